"""What the tests of gradient matching on Keras share: data, models, and derivatives from independent sources."""

from typing import Any

import keras
import numpy as np
from keras import layers

Array = np.ndarray[Any, Any]

# Keras 3.15 converts tensors in a way that numpy 2 deprecates (predict, save): Keras's own, with plain models too.
KERAS_WARNING = "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
BATCH_NORM_WARNING = "ignore:`model` has batch normalisation:UserWarning"


def numpy_of(tensor: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def smooth_data(n: int = 12, n_inputs: int = 3, n_outputs: int = 2, seed: int = 0) -> tuple[Array, Array, Array]:
    """Inputs of unequal sizes, values and exact derivatives (the shape of x for one output)."""
    rng = np.random.default_rng(seed)
    frequency = rng.normal(size=(n_outputs, n_inputs)) * 0.7
    x = rng.normal(size=(n, n_inputs)) * np.linspace(0.5, 2.0, n_inputs)
    angles = x @ frequency.T
    y = np.sin(angles)
    dydx = np.cos(angles)[:, :, None] * frequency
    dydx = dydx[:, 0] if n_outputs == 1 else dydx
    return x.astype("float32"), y.astype("float32"), dydx.astype("float32")


def mlp(n_inputs: int = 3, n_outputs: int = 2, width: int = 8, seed: int = 0) -> Any:
    keras.utils.set_random_seed(seed)
    hidden = layers.Dense(width, "tanh", bias_initializer="random_normal")
    return keras.Sequential([keras.Input((n_inputs,)), hidden, layers.Dense(n_outputs)])


class Subclassed(keras.Model):
    """Not built before its first call; its call has no `training` argument."""

    def __init__(self, n_outputs: int = 2) -> None:
        super().__init__()
        self.hidden = layers.Dense(8, "tanh")
        self.final = layers.Dense(n_outputs)

    def call(self, x: Any) -> Any:
        return self.final(self.hidden(x))


class OwnStep(keras.Model):
    """A train_step of its own (TensorFlow and torch backends), or none (JAX)."""

    steps = 0

    def train_step(self, *args: Any) -> Any:
        OwnStep.steps += 1
        return super().train_step(*args)


def architecture(name: str) -> tuple[Any, tuple[int, ...]]:
    """A model by name, and the shape of one input."""
    keras.utils.set_random_seed(0)
    if name == "functional":
        x = keras.Input((3,))
        skip = layers.Dense(8)(x)
        return keras.Model(x, layers.Dense(1)(layers.Add()([layers.Activation("softplus")(skip), skip]))), (3,)
    if name == "rank one":
        return keras.Sequential([keras.Input((3,)), layers.Dense(8, "gelu"), layers.Dense(1), layers.Reshape(())]), (3,)
    if name == "subclassed":
        return Subclassed(), (3,)
    if name == "image":
        stack = [layers.Conv2D(4, 3, activation="tanh"), layers.AveragePooling2D(2), layers.Flatten(), layers.Dense(2)]
        return keras.Sequential([keras.Input((6, 6, 2)), *stack]), (6, 6, 2)
    if name == "lstm":
        return keras.Sequential([keras.Input((4, 2)), layers.LSTM(5), layers.Dense(2)]), (4, 2)
    if name == "gru":
        return keras.Sequential([keras.Input((4, 2)), layers.GRU(5), layers.Dense(1)]), (4, 2)
    if name == "attention":
        x = keras.Input((4, 6))
        h = layers.LayerNormalization()(layers.Dense(6)(x))
        h = layers.MultiHeadAttention(2, 3)(h, h) + h
        return keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling1D()(layers.LayerNormalization()(h)))), (4, 6)
    return mlp(), (3,)


def one_by_one(model: keras.Model, x: Array, step: float = 1e-2) -> Array:
    """Derivatives in inference, (batch, n_outputs, n_inputs): central differences, which mix no rows.

    Error: step**2 times third derivatives (1e-4 here) plus float32 rounding over the step (1e-5).
    """
    n_inputs = x[0].size
    shifts = np.stack([step * np.eye(n_inputs), -step * np.eye(n_inputs)])  # (2, inputs, inputs)
    moved = x.reshape(1, 1, len(x), n_inputs) + shifts[:, :, None]
    y = np.asarray(model.predict_on_batch(moved.reshape(-1, *x.shape[1:]).astype("float32")), dtype=np.float64)
    y = y.reshape(2, n_inputs, len(x), -1)
    return np.transpose((y[0] - y[1]) / (2 * step), (1, 2, 0))


def weights_of(model: keras.Model) -> list[Array]:
    return [numpy_of(weight).copy() for weight in model.trainable_weights]


def one_step(model: keras.Model, x: Any, targets: Any, sample_weight: Any = None) -> list[Array]:
    """The gradient that one training step applies; the model must be compiled with SGD(1.0)."""
    before = weights_of(model)
    model.train_on_batch(x, targets, sample_weight=sample_weight)
    return [b - a for b, a in zip(before, weights_of(model), strict=True)]


def mlp_loss(weights: list[Array], x: Array, y: Array, dydx: Array, scale: Array, weight: float) -> float:
    """Value and derivative loss of `mlp` in float64 numpy, from the closed form of its Jacobian."""
    (w1, b1, w2, b2), hidden = weights, np.tanh(x @ weights[0] + weights[1])
    del b1
    jacobian = np.einsum("jh,bh,ho->boj", w1, 1 - hidden**2, w2)
    residual = (jacobian - dydx) * scale
    return float(np.mean((hidden @ w2 + b2 - y) ** 2) + weight * np.mean(np.sum(residual**2, axis=2)))
