"""Gradient matching on a model that stays the user's own, and random projections."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras_matching_cells import (
    BATCH_NORM_WARNING,
    KERAS_WARNING,
    OwnStep,
    Subclassed,
    mlp,
    numpy_of,
    one_step,
    smooth_data,
    weights_of,
)

from gradwise_keras._attach import attach_gradient_matching
from gradwise_keras._matching_loss import GradientMatching
from gradwise_keras._with_derivatives import WithDerivatives

pytestmark = [pytest.mark.filterwarnings(KERAS_WARNING), pytest.mark.filterwarnings(BATCH_NORM_WARNING)]

BACKEND = keras.config.backend()


def targets_of(y: Any, dydx: Any) -> dict[str, Any]:
    return {"y": y, "dydx": dydx}


def build(kind: str) -> Any:
    keras.utils.set_random_seed(0)
    if kind == "subclassed":
        return Subclassed()
    inputs = keras.Input((3,))
    h = layers.Dense(8, "tanh", kernel_regularizer="l2")(inputs)
    if "norm" in kind:
        h = layers.BatchNormalization()(h)
    if "dropout" in kind:
        h = layers.Dropout(0.5, seed=3 if "seeded" in kind else None)(h)
    return (OwnStep if kind == "own step" else keras.Model)(inputs, layers.Dense(2)(h))


KINDS = ["plain", "subclassed", "own step", "seeded dropout", "dropout", "norm and seeded dropout"]


@pytest.mark.parametrize("kind", KINDS)
def test_attached_training_is_that_of_the_wrapper(kind: str) -> None:
    x, y, dydx = smooth_data()
    weights = {"y": np.linspace(0.5, 1.5, 12), "dydx": (np.arange(12) % 3 > 0).astype("float32")}
    options: dict[str, Any] = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, "sample_weight": weights}
    matching = GradientMatching(0.7).fit(x, y, dydx)
    wrapped: Any = WithDerivatives(build(kind))
    wrapped.compile(keras.optimizers.SGD(0.1), loss={"y": "mse", "dydx": matching})
    expected = wrapped.fit(x, targets_of(y, dydx), **options).history
    OwnStep.steps = 0
    model: Any = build(kind)
    model.compile(keras.optimizers.SGD(0.1), loss="mse", metrics=["mae"])
    attach_gradient_matching(model, matching)
    history = model.fit(x, targets_of(y, dydx), **options).history
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-4)  # float32
    assert history["derivative_loss"] == pytest.approx(expected["dydx_loss"], rel=1e-4)
    assert "mae" in history
    if kind == "own step":
        assert OwnStep.steps > 0
    for ours, theirs in zip(model.variables, wrapped.model.variables, strict=True):
        np.testing.assert_allclose(numpy_of(ours), numpy_of(theirs), rtol=1e-4, atol=1e-5, err_msg=ours.path)
    evaluation: dict[str, Any] = {"verbose": 0, "return_dict": True}
    logs = model.evaluate(x, targets_of(y, dydx), **evaluation)
    wrapped_logs = wrapped.evaluate(x, targets_of(y, dydx), **evaluation)
    assert logs["derivative_loss"] == pytest.approx(wrapped_logs["dydx_loss"], rel=1e-4)
    assert logs["loss"] == pytest.approx(wrapped_logs["loss"], rel=1e-4)


def test_an_unfitted_loss_is_fitted_to_the_training_data() -> None:
    x, y, dydx = smooth_data()
    model: Any = build("plain")
    model.compile("sgd", loss="mse")
    attached = attach_gradient_matching(model)
    model.fit(x, targets_of(y, dydx), verbose=0)
    assert attached.matching.get_config() == GradientMatching().fit(x, y, dydx).get_config()
    with pytest.raises(ValueError, match=r'`y` must be a dict {"y": values, "dydx": derivatives}'):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("by_context", [False, True])
def test_detaching_restores_the_model(by_context: bool, tmp_path: Path) -> None:
    x, y, dydx = smooth_data()
    model: Any = build("dropout")
    model.compile("sgd", loss="mse", metrics=["mae"])
    model.fit(x, y, verbose=0)
    before, metrics = dict(vars(model)), list(model._metrics)
    if by_context:
        with attach_gradient_matching(model):
            model.fit(x, targets_of(y, dydx), verbose=0)
    else:
        attached = attach_gradient_matching(model)
        with pytest.raises(ValueError, match="`model` must have one gradient matching at a time"):
            attach_gradient_matching(model)
        model.fit(x, targets_of(y, dydx), verbose=0)
        model.save(tmp_path / "attached.keras")
        loaded: Any = keras.models.load_model(tmp_path / "attached.keras")
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
        assert set(loaded.fit(x, y, verbose=0).history) == {"loss", "mae"}
        attached.detach()
        attached.detach()
    assert set(vars(model)) - set(before) <= {"stop_predicting"}  # of Keras's predict
    assert all(vars(model).get(name) is before.get(name) for name in ("call", "compute_loss", "compute_metrics", "fit"))
    assert model._compute_loss_has_training_arg is before["_compute_loss_has_training_arg"]
    assert model._metrics == metrics
    assert set(model.fit(x, y, verbose=0).history) == {"loss", "mae"}


def gradients_of(projections: int | None, steps: int) -> tuple[list[np.ndarray[Any, Any]], list[float], Any]:
    """The mean gradient and the losses of `steps` training steps at the same weights."""
    x, y, dydx = smooth_data(n=6, n_outputs=3)
    model: Any = mlp(n_outputs=3)
    model.compile(keras.optimizers.SGD(1.0), loss="mse")
    target = np.where(np.random.default_rng(0).random(dydx.shape) < 0.9, dydx, np.nan).astype("float32")
    matching = GradientMatching(scale="per_input", loss="huber").fit(x, y, dydx)
    attach_gradient_matching(model, matching, projections=projections, seed=1)
    start = model.get_weights()
    total, losses = [np.zeros_like(w) for w in start], []
    for _ in range(steps):
        total = [a + b / steps for a, b in zip(total, one_step(model, x, targets_of(y, target)), strict=True)]
        losses.append(float(model.get_metrics_result()["derivative_loss"]))
        model.reset_metrics()
        model.set_weights(start)
    return total, losses, model


def test_projections_are_unbiased_and_exact_from_n_outputs_on() -> None:
    full, (exact,), _ = gradients_of(None, 1)
    for a, b in zip(full, gradients_of(3, 1)[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # float32
    steps = 400
    mean, losses, _ = gradients_of(1, steps)
    assert len(set(losses)) > 0.6 * steps  # drawn anew in every step: of 3**6 draws, 400 differ in 308
    standard_error = np.std(losses) / np.sqrt(steps)
    assert abs(np.mean(losses) - exact) < 4 * standard_error
    assert standard_error < 0.05 * exact  # so that the comparison says something
    size = np.sqrt(sum(np.sum(a**2) for a in full))
    assert np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(full, mean, strict=True))) < 0.1 * size


def test_projections_leave_random_streams_alone_and_go_on_over_epochs() -> None:
    x, y, dydx = smooth_data(n=20)  # of 2**20 draws, no two are alike

    def train(projections: int | None, epochs: list[int], kind: str = "plain") -> tuple[Any, list[float]]:
        model: Any = build(kind)
        model.compile(keras.optimizers.SGD(0.0), loss="mse")
        attach_gradient_matching(model, GradientMatching().fit(x, y, dydx), projections=projections, seed=4)
        losses = []
        for n in epochs:
            fit: dict[str, Any] = {"batch_size": 20, "shuffle": False, "verbose": 0}
            losses += model.fit(x, targets_of(y, dydx), epochs=n, **fit).history["derivative_loss"]
        return model, losses

    plain, _ = train(None, [3], "seeded dropout")
    model, _ = train(1, [3], "seeded dropout")
    losses = train(1, [3])[1]
    for ours, theirs in zip(model.non_trainable_variables, plain.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(numpy_of(ours), numpy_of(theirs))
    assert len(set(losses)) == 3
    assert train(1, [1, 2])[1] == pytest.approx(losses, rel=1e-6)  # a second fit goes on where the first stopped


def test_evaluation_matches_all_outputs() -> None:
    x, y, dydx = smooth_data()
    losses = []
    for projections in (None, 1):
        model: Any = build("plain")
        model.compile("sgd", loss="mse")
        attach_gradient_matching(model, GradientMatching().fit(x, y, dydx), projections=projections)
        losses.append(model.evaluate(x, targets_of(y, dydx), verbose=0, return_dict=True)["derivative_loss"])
    assert losses[0] == losses[1]


def test_mixed_precision() -> None:
    x, y, dydx = smooth_data()
    before = keras.config.dtype_policy()
    losses = []
    try:
        for policy in ("float32", "mixed_bfloat16"):
            keras.config.set_dtype_policy(policy)
            model: Any = build("plain")
            model.compile(keras.optimizers.SGD(0.01), loss="mse")
            attach_gradient_matching(model, GradientMatching().fit(x, y, dydx))
            losses.append(model.fit(x, targets_of(y, dydx), verbose=0).history["derivative_loss"][0])
    finally:
        keras.config.set_dtype_policy(before)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # bfloat16: 8 bits


def test_weight_zero_is_plain_training() -> None:
    x, y, dydx = smooth_data()
    models = [build("dropout"), build("dropout")]
    for model in models:
        keras.utils.set_random_seed(1)
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        targets: Any = y
        if model is models[1]:
            attach_gradient_matching(model, GradientMatching(0.0))
            targets = targets_of(y, np.full_like(dydx, np.nan))
        model.fit(x, targets, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(*map(weights_of, models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # another graph: rounding


def test_misuse_is_named() -> None:
    model: Any = mlp()
    with pytest.raises(ValueError, match="`model` must be compiled"):
        attach_gradient_matching(model)
    model.compile("sgd", loss="mse")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"matching": "mse"}, "`matching` must be a GradientMatching. Received: matching='mse'"),
        ({"projections": 0}, "`projections` must be a whole number of at least 1. Received: projections=0"),
        ({"projections": 1.5}, "Received: projections=1.5"),
        ({"seed": -1}, "`seed` must be a whole number of at least 0. Received: seed=-1"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            attach_gradient_matching(model, **arguments)
    with pytest.raises(ValueError, match=r"`model` must be a keras.Model"):
        attach_gradient_matching(len)  # pyright: ignore[reportArgumentType] - that is the test
