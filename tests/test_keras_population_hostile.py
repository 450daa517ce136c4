"""PopulationCallback where users push: own training steps, faults, callbacks, several fits, odd data."""

import copy
import math
import pickle
import threading
from typing import Any

import keras
import numpy as np
import pytest
from keras_cells import (
    BACKEND,
    KERAS_WARNING,
    Subclassed,
    assert_same,
    batches_of,
    compiled,
    data,
    fit,
    numpy_of,
    ops,
    sequential,
    state_of,
    train_by_hand,
    weights_of,
)

from gradwise import Population
from gradwise.keras import PopulationCallback

pytestmark = pytest.mark.filterwarnings(KERAS_WARNING)

X, Y = data()


def population(size: int = 2, sigma: Any = 0.3, **options: Any) -> PopulationCallback:
    return PopulationCallback(size, sigma, **{"seed": 5, **options})


# -- training steps of the user's own ----------------------------------------------------------------------------------


class Guided(keras.Model):
    """The training step of Keras's guides, in the form of each backend; `twist` is what goes wrong in it."""

    twist = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hidden = keras.layers.Dense(4, "tanh")
        self.final = keras.layers.Dense(2)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.final(self.hidden(x))

    def _logs(self, y: Any, y_pred: Any, loss: Any) -> dict[str, Any]:
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, *args: Any) -> Any:
        return {"tensorflow": self.step_tensorflow, "torch": self.step_torch, "jax": self.step_jax}[BACKEND](*args)

    def step_tensorflow(self, batch: Any) -> Any:
        import tensorflow as tf

        x, y = batch[0], batch[1]
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        if self.twist != "never":
            self.optimizer.apply(gradients, self.trainable_variables)
        if self.twist == "twice":
            self.optimizer.apply(gradients, self.trainable_variables)
        if self.twist == "assigns":
            self.trainable_variables[0].assign(ops.clip(self.trainable_variables[0], -0.1, 0.1))
        return self._logs(y, y_pred, loss)

    def step_torch(self, batch: Any) -> Any:
        import torch

        x, y = batch[0], batch[1]
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            if self.twist != "never":
                self.optimizer.apply(gradients, self.trainable_weights)
            if self.twist == "twice":
                self.optimizer.apply(gradients, self.trainable_weights)
            if self.twist == "assigns":
                self.trainable_variables[0].assign(ops.clip(self.trainable_variables[0], -0.1, 0.1))
        return self._logs(y, y_pred, loss)

    def compute_loss_and_updates(  # pyright: ignore[reportIncompatibleMethodOverride] - as in the guide
        self, trainable: Any, non_trainable: Any, x: Any, y: Any, training: bool = False
    ) -> Any:
        y_pred, non_trainable = self.stateless_call(trainable, non_trainable, x, training=training)
        return self.compute_loss(x, y, y_pred), (y_pred, non_trainable)

    def step_jax(self, state: Any, batch: Any) -> Any:
        import jax

        trainable, non_trainable, optimizer, metrics = state
        x, y = batch[0], batch[1]
        grad = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (loss, (y_pred, non_trainable)), gradients = grad(trainable, non_trainable, x, y, training=True)
        if self.twist != "never":
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        if self.twist == "twice":
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        if self.twist == "assigns":
            trainable = [ops.clip(trainable[0], -0.1, 0.1), *trainable[1:]]
        with keras.StatelessScope(state_mapping=list(zip(self.metrics_variables, metrics, strict=True))) as scope:
            logs = self._logs(y, y_pred, loss)
        metrics = [scope.get_current_value(v) for v in self.metrics_variables]
        return logs, (trainable, non_trainable, optimizer, metrics)


class Tracked(Guided):
    """With a loss tracker of its own, as in the guides, beside that of `compile`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tracker = keras.metrics.Mean(name="loss")

    def _logs(self, y: Any, y_pred: Any, loss: Any) -> dict[str, Any]:
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result(), "twice": 2 * loss, "count": 1}


class Raw(Guided):
    """Without metrics."""

    def _logs(self, y: Any, y_pred: Any, loss: Any) -> dict[str, Any]:
        return {"loss": loss}


def guided(kind: type[Guided] = Guided, twist: str = "", **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    model = kind()
    model.twist = twist
    model(X[:1])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", **options)
    return model


@pytest.mark.parametrize("kind", [Guided, Tracked, Raw])
def test_training_steps_of_the_guides(kind: type[Guided]) -> None:
    metrics = ["mae"] if kind is Guided else None
    model, other = guided(kind, metrics=metrics), guided(kind)
    history = fit(model, X[:8], Y[:8], population())
    said = train_by_hand(other, batches_of(X[:8], Y[:8]), Population(2, 0.3, seed=5))
    for weights, expected in zip(weights_of(model), weights_of(other), strict=True):
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    mean = said.loss[-1] if kind is Raw else np.mean(said.loss)
    assert history["loss"][0] == pytest.approx(mean, rel=1e-5)
    if kind is Guided:
        assert "mae" in history
    if kind is Tracked:
        assert history["twice"][0] == pytest.approx(2 * said.loss[-1], rel=1e-5)
        assert history["count"] == [1]
    if kind is Raw:  # no metric was told the loss
        assert math.isnan(history["population_spread"][0])
    else:
        assert history["population_spread"][0] == pytest.approx(np.mean(said.spread), rel=1e-3)


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        ("twice", "`train_step` must apply the optimizer once"),
        ("never", "`train_step` must apply its gradients with `model.optimizer`"),
        ("assigns", "`train_step` must leave trainable weights to `model.optimizer`"),
    ],
)
def test_training_steps_that_cannot_be_a_member(twist: str, message: str) -> None:
    model = guided(twist=twist)
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        fit(model, X, Y, population())
    for weights, value in zip(weights_of(model), before, strict=True):
        np.testing.assert_array_equal(weights, value)
