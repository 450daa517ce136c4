"""PopulationGradient and MeanWeights: the inner optimizer where sigma is 0, numpy by hand, and all ways to train."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras.callbacks import EarlyStopping, LambdaCallback, LearningRateScheduler, ModelCheckpoint, ReduceLROnPlateau
from keras.optimizers import SGD, Adam, AdamW, LossScaleOptimizer
from keras_cells import (
    ATOL,
    BACKEND,
    KERAS_WARNING,
    RTOL,
    WIDE,
    Array,
    Subclassed,
    assert_same,
    assign,
    batches_of,
    compiled,
    data,
    fit,
    floats,
    numpy_of,
    ops,
    state_of,
    streams,
    weights_of,
)

from gradwise import Population
from gradwise.keras import MeanWeights, PopulationGradient

pytestmark = pytest.mark.filterwarnings(KERAS_WARNING)

schedules: Any = keras.optimizers.schedules

# Single precision, where a schedule, a distribution strategy or a loss scale decides on it: rounding of some steps.
ROUNDING = {"rtol": 2e-4, "atol": 2e-6}


def few(options: Sequence[Any]) -> list[Any]:
    """First and last where each is compiled for seconds."""
    return [options[0], options[-1]] if BACKEND == "jax" else list(options)


# -- numpy by hand -----------------------------------------------------------------------------------------------------


def gradient_by_hand(weights: Sequence[Array], x: Array, y: Array) -> list[Array]:
    """Of the mean squared error of `keras_cells.sequential`."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1 + b1)
    slope = 2 * (hidden @ w2 + b2 - y) / y.size
    back = (slope @ w2.T) * (1 - hidden**2)
    return [x.T @ back, back.sum(0), hidden.T @ slope, slope.sum(0)]


def loss_by_hand(weights: Sequence[Array], x: Array, y: Array) -> float:
    w1, b1, w2, b2 = weights
    return float(np.mean((np.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2))


def member_by_hand(mean: Sequence[Array], population: Population, step: int, chosen: Sequence[int]) -> list[Array]:
    result = list(mean)
    for index in chosen:
        m = mean[index]
        axes = None if population.scale == "rms" else tuple(range(m.ndim - 1))
        size = 1.0 if population.scale == "absolute" else np.sqrt(np.mean(m**2, axis=axes, keepdims=True))
        if population.scale == "filter" and m.ndim == 1:
            size = np.abs(m)
        noise = population.unit_noise(m.shape, step=step, member=0, tensor=index)
        result[index] = m + population.sigma_at(step) * size * noise
    return result


def train_by_hand(
    weights: Sequence[Array],
    batches: Sequence[Any],
    population: Population,
    *,
    chosen: Sequence[int] = (0, 2),
    restored: Sequence[int] = (),
    rate: float = 0.125,
    momentum: float = 0.875,
) -> tuple[list[list[Array]], list[list[Array]]]:
    """Means and members after each step of SGD; at the steps `restored` the mean is in place, as before the first."""
    mean: list[Array] = [np.array(w, "float64") for w in weights]
    velocity = [np.zeros_like(m) for m in mean]
    means: list[list[Array]] = [list(mean)]
    members: list[list[Array]] = [list(mean)]
    for step, (x, y, _) in enumerate(batches):
        at = mean if step in restored else members[-1]
        velocity = [momentum * v - rate * g for v, g in zip(velocity, gradient_by_hand(at, x, y), strict=True)]
        mean = [m + v for m, v in zip(mean, velocity, strict=True)]
        means.append(mean)
        members.append(member_by_hand(mean, population, step + 1, chosen))
    return means, members


def assert_close(found: Sequence[Array], expected: Sequence[Array], **tolerance: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": RTOL, "atol": ATOL}))


def population_sgd(sigma: Any = 0.3, **options: Any) -> Any:
    # Powers of two: Keras on TensorFlow rounds Python's numbers to float32.
    return PopulationGradient(SGD(0.125, momentum=0.875), sigma, **{"seed": 5, **options})


def stepper(optimizer: Any, variables: Sequence[Any]) -> Callable[[Sequence[Array | None]], None]:
    """Steps with gradients from outside, compiled where eager steps are slow."""
    optimizer.build(variables)
    compiled_step: Any = None
    if BACKEND == "jax":
        import jax

        compiled_step = jax.jit(optimizer.stateless_apply)

    def step(gradients: Sequence[Array | None]) -> None:
        dtypes = [variable.dtype for variable in variables]
        given = [None if g is None else ops.convert_to_tensor(g, d) for g, d in zip(gradients, dtypes, strict=True)]
        if compiled_step is None:
            optimizer.apply(given, variables)
            return
        state, weights = [[v.value for v in group] for group in (optimizer.variables, variables)]
        weights, state = compiled_step(state, given, weights)
        assign(variables, weights)
        assign(optimizer.variables, state)

    return step


# -- sigma 0 -----------------------------------------------------------------------------------------------------------

INNER: dict[str, Callable[[], Any]] = {
    "average that overwrites": lambda: SGD(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2),
    "nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: Adam(0.05),
    "adamw": lambda: AdamW(0.05, weight_decay=0.1),
    "clipnorm": lambda: SGD(0.1, clipnorm=0.1),
    "global clipnorm": lambda: Adam(0.1, global_clipnorm=0.1),
    "average": lambda: SGD(0.1, use_ema=True, ema_momentum=0.9),
    "accumulation": lambda: Adam(0.05, gradient_accumulation_steps=2),
    "schedule": lambda: SGD(schedules.ExponentialDecay(0.1, 2, 0.5), momentum=0.9),
    "all of it": lambda: AdamW(
        schedules.CosineDecay(0.1, 4), weight_decay=0.1, clipvalue=0.2, use_ema=True, gradient_accumulation_steps=3
    ),
}


@pytest.mark.parametrize("name", few(list(INNER)))
def test_steps_of_sigma_zero_are_the_inner_optimizers(name: str) -> None:
    plain, inner = INNER[name](), INNER[name]()
    one, other = compiled(optimizer=plain), compiled(optimizer=PopulationGradient(inner, 0.0, seed=0))
    steps = [stepper(model.optimizer, model.trainable_variables) for model in (one, other)]
    rng = np.random.default_rng(0)
    for _ in range(7):
        gradients = [rng.normal(size=variable.shape) for variable in one.trainable_variables]
        for step in steps:
            step(gradients)
    for model in (one, other):
        model.optimizer.finalize_variable_values(model.trainable_variables)
    assert_close(weights_of(other), weights_of(one), rtol=0)
    assert_close([numpy_of(v) for v in inner.variables], [numpy_of(v) for v in plain.variables], rtol=0)


def noisy() -> keras.Model:
    stack = [layers.Dense(4), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.3), layers.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *stack])


