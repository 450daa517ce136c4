"""Derivatives of bases: closed forms, float64 central differences, scikit-learn's own features."""

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    PolynomialFeatures,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
)

from gradwise._basis import check_basis, derivatives, features, fitted_basis


class Waves:
    """A basis of one's own: sin and cos of the first input."""

    def transform(self, X):
        return np.stack([np.sin(X[:, 0]), np.cos(X[:, 0])], axis=1)

    def derivative(self, X):
        result = np.zeros((len(X), 2, X.shape[1]))
        result[:, 0, 0], result[:, 1, 0] = np.cos(X[:, 0]), -np.sin(X[:, 0])
        return result


def central_differences(basis, X, step=1e-6):
    columns = []
    for j in range(X.shape[1]):
        move = step * np.eye(X.shape[1])[j]
        columns.append((features(basis, X + move) - features(basis, X - move)) / (2 * step))
    return np.stack(columns, axis=2)


def data(n=30, d=3, seed=0):
    return np.random.default_rng(seed).uniform(-2, 2, (n, d))


BASES = {
    "polynomial": PolynomialFeatures(4),
    "without bias": PolynomialFeatures(3, include_bias=False),
    "interactions": PolynomialFeatures(3, interaction_only=True),
    "degrees 2 to 3": PolynomialFeatures(cast("Any", (2, 3))),
    "cubic spline": SplineTransformer(5, 3, extrapolation="continue"),
    "quadratic quantiles": SplineTransformer(4, 2, knots="quantile", extrapolation="linear"),
    "without last": SplineTransformer(5, 3, include_bias=False, extrapolation="constant"),
    "periodic": SplineTransformer(6, 3, extrapolation="periodic"),
    "sparse": SplineTransformer(5, 3, sparse_output=True, extrapolation="linear"),
    "own": Waves(),
    "scaler": StandardScaler(),
    "scaled": make_pipeline(StandardScaler(), PolynomialFeatures(3)),
    "scaled twice": make_pipeline(MinMaxScaler((-1, 1)), RobustScaler(), MaxAbsScaler(), PolynomialFeatures(2)),
    "no spread": make_pipeline(StandardScaler(with_std=False), PolynomialFeatures(2)),
    "scaled after": make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler()),
    "chain": make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), PolynomialFeatures(2)),
    "passthrough": make_pipeline("passthrough", PolynomialFeatures(2)),
    "nothing but passthrough": make_pipeline("passthrough"),
    "splines of a scaler": make_pipeline(StandardScaler(), SplineTransformer(4, 3, extrapolation="continue")),
    "none": None,
}


@pytest.mark.parametrize("name", BASES)
def test_derivatives_equal_central_differences_inside_and_outside_the_data(name):
    basis = fitted_basis(BASES[name], data(), None)
    X = data(seed=1) * [1.0, 1.6, 0.5]  # the second input leaves the range of the fit
    # 2e-8: the truncation error of a central difference with step 1e-6 is 1e-12, rounding a few 1e-10, both times
    # derivatives of size up to 100.
    np.testing.assert_allclose(derivatives(basis, X), central_differences(basis, X), rtol=1e-7, atol=2e-8)


def test_polynomial_derivatives_are_right_at_zero():
    basis = fitted_basis(PolynomialFeatures(3), np.ones((1, 2)), None)
    result = derivatives(basis, np.array([[0.0, 0.0], [0.0, 2.0]]))
    names = list(basis.get_feature_names_out(["a", "b"]))
    expected = {"a": (1, 0), "b": (0, 1)}
    for k, name in enumerate(names):
        assert tuple(result[0, k]) == expected.get(name, (0, 0))
    at_two = {"a": (1, 0), "b": (0, 1), "a b": (2, 0), "b^2": (0, 4), "a b^2": (4, 0), "b^3": (0, 12)}
    for k, name in enumerate(names):
        assert tuple(result[1, k]) == at_two.get(name, (0, 0))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_polynomial_derivatives_equal_the_quotient_away_from_zero(degree, d, seed):
    X = np.random.default_rng(seed).uniform(0.5, 2, (4, d))
    basis = fitted_basis(PolynomialFeatures(degree), X, None)
    quotient = features(basis, X)[:, :, None] * basis.powers_ / X[:, None]
    np.testing.assert_allclose(derivatives(basis, X), quotient, rtol=1e-13, atol=1e-13)


