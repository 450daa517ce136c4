"""GradientEnhancedRidgeCV: the closed form equals leaving samples out one by one, folds equal refits, RidgeCV."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import base
from sklearn.linear_model import RidgeCV
from sklearn.metrics import make_scorer, mean_absolute_error, r2_score
from sklearn.model_selection import GroupKFold, KFold, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, SplineTransformer, StandardScaler

import gradwise._ridge_data
from gradwise import GradientEnhancedRidge, GradientEnhancedRidgeCV, estimate_gradients
from gradwise._ridge_data import training_samples
from gradwise._ridge_equations import coefficients, equations
from gradwise._ridge_loo import leave_one_out

clone: Any = base.clone  # typed as what cannot be fitted
BASES = {
    "none": None,
    "polynomial": PolynomialFeatures(2),
    "spline": SplineTransformer(4, 3, extrapolation="continue"),
    "scaled": make_pipeline(StandardScaler(), PolynomialFeatures(3)),  # 20 features, more than samples
}
ALPHAS = (1e-3, 0.1, 10.0)
WEIGHTS = (0.0, 0.3, 3.0)


def data(n=11, d=3, m=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) + 1.0
    y = rng.standard_normal((n, m)) * np.array([2.0, 30.0])[:m] + 5.0
    dydx = rng.standard_normal((n, m, d))
    dydx[rng.random(dydx.shape) < 0.3] = np.nan
    dydx[3] = np.nan
    return X, y, dydx, rng.uniform(0.2, 2.0, n)


def brute_force(X, y, dydx, s, basis, scale, alpha, weight, fit_intercept):
    """Leave each sample out and fit again, with the scale and the basis of all samples."""
    result = np.empty(y.shape)
    for i in range(len(X)):
        rest = np.arange(len(X)) != i
        samples = training_samples(X[rest], y[rest], dydx[rest], mask=None, sample_weight=s[rest])
        system = equations(samples, basis, scale, fit_intercept=fit_intercept)
        coef = coefficients(system, alpha=np.full(y.shape[1], alpha), derivative_weight=weight)
        phi = X[i] if basis is None else basis.transform(X[[i]])[0]
        result[i] = coef @ (phi - system.center) + system.level
    return result


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("name", BASES)
def test_closed_form_equals_leaving_each_sample_out(name, fit_intercept, monkeypatch):
    X, y, dydx, s = data()
    model = GradientEnhancedRidge(basis=BASES[name], fit_intercept=fit_intercept).fit(X, y, dydx, s)
    basis, scale = model.basis_, model.derivative_scale_
    samples = training_samples(X, y, dydx, mask=None, sample_weight=s)
    system = equations(samples, basis, scale, fit_intercept=fit_intercept)
    for weight in WEIGHTS:
        expected = [brute_force(X, y, dydx, s, basis, scale, alpha, weight, fit_intercept) for alpha in ALPHAS]
        for block in (2**22, 100):  # one block, and several
            with monkeypatch.context() as patch:
                patch.setattr(gradwise._ridge_data, "_BLOCK", block)
                predictions = leave_one_out(
                    samples, basis, scale, system, alphas=ALPHAS, derivative_weight=weight, fit_intercept=fit_intercept
                )
            np.testing.assert_allclose(predictions, expected, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_score_and_choice_are_those_of_leaving_each_sample_out(name):
    X, y, dydx, s = data()
    model = GradientEnhancedRidgeCV(ALPHAS, WEIGHTS, basis=BASES[name]).fit(X, y, dydx, s)
    variance = np.average((y - np.average(y, axis=0, weights=s)) ** 2, axis=0, weights=s)
    scores = []
    for weight in WEIGHTS:
        for alpha in ALPHAS:
            left_out = brute_force(X, y, dydx, s, model.basis_, model.derivative_scale_, alpha, weight, True)
            scores.append(np.mean(1 - np.average((y - left_out) ** 2, axis=0, weights=s) / variance))
    np.testing.assert_allclose(model.cv_results_["mean_test_score"], scores, rtol=1e-7)
    best = int(np.argmax(scores))
    assert model.cv_results_["rank_test_score"][best] == 1
    assert (model.derivative_weight_, model.alpha_) == (WEIGHTS[best // 3], ALPHAS[best % 3])
    assert model.best_score_ == pytest.approx(scores[best])
    refit = GradientEnhancedRidge(model.alpha_, model.derivative_weight_, basis=BASES[name]).fit(X, y, dydx, s)
    np.testing.assert_allclose(model.coef_, refit.coef_, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(model.intercept_, refit.intercept_, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(model.predict_jacobian(X), refit.predict_jacobian(X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [4, 30])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_without_derivatives_it_is_ridge_cv(n, fit_intercept):
    X, y, _, s = data(n, 6)
    for weight in (None, s):
        ours = GradientEnhancedRidgeCV(ALPHAS, fit_intercept=fit_intercept).fit(X, y[:, 0], sample_weight=weight)
        theirs: Any = RidgeCV(ALPHAS, fit_intercept=fit_intercept).fit(X, y[:, 0], sample_weight=weight)
        assert ours.alpha_ == theirs.alpha_
        assert ours.derivative_weight_ == 0
        assert GradientEnhancedRidgeCV(ALPHAS, [1.0]).fit(X, y[:, 0]).derivative_weight_ == 0
        np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-9)
        if weight is None:
            assert 1 - ours.best_score_ == pytest.approx(-theirs.best_score_ / y[:, 0].var(), rel=1e-9)


@pytest.mark.parametrize("cv", [3, ShuffleSplit(4, random_state=0), KFold(4, shuffle=True, random_state=1)])
@pytest.mark.parametrize("name", ["none", "polynomial"])
def test_folds_are_of_whole_samples(name, cv):
    X, y, dydx, s = data(20)
    model = GradientEnhancedRidgeCV(ALPHAS, WEIGHTS, basis=BASES[name], cv=cv).fit(X, y, dydx, s)
    variance = np.average((y - np.average(y, axis=0, weights=s)) ** 2, axis=0, weights=s)
    splitter = KFold(3) if cv == 3 else cv
    scores = np.empty((3, 3, splitter.get_n_splits()))
    for k, (train, test) in enumerate(splitter.split(X)):
        samples = training_samples(X[train], y[train], dydx[train], mask=None, sample_weight=s[train])
        system = equations(samples, model.basis_, model.derivative_scale_, fit_intercept=True)
        phi = X[test] if model.basis_ is None else model.basis_.transform(X[test])
        for w, weight in enumerate(WEIGHTS):
            for a, alpha in enumerate(ALPHAS):
                coef = coefficients(system, alpha=np.full(2, alpha), derivative_weight=weight)
                residual = y[test] - (phi - system.center) @ coef.T - system.level
                scores[w, a, k] = np.mean(1 - np.average(residual**2, axis=0, weights=s[test]) / variance)
    np.testing.assert_allclose(model.cv_results_["mean_test_score"], scores.mean(axis=2).ravel(), rtol=1e-9)
    np.testing.assert_allclose(model.cv_results_["std_test_score"], scores.std(axis=2).ravel(), rtol=1e-9)


def test_one_sample_per_fold_is_leave_one_out():
    X, y, dydx, _ = data()
    folds = GradientEnhancedRidgeCV(ALPHAS, WEIGHTS, basis=BASES["polynomial"], cv=len(X)).fit(X, y, dydx)
    closed = clone(folds).set_params(cv=None).fit(X, y, dydx)
    for key in ("mean_test_score", "rank_test_score", "alpha", "derivative_weight"):
        np.testing.assert_allclose(folds.cv_results_[key], closed.cv_results_[key], rtol=1e-7)
    assert pd.DataFrame(closed.cv_results_).shape == (9, 4)


def test_weight_zero_removes_a_sample_from_the_folds_too():
    X, y, dydx, s = data(12)
    s[[2, 7]] = 0.0
    folds = [(np.arange(6), np.arange(6, 12)), (np.arange(6, 12), np.arange(6)), (np.arange(12), np.array([2, 7]))]
    kept = np.flatnonzero(s)
    fewer = [(np.arange(5), np.arange(5, 10)), (np.arange(5, 10), np.arange(5))]
    first = GradientEnhancedRidgeCV(ALPHAS, WEIGHTS, cv=folds).fit(X, y, dydx, s)
    second = GradientEnhancedRidgeCV(ALPHAS, WEIGHTS, cv=fewer).fit(X[kept], y[kept], dydx[kept], s[kept])
    np.testing.assert_allclose(first.cv_results_["mean_test_score"], second.cv_results_["mean_test_score"], rtol=1e-10)
    np.testing.assert_allclose(first.coef_, second.coef_, rtol=1e-10)


@pytest.mark.parametrize("cv", [None, 3])
def test_scorers_of_scikit_learn(cv):
    X, y, dydx, s = data(15)
    model = GradientEnhancedRidgeCV(ALPHAS, WEIGHTS, cv=cv)
    names = clone(model).set_params(scoring="neg_mean_absolute_error").fit(X, y, dydx)
    scorer = make_scorer(mean_absolute_error, greater_is_better=False)
    functions = clone(model).set_params(scoring=scorer).fit(X, y, dydx, np.full(15, 2.0))
    np.testing.assert_array_equal(names.cv_results_["mean_test_score"] < 0, True)
    assert functions.cv_results_["mean_test_score"].shape == (9,)
    if cv is None:
        default, r2 = clone(model).fit(X, y, dydx, s), clone(model).set_params(scoring="r2").fit(X, y, dydx, s)
        np.testing.assert_allclose(r2.cv_results_["mean_test_score"], default.cv_results_["mean_test_score"], rtol=1e-9)
        left_out = brute_force(X, y, dydx, np.ones(15), None, names.derivative_scale_, ALPHAS[1], WEIGHTS[2], True)
        assert names.cv_results_["mean_test_score"][7] == pytest.approx(-mean_absolute_error(y, left_out), rel=1e-8)
        assert r2_score(y, left_out) < 1


def test_good_derivatives_are_used_and_hopeless_ones_are_not():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((25, 10))
    coef = rng.standard_normal(10)
    y = X @ coef + 2 * rng.standard_normal(25)
    exact = np.tile(coef, (25, 1))
    good = GradientEnhancedRidgeCV().fit(X, y, exact)
    assert good.derivative_weight_ >= 1
    assert np.abs(good.coef_ - coef).max() < 0.2
    wrong = GradientEnhancedRidgeCV().fit(X, y, 30 * rng.standard_normal((25, 10)) - 5 * coef)
    assert wrong.derivative_weight_ <= 0.01
    without = GradientEnhancedRidgeCV(derivative_weights=[0.0]).fit(X, y, exact)
    np.testing.assert_allclose(without.coef_, GradientEnhancedRidgeCV().fit(X, y).coef_, rtol=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
def test_estimated_derivatives_do_not_know_the_values_that_are_held_out(outputs):
    X, y, _, s = data(30)
    y = y[:, 0] if outputs == 1 else y
    s[4] = 0.0
    seen = []

    def estimate(X, y):
        seen.append((X, y))
        return estimate_gradients(X, y)

    model = GradientEnhancedRidgeCV(ALPHAS, WEIGHTS, cv=3).fit(X, y, estimate, s)
    kept = np.flatnonzero(s)
    expected = [kept, *(np.setdiff1d(train, [4]) for train, _ in KFold(3).split(X))]
    assert len(seen) == 4
    for (inputs, values), rows in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(inputs, X[rows])
        np.testing.assert_array_equal(values, y[rows])
    arrays = GradientEnhancedRidge(model.alpha_, model.derivative_weight_)
    direct = clone(arrays).fit(X, y, estimate, s)
    np.testing.assert_allclose(model.coef_, direct.coef_, rtol=1e-10)
    by_hand = clone(arrays).fit(X[kept], y[kept], estimate_gradients(X[kept], y[kept]), s[kept])
    np.testing.assert_array_equal(direct.coef_, by_hand.coef_)
    with pytest.raises(ValueError, match="`cv` must not be None where `dydx` is a function"):
        GradientEnhancedRidgeCV().fit(X, y, estimate_gradients)
    with pytest.raises(TypeError, match="there is no `dydx`"):
        direct.fit(X, y, estimate, mask=np.ones((30, 3), dtype=bool))


def test_units_of_each_output_do_not_matter():
    X, y, dydx, s = data()
    unit = np.array([100.0, 0.01])
    first = GradientEnhancedRidgeCV(basis=PolynomialFeatures(2)).fit(X, y, dydx, s)
    second = GradientEnhancedRidgeCV(basis=PolynomialFeatures(2)).fit(X, unit * y, unit[:, None] * dydx, s)
    assert (first.alpha_, first.derivative_weight_) == (second.alpha_, second.derivative_weight_)
    np.testing.assert_allclose(second.predict(X) / unit, first.predict(X), rtol=1e-7)


def test_what_is_not_determined_without_a_sample_is_not_chosen():
    X, y, dydx, _ = data(4, 6)
    model = GradientEnhancedRidgeCV([0.0, 1.0], [0.0]).fit(X, y, dydx)
    assert model.alpha_ == 1.0
    assert model.cv_results_["mean_test_score"][0] == -np.inf
    with pytest.raises(ValueError, match="`alphas` must hold a value whose fit is determined"):
        GradientEnhancedRidgeCV([0.0], [0.0]).fit(X, y, dydx)


def test_errors():
    X, y, dydx, _ = data()
    with pytest.raises(ValueError, match="`alphas` must hold at least one candidate"):
        GradientEnhancedRidgeCV([]).fit(X, y)
    with pytest.raises(ValueError, match="`derivative_weights` must be finite and not negative; got -1"):
        GradientEnhancedRidgeCV(derivative_weights=[1, -1]).fit(X, y, dydx)
    with pytest.raises(ValueError, match="n_samples=1"):
        GradientEnhancedRidgeCV().fit(X[:1], y[:1], dydx[:1])
    with pytest.raises(ValueError, match="groups"):  # scikit-learn's words
        GradientEnhancedRidgeCV(cv=GroupKFold(2)).fit(X, y, dydx)
