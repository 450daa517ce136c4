"""Scales of derivatives: closed forms, independence of units, and the standardising transformer."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from gradwise._matching import gradient_matching_loss
from gradwise._matching_scale import directional_scale, matching_scale, standard_deviation
from gradwise._scaling import DerivativeScaler

N, OUTPUTS, INPUTS = 20, 2, 3


def data(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, INPUTS)) * [1.0, 10.0, 0.1]
    y = rng.standard_normal((N, OUTPUTS)) * [2.0, 30.0]
    target = rng.standard_normal((N, OUTPUTS, INPUTS)) * np.array([[1.0], [50.0]]) / [1.0, 10.0, 0.1]
    target[rng.random(target.shape) < 0.2] = np.nan
    return x, y, target, rng.random(target.shape) < 0.8


@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.parametrize("scale", ["block", "per_input", "none"])
def test_scale_equals_a_loop(scale, with_y):
    x, y, target, mask = data()
    result = matching_scale(x, y if with_y else None, target, mask=mask, scale=scale, xp=np)
    known = mask & ~np.isnan(target)
    sigma_x = x.std(axis=0)
    for o in range(OUTPUTS):
        entries = [(sigma_x[j] * target[i, o, j]) ** 2 for i in range(N) for j in range(INPUTS) if known[i, o, j]]
        d = INPUTS * np.mean(entries)
        sigma_y = y[:, o].std() if with_y else np.sqrt(d)
        signal = np.array([sigma_x[j] * np.sqrt(np.mean(target[known[:, o, j], o, j] ** 2)) for j in range(INPUTS)])
        c = np.maximum(signal, 0.1 * signal.max())
        expected = {
            "block": sigma_y * sigma_x / np.sqrt(d),
            "per_input": sigma_y * sigma_x / (c * np.sqrt(INPUTS)),
            "none": np.ones(INPUTS),
        }[scale]
        assert result.scale[o] == pytest.approx(expected, rel=1e-12)
        assert result.threshold[o] == pytest.approx(1.0 if scale == "none" else sigma_y / np.sqrt(INPUTS), rel=1e-12)


def test_weight_one_makes_a_relative_derivative_error_count_like_a_relative_value_error():
    x, y, target, _ = data()
    target = np.nan_to_num(target, nan=1.0)
    scale = matching_scale(x, y[:, :1], target[:, :1], xp=np).scale
    loss = gradient_matching_loss(1.1 * target[:, :1], target[:, :1], scale=scale, xp=np)
    assert loss == pytest.approx(0.01 * y[:, 0].var(), rel=1e-12)  # 10 % error: (0.1 sigma_y)**2


@given(a=st.floats(0.01, 100), b=st.floats(0.01, 100), column=st.integers(0, INPUTS - 1))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("scale", ["block", "per_input"])
def test_units_of_x_do_not_matter_and_those_of_y_only_square(scale, a, b, column):
    x, y, target, mask = data()
    predicted = np.random.default_rng(1).standard_normal(target.shape)

    def loss(x_unit, y_unit):
        t, p = target * y_unit / x_unit, predicted * y_unit / x_unit
        s = matching_scale(x * x_unit, y * y_unit, t, mask=mask, scale=scale, xp=np).scale
        return gradient_matching_loss(p, t, mask=mask, scale=s, xp=np)

    unit = np.ones(INPUTS)
    unit[column] = a
    assert loss(unit, b) == pytest.approx(b**2 * loss(np.ones(INPUTS), 1.0), rel=1e-9)


def test_per_input_has_a_floor_for_inputs_that_hardly_matter():
    x, y, target, _ = data()
    target = np.nan_to_num(target, nan=1.0)
    target[:, :, 2] *= 1e-9
    result = matching_scale(x, y, target, scale="per_input", xp=np)
    sigma = x.std(axis=0)
    assert (result.scale[:, 2] / sigma[2] < 10.001 * (result.scale / sigma).min(axis=1)).all()


@pytest.mark.parametrize("scale", ["block", "per_input"])
def test_degenerate_data_give_finite_scales(scale):
    x, y, target, _ = data()
    zero = matching_scale(x, y, np.zeros_like(target), scale=scale, xp=np)
    assert zero.scale == pytest.approx(np.tile(x.std(axis=0), (OUTPUTS, 1)))
    unknown = matching_scale(x, None, np.full_like(target, np.nan), scale=scale, xp=np)
    assert unknown.scale == pytest.approx(np.tile(x.std(axis=0), (OUTPUTS, 1)))
    assert (unknown.threshold > 0).all()
    one_row = matching_scale(x[:1], None, np.ones((1, OUTPUTS, INPUTS)), scale=scale, xp=np)
    assert (one_row.scale > 0).all()
    constant_y = matching_scale(x, np.ones_like(y), target, scale=scale, xp=np)
    assert (constant_y.scale > 0).all()


def test_constant_columns_are_recognised_despite_rounding():
    values = np.full((1000, 2), 0.1)
    values[:, 1] += np.linspace(0, 1e-9, 1000)
    deviation = standard_deviation(values, xp=np)
    assert deviation[0] == 0
    assert deviation[1] == pytest.approx(values[:, 1].std())


def test_directional_scale():
    rng = np.random.default_rng(0)
    y, target = rng.standard_normal((N, OUTPUTS)), rng.standard_normal((N, OUTPUTS, 4))
    result = directional_scale(y, target, xp=np)
    expected = y.std(axis=0) / np.sqrt((target**2).mean(axis=(0, 2)))
    assert result.scale[:, 0] == pytest.approx(expected)
    assert result.threshold == pytest.approx(y.std(axis=0))
    assert directional_scale(None, target, xp=np).scale == pytest.approx(np.ones((OUTPUTS, 1)))
    assert directional_scale(y, target, scale="none", xp=np).scale == pytest.approx(np.ones((OUTPUTS, 1)))


def test_statistics_agree_in_torch():
    torch = pytest.importorskip("torch")
    arrays = data()
    for scale in ("block", "per_input", "none"):
        expected = matching_scale(*arrays[:3], mask=arrays[3], scale=scale, xp=np)
        x, y, target, mask = (torch.tensor(a) for a in arrays)
        got = matching_scale(x, y, target, mask=mask, scale=scale, xp=torch)
        assert got.scale.numpy() == pytest.approx(expected.scale)
        assert got.threshold.numpy() == pytest.approx(expected.threshold)


def test_scaler_applies_the_chain_rule():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 2)) * [3.0, 0.2] + [1.0, -5.0]

    def f(X):
        return np.stack([np.sin(X[:, 0]) * X[:, 1], X[:, 0] ** 2], axis=1)

    dydx = np.stack(
        [
            np.stack([np.cos(X[:, 0]) * X[:, 1], np.sin(X[:, 0])], axis=1),
            np.stack([2 * X[:, 0], np.zeros(50)], axis=1),
        ],
        axis=1,
    )
    scaler = DerivativeScaler().fit(X, f(X), dydx)
    Xs, ys, ds = scaler.transform(X, f(X), dydx)
    assert Xs.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert ys.std(axis=0) == pytest.approx(1)
    for j in range(2):
        step = np.zeros(2)
        step[j] = 1e-6
        forward, backward = (
            scaler.transform(y=f(scaler.inverse_transform(Xs + sign * step)[0]))[1] for sign in (1, -1)
        )
        assert ds[:, :, j] == pytest.approx((forward - backward) / 2e-6, abs=1e-7)  # central differences in float64
    for original, back in zip((X, f(X), dydx), scaler.inverse_transform(Xs, ys, ds), strict=True):
        assert back == pytest.approx(original)


def test_scaler_shapes_none_nan_and_constant_columns():
    X = np.array([[0.0, 5.0], [2.0, 5.0]])
    y = np.array([1.0, 7.0])
    dydx = np.array([[3.0, np.nan], [3.0, 1.0]])
    scaler = DerivativeScaler().fit(X, y, dydx)
    assert scaler.n_features_in_ == 2
    assert scaler.x_scale_.tolist() == [1.0, 1.0]
    assert scaler.y_scale_.tolist() == [3.0]
    _, ys, ds = scaler.transform(X, y, dydx)
    assert ys.shape == (2,)
    assert ds.shape == (2, 2)
    assert np.isnan(ds[0, 1])
    assert scaler.transform(X, y[:, None], dydx[:, None, :])[2].shape == (2, 1, 2)
    assert scaler.transform(None, None, None) == (None, None, None)
    assert isinstance(clone(scaler), DerivativeScaler)
    assert "DerivativeScaler()" in repr(scaler)


def test_scaler_errors():
    X, y, dydx = np.zeros((4, 2)), np.zeros((4, 3)), np.zeros((4, 3, 2))
    with pytest.raises(NotFittedError):
        DerivativeScaler().transform(X)
    for name, args in {
        "X": (X[0], y, dydx),
        "y": (X, y[:3], dydx),
        "dydx": (X, y, dydx[:, :2]),
        "dydx` must have shape (4, 3, 2)": (X, y, dydx[:3]),
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"`{name}")):
            DerivativeScaler().fit(*args)
    with pytest.raises(ValueError, match="`X` must be finite"):
        DerivativeScaler().fit(X * np.nan, y)
    with pytest.raises(ValueError, match="`dydx` must be finite or NaN"):
        DerivativeScaler().fit(X, y, dydx + np.inf)
    scaler = DerivativeScaler().fit(X, y)
    with pytest.raises(ValueError, match="`X` must have shape"):
        scaler.transform(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="`y` must have shape"):
        scaler.transform(y=np.zeros(4))
    with pytest.raises(ValueError, match="`scale` must be one of"):
        matching_scale(X, y, dydx, scale="blocks", xp=np)
