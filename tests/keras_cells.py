"""What the tests of the Keras population share: data, models, and a training loop by hand.

The loop uses the backend's own autodiff, numpy and the core's noise, and nothing of the adapter.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers

from gradwise import Population

Array = np.ndarray[Any, Any]

BACKEND: str = keras.config.backend()

ops: Any = keras.ops  # whose annotations allow None nearly everywhere

# Keras 3.15 converts tensors in a way that numpy 2 deprecates (predict, save): Keras's own, with plain models too.
KERAS_WARNING = "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"

# float64 where the backend has it without a global switch. Rounding, times a few steps of some dozens of operations;
# on torch keras.ops.norm, which the scale of the noise comes from, rounds to float32.
WIDE = "float32" if BACKEND == "jax" else "float64"
RTOL, ATOL = {"jax": (1e-4, 1e-6), "torch": (1e-5, 1e-5), "tensorflow": (1e-9, 1e-12)}[BACKEND]


def numpy_of(tensor: Any) -> Array:
    return np.array(ops.convert_to_numpy(tensor))


@contextlib.contextmanager
def floats(dtype: str) -> Iterator[None]:
    """Models are made in `dtype`."""
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(policy)


def data(rows: int = 10, inputs: int = 3, outputs: int = 2, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs))
    y = np.sin(x @ rng.normal(size=(inputs, outputs)))
    return x.astype(keras.config.floatx()), y.astype(keras.config.floatx())


# -- models ------------------------------------------------------------------------------------------------------------


def sequential(**options: Any) -> keras.Model:
    hidden = layers.Dense(4, "tanh", bias_initializer="random_normal", **options)
    return keras.Sequential([keras.Input((3,)), hidden, layers.Dense(2)])


def functional() -> keras.Model:
    x = keras.Input((3,))
    h = layers.Dense(4, "tanh", name="first")(x)
    return keras.Model(x, layers.Dense(2, name="last")(layers.Concatenate()([h, x])))


class Subclassed(keras.Model):
    """Not built before it sees data."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hidden = layers.Dense(4, "tanh")
        self.final = layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.final(self.hidden(x))


class AddsLosses(keras.layers.Layer):
    """A loss of its own, of what it sees."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        self.add_loss(0.05 * ops.mean(ops.abs(x)))
        return x


class Fails(keras.losses.Loss):
    """Raises inside the compiled step (or, on JAX, at its first trace) where a target is large."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        loss = ops.mean(ops.square(y_true - y_pred), axis=-1)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            return tf.debugging.check_numerics(loss, "on purpose")
        if BACKEND == "jax":
            raise FloatingPointError("on purpose")
        if not bool(ops.all(ops.isfinite(loss))):
            raise FloatingPointError("on purpose")
        return loss


def regularized() -> keras.Model:
    hidden = layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.1), activity_regularizer="l1")
    return keras.Sequential([keras.Input((3,)), hidden, AddsLosses(), layers.Dense(2, bias_regularizer="l2")])


def batch_norm() -> keras.Model:
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(momentum=0.8), layers.ReLU(), layers.Dense(2)]
    )


def dropout(seed: int | None = 3) -> keras.Model:
    stack = [layers.Dense(6, "tanh"), layers.Dropout(0.4, seed=seed), layers.GaussianNoise(0.1, seed=5)]
    return keras.Sequential([keras.Input((3,)), *stack, layers.Dense(2)])


def frozen() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dense(4, "tanh"), layers.Dense(2)])
    model.layers[0].trainable = False
    return model


def convolution() -> keras.Model:
    stack = [layers.Reshape((3, 1)), layers.Conv1D(3, 2, activation="tanh"), layers.Flatten()]
    return keras.Sequential([keras.Input((3,)), *stack, layers.Dense(2)])


def recurrent() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), layers.Reshape((3, 1)), layers.GRU(3), layers.Dense(2)])


def embedding() -> keras.Model:
    """Of the signs of the inputs."""
    x = keras.Input((3,))
    signs = layers.Lambda(lambda x: ops.cast(x > 0, "int32"), output_shape=(3,))(x)
    return keras.Model(x, layers.Dense(2)(layers.Flatten()(layers.Embedding(2, 3)(signs))))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "sequential": sequential,
    "functional": functional,
    "subclassed": Subclassed,
    "regularized": regularized,
    "batch_norm": batch_norm,
    "dropout": dropout,
    "unseeded dropout": lambda: dropout(None),
    "frozen": frozen,
    "convolution": convolution,
    "recurrent": recurrent,
    "embedding": embedding,
}


