"""PopulationCallback on several devices: replicas of TensorFlow, a data-parallel mesh of JAX."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TENSORFLOW = """
import json, sys
import numpy as np, tensorflow as tf
devices, sigma, kind, sharded = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * max(devices, 1))
import keras
from keras_cells import Fails, Subclassed, compiled, data, fit, numpy_of
from gradwise.keras import PopulationCallback
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)]) if devices > 1 else None
def made():
    if kind == "unbuilt":
        keras.utils.set_random_seed(0)
        model = Subclassed()
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model
    return compiled("sequential", optimizer=keras.optimizers.SGD(0.1), **({"loss": Fails()} if kind == "fails" else {}))
if strategy is None:
    model = made()
else:
    with strategy.scope():
        model = made()
x, y = data(18)
before = None
if kind == "fails":
    y[7] = np.inf
    before = [numpy_of(v).tolist() for v in model.trainable_variables]
raised = False
callback = PopulationCallback(2, sigma, sharded, seed=5)
try:
    history = fit(model, x, y, callback, batch_size=6 if kind != "fails" else 18)
except Exception as error:
    raised, history = "on purpose" in str(error), {}
weights = [numpy_of(v).tolist() for v in model.trainable_variables]
replicas = []
if strategy is not None:
    for v in model.trainable_variables:
        local = [value.numpy() for value in strategy.experimental_local_results(v.value)]
        replicas.append(all(np.array_equal(local[0], value) for value in local))
result = {"weights": weights, "before": before, "history": history, "raised": raised, "same": all(replicas)}
print("RESULT" + json.dumps(result))
"""

JAX = """
import json, sys
import keras, numpy as np
from keras_cells import compiled, data, fit, numpy_of
from gradwise.keras import PopulationCallback
devices, sigma, kind, sharded = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
if devices > 1:
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=[f"cpu:{i}" for i in range(devices)]))
model = compiled("sequential", optimizer=keras.optimizers.SGD(0.1))
history = fit(model, *data(16), PopulationCallback(2, sigma, sharded, seed=5), batch_size=4)
print("RESULT" + json.dumps({"weights": [numpy_of(v).tolist() for v in model.trainable_variables], "history": history}))
"""


def run(program: str, backend: str, devices: int, sigma: float, kind: str = "built", sharded: bool = False) -> Any:
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": str(here),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-c", program, str(devices), str(sigma), kind, str(sharded)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def assert_close(left: Any, right: Any) -> None:
    for a, b in zip(left["weights"], right["weights"], strict=True):
        assert a == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in b]


mine = os.environ["KERAS_BACKEND"]


@pytest.mark.skipif(mine != "tensorflow", reason="TensorFlow's replicas")
@pytest.mark.parametrize("devices", [2, 3])
def test_replicas_equal_one_device(devices: int) -> None:
    """The members of all replicas have the same noise, so the mean over rows and members is that of one device."""
    several, one = (run(TENSORFLOW, "tensorflow", n, 0.3) for n in (devices, 1))
    assert several["same"]
    assert_close(several, one)
    assert several["history"]["loss"] == pytest.approx(one["history"]["loss"], rel=1e-5)


@pytest.mark.skipif(mine != "tensorflow", reason="TensorFlow's replicas")
def test_unbuilt_models_and_shards_on_replicas() -> None:
    assert run(TENSORFLOW, "tensorflow", 2, 0.3, "unbuilt")["same"]
    assert run(TENSORFLOW, "tensorflow", 2, 0.3, "built", True)["same"]


@pytest.mark.skipif(mine != "tensorflow", reason="TensorFlow's replicas")
def test_replicas_stand_at_the_mean_after_a_fault() -> None:
    result = run(TENSORFLOW, "tensorflow", 2, 0.3, "fails")
    assert result["raised"]
    assert result["same"]
    assert result["weights"] == result["before"]


@pytest.mark.skipif(mine != "jax", reason="a mesh of JAX")
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_mesh_equals_one_device(sharded: bool) -> None:
    several, one = (run(JAX, "jax", n, 0.3, sharded=sharded) for n in (2, 1))
    assert_close(several, one)
    assert several["history"]["population_agreement"] == pytest.approx(one["history"]["population_agreement"], rel=1e-4)
