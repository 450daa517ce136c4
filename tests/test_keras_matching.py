"""GradientMatching as a Keras loss: the mathematics of the core, masks, shapes, configuration."""

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras_matching_cells import KERAS_WARNING, mlp, mlp_loss, numpy_of, one_step, smooth_data, weights_of

from gradwise._matching import gradient_matching_loss
from gradwise._matching_scale import matching_scale
from gradwise_keras._matching_loss import GradientMatching
from gradwise_keras._with_derivatives import WithDerivatives
from gradwise_torch import GradientMatching as TorchGradientMatching

pytestmark = pytest.mark.filterwarnings(KERAS_WARNING)


def fitted(x: Any, y: Any, dydx: Any, **options: Any) -> GradientMatching:
    return GradientMatching(**options).fit(x, y, dydx)


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("scale", ["block", "per_input", "none"])
@pytest.mark.parametrize("weighted", ["no", "samples", "column", "entries"])
def test_loss_is_that_of_the_core(scale: str, loss: str, weighted: str) -> None:
    x, y, dydx = smooth_data()
    predicted = dydx + np.random.default_rng(1).normal(size=dydx.shape).astype("float32")
    target = dydx.copy()
    target[3, 1, 2] = np.nan
    weights = np.random.default_rng(2).integers(0, 3, size=dydx.shape if weighted == "entries" else 12)
    weights = None if weighted == "no" else weights.astype("float32")
    statistics = matching_scale(x, y, dydx, scale=scale, xp=np)
    expected = 0.7 * gradient_matching_loss(
        predicted,
        target,
        sample_weight=weights,
        scale=None if scale == "none" else statistics.scale,
        loss=loss,
        threshold=1.0 if scale == "none" else statistics.threshold,
        xp=np,
    )
    given = weights[:, None] if weights is not None and weighted == "column" else weights
    value = fitted(x, y, dydx, derivative_weight=0.7, scale=scale, loss=loss)(target, predicted, given)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)  # float32


def test_weights_of_entries_are_a_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    predicted, target, weights = rng.normal(size=(3, 4, 2, 5))
    weights = np.where(weights > 0, weights, 0.0)
    by_hand = 5 * np.sum(weights * (predicted - target) ** 2) / np.sum(weights)
    assert gradient_matching_loss(predicted, target, sample_weight=weights, xp=np) == pytest.approx(by_hand, rel=1e-12)
    per_sample = np.array([1.0, 0.0, 2.0, 0.5])
    spread = np.broadcast_to(per_sample[:, None, None], target.shape)
    value = gradient_matching_loss(predicted, target, sample_weight=per_sample, xp=np)
    assert value == pytest.approx(gradient_matching_loss(predicted, target, sample_weight=spread, xp=np), rel=1e-12)


def test_zero_if_and_only_if_equal() -> None:
    x, y, dydx = smooth_data()
    matching = fitted(x, y, dydx)
    assert float(matching(dydx, dydx)) == 0
    other = dydx.copy()
    other[5, 0, 1] += 1e-3
    assert float(matching(dydx, other)) > 0


def test_unknown_entries_do_not_matter_whatever_stands_there() -> None:
    x, y, dydx = smooth_data()
    matching = fitted(x, y, dydx)
    predicted = dydx * 1.5
    known = np.random.default_rng(0).random(dydx.shape) < 0.6
    by_nan = matching(np.where(known, dydx, np.nan), predicted)
    by_weight = matching(np.where(known, dydx, np.inf), np.where(known, predicted, np.nan), known)
    assert float(by_nan) == pytest.approx(float(by_weight), rel=1e-6)  # float32
    rows = np.arange(12) % 3 > 0
    by_rows = matching(np.where(rows[:, None, None], dydx, np.inf), predicted, rows.astype("float32"))
    assert float(by_rows) == pytest.approx(float(matching(dydx[rows], predicted[rows])), rel=1e-6)
    assert float(matching(np.full_like(dydx, np.nan), predicted)) == 0