WAYS = {"jax": [("all of it", True), ("adam", False)]}.get(BACKEND, [("all of it", False)])
WAYS += {"tensorflow": [("nesterov", True)]}.get(BACKEND, [])  # torch.compile takes minutes


@pytest.mark.parametrize(("name", "jit"), WAYS)
def test_fit_of_sigma_zero_is_the_inner_optimizers(name: str, jit: bool) -> None:
    found: list[Any] = []
    for wrap in (False, True):
        keras.utils.set_random_seed(0)
        model: Any = noisy()
        inner = INNER[name]()
        model.compile(PopulationGradient(inner, 0.0, seed=0) if wrap else inner, "mse", jit_compile=jit)
        rows = slice(4 if BACKEND == "jax" and not jit else None)  # eager JAX compiles each operation
        x, y = data()
        history = fit(model, x[rows], y[rows], epochs=2)
        state = {str(i): numpy_of(v) for i, v in enumerate([*model.variables, *inner.variables])}
        found.append((state, history, streams()))
    exact = not (jit and BACKEND == "tensorflow")  # XLA fuses in another way: rounding
    assert_same(found[0][0], found[1][0], **({} if exact else {"rtol": 1e-5, "atol": 1e-6}))
    assert found[0][1]["loss"] == (found[1][1]["loss"] if exact else pytest.approx(found[1][1]["loss"], rel=1e-5))
    assert found[0][2] == found[1][2]


# -- by hand -----------------------------------------------------------------------------------------------------------

HOW: dict[str, tuple[dict[str, Any], Sequence[int]]] = {
    "everything": ({"perturb": lambda path, variable: True, "scale": "filter"}, (0, 1, 2, 3)),
    "rms": ({}, (0, 2)),
    "filter": ({"scale": "filter"}, (0, 2)),
    "absolute rademacher": ({"scale": "absolute", "noise": "rademacher"}, (0, 2)),
    "last": ({"perturb": lambda path, variable: variable.shape[0] == 4 and path.endswith("kernel")}, (2,)),
    "nothing": ({"perturb": lambda path, variable: False}, ()),
    "schedule": ({"sigma": schedules.InverseTimeDecay(0.4, 1, 1.0)}, (0, 2)),
}


@pytest.mark.parametrize("name", few(list(HOW)))
def test_steps_as_by_hand(name: str) -> None:
    options, chosen = HOW[name]
    # TensorFlow refuses to multiply a schedule's float32 by float64.
    with floats("float32" if name == "schedule" else WIDE):
        x, y = data()
        batches = batches_of(x, y, epochs=2)
        optimizer = population_sgd(**options)
        model = compiled(optimizer=optimizer)
        population = optimizer.population
        if name == "schedule":
            population = dataclasses.replace(population, sigma=lambda step: 0.4 / (1 + step))
        means, members = train_by_hand(weights_of(model), batches, population, chosen=chosen)
        apply = stepper(optimizer, model.trainable_variables)
        tolerance = ROUNDING if name == "schedule" else {}
        for (x, y, _), at, mean, member in zip(batches, members, means[1:], members[1:], strict=False):
            apply(gradient_by_hand(at, x, y))
            assert_close(weights_of(model), member, **tolerance)
            kept = [mean[index] for index in chosen]
            assert_close([numpy_of(v) for v in optimizer._means], kept, **tolerance)
        assert int(optimizer.iterations) == len(batches)