def compiled(name: str = "sequential", optimizer: Any = None, seed: int = 0, **options: Any) -> Any:
    """A model by name, the same at every call; SGD with momentum, mean squared error."""
    keras.utils.set_random_seed(seed)
    model = MODELS[name]()
    inner = keras.optimizers.SGD(0.1, momentum=0.9) if optimizer is None else optimizer
    model.compile(**{"optimizer": inner, "loss": "mse", "metrics": ["mae"], **options})
    return model


def fit(model: Any, x: Any = None, y: Any = None, *callbacks: Any, **options: Any) -> dict[str, list[float]]:
    """Train for one epoch of batches of 4 rows in order, unless told otherwise; return the history."""
    if x is None:
        x, y = data()
    plain = {"batch_size": 4, "shuffle": False, "verbose": 0, "epochs": 1}
    if not isinstance(x, np.ndarray | list | dict | tuple):
        del plain["batch_size"], plain["shuffle"]
    return model.fit(x, y, callbacks=list(callbacks), **{**plain, **options}).history


# -- what is compared --------------------------------------------------------------------------------------------------


def weights_of(model: Any) -> list[Array]:
    return [numpy_of(variable) for variable in model.trainable_variables]


def state_of(model: Any) -> dict[str, Array]:
    """Everything a training step may touch, by name."""
    groups = {
        "model": model.variables,
        "optimizer": model.optimizer.variables,
        "metric": model.metrics_variables,
    }
    return {
        f"{group} {index} {variable.path}": numpy_of(variable)
        for group, variables in groups.items()
        for index, variable in enumerate(variables)
    }


def streams() -> tuple[Any, ...]:
    """Where the global random streams stand."""
    import torch
    from keras.src.backend.common import global_state

    generator: Any = global_state.get_global_attribute("global_seed_generator")
    own = None if generator is None else numpy_of(generator.state).tolist()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the global stream is what is looked at
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist(), own


def assert_same(left: dict[str, Array], right: dict[str, Array], **tolerance: Any) -> None:
    """Equal, bit for bit if no tolerance is given; names may differ in the counters that Keras puts into them."""
    assert len(left) == len(right)
    for (name, a), b in zip(left.items(), right.values(), strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


# -- the loop by hand --------------------------------------------------------------------------------------------------


def assign(variables: Any, values: Any) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def forward_and_backward(model: Any, x: Any, y: Any, sample_weight: Any) -> tuple[list[Any], float]:
    """Gradients and loss of a model as it stands, which it leaves as a training step does except for its weights."""
    variables = model.trainable_variables
    batch: Any = keras.tree.map_structure(
        lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), (x, y, sample_weight)
    )
    x, y, sample_weight = batch

    def loss_of() -> Any:
        y_pred = model(x, training=True)
        return model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)

    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss: Any = loss_of()
        gradients: Any = tape.gradient(loss, [variable.value for variable in variables])
        return [None if g is None else numpy_of(tf.convert_to_tensor(g)) for g in gradients], float(numpy_of(loss))
    if BACKEND == "torch":
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        gradients = [variable.value.grad for variable in variables]
        return [None if g is None else numpy_of(g) for g in gradients], float(numpy_of(loss))
    import jax

    others = model.non_trainable_variables

    def stateless(values: Any) -> Any:
        mapping = [*zip(variables, values, strict=True), *((other, other.value) for other in others)]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            loss = loss_of()
        return loss, [scope.get_current_value(other) for other in others]

    (loss, after), gradients = jax.value_and_grad(stateless, has_aux=True)([variable.value for variable in variables])
    assign(others, after)
    return [numpy_of(g) for g in gradients], float(loss)


class Said:
    """What the members of the steps said."""

    def __init__(self) -> None:
        self.agreement: list[float] = []
        self.spread: list[float] = []
        self.loss: list[float] = []
        self.rows: list[int] = []


def scale_by_hand(weights: Array, sigma: float, scale: str) -> Any:
    if scale == "absolute":
        return sigma
    axes = None if scale == "rms" else tuple(range(weights.ndim - 1))
    return sigma * np.sqrt(np.mean(np.square(weights), axis=axes, keepdims=True))


