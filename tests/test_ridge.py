"""GradientEnhancedRidge: Ridge without derivatives, the stacked least squares with them, units, weights, masks."""

from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import base
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, SplineTransformer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import gradwise._ridge_data
from gradwise import GradientEnhancedRidge, GradientEnhancedRidgeCV
from gradwise._basis import derivatives, features
from gradwise._matching_scale import matching_scale

clone: Any = base.clone  # typed as what cannot be fitted


class Cubes:
    """A basis of one's own without scikit-learn."""

    def transform(self, X):
        return np.hstack([X, X**3])

    def derivative(self, X):
        eye = np.eye(X.shape[1])
        return np.concatenate([np.broadcast_to(eye, (len(X), *eye.shape)), 3 * X[:, :, None] ** 2 * eye], axis=1)


BASES = {
    "none": None,
    "polynomial": PolynomialFeatures(2),
    "spline": SplineTransformer(4, 3, extrapolation="continue"),
    "scaled": make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False)),
    "own": Cubes(),
}


def data(n=12, d=3, m=2, seed=0, unknown=0.3):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * np.array([1.0, 10.0, 0.1, 3.0, 1.0])[:d] + 2.0
    y = rng.standard_normal((n, m)) * np.array([2.0, 30.0, 1.0])[:m] + 5.0
    dydx = rng.standard_normal((n, m, d))
    dydx[rng.random(dydx.shape) < unknown] = np.nan
    return X, y, dydx, rng.uniform(0.2, 2.0, n)


def scale_by_loop(X, y, dydx, s):
    """The c_oj of the docstring, for inputs that all vary."""
    d = X.shape[1]
    result = np.empty(dydx.shape[1:])

    def deviation(values):
        return np.sqrt(np.average((values - np.average(values, weights=s)) ** 2, weights=s))

    sigma_x = [deviation(X[:, j]) for j in range(d)]
    for o in range(dydx.shape[1]):
        known = [(i, j) for i in range(len(X)) for j in range(d) if not np.isnan(dydx[i, o, j])]
        mean = np.average([(sigma_x[j] * dydx[i, o, j]) ** 2 for i, j in known], weights=[s[i] for i, j in known])
        result[o] = [deviation(y[:, o]) * sigma / np.sqrt(d * mean) for sigma in sigma_x]
    return result


def stacked(model, X, y, dydx, s, scale):
    """Coefficients and intercept of each output by least squares on all rows at once, as the objective says."""
    phi, slopes = features(model.basis_, X), derivatives(model.basis_, X)
    p = phi.shape[1]
    coefs, intercepts = [], []
    for o in range(y.shape[1]):
        rows, targets = [], []
        for i in range(len(X)):
            rows.append(np.sqrt(s[i]) * np.append(phi[i], 1.0 * model.fit_intercept))
            targets.append(np.sqrt(s[i]) * y[i, o])
            for j in np.flatnonzero(~np.isnan(dydx[i, o])):
                factor = np.sqrt(model.derivative_weight * s[i]) * scale[o, j]
                rows.append(factor * np.append(slopes[i, :, j], 0.0))
                targets.append(factor * dydx[i, o, j])
        rows += list(np.sqrt(model.alpha) * np.eye(p, p + 1))
        targets += [0.0] * p
        solution = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
        coefs.append(solution[:-1])
        intercepts.append(solution[-1])
    return np.array(coefs), np.array(intercepts)