# Keras on torch takes one step per execution; compiled torch takes minutes.
@pytest.mark.parametrize("way", ["eager", "unbuilt"] if BACKEND == "torch" else ["compiled", "several", "unbuilt"])
def test_fit_as_by_hand(way: str) -> None:
    with floats(WIDE):
        x, y = data(12)
        name = "subclassed" if way == "unbuilt" else "sequential"
        options = {"steps_per_execution": 2} if way == "several" else {}
        still = compiled(name, SGD(0.0))
        fit(still, x[:1], y[:1])  # builds it in the training step, as that of the other is
        optimizer = population_sgd()
        model = compiled(name, optimizer, **options)
        history = fit(model, x, y, epochs=2)
        batches = batches_of(x, y, epochs=2)
        means, members = train_by_hand(weights_of(still), batches, optimizer.population)
        assert_close(weights_of(model), means[-1])
        losses = [loss_by_hand(at, x, y) for at, (x, y, _) in zip(members, batches, strict=False)]
        assert history["loss"] == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-5)


def test_accumulated_gradients_are_of_different_members() -> None:
    with floats(WIDE):
        x, y = data()
        optimizer = PopulationGradient(SGD(0.125, gradient_accumulation_steps=3), 0.3, seed=5)
        model = compiled(optimizer=optimizer)
        mean = weights_of(model)
        fit(model, x, y)  # three batches
        members = [mean, *(member_by_hand(mean, optimizer.population, step, (0, 2)) for step in (1, 2))]
        gradients = [gradient_by_hand(m, x, y) for m, (x, y, _) in zip(members, batches_of(x, y), strict=True)]
        assert_close(weights_of(model), [m - 0.125 * np.mean(g, 0) for m, *g in zip(mean, *gradients, strict=True)])


def test_indices_count_what_is_trainable() -> None:
    optimizer = PopulationGradient(SGD(0.0), 0.5, seed=5)
    model = compiled("frozen", optimizer)
    mean = weights_of(model)
    frozen = numpy_of(model.layers[0].kernel)
    model.train_on_batch(*data())
    assert_close(weights_of(model), member_by_hand(mean, optimizer.population, 1, (0, 2)), **ROUNDING)
    np.testing.assert_array_equal(numpy_of(model.layers[0].kernel), frozen)


# -- state -------------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
def only_last(path: str, variable: Any) -> bool:
    return variable.shape[0] == 4


def training_state(model: Any) -> dict[str, Array]:
    """Without the metrics, which a loaded model has not seen."""
    return {name: value for name, value in state_of(model).items() if not name.startswith("metric")}


@pytest.mark.parametrize("when", ["at a member", "at the mean"][: 1 if BACKEND == "jax" else 2])
def test_saved_training_goes_on_bit_for_bit(when: str, tmp_path: Path) -> None:
    optimizer = PopulationGradient(Adam(0.05), schedules.ExponentialDecay(0.4, 2, 0.5), perturb=only_last, seed=3)
    model = compiled(optimizer=optimizer)
    for x, y, _ in batches_of(*data()):
        model.train_on_batch(x, y)
    if when == "at the mean":
        optimizer.restore_mean()
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is PopulationGradient
    assert loaded.optimizer is not optimizer
    assert_same(training_state(loaded), training_state(model))
    assert int(loaded.optimizer._away.value) == (when == "at a member")
    for resumed in (model, loaded):
        for x, y, _ in batches_of(*data(seed=1)):
            resumed.train_on_batch(x, y)
    assert_same(training_state(loaded), training_state(model))


def test_a_member_that_was_saved_is_where_fit_with_mean_weights_begins(tmp_path: Path) -> None:
    model = compiled(optimizer=population_sgd())
    model.train_on_batch(*data())
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    x, y = data(seed=1)
    model.train_on_batch(x, y)
    model.optimizer.restore_mean()
    fit(loaded, x, y, MeanWeights(), batch_size=len(x))
    assert_close(weights_of(loaded), weights_of(model), rtol=0)


def test_checkpoints_of_weights_hold_the_member_and_its_mean(tmp_path: Path) -> None:
    one, other = (compiled(optimizer=population_sgd(), seed=seed) for seed in (0, 1))
    one.train_on_batch(*data())
    one.save_weights(tmp_path / "all.weights.h5")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "all.weights.h5")
    for model in (one, other):
        model.optimizer.restore_mean()
    assert_close(weights_of(other), weights_of(one), rtol=0)


@pytest.mark.parametrize("sigma", [0.2, np.float32(0.25), 0, schedules.PolynomialDecay(0.3, 10, 0.1)])
def test_configurations_come_back(sigma: Any) -> None:
    inner = AdamW(0.3, weight_decay=0.2)
    optimizer = PopulationGradient(
        inner, sigma, scale="filter", noise="rademacher", perturb=only_last, seed=2**63, name="mine"
    )
    copies: list[Any] = [
        PopulationGradient.from_config(optimizer.get_config()),
        keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(optimizer)))),
        keras.optimizers.get(keras.optimizers.serialize(optimizer)),
    ]
    for again in copies:
        assert again.get_config() == optimizer.get_config()
        assert type(again.inner_optimizer) is type(inner)
        assert (again.name, again.population.seed, again.population.scale) == ("mine", 2**63, "filter")
        if callable(sigma):
            assert float(numpy_of(again.population.sigma(10))) == pytest.approx(0.1)
        else:
            assert again.population.sigma == sigma
        assert again._perturb is only_last


