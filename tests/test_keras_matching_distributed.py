"""Gradient matching under tf.distribute and keras.distribution: the numbers of one device."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

BACKEND = keras.config.backend()

# Twelve rows, two devices, six rows each; NaN-free, so that the mean of the devices' losses is that of the batch.
PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import contextlib, keras, numpy as np
from gradwise_keras._attach import attach_gradient_matching
from gradwise_keras._matching_loss import GradientMatching
from gradwise_keras._with_derivatives import WithDerivatives
from keras_matching_cells import mlp, numpy_of, smooth_data

x, y, dydx = smooth_data()
scope = contextlib.nullcontext
if "mirrored" in sys.argv:
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope
if "data" in sys.argv:
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()))
    assert len(keras.distribution.list_devices()) == 2

def train(way):
    with scope():
        model = mlp()
        matching = GradientMatching(0.5).fit(x, y, dydx)
        if way == "wrapper":
            trained = WithDerivatives(model)
            trained.compile(keras.optimizers.SGD(0.1), loss={"y": "mse", "dydx": matching})
        else:
            trained = model
            model.compile(keras.optimizers.SGD(0.1), loss="mse")
            attach_gradient_matching(model, matching, projections=None if way == "attached" else 1)
    history = trained.fit(x, {"y": y, "dydx": dydx}, batch_size=12, epochs=3, shuffle=False, verbose=0).history
    logs = trained.evaluate(x, {"y": y, "dydx": dydx}, batch_size=12, verbose=0, return_dict=True)
    name = "dydx_loss" if way == "wrapper" else "derivative_loss"
    return [*history["loss"], *history[name], logs["loss"], logs[name]], [numpy_of(w) for w in model.weights]

found = {}
for way in ("wrapper", "attached", "projected"):
    numbers, weights = train(way)
    if way == "projected":  # other draws than on one device
        assert np.all(np.isfinite(numbers))
        continue
    found[way + " numbers"] = np.array(numbers)
    found.update({f"{way} {i}": weight for i, weight in enumerate(weights)})
np.savez(sys.argv[1], **found)
"""


def run(where: Path, way: str) -> None:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    if way == "data":
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    subprocess.run([sys.executable, "-c", PROGRAM, str(where), way], env=environment, check=True, timeout=300)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras distributes it by hand-written loops only")
def test_two_devices_give_the_numbers_of_one(tmp_path: Path) -> None:
    import numpy as np

    run(tmp_path / "one.npz", "one")
    run(tmp_path / "two.npz", "mirrored" if BACKEND == "tensorflow" else "data")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert len(one.files) == 10
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)  # sums in another order
    np.testing.assert_allclose(one["wrapper numbers"], one["attached numbers"], rtol=1e-5)