@pytest.mark.parametrize("known_by", ["nan", "entries", "samples"])
def test_gradient_of_unknown_entries_is_zero_and_not_nan(known_by: str) -> None:
    x, y, dydx = smooth_data()
    known = np.random.default_rng(0).random(dydx.shape) < 0.6
    weight = None
    if known_by == "samples":
        known[:] = np.arange(12)[:, None, None] % 3 > 0
        weight = known[:, 0, 0].astype("float32")
    gradients = []
    for filler in (0.0, np.nan) if known_by != "nan" else (np.nan,):
        entries = known.astype("float32") if known_by == "entries" else weight
        model: Any = WithDerivatives(mlp())
        model.compile(keras.optimizers.SGD(1.0), loss={"y": "mse", "dydx": fitted(x, y, dydx)})
        target = np.where(known, dydx, filler).astype("float32")
        ones = np.ones(12, "float32")
        gradients.append(
            one_step(model, x, {"y": y, "dydx": target}, None if entries is None else {"y": ones, "dydx": entries})
        )
    statistics = matching_scale(x, y, dydx, xp=np)
    for gradient in gradients:
        assert all(np.all(np.isfinite(part)) for part in gradient)
    for gradient, other in zip(gradients[0], gradients[-1], strict=True):
        np.testing.assert_array_equal(gradient, other)
    # And what is known does count, by the formula: differences of the core's loss in float64.
    weights = [w.astype(np.float64) for w in weights_of(mlp())]

    def loss(shift: float) -> float:
        moved = [weights[0] + shift * gradients[0][0], *weights[1:]]
        hidden = np.tanh(x @ moved[0] + moved[1])
        jacobian = np.einsum("jh,bh,ho->boj", moved[0], 1 - hidden**2, moved[2])
        masked = gradient_matching_loss(jacobian, dydx, mask=known, scale=statistics.scale, xp=np)
        return float(np.mean((hidden @ moved[2] + moved[3] - y) ** 2) + masked)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope == pytest.approx(float(np.sum(gradients[0][0] ** 2)), rel=1e-4)  # float32 gradient


def test_negative_weights_cannot_be_overlooked() -> None:
    x, y, dydx = smooth_data()
    weight = np.ones(12, "float32")
    weight[3] = -1
    assert np.isnan(float(fitted(x, y, dydx)(dydx, dydx, weight)))


def test_one_output_may_keep_its_axis() -> None:
    x, y, dydx = smooth_data(n_outputs=1)
    matching = fitted(x, y, dydx)
    predicted = dydx + 1
    assert float(matching(dydx[:, None], predicted)) == float(matching(dydx, predicted)) > 0
    assert GradientMatching().fit(x, y[:, 0], dydx[:, None]).get_config() == matching.get_config()


@pytest.mark.parametrize("shape", [(1, 2, 3), (12, 1, 3), (12, 2, 1), (12, 3), (2, 3), (12, 3, 2), ()])
def test_shapes_that_broadcast_are_errors(shape: tuple[int, ...]) -> None:
    x, y, dydx = smooth_data()
    with pytest.raises(ValueError, match=r"`y_true` must have shape \(12, 2, 3\). Received: y_true of shape"):
        fitted(x, y, dydx)(np.zeros(shape, "float32"), dydx)


def test_targets_with_an_extra_axis_in_the_batch_are_errors() -> None:
    x, y, dydx = smooth_data(n=3, n_outputs=1)  # as many rows as inputs, so that more would broadcast
    with pytest.raises(ValueError, match="y_true"):
        fitted(x, y, dydx)(dydx[None], dydx)


@pytest.mark.parametrize("shape", [(1,), (12, 2), (12, 3), (12, 1, 1), (12, 1, 3), (6,), ()])
def test_weights_that_broadcast_are_errors(shape: tuple[int, ...]) -> None:
    x, y, dydx = smooth_data()
    with pytest.raises(ValueError, match=r"`sample_weight` must have shape \(12,\) or \(12, 1\) or \(12, 2, 3\)"):
        fitted(x, y, dydx)(dydx, dydx, np.ones(shape, "float32"))


@pytest.mark.parametrize("scale", ["block", "per_input", "none"])
def test_unfitted_is_an_error_with_its_remedy(scale: str) -> None:
    _, _, dydx = smooth_data()
    with pytest.raises(ValueError, match=r"must be fitted before its first call. Call `matching.fit\(X, y, dydx\)`"):
        GradientMatching(scale=scale)(dydx, dydx)


def test_raw_derivatives_of_one_output_need_no_fit() -> None:
    _, _, dydx = smooth_data(n_outputs=1)
    value = float(GradientMatching(scale="none")(dydx, dydx + 2))
    assert value == pytest.approx(12.0, rel=1e-6)  # three inputs, 2**2 each


def test_weight_zero_is_zero_whatever_the_arrays_hold() -> None:
    _, _, dydx = smooth_data(n_outputs=1)
    assert float(GradientMatching(0)(dydx, np.full_like(dydx, np.nan))) == 0


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("scale", ["block", "per_input", "none"])
def test_configuration_round_trips(scale: str, fit: bool) -> None:
    x, y, dydx = smooth_data()
    matching = GradientMatching(0.3, scale=scale, loss="huber", name="mine")
    if fit:
        matching.fit(x, y, dydx)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(matching))
    assert restored.get_config() == matching.get_config()
    if fit:
        assert float(restored(dydx, dydx * 2)) == float(matching(dydx, dydx * 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"derivative_weight": -1}, "`derivative_weight` must be .* Received: derivative_weight=-1"),
        ({"derivative_weight": float("nan")}, "Received: derivative_weight=nan"),
        ({"derivative_weight": "1"}, "Received: derivative_weight='1'"),
        ({"scale": "batch"}, "`scale` must be one of 'block', 'per_input', 'none'. Received: scale='batch'"),
        ({"loss": "mae"}, "`loss` must be one of 'mse', 'huber'. Received: loss='mae'"),
    ],
)
def test_invalid_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientMatching(**options)