def test_splines_outside_of_the_knots():
    X = np.linspace(0, 1, 20)[:, None]
    out = np.array([[-0.5], [1.5]])
    inside = np.array([[0.0], [1.0]])
    results = {}
    for mode in ("constant", "linear", "continue"):
        results[mode] = derivatives(fitted_basis(SplineTransformer(4, 3, extrapolation=mode), X, None), out)
    basis = fitted_basis(SplineTransformer(4, 3, extrapolation="linear"), X, None)
    assert not results["constant"].any()
    np.testing.assert_array_equal(results["linear"], derivatives(basis, inside))  # the slope at the boundary goes on
    assert np.abs(results["continue"] - results["linear"]).max() > 1
    strict = fitted_basis(SplineTransformer(4, 3, extrapolation="error"), X, None)
    np.testing.assert_array_equal(derivatives(strict, inside), derivatives(basis, inside))
    with pytest.raises(ValueError, match="beyond the limits of the knots"):
        derivatives(strict, out)


@pytest.mark.parametrize(("degree", "mode"), [(0, "linear"), (1, "constant"), (1, "linear")])
def test_splines_of_low_degree(degree, mode):
    basis = fitted_basis(SplineTransformer(4, degree, extrapolation=mode), np.linspace(0, 1, 20)[:, None], None)
    X = np.array([[-0.5], [0.2], [0.5], [0.9], [1.4]])  # no knot among them
    np.testing.assert_allclose(derivatives(basis, X), central_differences(basis, X), atol=1e-8)


def test_periodic_splines_go_on():
    basis = fitted_basis(SplineTransformer(5, 3, extrapolation="periodic"), np.linspace(0, 1, 20)[:, None], None)
    X = np.array([[0.1], [0.7]])
    np.testing.assert_allclose(derivatives(basis, X), derivatives(basis, X + 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["constant", "periodic"])
def test_constant_column_has_no_slope(mode):
    X = np.column_stack([np.linspace(0, 1, 9), np.ones(9)])
    result = derivatives(fitted_basis(SplineTransformer(4, 3, extrapolation=mode), X, None), X)
    assert np.isfinite(result).all()
    assert not result[:, :, 1].any()


def test_argument_is_copied_and_takes_weights():
    X = data()
    weight = np.ones(len(X))
    weight[X[:, 0] > 0] = 0.0
    mine = make_pipeline(StandardScaler(), SplineTransformer(4, 3))
    fitted = fitted_basis(mine, X, weight)
    assert not hasattr(mine[0], "scale_")
    np.testing.assert_allclose(fitted[0].mean_, X[weight > 0].mean(axis=0))
    own = Waves()
    assert fitted_basis(own, X, None) is not own


def test_errors():
    for basis in (PCA(), FunctionTransformer(np.log), make_pipeline(PCA(), PolynomialFeatures()), "poly", Waves):
        with pytest.raises(TypeError, match="`basis` must be PolynomialFeatures"):
            check_basis(basis)
    with pytest.raises(TypeError, match="that clips"):
        check_basis(make_pipeline(MinMaxScaler(clip=True), PolynomialFeatures()))

    class Wrong(Waves):
        def derivative(self, X):
            return super().derivative(X)[:, :, 0]

        def transform(self, X):
            return super().transform(X)[:, 0]

    with pytest.raises(ValueError, match=r"`basis.derivative` must return shape \(30, n_features, 3\); got \(30, 2\)"):
        derivatives(Wrong(), data())
    with pytest.raises(ValueError, match=r"`basis.transform` must return shape \(30, n_features\); got \(30,\)"):
        features(Wrong(), data())
    with pytest.raises(ValueError, match="finite features"), np.errstate(over="ignore"):
        features(fitted_basis(PolynomialFeatures(3), data(), None), 1e200 * data())

    class Endless(Waves):
        def derivative(self, X):
            return np.inf * np.ones((len(X), 2, 3))

    with pytest.raises(ValueError, match=r"`basis\.derivative` must be finite"):
        derivatives(Endless(), data())