def test_clones_train_alike() -> None:
    model = compiled(optimizer=population_sgd())
    model.train_on_batch(*data())
    model.optimizer.restore_mean()
    clone: Any = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    fresh = PopulationGradient.from_config(model.optimizer.get_config())
    clone.compile(fresh, "mse")
    model.compile(PopulationGradient.from_config(model.optimizer.get_config()), "mse")
    for batch in batches_of(*data()):
        assert clone.train_on_batch(*batch) == model.train_on_batch(*batch)
    assert_close(weights_of(clone), weights_of(model), rtol=0)


def test_variables_are_the_optimizers_alone() -> None:
    optimizer = PopulationGradient(Adam(0.1, use_ema=True), 0.1, seed=0)
    model = compiled(optimizer=optimizer)
    fit(model)
    variables = [id(variable) for variable in optimizer.variables]
    assert len(set(variables)) == len(variables)
    assert not set(variables) & {id(variable) for variable in model.variables}
    # Its own counter and rate, two means and the flag; then the inner optimizer's.
    assert len(variables) == 5 + len(optimizer.inner_optimizer.variables)
    assert [tuple(mean.shape) for mean in optimizer._means] == [(3, 4), (4, 2)]


def test_weights_of_an_optimizer_are_all_of_its_variables() -> None:
    one, other = (compiled(optimizer=PopulationGradient(Adam(0.1), seed=3)) for _ in range(2))
    one.train_on_batch(*data())
    other.optimizer.build(other.trainable_variables)
    other.set_weights(one.get_weights())
    other.optimizer.set_weights([numpy_of(variable) for variable in one.optimizer.variables])
    assert_same(training_state(other), training_state(one))


# -- who sees what -----------------------------------------------------------------------------------------------------


def test_weights_that_are_set_between_fits_are_taken() -> None:
    model = compiled(optimizer=PopulationGradient(SGD(0.0), 0.5, seed=0))
    fit(model)
    mine = [np.full_like(w, 0.25) for w in weights_of(model)]
    model.set_weights(mine)
    fit(model, epochs=2)
    assert_close(weights_of(model), mine, rtol=0)


def test_weights_that_are_loaded_between_fits_are_taken(tmp_path: Path) -> None:
    model = compiled(optimizer=PopulationGradient(SGD(0.0), 0.5, seed=0))
    fit(model)
    saved = weights_of(model)
    model.save_weights(tmp_path / "best.weights.h5")
    model.set_weights([w + 1 for w in model.get_weights()])
    model.load_weights(tmp_path / "best.weights.h5")
    fit(model)
    assert_close(weights_of(model), saved, rtol=0)


def test_what_is_written_over_a_member_is_lost_unless_the_mean_was_restored() -> None:
    model = compiled(optimizer=PopulationGradient(SGD(0.0), 0.5, seed=0))
    mean = weights_of(model)
    mine = [np.ones_like(w) for w in mean]
    for restore, expected in ((False, [mean[0], mine[1], mean[2], mine[3]]), (True, mine)):
        model.train_on_batch(*data())
        if restore:
            model.optimizer.restore_mean()
        model.set_weights(mine)
        model.train_on_batch(*data())
        model.optimizer.restore_mean()
        assert_close(weights_of(model), expected, rtol=0)


def test_with_mean_weights_all_others_see_the_mean(tmp_path: Path) -> None:
    with floats(WIDE):
        x, y = data()
        held = data(6, seed=1)
        optimizer = population_sgd()
        model = compiled(optimizer=optimizer)
        start = weights_of(model)
        seen: list[list[Array]] = []
        look = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(weights_of(model)))
        history = fit(model, x, y, MeanWeights(), look, epochs=2, validation_data=held)
        means, _ = train_by_hand(start, batches_of(x, y, epochs=2), optimizer.population, restored=[3])
        assert_close(seen[0], means[3])
        assert_close(seen[1], means[6])
        assert_close(weights_of(model), seen[1], rtol=0)
        expected = [loss_by_hand(means[step], *held) for step in (3, 6)]
        assert history["val_loss"] == pytest.approx(expected, rel=1e-5)
        assert history["val_loss"][-1] == model.evaluate(*held, batch_size=4, verbose=0)[0]
        fit(model, x, y, MeanWeights(), look)  # no validation
        assert_close(weights_of(model), seen[2], rtol=0)