def parts_of(batch: Any, members: int, *, sharded: bool) -> list[tuple[Any, int]]:
    """What each member sees, and how much it counts."""
    if not sharded:
        return [(batch, 1)] * members
    rows = len(next(leaf for leaf in keras.tree.flatten(batch) if leaf is not None))
    parts = [part for part in np.array_split(np.arange(rows), members) if len(part)]
    return [
        (keras.tree.map_structure(lambda leaf, p=p: None if leaf is None else leaf[p], batch), len(p)) for p in parts
    ]


def train_by_hand(
    model: Any,
    batches: list[tuple[Any, Any, Any]],
    population: Population,
    *,
    sharded: bool = False,
    perturb: Callable[[str, Any], bool] | None = None,
    sigma: Callable[[int], float] | None = None,
) -> Said:
    """Train a built model on batches of (x, y, sample_weight), one obvious statement after the other."""
    import torch

    said = Said()
    choose = (lambda _, variable: len(variable.shape) >= 2) if perturb is None else perturb
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    for batch in batches:
        step = int(optimizer._iterations)
        size = population.sigma_at(step) if sigma is None else sigma(step)
        mean, others = weights_of(model), model.non_trainable_variables
        start = [numpy_of(other) for other in others]
        stream = torch.get_rng_state()
        gradients: list[list[Any]] = []
        counts: list[int] = []
        losses: list[float] = []
        ends: list[list[Array]] = []
        after_one: Any = stream
        for member, (part, count) in enumerate(parts_of(batch, population.size, sharded=sharded)):
            for index, (variable, m) in enumerate(zip(model.trainable_variables, mean, strict=True)):
                moved = m
                if choose(variable.path, variable):
                    noise = population.unit_noise(m.shape, step=step, member=member, tensor=index, paired=not sharded)
                    moved = (m + scale_by_hand(m, size, population.scale) * noise).astype(m.dtype)
                variable.assign(moved)
            if not sharded:  # the same masks for all
                torch.set_rng_state(stream)
                assign(others, start)
            else:  # normalisation from where it stood, seeds go on
                for other, value in zip(others, start, strict=True):
                    if np.issubdtype(value.dtype, np.floating):
                        other.assign(value)
            gradient, loss = forward_and_backward(model, *part)
            after_one = torch.get_rng_state() if member == 0 or sharded else after_one
            gradients.append(gradient)
            losses.append(loss)
            counts.append(count)
            ends.append([numpy_of(other) for other in others])
        torch.set_rng_state(after_one)

        def average(values: list[Any], counts: list[int] = counts) -> Any:
            return None if values[0] is None else np.average(values, axis=0, weights=counts).astype(values[0].dtype)

        assign(model.trainable_variables, mean)
        for other, values in zip(others, zip(*ends, strict=True), strict=True):
            float_ = np.issubdtype(values[0].dtype, np.floating)
            other.assign(average(list(values)) if float_ else values[-1] if sharded else values[0])
        combined = [average(list(values)) for values in zip(*gradients, strict=True)]
        given = [None if g is None else ops.convert_to_tensor(g) for g in combined]
        context: Any = torch.no_grad() if BACKEND == "torch" else contextlib.nullcontext()
        with context:
            model.optimizer.apply(given, model.trainable_variables)

        def square(gradient: list[Any]) -> float:
            return float(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient if g is not None))

        said.agreement.append(square(combined) / np.average([square(g) for g in gradients], weights=counts))
        said.spread.append(float(np.std(losses)))
        said.loss.append(float(np.average(losses, weights=counts)))
        said.rows.append(len(keras.tree.flatten(batch[0])[0]))
    model.optimizer.finalize_variable_values(model.trainable_variables)
    return said


def batches_of(x: Any, y: Any, sample_weight: Any = None, *, size: int = 4, epochs: int = 1) -> list[Any]:
    """Batches as `fit` makes them of arrays, or trees of arrays, in order."""
    rows = len(keras.tree.flatten(x)[0])
    return [
        keras.tree.map_structure(
            lambda leaf, at=at: None if leaf is None else leaf[at : at + size], (x, y, sample_weight)
        )
        for _ in range(epochs)
        for at in range(0, rows, size)
    ]