# -- without derivatives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", BASES)
def test_without_derivatives_it_is_ridge(name, alpha, n, fit_intercept, weights):
    X, y, dydx, s = data(n, 3)
    X = (X - 2) / [
        1.0,
        10.0,
        0.1,
    ]  # both are least squares: well-conditioned, so that rounding does not tell them apart
    sample_weight = s if weights else None
    model = GradientEnhancedRidge(alpha, fit_intercept=fit_intercept, basis=BASES[name])
    model.fit(X, y, sample_weight=sample_weight)
    phi = features(model.basis_, X)
    reference = Ridge(alpha, fit_intercept=fit_intercept, solver="svd").fit(phi, y, sample_weight=sample_weight)
    if alpha == 0:  # Ridge divides by singular values of 1e-16 of the largest, where a fit is not unique; this does not
        reference = LinearRegression(fit_intercept=fit_intercept, tol=1e-12).fit(phi, y, sample_weight=sample_weight)
    new = np.vstack([X, X[:2] + 0.1])
    np.testing.assert_allclose(
        model.predict(new), reference.predict(features(model.basis_, new)), rtol=1e-10, atol=1e-9
    )
    if alpha > 0:
        np.testing.assert_allclose(model.coef_, reference.coef_, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(model.intercept_, reference.intercept_ * np.ones(2), rtol=1e-10, atol=1e-10)
    same = clone(model).set_params(derivative_weight=0.0).fit(X, y, dydx, sample_weight)
    np.testing.assert_array_equal(same.coef_, model.coef_)


@pytest.mark.parametrize("n", [5, 50])
def test_shapes_of_the_attributes_are_those_of_ridge(n):
    X, y, _, _ = data(n, 5)
    for target in (y, y[:, 0]):
        ours, theirs = GradientEnhancedRidge(2.0).fit(X, target), Ridge(2.0).fit(X, target)
        assert ours.coef_.shape == theirs.coef_.shape
        assert np.shape(ours.intercept_) == np.shape(theirs.intercept_)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-10)
        np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-10)
        assert ours.predict_jacobian(X).shape == (*target.shape, X.shape[1])
    assert GradientEnhancedRidge(fit_intercept=False).fit(X, y).intercept_ == 0.0
    column = GradientEnhancedRidge(2.0).fit(X, y[:, :1])  # predicts what was fitted: a column
    assert (column.predict(X).shape, column.predict_jacobian(X).shape) == ((n, 1), (n, 1, 5))


def test_alpha_for_each_output():
    X, y, dydx, _ = data()
    for basis in BASES.values():
        both = GradientEnhancedRidge([0.1, 10.0], basis=basis).fit(X, y, dydx)
        for o, alpha in enumerate([0.1, 10.0]):
            one = GradientEnhancedRidge(alpha, basis=basis).fit(X, y[:, o], dydx[:, o])
            np.testing.assert_allclose(both.coef_[o], one.coef_, rtol=1e-9, atol=1e-10)
    ours, theirs = GradientEnhancedRidge([0.1, 10.0]).fit(X, y), Ridge(cast("Any", [0.1, 10.0])).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-10)