def test_without_mean_weights_validation_sees_a_member() -> None:
    """The caveat of the docstring."""
    with floats(WIDE):
        x, y = data()
        held = data(6, seed=1)
        optimizer = population_sgd()
        model = compiled(optimizer=optimizer)
        start = weights_of(model)
        seen: list[list[Array]] = []
        look = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(weights_of(model)))
        history = fit(model, x, y, look, epochs=2, validation_data=held)
        means, members = train_by_hand(start, batches_of(x, y, epochs=2), optimizer.population)
        expected = [loss_by_hand(members[step], *held) for step in (3, 6)]
        assert history["val_loss"] == pytest.approx(expected, rel=1e-5)
        assert_close(seen[1], members[6])
        assert_close(weights_of(model), means[6])
        assert history["val_loss"][-1] != pytest.approx(model.evaluate(*held, verbose=0)[0], rel=1e-3)


def test_the_best_weights_are_those_that_validation_saw(tmp_path: Path) -> None:
    model = compiled(optimizer=population_sgd())
    held = data(8, seed=1)  # two full batches
    rates = LearningRateScheduler(lambda epoch: 0.05 if epoch < 2 else -0.05)  # uphill from the third epoch on
    stop = EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    keep = ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss", save_best_only=True)
    history = fit(model, *data(), MeanWeights(), rates, stop, keep, epochs=9, validation_data=held)
    best = int(np.argmin(history["val_loss"]))
    assert best < len(history["val_loss"]) - 1 < 8  # stopped early, and not at the best
    restored = weights_of(model)
    assert model.evaluate(*held, batch_size=4, verbose=0)[0] == history["val_loss"][best]
    saved: Any = keras.saving.load_model(tmp_path / "best.keras")
    assert_close(weights_of(saved), restored, rtol=0)
    assert int(saved.optimizer._away.value) == 0


def test_evaluation_of_a_member_can_be_told_to_restore_the_mean() -> None:
    model = compiled(optimizer=population_sgd())
    model.train_on_batch(*data())
    member = model.evaluate(*data(), verbose=0)[0]
    mean = model.evaluate(*data(), verbose=0, callbacks=[MeanWeights()])[0]
    model.optimizer.restore_mean()
    assert mean == model.evaluate(*data(), verbose=0)[0] != member


def test_swapped_averages_are_averages_of_means() -> None:
    found = []
    for wrap in (False, True):
        inner = SGD(0.1, use_ema=True, ema_momentum=0.5)
        model = compiled(optimizer=PopulationGradient(inner, 0.0, seed=0) if wrap else inner)
        callbacks = [MeanWeights()] if wrap else []
        swap = keras.callbacks.SwapEMAWeights()
        found.append((fit(model, *data(), *callbacks, swap, epochs=2, validation_data=data()), weights_of(model)))
    assert found[0][0] == found[1][0]
    assert_close(found[1][1], found[0][1], rtol=0)


def test_a_moving_average_is_of_means_and_is_what_fit_ends_with() -> None:
    with floats(WIDE):
        x, y = data()
        optimizer = PopulationGradient(SGD(0.125, momentum=0.875, use_ema=True, ema_momentum=0.5), 0.3, seed=5)
        model = compiled(optimizer=optimizer)
        start = weights_of(model)
        fit(model, x, y)
        means, _ = train_by_hand(start, batches_of(x, y), optimizer.population)
        average = means[1]  # Keras starts there
        for mean in means[2:]:
            average = [(a + m) / 2 for a, m in zip(average, mean, strict=True)]
        assert_close(weights_of(model), average)
        if BACKEND != "jax":  # where Keras's averages allow one call of `fit`
            fit(model, x, y)  # the average is the mean now
            assert int(optimizer.iterations) == 6


@pytest.mark.parametrize("optimizer", ["adam", LossScaleOptimizer(SGD())])
def test_mean_weights_need_the_optimizer(optimizer: Any) -> None:
    model = compiled(optimizer=optimizer)
    with pytest.raises(ValueError, match=f"compiled with a PopulationGradient.*{type(model.optimizer).__name__}"):
        fit(model, *data(), MeanWeights())


# -- precision and learning rates --------------------------------------------------------------------------------------


POLICIES = ["mixed_float16", "mixed_bfloat16", "bfloat16"]


def half(optimizer: Any, policy: str, **options: Any) -> Any:
    keras.config.set_dtype_policy(policy)
    try:
        return compiled(optimizer=optimizer, **options)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", few(POLICIES))
