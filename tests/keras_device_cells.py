"""The trainings of test_keras_distributed.py, all in one process: ``python keras_device_cells.py WHERE`` pickles them.

A process of its own, because TensorFlow and JAX take their number of devices before anything else; one for all of
them, because each process has to import and warm up its backend. A training that fails leaves its traceback.
"""

import contextlib
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np
from keras_cells import Fails, Subclassed, compiled, data, fit, numpy_of
from keras_matching_cells import mlp, smooth_data

from gradwise.keras import (
    GradientMatching,
    MeanWeights,
    PopulationCallback,
    PopulationGradient,
    WithDerivatives,
    attach_gradient_matching,
)

BACKEND = keras.config.backend()

if BACKEND == "tensorflow":
    import tensorflow as tf

    CPU = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(CPU, [tf.config.LogicalDeviceConfiguration()] * 3)


@contextlib.contextmanager
def on(devices: int) -> Iterator[Callable[[], Any]]:
    """The context in which models for so many devices are made: replicas of TensorFlow, a mesh of JAX."""
    if devices == 1:
        yield contextlib.nullcontext
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        # Groups of devices have numbers, the same in every strategy: TensorFlow's tests separate theirs like this.
        tf.distribute.MirroredStrategy._collective_key_base += 100_000
        yield tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)]).scope
    else:
        found = keras.distribution.list_devices()
        assert len(found) == devices
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=found))
        try:
            yield contextlib.nullcontext
        finally:
            keras.distribution.set_distribution(None)


def alike(variables: Any, devices: int) -> bool:
    """Whether all replicas hold the same numbers; JAX has one array."""
    if BACKEND == "jax" or devices == 1:
        return True
    held = [[value.numpy() for value in variable.value.values] for variable in variables]
    assert all(len(values) == devices for values in held)
    return all(np.array_equal(values[0], value) for values in held for value in values)


def population(devices: int, kind: str = "built", *, sharded: bool = False) -> dict[str, Any]:
    """One epoch with PopulationCallback; a kind of model that is not built, or whose loss raises."""
    with on(devices) as scope:
        with scope():
            if kind == "unbuilt":
                keras.utils.set_random_seed(0)
                model: Any = Subclassed()
                model.compile(keras.optimizers.SGD(0.1), "mse")
            else:
                options: dict[str, Any] = {"loss": Fails()} if kind == "fails" else {}
                model = compiled("sequential", optimizer=keras.optimizers.SGD(0.1), **options)
        x, y = data(18 if BACKEND == "tensorflow" else 16)
        batch_size = 6 if BACKEND == "tensorflow" else 4
        before: list[Any] = []
        members = 2
        if kind == "fails":
            # Four members are a loop in the graph, which breaks off at one; of two, nothing would need to be rescued.
            batch_size, members = len(x), 4
            y[[7, 12]] = np.inf  # one row of each replica
            before = [numpy_of(v) for v in model.trainable_variables]
        history, raised = {}, ""
        callback = PopulationCallback(members, 0.3, sharded, seed=5)
        try:
            history = fit(model, x, y, callback, batch_size=batch_size)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            raised = str(error)
        weights = [numpy_of(v) for v in model.trainable_variables]
        same = alike(model.trainable_variables, devices)
    return {"weights": weights, "before": before, "history": history, "raised": raised, "same": same}


def optimizer(devices: int, *, scaled: bool) -> dict[str, Any]:
    """Two epochs with PopulationGradient and MeanWeights, and a member after each of two more steps."""
    found: dict[str, Any] = {}
    x, y = data(12)
    with on(devices) as scope:
        with scope():
            optimizer = PopulationGradient(keras.optimizers.Adam(0.05), 0.3, seed=5)
            outer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**4) if scaled else optimizer
            model = compiled("sequential", outer)
            start = [np.cos(np.arange(w.size)).reshape(w.shape) for w in model.get_weights()]
            model.set_weights(start)

        def look(batch: int = 0, logs: Any = None) -> None:
            assert alike([*model.trainable_variables, *optimizer._means, optimizer._away], devices)

        callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=look), MeanWeights()]
        history = fit(model, x, y, *callbacks, batch_size=6, epochs=2, validation_data=(x, y))
        found |= {key: np.array(values) for key, values in history.items()}
        model.train_on_batch(x[:6], y[:6])
        for time in ("member", "mean"):
            found |= {f"{time} {i}": numpy_of(v) for i, v in enumerate(model.trainable_variables)}
            optimizer.restore_mean()
            look()
        model.optimizer.learning_rate = 0.0
        model.set_weights(start)
        model.train_on_batch(x[:6], y[:6])
        found |= {f"exactly {i}": numpy_of(v) for i, v in enumerate(model.trainable_variables)}
    return found


def matching(devices: int, way: str) -> dict[str, Any]:
    """Three epochs of one batch of 12 rows: losses in training and in evaluation, and weights.

    NaN-free and as many rows for each device, so that the mean of the devices' losses is that of the batch.
    """
    x, y, dydx = smooth_data()
    with on(devices) as scope:
        with scope():
            model: Any = mlp()
            trained: Any = model
            loss = GradientMatching(0.5).fit(x, y, dydx)
            if way == "wrapper":
                trained = WithDerivatives(model)
                trained.compile(keras.optimizers.SGD(0.1), loss={"y": "mse", "dydx": loss})
            else:
                model.compile(keras.optimizers.SGD(0.1), loss="mse")
                attach_gradient_matching(model, loss, projections=None if way == "attached" else 1)
        targets = {"y": y, "dydx": dydx}
        history = trained.fit(x, targets, batch_size=12, epochs=3, shuffle=False, verbose=0).history
        logs = trained.evaluate(x, targets, batch_size=12, verbose=0, return_dict=True)
        name = "dydx_loss" if way == "wrapper" else "derivative_loss"
        numbers = np.array([*history["loss"], *history[name], logs["loss"], logs[name]])
        return {"numbers": numbers, **{f"weight {i}": numpy_of(w) for i, w in enumerate(model.weights)}}


TRAININGS: dict[str, Callable[[], dict[str, Any]]] = {
    "population, 1": lambda: population(1),
    "population, 2": lambda: population(2),
    "population of shards, 2": lambda: population(2, sharded=True),
    "scaled optimizer, 1": lambda: optimizer(1, scaled=True),
    "scaled optimizer, 2": lambda: optimizer(2, scaled=True),
    "wrapper, 1": lambda: matching(1, "wrapper"),
    "wrapper, 2": lambda: matching(2, "wrapper"),
    "attached, 1": lambda: matching(1, "attached"),
    "attached, 2": lambda: matching(2, "attached"),
    "projected, 2": lambda: matching(2, "projected"),
}
if BACKEND == "tensorflow":
    TRAININGS |= {
        "population, 3": lambda: population(3),
        "population of an unbuilt model, 2": lambda: population(2, "unbuilt"),
        "optimizer, 1": lambda: optimizer(1, scaled=False),
        "optimizer, 3": lambda: optimizer(3, scaled=False),
        "population that fails, 2": lambda: population(2, "fails"),  # the last: it aborts TensorFlow's communication
    }
else:
    TRAININGS["population of shards, 1"] = lambda: population(1, sharded=True)


def main() -> None:
    found: dict[str, Any] = {}
    for name, train in TRAININGS.items():
        try:
            found[name] = train()
        except Exception:  # noqa: BLE001 - the tests of it raise it
            found[name] = traceback.format_exc()
    with Path(sys.argv[1]).open("wb") as file:
        pickle.dump(found, file)


if __name__ == "__main__":
    main()