def test_weight_zero_skips_the_derivatives():
    class Unknown(Cubes):
        def derivative(self, X):
            raise NotImplementedError

    X, y, dydx, _ = data()
    assert GradientEnhancedRidge(derivative_weight=0, basis=Unknown()).fit(X, y, dydx).coef_.shape == (2, 6)
    with pytest.raises(NotImplementedError):
        GradientEnhancedRidge(basis=Unknown()).fit(X, y, dydx)


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("alpha", [1e-3, 3.0])
@pytest.mark.parametrize("n", [2, 4, 30])
@pytest.mark.parametrize("name", BASES)
def test_it_is_the_least_squares_solution_of_all_rows(name, n, alpha, fit_intercept):
    X, y, dydx, s = data(n)
    dydx[1] = np.nan  # a row without any derivative
    model = GradientEnhancedRidge(alpha, 0.7, fit_intercept, BASES[name]).fit(X, y, dydx, s)
    scale = scale_by_loop(X, y, dydx, s)
    np.testing.assert_allclose(model.derivative_scale_, scale, rtol=1e-12)
    coef, intercept = stacked(model, X, y, dydx, s, scale)
    np.testing.assert_allclose(model.coef_, coef, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(model.intercept_ + np.zeros(2), intercept, rtol=1e-8, atol=1e-7)


def test_scale_is_that_of_gradient_matching():
    X, y, dydx, _ = data()
    mask = np.random.default_rng(1).random(dydx.shape) < 0.7
    model = GradientEnhancedRidge().fit(X, y, dydx, mask=mask)
    assert model.derivative_scale_ == pytest.approx(matching_scale(X, y, dydx, mask=mask, xp=np).scale, rel=1e-12)


def test_weight_one_makes_a_relative_derivative_error_count_like_a_relative_value_error():
    X, y, dydx, _ = data(unknown=0.0)
    scale = GradientEnhancedRidge().fit(X, y, dydx).derivative_scale_
    values = np.sum((0.1 * (y - y.mean(axis=0))) ** 2, axis=0)  # 10 %
    np.testing.assert_allclose(np.sum((scale * 0.1 * dydx) ** 2, axis=(0, 2)), values, rtol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_blocks_do_not_matter(name, monkeypatch):
    X, y, dydx, s = data(70)
    whole = GradientEnhancedRidge(0.1, basis=BASES[name]).fit(X, y, dydx, s)
    monkeypatch.setattr(gradwise._ridge_data, "_BLOCK", 40)
    parts = GradientEnhancedRidge(0.1, basis=BASES[name]).fit(X, y, dydx, s)
    np.testing.assert_allclose(parts.coef_, whole.coef_, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(parts.predict(X), whole.predict(X), rtol=1e-9)
    np.testing.assert_allclose(parts.predict_jacobian(X), whole.predict_jacobian(X), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", BASES)
def test_outputs_do_not_know_of_each_other(name):
    X, y, dydx, s = data(20, 3, 3)
    dydx[:, 1] = np.where(np.isnan(dydx[:, 0]), np.nan, 1.0)  # outputs 0 and 1 know the same entries and share a matrix
    model = GradientEnhancedRidge(0.5, basis=BASES[name]).fit(X, y, dydx, s)
    for o in range(3):
        one = GradientEnhancedRidge(0.5, basis=BASES[name]).fit(X, y[:, o], dydx[:, o], s)
        np.testing.assert_allclose(model.coef_[o], one.coef_, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(model.predict_jacobian(X)[:, o], one.predict_jacobian(X), rtol=1e-7, atol=1e-8)


# -- exact derivatives -------------------------------------------------------------------------------------------------


def test_one_sample_recovers_the_coefficients():
    rng = np.random.default_rng(0)
    x, coef, intercept = rng.standard_normal((1, 5)), rng.standard_normal((2, 5)), np.array([3.0, -1.0])
    model = GradientEnhancedRidge(alpha=0.0).fit(x, x @ coef.T + intercept, coef[None])
    np.testing.assert_allclose(model.coef_, coef, rtol=1e-14)
    np.testing.assert_allclose(model.intercept_, intercept, rtol=1e-14)
    np.testing.assert_array_equal(model.derivative_scale_, np.ones((2, 5)))  # nothing varies: sigma_x is 1


def test_one_sample_recovers_a_thousand_coefficients_and_leaves_unknown_ones_alone():
    rng = np.random.default_rng(0)
    x, coef = rng.standard_normal((1, 1000)), rng.standard_normal(1000)
    dydx = coef[None].copy()
    dydx[0, 7] = np.nan
    model = GradientEnhancedRidge(alpha=0.0).fit(x, x @ coef, dydx)
    np.testing.assert_allclose(np.delete(model.coef_, 7), np.delete(coef, 7), rtol=1e-12)
    assert model.coef_[7] == 0.0  # the shortest solution


def test_unknown_columns_are_fitted_to_the_values():
    rng = np.random.default_rng(0)
    X, coef = rng.standard_normal((30, 100)), rng.standard_normal(100)
    dydx = np.tile(coef, (30, 1))
    dydx[:, :20] = np.nan  # 20 free columns, 30 values: determined
    model = GradientEnhancedRidge(alpha=0.0).fit(X, X @ coef + 1, dydx)
    np.testing.assert_allclose(model.coef_, coef, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("alpha", [0.0, 1e-8])
def test_a_constant_column_follows_its_derivative(alpha):
    rng = np.random.default_rng(0)
    X, coef = rng.standard_normal((6, 3)), np.array([1.0, -2.0, 0.5])
    X[:, 1] = 0.7  # the mean of six times 0.7 is not exactly 0.7
    dydx = np.tile(coef, (6, 1))
    model = GradientEnhancedRidge(alpha).fit(X, X @ coef, dydx)
    np.testing.assert_allclose(model.coef_, coef, rtol=1e-7)
    sigma_y = (X @ coef).std()
    assert model.derivative_scale_[0, 1] * 2.0 == pytest.approx(sigma_y / np.sqrt(3), rel=1e-12)  # |dydx| is 2
    zero = GradientEnhancedRidge().fit(X, X[:, 0], np.tile([1.0, 0.0, 0.0], (6, 1)))
    assert zero.derivative_scale_[0, 1] == 1.0


def test_polynomials_are_recovered_from_fewer_samples_than_coefficients():
    rng = np.random.default_rng(1)
    basis = PolynomialFeatures(3)
    X = rng.uniform(-1, 1, (8, 3))
    X[0] = 0.0
    coef = rng.standard_normal(basis.fit_transform(X).shape[1])  # 20 coefficients, 8 values
    dydx = np.einsum("ikj,k->ij", derivatives(basis, X), coef)
    model = GradientEnhancedRidge(0.0, basis=basis).fit(X, basis.transform(X) @ coef, dydx)
    new = rng.uniform(-2, 2, (10, 3))
    np.testing.assert_allclose(model.predict(new), basis.transform(new) @ coef, rtol=1e-9, atol=1e-10)
    expected = np.einsum("ikj,k->ij", derivatives(basis, new), coef)
    np.testing.assert_allclose(model.predict_jacobian(new), expected, rtol=1e-9, atol=1e-9)


def test_predicted_derivatives_equal_central_differences():
    X, y, dydx, _ = data(20)
    for basis in BASES.values():
        model = GradientEnhancedRidge(0.1, basis=basis).fit(X, y, dydx)
        steps = 1e-5 * np.eye(3)
        columns = [(model.predict(X + step) - model.predict(X - step)) / 2e-5 for step in steps]
        jacobian = model.predict_jacobian(X)
        np.testing.assert_allclose(jacobian, np.stack(columns, axis=2), rtol=1e-5, atol=1e-5 * np.abs(jacobian).max())


# -- weights, masks, order, units --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_integer_weights_are_repeated_rows(name):
    X, y, dydx, _ = data(8)
    times = np.array([1, 0, 3, 2, 1, 0, 2, 1])
    X[5] = 1e3  # a removed sample is not seen by scales, means and knots either
    weighted = GradientEnhancedRidge(0.3, basis=BASES[name]).fit(X, y, dydx, times)
    rows = np.repeat(np.arange(8), times)
    repeated = GradientEnhancedRidge(0.3, basis=BASES[name]).fit(X[rows], y[rows], dydx[rows])
    np.testing.assert_allclose(weighted.derivative_scale_, repeated.derivative_scale_, rtol=1e-12)
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", BASES)
def test_mask_is_nan_and_selects(name):
    X, y, dydx, _ = data(unknown=0.0)
    mask = np.random.default_rng(3).random(dydx.shape) < 0.6
    model = GradientEnhancedRidge(basis=BASES[name])
    nan = clone(model).fit(X, y, np.where(mask, dydx, np.nan)).coef_
    np.testing.assert_array_equal(clone(model).fit(X, y, np.where(mask, dydx, 1e300), mask=mask).coef_, nan)
    nothing = clone(model).fit(X, y, np.full(dydx.shape, np.nan)).coef_
    np.testing.assert_allclose(nothing, clone(model).fit(X, y).coef_, rtol=1e-8, atol=1e-9)


@given(st.permutations(range(12)), st.sampled_from(sorted(BASES)))
@settings(max_examples=15, deadline=None)
def test_order_of_rows_is_irrelevant(order, name):
    X, y, dydx, s = data()
    order = list(order)
    model = GradientEnhancedRidge(0.2, basis=BASES[name])
    first = clone(model).fit(X, y, dydx, s).predict(X)
    second = clone(model).fit(X[order], y[order], dydx[order], s[order]).predict(X)
    np.testing.assert_allclose(second, first, rtol=1e-8, atol=1e-8)


@given(a=st.floats(0.01, 100), b=st.floats(-100, 100), c=st.floats(0.01, 100), name=st.sampled_from(sorted(BASES)))
@settings(max_examples=30, deadline=None)
def test_units_of_y_do_not_matter(a, b, c, name):
    X, y, dydx, s = data()
    unit = np.array([a, c])  # a unit of its own for each output
    model = GradientEnhancedRidge(0.2, basis=BASES[name])
    first = clone(model).fit(X, y, dydx, s).predict(X)
    second = clone(model).fit(X, unit * y + b, unit[:, None] * dydx, s).predict(X)
    np.testing.assert_allclose((second - b) / unit, first, rtol=1e-7, atol=1e-6)


@given(
    units=st.lists(st.floats(0.03, 30), min_size=3, max_size=3),
    constant=st.booleans(),
    name=st.sampled_from(["none", "polynomial", "scaled"]),
)
@settings(max_examples=30, deadline=None)
def test_units_of_x_do_not_matter_where_coefficients_are_not_penalised_in_them(units, constant, name):
    X, y, dydx, _ = data(20)
    X = (X - 2) / [1.0, 10.0, 0.1]
    if constant:
        X[:, 2] = 0.7
    unit = np.array(units)
    # A StandardScaler in front makes any alpha free of units, the others are with alpha = 0 only.
    model = GradientEnhancedRidge(0.2 if name == "scaled" else 0.0, basis=BASES[name])
    if name == "polynomial":
        model.set_params(basis=PolynomialFeatures(2, include_bias=False))
    if constant and name == "scaled":
        return  # StandardScaler keeps the units of a constant column
    first = clone(model).fit(X, y, dydx).predict(X)
    second = clone(model).fit(unit * X, y, dydx / unit).predict(unit * X)
    np.testing.assert_allclose(second, first, rtol=1e-6, atol=1e-6)


def test_alpha_goes_with_the_square_of_a_common_unit():
    X, y, dydx, s = data()
    first = GradientEnhancedRidge(0.2).fit(X, y, dydx, s).predict(X)
    np.testing.assert_allclose(
        GradientEnhancedRidge(20.0).fit(10 * X, y, dydx / 10, s).predict(10 * X), first, rtol=1e-9
    )


def test_arguments_are_not_changed():
    arrays = data()
    copies = [array.copy() for array in arrays]
    GradientEnhancedRidge(basis=PolynomialFeatures(2)).fit(*arrays)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


# -- scikit-learn and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator", [GradientEnhancedRidge(), GradientEnhancedRidgeCV(), GradientEnhancedRidgeCV(cv=3)]
)
def test_check_estimator(estimator):
    checks = check_estimator(estimator, on_skip=None)  # a failed check raises
    assert len(checks) > 40
    # That one needs an environment variable, which has to be set before scipy is imported.
    assert {check["check_name"] for check in checks if check["status"] != "passed"} <= {"check_array_api_input"}


def test_names_of_columns():
    X, y, dydx, _ = data()
    model = GradientEnhancedRidge().fit(pd.DataFrame(X, columns=list("abc")), y, dydx)
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert model.n_features_in_ == 3


def test_errors():
    X, y, dydx, s = data()
    model = GradientEnhancedRidge()
    for wrong in (dydx[:, 0], dydx[:, :, :2], dydx.transpose(0, 2, 1), dydx[:5], dydx[:, :1]):
        with pytest.raises(ValueError, match=r"`dydx` must have shape \(12, 2, 3\); got"):
            model.fit(X, y, wrong)
    with pytest.raises(ValueError, match=r"`dydx` must have shape \(12, 1, 3\) or \(12, 3\)"):
        model.fit(X, y[:, 0], dydx)
    with pytest.raises(ValueError, match="must be finite or NaN"):
        model.fit(X, y, np.where(np.isnan(dydx), np.inf, dydx))
    with pytest.raises(ValueError, match="`mask` must have shape"):
        model.fit(X, y, dydx, mask=np.ones((12, 3), dtype=bool))
    with pytest.raises(TypeError, match="Pass `mask != 0`"):
        model.fit(X, y, dydx, mask=np.ones((12, 2, 3)))
    with pytest.raises(TypeError, match="there is no `dydx`"):
        model.fit(X, y, mask=np.ones((12, 2, 3), dtype=bool))
    with pytest.raises(ValueError, match="`sample_weight` must not be negative, and not all zero"):
        model.fit(X, y, dydx, -s)
    with pytest.raises(ValueError, match="zero"):  # scikit-learn's words
        model.fit(X, y, dydx, 0 * s)
    with pytest.raises(ValueError, match="`derivative_weight` must be finite and not negative; got -1"):
        GradientEnhancedRidge(derivative_weight=-1).fit(X, y)
    with pytest.raises(ValueError, match="`alpha` must be finite and not negative"):
        GradientEnhancedRidge(-1.0).fit(X, y)
    with pytest.raises(ValueError, match=r"`alpha` must be a number or have shape \(2,\)"):
        GradientEnhancedRidge([1.0, 2.0, 3.0]).fit(X, y)
    with pytest.raises(TypeError, match="`basis` must be PolynomialFeatures"):
        GradientEnhancedRidge(basis="cubic").fit(X, y)