def test_half_precision_of_sigma_zero_is_the_inner_optimizers(policy: str) -> None:
    found = []
    for wrap in (False, True):
        inner = SGD(0.1, momentum=0.9, loss_scale_factor=8.0 if policy == "mixed_bfloat16" else None)
        model = half(PopulationGradient(inner, 0.0, seed=0) if wrap else inner, policy)
        losses = [float(model.train_on_batch(*batch)[0]) for batch in batches_of(*data())]
        found.append((losses, weights_of(model)))
    assert found[0][0] == found[1][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_array_equal(np.float64(a), np.float64(b))


@pytest.mark.parametrize("policy", few(POLICIES))
def test_half_precision_moves_members_and_ends_at_the_mean(policy: str) -> None:
    optimizer = PopulationGradient(SGD(0.0), 0.5, seed=5)
    model = half(optimizer, policy)
    assert isinstance(model.optimizer, LossScaleOptimizer) == (policy == "mixed_float16")
    mean = [np.array(w, "float64") for w in weights_of(model)]
    model.train_on_batch(*data())
    expected = member_by_hand(mean, optimizer.population, 1, (0, 2))
    rounding = {"rtol": 2**-7} if policy == "bfloat16" else ROUNDING  # of the eight digits of a bfloat16
    assert_close([np.array(w, "float64") for w in weights_of(model)], expected, **rounding)
    held = data(8, seed=1)
    history = fit(model, *data(), MeanWeights(), validation_data=held)
    assert history["val_loss"][-1] == model.evaluate(*held, batch_size=4, verbose=0)[0]
    for a, b in zip(weights_of(model), mean, strict=True):
        np.testing.assert_array_equal(np.float64(a), b)


def test_skipped_steps_move_nothing() -> None:
    optimizer = population_sgd()
    model = half(LossScaleOptimizer(optimizer, initial_scale=2.0**24), "mixed_float16")
    x, y = data()
    places = []
    for _ in range(14):
        model.train_on_batch(x, y)
        places.append((int(optimizer.iterations), int(optimizer._away.value), weights_of(model)))
    counts = [count for count, _, _ in places]
    skipped = counts.count(0)
    assert 0 < skipped < 12  # a loss scale that half precision cannot hold at first
    for before, after in itertools.pairwise(places):
        assert (before[0] == after[0]) == all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    assert places[skipped - 1][1] == 0
    start = places[0][2]
    means, members = train_by_hand(start, [(x, y, None)] * (14 - skipped), optimizer.population)
    tolerance = {"rtol": 0.05, "atol": 0.02}  # gradients in half precision, over a dozen steps
    assert_close(places[-1][2], members[counts[-1]], **tolerance)
    model.train_on_batch(x * np.float32(1e30), y)  # at a member
    assert int(optimizer.iterations) == counts[-1]
    assert_close(weights_of(model), places[-1][2], rtol=0)
    optimizer.restore_mean()
    assert_close(weights_of(model), means[counts[-1]], **tolerance)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_learning_rates_are_the_inner_optimizers(policy: str) -> None:
    inner = SGD(0.5)
    model = half(PopulationGradient(inner, seed=0), policy)
    never = ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    history = fit(model, *data(), never, epochs=3)
    assert history["learning_rate"] == [0.5, 0.5, 0.25]
    assert float(numpy_of(inner.learning_rate)) == 0.125
    model.optimizer.learning_rate = 0.25
    assert float(numpy_of(inner.learning_rate)) == float(numpy_of(model.optimizer.learning_rate)) == 0.25
    fit(model, *data(), LearningRateScheduler(lambda epoch, rate: rate * 2))
    assert float(numpy_of(inner.learning_rate)) == 0.5
    scheduled = PopulationGradient(SGD(schedules.ExponentialDecay(0.5, 1, 0.5)))
    with pytest.raises(TypeError, match="not settable"):
        scheduled.learning_rate = 0.1


def test_a_loss_scale_around_takes_that_of_the_inner_optimizer_away() -> None:
    inner = SGD(loss_scale_factor=128.0)
    optimizer = PopulationGradient(inner, seed=0)
    assert float(numpy_of(optimizer.scale_loss(ops.convert_to_tensor(2.0)))) == 256
    assert optimizer.loss_scale_factor == 128
    LossScaleOptimizer(optimizer)  # which would else divide by both, having multiplied by its own
    assert inner.loss_scale_factor is optimizer.loss_scale_factor is None


def test_exclusions_from_weight_decay_reach_the_inner_optimizer() -> None:
    optimizer = PopulationGradient(AdamW(0.1, weight_decay=0.5), 0.0, seed=0)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    model = compiled(optimizer=optimizer)
    before = weights_of(model)
    stepper(optimizer, model.trainable_variables)([np.zeros_like(w) for w in before])
    changed = [bool(np.any(a != b)) for a, b in zip(weights_of(model), before, strict=True)]
    assert changed == [False, True, False, False]  # the last bias is 0


# -- training loops of one's own ---------------------------------------------------------------------------------------


def jax_loop(model: Any, optimizer: Any, batches: Sequence[Any]) -> None:
    import jax

    def loss_of(trainable: Any, fixed: Any, x: Any, y: Any) -> Any:
        predicted, fixed = model.stateless_call(trainable, fixed, x)
        return ops.mean(ops.square(predicted - y)), fixed

    @jax.jit
    def step(trainable: Any, fixed: Any, state: Any, x: Any, y: Any) -> Any:
        gradients, fixed = jax.grad(loss_of, has_aux=True)(trainable, fixed, x, y)
        return *optimizer.stateless_apply(state, gradients, trainable), fixed

    optimizer.build(model.trainable_variables)
    trainable, fixed, state = (
        [v.value for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    )
    for x, y, _ in batches:
        trainable, state, fixed = step(trainable, fixed, state, x, y)
    assign(model.trainable_variables, trainable)
    assign(optimizer.variables, state)


def torch_loop(model: Any, optimizer: Any, batches: Sequence[Any]) -> None:
    import torch

    for x, y, _ in batches:
        loss: Any = torch.mean(torch.square(model(torch.tensor(x)) - torch.tensor(y)))
        model.zero_grad()
        loss.backward()
        variables = model.trainable_variables
        gradients = [variable.value.grad for variable in variables]
        optimizer.apply(gradients, variables)  # where torch records a graph: not of this
        assert all(variable.value.is_leaf and variable.value.requires_grad for variable in variables)
        assert not any(variable.value.requires_grad for variable in optimizer.variables)


def tensorflow_loop(model: Any, optimizer: Any, batches: Sequence[Any], *, compiled: bool = True) -> None:
    import tensorflow as tf

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        gradients: Any = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    if compiled:
        step = tf.function(step, reduce_retracing=True)  # which builds the model and the optimizer while it traces
    for x, y, _ in batches:
        step(tf.constant(x), tf.constant(y))


LOOPS: dict[str, dict[str, Callable[[Any, Any, Any], None]]] = {
    "jax": {"jit": jax_loop},
    "torch": {"eager": torch_loop},
    "tensorflow": {
        "compiled": tensorflow_loop,
        "eager": lambda *given: tensorflow_loop(*given, compiled=False),
    },
}


@pytest.mark.parametrize("way", LOOPS[BACKEND])
def test_own_loops_as_by_hand(way: str) -> None:
    with floats(WIDE):
        x, y = data(12)
        batches = batches_of(x, y, epochs=2)
        keras.utils.set_random_seed(0)
        start = Subclassed()
        start(x[:1])
        keras.utils.set_random_seed(0)
        model = Subclassed()
        if BACKEND != "tensorflow":
            model(x[:1])
        optimizer = population_sgd()
        LOOPS[BACKEND][way](model, optimizer, batches)
        means, members = train_by_hand(weights_of(start), batches, optimizer.population)
        assert_close(weights_of(model), members[-1])
        optimizer.restore_mean()
        assert_close(weights_of(model), means[-1])
        optimizer.restore_mean()  # again: nothing
        assert_close(weights_of(model), means[-1])
        assert int(optimizer.iterations) == len(batches)


def test_arguments_of_apply() -> None:
    optimizer = population_sgd()
    optimizer.apply([])  # as any optimizer of Keras
    with pytest.raises(ValueError, match="`trainable_variables` must be given"):
        optimizer.apply([ops.ones((3, 4))])
    assert not optimizer.built
    optimizer.restore_mean()
    model = compiled(optimizer=optimizer)
    gradients = [np.ones_like(w) for w in weights_of(model)]
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], iter(model.trainable_variables))
    one = weights_of(model)
    again = population_sgd()
    model = compiled(optimizer=again)
    again.build(model.trainable_variables)
    again.apply([ops.convert_to_tensor(g) for g in gradients])
    assert_close(weights_of(model), one, rtol=0)
    with pytest.raises(ValueError, match="Unknown variable"):
        again.apply([ops.ones((2,))], [keras.Variable(np.zeros(2, "float32"))])
    again.restore_mean()
    assert_close(weights_of(model)[1:2], one[1:2], rtol=0)