def test_invalid_data_is_named() -> None:
    x, y, dydx = smooth_data()
    with pytest.raises(ValueError, match="`dydx` must be given"):
        GradientMatching().fit(x, y)
    with pytest.raises(ValueError, match="`y` must have one row"):
        GradientMatching().fit(x, y[:3], dydx)
    with pytest.raises(ValueError, match="`dydx` must have shape"):
        GradientMatching().fit(x, y, dydx[:, :1])
    with pytest.raises(ValueError, match="`X` must be finite"):
        GradientMatching().fit(np.where(x > 0, np.nan, x), y, dydx)
    with pytest.raises(ValueError, match=r"must have the sizes .* that were fitted, \(2, 3\)"):
        fitted(x, y, dydx)(dydx[:, :, :2], dydx[:, :, :2])


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_loss_and_gradient_are_those_of_the_torch_adapter(n_outputs: int, loss: str) -> None:
    x, y, dydx = smooth_data(n_outputs=n_outputs)
    model: Any = WithDerivatives(mlp(n_outputs=n_outputs))
    matching = fitted(x, y, dydx, derivative_weight=0.5, loss=loss)
    model.compile(keras.optimizers.SGD(1.0), loss={"y": "mse", "dydx": matching})
    weights = weights_of(model)
    twin = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, n_outputs))
    with torch.no_grad():
        for parameter, weight in zip(twin.parameters(), weights, strict=True):
            parameter.copy_(torch.tensor(weight.T))
    torch_matching = TorchGradientMatching(0.5, loss=loss).fit(x, y, dydx)
    assert matching.statistics is not None
    np.testing.assert_allclose(torch_matching.scales.jacobian_scale, matching.statistics.scale, rtol=1e-6)
    prediction, term = torch_matching.with_values(twin, torch.tensor(x), torch.tensor(dydx))
    total = torch.nn.functional.mse_loss(prediction, torch.tensor(y)) + term
    total.backward()
    value = model.evaluate(x, {"y": y, "dydx": dydx}, batch_size=12, verbose=0, return_dict=True)["loss"]
    assert value == pytest.approx(total.item(), rel=1e-5)  # float32
    for gradient, parameter in zip(one_step(model, x, {"y": y, "dydx": dydx}), twin.parameters(), strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(gradient, parameter.grad.numpy().T, rtol=1e-3, atol=1e-5)  # float32


def test_gradient_is_that_of_finite_differences_in_float64() -> None:
    x, y, dydx = smooth_data()
    matching = fitted(x, y, dydx, derivative_weight=2.0)
    assert matching.statistics is not None
    model: Any = WithDerivatives(mlp())
    model.compile(keras.optimizers.SGD(1.0), loss={"y": "mse", "dydx": matching})
    weights = [w.astype(np.float64) for w in weights_of(model)]
    arguments: Any = (*(a.astype(np.float64) for a in (x, y, dydx)), matching.statistics.scale, 2.0)
    gradients = one_step(model, x, {"y": y, "dydx": dydx})
    for k, gradient in enumerate(gradients):
        differences = np.zeros_like(weights[k])
        for index in np.ndindex(*differences.shape):
            losses = []
            for step in (1e-5, -1e-5):
                moved = [w.copy() for w in weights]
                moved[k][index] += step
                losses.append(mlp_loss(moved, *arguments))
            differences[index] = (losses[0] - losses[1]) / 2e-5
        # float32 weights of size 1 lose 1e-7 in the subtraction that reads the gradient off
        np.testing.assert_allclose(gradient, differences, rtol=2e-4, atol=2e-5)


def test_fitting_on_tensors_and_lists() -> None:
    x, y, dydx = smooth_data()
    tensors = [keras.ops.convert_to_tensor(array) for array in (x, y, dydx)]
    assert GradientMatching().fit(*tensors).get_config() == fitted(x, y, dydx).get_config()
    assert GradientMatching().fit(x.tolist(), y.tolist(), dydx.tolist()).get_config() == fitted(x, y, dydx).get_config()
    assert numpy_of(tensors[0]).dtype == np.float32