def test_variables_without_gradient() -> None:
    optimizer = PopulationGradient(SGD(1.0), 0.5, seed=5)
    model = compiled(optimizer=optimizer)
    mean = weights_of(model)
    gradients = [None, np.ones(4), np.ones((4, 2)), None]
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        stepper(optimizer, model.trainable_variables)(gradients)
    mean = [m - (0 if g is None else g) for m, g in zip(mean, gradients, strict=True)]
    assert_close(weights_of(model), member_by_hand(mean, optimizer.population, 1, (0, 2)), **ROUNDING)
    optimizer.restore_mean()
    assert_close(weights_of(model), mean, rtol=1e-6)
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None] * 4, model.trainable_variables)
    assert_close(weights_of(model), mean, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others have none")
def test_embeddings_take_sparse_gradients() -> None:
    found = []
    for wrap in (False, True):
        inner = SGD(0.5)
        model = compiled("embedding", PopulationGradient(inner, 0.0, seed=0) if wrap else inner)
        x, y = data(seed=2)
        fit(model, np.abs(x), y)  # which look up one row of two
        found.append(weights_of(model))
    assert_close(found[1], found[0], rtol=0)
    model = compiled("embedding", PopulationGradient(SGD(0.5), 0.5, seed=0))
    before = weights_of(model)[0]
    fit(model, np.abs(x), y)
    np.testing.assert_array_equal(weights_of(model)[0][0], before[0])
    assert np.all(weights_of(model)[0][1] != before[1])


def test_constraints_hold_for_the_mean() -> None:
    keras.utils.set_random_seed(0)
    constrained = layers.Dense(8, kernel_constraint="non_neg")
    model: Any = keras.Sequential([keras.Input((3,)), constrained, layers.Dense(2)])
    model.compile(PopulationGradient(SGD(0.3), 0.8, seed=5), "mse")
    x, y = data()
    model.train_on_batch(x, y)
    assert np.any(numpy_of(constrained.kernel) < 0)  # a member
    model.optimizer.restore_mean()
    assert np.all(numpy_of(constrained.kernel) >= 0)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Oops(Exception):
    pass


def test_the_mean_comes_back_after_an_exception() -> None:
    with floats(WIDE):
        x, y = data(12)
        optimizer = population_sgd()
        model = compiled(optimizer=optimizer)
        start = weights_of(model)

        def fail(batch: int, logs: Any) -> None:
            if batch == 1:
                raise Oops

        with pytest.raises(Oops):
            fit(model, x, y, LambdaCallback(on_train_batch_end=fail))
        means, members = train_by_hand(start, batches_of(x, y), optimizer.population)
        assert_close(weights_of(model), means[2] if BACKEND == "jax" else members[2])  # JAX's fit cleans up
        optimizer.restore_mean()
        assert_close(weights_of(model), means[2])
        fit(model, x, y)  # and goes on


class FailsInTraining(keras.Sequential):
    fails = True

    def train_step(self, *args: Any) -> Any:
        if self.fails:
            raise Oops
        return super().train_step(*args)


@pytest.mark.parametrize("average", [False, True])
def test_an_exception_in_the_first_step_is_not_masked(average: bool) -> None:
    keras.utils.set_random_seed(0)
    model: Any = FailsInTraining([keras.Input((3,)), layers.Dense(2)])
    optimizer = PopulationGradient(SGD(0.1, use_ema=average), seed=0)
    model.compile(optimizer, "mse")
    with pytest.raises(Oops):
        fit(model)
    if BACKEND != "jax":
        optimizer.restore_mean()
        model.fails = False
        model.compile(optimizer, "mse")
        fit(model)
        return
    with pytest.raises(RuntimeError, match="jax_state_sync"):  # as lost as the model's weights
        optimizer.restore_mean()


@pytest.mark.skipif(BACKEND != "jax", reason="where fit takes the variables away")
def test_the_mean_within_fit_needs_the_variables() -> None:
    model = compiled(optimizer=population_sgd())
    with pytest.raises(RuntimeError, match=r"`restore_mean` needs .* `model.jax_state_sync\(\)`"):
        fit(model, *data(), LambdaCallback(on_train_batch_end=lambda batch, logs: model.optimizer.restore_mean()))
    flags = []

    def restore(batch: int, logs: Any) -> None:
        model.jax_state_sync()
        flags.append(int(model.optimizer._away.value))
        model.optimizer.restore_mean()

    model = compiled(optimizer=population_sgd())
    fit(model, *data(), LambdaCallback(on_train_batch_end=restore))
    assert flags == [1, 1, 1]


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("inner_optimizer", None, TypeError),
        ("inner_optimizer", 3, TypeError),
        ("inner_optimizer", Adam, TypeError),
        ("inner_optimizer", PopulationGradient("sgd", seed=0), TypeError),
        ("inner_optimizer", LossScaleOptimizer(SGD()), TypeError),
        ("inner_optimizer", LossScaleOptimizer(PopulationGradient("sgd", seed=0)), TypeError),
        ("sigma", -0.1, ValueError),
        ("sigma", float("nan"), ValueError),
        ("sigma", "0.1", TypeError),
        ("scale", "tensor", ValueError),
        ("noise", "uniform", ValueError),
        ("perturb", ["kernel"], TypeError),
        ("seed", -1, ValueError),
        ("seed", 1.5, ValueError),
    ],
)
def test_bad_arguments_are_named(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: Any = {"inner_optimizer": "sgd", argument: value}
    with pytest.raises(error, match=f"`{argument}`"):
        PopulationGradient(**arguments)


def test_optimizers_by_name() -> None:
    assert isinstance(PopulationGradient("adam").inner_optimizer, Adam)
    with pytest.raises(ValueError, match="nonsense"):
        PopulationGradient("nonsense")
    with pytest.raises(TypeError, match="positional"):
        PopulationGradient("sgd", 0.1, "rms")  # pyright: ignore[reportCallIssue] - what is tested


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_the_global_seed_decides_and_no_stream_is_touched() -> None:
    found: list[Any] = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        before = streams()
        optimizer = population_sgd(seed=None)
        assert streams() == before
        assert optimizer.population.seed == seed
        model = compiled(optimizer=optimizer)
        model.train_on_batch(*data())
        found.append(weights_of(model))
    assert_close(found[1], found[0], rtol=0)
    assert np.any(found[2][0] != found[0][0])


def test_seeds_decide_on_noise_alone() -> None:
    members = []
    for seed in (7, 7, 8):
        optimizer = PopulationGradient(SGD(0.0), 0.3, seed=seed)
        model = compiled(optimizer=optimizer)
        stepper(optimizer, model.trainable_variables)([np.zeros_like(w) for w in weights_of(model)])
        members.append(weights_of(model))
    assert_close(members[1], members[0], rtol=0)
    assert np.all(members[2][0] != members[0][0])
    assert_close(members[2][1::2], members[0][1::2], rtol=0)  # biases
