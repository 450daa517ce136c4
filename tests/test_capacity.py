"""`capacity_study`: its definitions, pairing, resuming, and what it does with fits that go wrong."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import capacity_functions
import capacity_network
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold

from gradwise import CapacityStudy, capacity_study
from gradwise._capacity_statistics import rise_band
from gradwise._capacity_training import Job, Training

Array = np.ndarray
GRID = [1, 2, 3, 5]


@dataclass
class Polynomial:
    """One input; the capacity is the degree."""

    coefficients: Array

    def predict(self, X: Array) -> Array:
        return np.polyval(self.coefficients, X[:, 0])

    def predict_jacobian(self, X: Array) -> Array:
        return np.polyval(np.polyder(self.coefficients), X)


@dataclass
class Recorder:
    """Fits polynomials and remembers what it was asked for."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    make: Callable[[Array], Any] = Polynomial

    def __call__(self, X: Array, y: Array, dydx: Array | None, *, capacity: float, seed: int) -> Any:
        self.calls.append((capacity, seed, dydx is not None, tuple(X[:, 0])))
        powers = np.arange(capacity, -1, -1)
        rows, right = X**powers, y
        if dydx is not None:
            slopes = powers * X ** np.maximum(powers - 1, 0)
            rows, right = np.concatenate([rows, slopes]), np.concatenate([y, dydx[:, 0]])
        return self.make(np.linalg.lstsq(rows, right, rcond=None)[0])


def cubic(n: int = 15, noise: float = 0.05) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(-1, 1, n))[:, None]
    return X, X[:, 0] ** 3 - X[:, 0] + noise * rng.normal(size=n), 3 * X**2 - 1


def known(value: Array | None) -> Array:
    assert value is not None
    return value


def study(fit: Any = None, grid: Any = GRID, data: Any = None, **options: Any) -> CapacityStudy:
    return capacity_study(Recorder() if fit is None else fit, grid, *(cubic() if data is None else data), **options)


# -- definitions -------------------------------------------------------------------------------------------------------


def test_definitions_from_the_frame() -> None:
    X, y, dydx = cubic()
    found = study(n_seeds=3, random_state=7)
    frame = found.to_frame()
    assert list(frame.columns) == [
        "capacity", "seed", "fold", "derivatives", "error", "derivative_error", "converged", "seconds",
    ]  # fmt: skip
    assert len(frame) == 4 * 3 * 5 * 2
    units = frame.pivot(index=["seed", "fold"], columns=["derivatives", "capacity"], values="error")
    without, with_ = units[False].to_numpy(), units[True].to_numpy()
    gaps = np.log(without) - np.log(with_)
    assert found.gap is not None
    np.testing.assert_allclose(found.gap, gaps.mean(axis=0))
    band = rise_band(gaps, rng=np.random.default_rng(7))
    np.testing.assert_array_equal(found.rise_band, band)
    mean, error = with_.mean(axis=0), with_.std(axis=0, ddof=1) / np.sqrt(15)
    need = GRID[np.flatnonzero(mean <= mean.min() + error[mean.argmin()])[0]]
    above = np.flatnonzero(band > np.log(1.5))
    assert found.need == need
    assert found.recommended_with == need
    assert found.upper_bound == (GRID[above[0] - 1] if len(above) else None)
    assert found.recommended_without == (need if found.upper_bound is None else min(need, found.upper_bound))
    unseen = frame.pivot(index=["seed", "fold"], columns=["derivatives", "capacity"], values="derivative_error")
    for derivatives, best in ((False, found.best_without), (True, found.best_with)):
        logs = np.log(units[derivatives].to_numpy()) + np.log(unseen[derivatives].to_numpy())
        assert best == GRID[logs.mean(axis=0).argmin()]
    # One training by hand: errors relative to the spread of y, derivatives at the points that are not trained on.
    rows, test = list(KFold(5, shuffle=True, random_state=8).split(X))[2]
    for derivatives in (False, True):
        model = Recorder()(X[rows], y[rows], dydx[rows] if derivatives else None, capacity=3, seed=8)
        row = frame.query(f"capacity == 3 and seed == 8 and fold == 2 and derivatives == {derivatives}").iloc[0]
        assert row.error == pytest.approx(np.sqrt(np.mean((model.predict(X[test]) - y[test]) ** 2)) / y.std())
        at = test if derivatives else rows
        miss = np.linalg.norm(model.predict_jacobian(X[at]) - dydx[at]) / np.linalg.norm(dydx[at])
        assert row.derivative_error == pytest.approx(miss)


def test_best_is_of_least_geometric_mean_of_both_unseen_errors() -> None:
    def training(error: float, unseen: float) -> Training:
        return Training(error, unseen, converged=True, seconds=0.0)

    # Products 10, 1.2 and 2: neither the least error (third) nor the least derivative error (first).
    errors = {1: (20.0, 0.5), 2: (1.0, 1.2), 4: (0.5, 4.0)}
    trainings = {Job(h, 0, fold, True): training(*both) for h, both in errors.items() for fold in range(2)}
    found = CapacityStudy((1, 2, 4), trainings)
    assert (found.best_with, found.need, found.best_without) == (2, 4, None)
    assert CapacityStudy((1, 2), {Job(h, 0, 0, False): training(1.0, h) for h in (1, 2)}).best_without == 1


def test_pairs_share_rows_and_seeds() -> None:
    fit = Recorder()
    study(fit, n_seeds=2, random_state=3)
    with_, without = ([c[:2] + c[3:] for c in fit.calls if c[2] == derivatives] for derivatives in (True, False))
    assert sorted(with_) == sorted(without)
    assert {seed for _, seed, *_ in fit.calls} == {3, 4}
    rows = {(seed, points) for _, seed, _, points in fit.calls}
    assert len(rows) == 10  # the folds are shuffled anew for each seed, and the same for all capacities


def test_gap_is_nil_where_derivatives_change_nothing() -> None:
    def same(X: Array, y: Array, dydx: Array | None, *, capacity: float, seed: int) -> Polynomial:
        return Recorder()(X, y, None, capacity=capacity, seed=seed)

    found = study(same)
    np.testing.assert_array_equal(found.gap, np.zeros(4))
    assert found.upper_bound is None


def test_gap_jumps_where_values_alone_overfit_and_bounds_the_capacity() -> None:
    found = study(grid=range(1, 11), data=cubic(14, 0.1), n_seeds=4)
    gap = known(found.gap)
    assert gap[:2].max() < 0.1  # too small for a cubic: derivatives do not help
    assert gap[-1] > 1
    assert found.upper_bound is not None
    assert 3 <= found.upper_bound < 10
    assert found.best_without == 3


def test_needed_width_of_a_teacher_network() -> None:
    function = capacity_functions.Function(capacity_functions.teacher(2, 3, seed=9), 2, samples=40, noise=0.05)
    unseen = capacity_functions.unseen_data(function, 500)
    x = np.random.default_rng(0).random((300, 2))
    y, slopes = capacity_functions.value_and_slopes(function, x)

    def student(width: int) -> float:
        """Error of the best of three, which have many samples without noise."""
        models = [capacity_network.fit(x, y, slopes, capacity=width, seed=seed) for seed in range(3)]
        return min(float(np.std(model.predict(unseen.X) - unseen.y) / unseen.y.std()) for model in models)

    assert student(3) < 0.01
    assert student(2) > 0.1
    few = capacity_functions.training_data(function, 12345)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = capacity_study(capacity_network.fit, [1, 2, 3, 8], few.X, few.y, few.dydx)
    assert (found.need, found.best_with, found.best_without, found.recommended_without) == (3, 3, 3, 3)
    assert found.upper_bound is None or found.upper_bound >= 3
    gap = known(found.gap)
    assert np.abs(gap[:2]).max() < 0.15  # too narrow: as wrong with derivatives as without
    assert gap[3] > 0.3


def test_networks_without_only() -> None:
    fit = Recorder()
    found = study(fit, networks="without", data=cubic(8))
    assert len(fit.calls) == 4 * 5
    assert not any(derivatives for *_, derivatives, _ in fit.calls)
    assert all(len(points) == 8 for *_, points in fit.calls)
    errors = found.derivative_errors(derivatives=False)
    assert errors is not None
    best = GRID[np.log(errors).mean(axis=0).argmin()]
    assert (found.best_without, found.recommended_without) == (best, best)
    np.testing.assert_array_equal(found.rise_band, rise_band(np.log(errors), rng=np.random.default_rng(0)))
    assert (found.gap, found.need, found.best_with, found.recommended_with) == (None,) * 4
    assert found.errors(derivatives=False) is None
    assert found.to_frame().error.isna().all()
    assert found.plot().axes


def test_networks_with_only_equal_those_of_both() -> None:
    both, with_ = study(), study(networks="with")
    assert (with_.need, with_.best_with) == (both.need, both.best_with)
    assert (with_.gap, with_.rise_band, with_.upper_bound, with_.best_without, with_.recommended_without) == (None,) * 5
    assert with_.plot().axes


# -- errors of derivatives ---------------------------------------------------------------------------------------------


def test_unknown_derivatives_and_outputs_count_as_in_the_loss() -> None:
    class Linear:
        def predict(self, X: Array) -> Array:
            return X @ np.array([[2.0, 0.0], [0.0, 5.0]]).T

        def predict_jacobian(self, X: Array) -> Array:
            return np.broadcast_to([[2.0, 0.0], [0.0, 5.0]], (len(X), 2, 2))

    rng = np.random.default_rng(0)
    X = rng.normal(size=(10, 2))
    dydx = rng.normal(size=(10, 2, 2))
    dydx[rng.random(dydx.shape) < 0.3] = np.nan
    y = rng.normal(size=(10, 2))
    found = capacity_study(lambda *_, **__: Linear(), [1, 2], X, y, dydx, networks="without", n_seeds=1)
    expected = []
    for output in range(2):
        there = ~np.isnan(dydx[:, output])
        target = (X.std(axis=0) * dydx[:, output])[there]
        mine = (X.std(axis=0) * Linear().predict_jacobian(X)[:, output])[there]
        expected.append(np.sum((mine - target) ** 2) / np.sum(target**2))
    errors = found.derivative_errors(derivatives=False)
    np.testing.assert_allclose(known(errors), np.full((1, 2), np.sqrt(np.mean(expected))))


def test_models_without_jacobian_are_differenced() -> None:
    @dataclass
    class Bare:
        coefficients: Array

        def predict(self, X: Array) -> Array:
            return Polynomial(self.coefficients).predict(X)

    mine, theirs = (
        found.derivative_errors(derivatives=True) for found in (study(Recorder(make=Bare)), study(Recorder()))
    )
    np.testing.assert_allclose(known(mine), known(theirs), rtol=1e-4)  # of central differences


@settings(max_examples=4)
@given(x_power=integers(-9, 9), y_power=integers(-9, 9))
def test_units_do_not_matter(x_power: int, y_power: int) -> None:
    X, y, dydx = cubic()
    x_unit, y_unit = 2.0**x_power, 2.0**y_power  # rounds nothing: L-BFGS takes the same way
    errors = [
        capacity_study(capacity_network.fit, [1, 2], *data, cv=3, n_seeds=1)
        for data in ((X, y, dydx), (x_unit * X, y_unit * y, y_unit / x_unit * dydx))
    ]
    for derivatives in (False, True):
        for name in ("errors", "derivative_errors"):
            one, other = (getattr(found, name)(derivatives=derivatives) for found in errors)
            np.testing.assert_allclose(one, other, rtol=1e-12)


# -- what is trained ---------------------------------------------------------------------------------------------------


class Ridge(BaseEstimator):
    """A scikit-learn style estimator of polynomials."""

    def __init__(self, hidden_layer_sizes: Any = (4,), degree: int = 1, random_state: int | None = None) -> None:
        self.hidden_layer_sizes, self.degree, self.random_state = hidden_layer_sizes, degree, random_state

    def fit(self, X: Array, y: Array, dydx: Array | None = None) -> "Ridge":
        capacity = self.hidden_layer_sizes[0] * self.degree
        assert self.random_state is not None
        self.model_ = Recorder()(X, y, dydx, capacity=capacity, seed=self.random_state)
        return self

    def predict(self, X: Array) -> Array:
        return self.model_.predict(X)


def test_estimators_are_cloned_with_capacity_and_seed() -> None:
    estimator = Ridge()
    by_function = study()
    for found in (
        study(estimator),
        study(Ridge((1,)), capacity_parameter="degree"),
        study(estimator, capacity_parameter=lambda h: {"hidden_layer_sizes": (1,), "degree": h}),
    ):
        np.testing.assert_allclose(known(found.errors(derivatives=True)), known(by_function.errors(derivatives=True)))
    assert estimator.get_params() == Ridge().get_params()
    assert not hasattr(estimator, "model_")
    with pytest.raises(ValueError, match="`capacity_parameter` must be a parameter of Ridge"):
        study(estimator, capacity_parameter="width")


def test_mlp_regressor_without_further_ado() -> None:
    from gradwise.torch import GradientEnhancedMLPRegressor

    X, y, dydx = cubic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = capacity_study(GradientEnhancedMLPRegressor(), [1, 4], X, y, dydx, cv=3, n_seeds=1)
    assert found.best_with in {1, 4}
    assert set(found.to_frame().converged) <= {True, False}
    errors = found.errors(derivatives=True)
    assert errors is not None
    assert errors[:, 1].mean() < 0.3  # noise of a fifth of the spread of y


@pytest.mark.parametrize("options", [{"networks": "without"}, {"cv": KFold(3)}])
def test_seeds_of_the_regressor_are_members_of_one_ensemble(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradwise.torch import GradientEnhancedMLPRegressor

    fitted: list[Any] = []
    plain = GradientEnhancedMLPRegressor.fit

    def fit(self: Any, *data: Any) -> Any:
        fitted.append((self.n_estimators, self.random_state, self.hidden_layer_sizes, len(data)))
        return plain(self, *data)

    monkeypatch.setattr(GradientEnhancedMLPRegressor, "fit", fit)
    X, y, dydx = cubic()
    found = capacity_study(
        GradientEnhancedMLPRegressor(tol=0.1), [1, 3], X, y, dydx, n_seeds=4, random_state=5, **options
    )
    folds = 1 if "networks" in options else 3
    arms = [2] * folds if folds == 1 else [2] * folds + [3] * folds
    assert fitted == [(4, 5, (width,), count) for width in (1, 3) for count in arms]
    errors = known(found.derivative_errors(derivatives=False)).reshape(4, folds, 2)
    assert len(np.unique(errors[:, 0, 1])) == 4  # four networks
    rows = np.arange(15) if folds == 1 else next(KFold(3).split(X))[0]
    ensemble = GradientEnhancedMLPRegressor((3,), tol=0.1, random_state=5, n_estimators=4).fit(X[rows], y[rows])
    mean = np.linalg.norm(ensemble.predict_jacobian(X[rows]) - dydx[rows]) / np.linalg.norm(dydx[rows])
    assert mean <= errors[:, 0, 1].mean()  # the mean of the members is no worse than they are on average


def test_folds_may_be_given() -> None:
    X = cubic()[0]
    splitter = KFold(3)
    pairs = list(splitter.split(X))
    fit = Recorder()
    one, other = study(fit, cv=splitter), study(cv=pairs)
    np.testing.assert_array_equal(one.errors(derivatives=False), other.errors(derivatives=False))
    assert {points for *_, points in fit.calls} == {tuple(X[rows, 0]) for rows, _ in pairs}


def test_processes_find_the_same() -> None:
    one, two = (study(capacity_network.fit, [1, 2], cv=3, n_jobs=jobs) for jobs in (1, 2))
    for derivatives in (False, True):
        np.testing.assert_array_equal(one.errors(derivatives=derivatives), two.errors(derivatives=derivatives))


def test_many_trains_all_units_of_a_capacity_at_once() -> None:
    class Together(Recorder):
        sizes: tuple[int, ...] = ()

        def many(self, data: Any, *, capacity: float, seeds: list[int]) -> list[Any]:
            self.sizes += (len(seeds),)
            return [self(*arrays, capacity=capacity, seed=seed) for arrays, seed in zip(data, seeds, strict=True)]

    fit = Together()
    found, one_by_one = study(fit), study()
    assert fit.sizes == (10,) * 8
    for derivatives in (False, True):
        np.testing.assert_array_equal(found.errors(derivatives=derivatives), one_by_one.errors(derivatives=derivatives))
    fit.many = lambda data, **_: []
    with pytest.raises(ValueError, match=r"`fit.many` must return 10 models"):
        study(fit)


# -- fits that go wrong ------------------------------------------------------------------------------------------------


@dataclass
class Stuck(Polynomial):
    converged_: bool = False


def test_fits_that_did_not_converge_are_flagged_and_count() -> None:
    @dataclass
    class Sometimes(Recorder):
        def __call__(self, *data: Any, capacity: float, seed: int) -> Any:
            model = super().__call__(*data, capacity=capacity, seed=seed)
            return Stuck(model.coefficients) if capacity == 5 and data[2] is None else model

    with pytest.warns(ConvergenceWarning, match=r"10 of 80 trainings did not converge \(capacities 5\)"):
        found = study(Sometimes())
    np.testing.assert_array_equal(found.gap, study().gap)
    assert found.not_converged == 10
    assert "10 of 80 trainings did not converge" in repr(found)
    frame = found.to_frame()
    flagged = frame[[value is False for value in frame.converged]]
    assert len(flagged) == 10
    assert set(flagged.capacity) == {5}
    assert not flagged.derivatives.any()
    labels = found.plot().axes[0].get_legend_handles_labels()[1]
    assert [label.split(":")[0] for label in labels if "did not converge" in label] == ["without"]


def test_warnings_of_a_fit_count_where_it_says_nothing_else() -> None:
    @dataclass
    class Warning_(Recorder):
        category: type[Warning] = ConvergenceWarning

        def __call__(self, *data: Any, capacity: float, seed: int) -> Any:
            warnings.warn("no", self.category, stacklevel=2)
            return super().__call__(*data, capacity=capacity, seed=seed)

    with pytest.warns(ConvergenceWarning, match="80 of 80") as caught:
        found = study(Warning_())
    assert len(caught) == 1  # one summary instead of 80
    assert found.not_converged == 80
    with pytest.warns(RuntimeWarning, match="no"):
        assert study(Warning_(category=RuntimeWarning)).not_converged == 0
    assert set(study().to_frame().converged) == {None}


def test_predictions_that_are_not_finite_are_left_out_with_their_unit_and_said() -> None:
    @dataclass
    class Broken(Recorder):
        def __call__(self, *data: Any, capacity: float, seed: int) -> Any:
            model = super().__call__(*data, capacity=capacity, seed=seed)
            return Polynomial(np.full(2, np.nan)) if (capacity, seed) == (2, 1) and data[2] is None else model

    with pytest.warns(ConvergenceWarning, match="5 predicted values that are not finite"):
        found = study(Broken())
    np.testing.assert_allclose(known(found.gap), known(study(n_seeds=1).gap))
    assert np.isinf(found.to_frame().error).sum() == 5
    assert found.plot().axes


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"grid": [3]}, ValueError, "`capacities` must be at least two ascending numbers"),
        ({"grid": [3, 3]}, ValueError, "`capacities` must be at least two ascending numbers"),
        ({"grid": ["a", "b"]}, ValueError, "`capacities` must be at least two ascending numbers; got 'a'"),
        ({"networks": "all"}, ValueError, "`networks` must be one of"),
        ({"n_seeds": 0}, ValueError, "`n_seeds` must be at least 1"),
        ({"fit": 3}, TypeError, "`fit` must be a function or an estimator"),
        ({"data": (*cubic()[:2], cubic()[2][1:])}, ValueError, "`dydx` must have shape"),
        ({"fit": Recorder(make=lambda c: Column(c))}, ValueError, r"must return shape \(3,\), as `y`; got \(3, 1\)"),
        ({"fit": Recorder(make=lambda c: Rows(c))}, ValueError, "`predict_jacobian` of the fitted model must return"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        study(**options)


class Column(Polynomial):
    def predict(self, X: Array) -> Array:
        return super().predict(X)[:, None]


class Rows(Polynomial):
    def predict_jacobian(self, X: Array) -> Array:
        return super().predict_jacobian(X)[1:]


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_study_that_broke_off_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "study.jsonl"

    class Breaks(Recorder):
        def __call__(self, *data: Any, **what: Any) -> Any:
            if len(self.calls) == 33:
                raise KeyboardInterrupt
            return super().__call__(*data, **what)

    Breaks.__qualname__ = Recorder.__qualname__  # a function is known by its name
    with pytest.raises(KeyboardInterrupt):
        study(Breaks(), resume=path)
    assert len(path.read_text().splitlines()) == 1 + 33
    with path.open("a") as file:
        file.write('{"capacity": 3, "se')  # killed while it wrote
    fit = Recorder()
    found = study(fit, resume=path)
    assert len(fit.calls) == 80 - 33
    np.testing.assert_array_equal(found.gap, study().gap)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    again = Recorder()
    assert study(again, resume=path).summary() == found.summary()
    assert not again.calls
    # More of the same is no other study.
    study(again, grid=[1, 2, 3, 5, 6], resume=path, n_seeds=3)
    assert len(again.calls) == 5 * 5 * 3 * 2 - 80
    assert study(networks="with", resume=path).need == found.need


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    broken = Recorder(make=lambda _: Polynomial(np.full(2, np.nan)))
    for fit in (broken, Recorder()):  # the second reads only
        with pytest.warns(ConvergenceWarning, match="not finite"):
            found = study(fit, networks="without", resume=path)
        assert np.isnan([training.error for training in found.trainings.values()]).all()
        assert np.isinf([training.derivative_error for training in found.trainings.values()]).all()
    assert "NaN" not in path.read_text()


def test_files_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    study(resume=path)
    X, y, dydx = cubic()
    for other in (
        {"data": (X, y + 1e-9, dydx)},
        {"data": (X, y, 2 * dydx)},
        {"cv": 4},
        {"random_state": 1},
        {"fit": Ridge()},
    ):
        before = path.read_bytes()
        with pytest.raises(ValueError, match="`resume` must be of the same data, folds and `fit`"):
            study(resume=path, **other)
        assert path.read_bytes() == before
    for text in ("important notes", "important\nnotes\n", '{"a": 1}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="`resume` must be a"):
            study(resume=path)
        assert path.read_text() == text
    path.write_text('{"gradwise.cap')  # killed at once
    assert study(resume=path).gap is not None


def test_functions_with_other_bound_settings_are_other_studies(tmp_path: Path) -> None:
    def fit(*data: Any, extra: int, **what: Any) -> Any:
        return Recorder()(*data, **what)

    path = tmp_path / "study.jsonl"
    study(partial(fit, extra=1), resume=path)
    study(partial(fit, extra=1), resume=path)
    with pytest.raises(ValueError, match="`resume` must be of the same"):
        study(partial(fit, extra=2), resume=path)


def test_estimators_with_other_settings_are_other_studies(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    study(Ridge(degree=1), resume=path)
    study(Ridge(hidden_layer_sizes=(9,), random_state=3), resume=path)  # set by the study anyway
    with pytest.raises(ValueError, match="`resume` must be of the same"):
        study(Ridge(degree=2), resume=path)


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_words_picture_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    found = study(grid=range(1, 11), data=cubic(14, 0.1), n_seeds=3, progress=True)
    assert "capacity study" in capsys.readouterr().out
    text = repr(found)
    assert f"with derivatives take {found.best_with:g} (within one standard error: {found.need:g})" in text
    assert f"without them {found.best_without:g} (upper bound {found.upper_bound:g}" in text
    assert text.endswith("300 trainings of 10 capacities>")
    top, bottom = found.plot().axes
    assert top.get_ylabel() == "relative error"
    labels = bottom.get_legend_handles_labels()[1]
    assert {f"need: {found.need:g}", f"upper bound: {found.upper_bound:g}", "log 1.5"} <= set(labels)
    (gap,) = [line for line in bottom.lines if str(line.get_label()).startswith("gap G")]
    np.testing.assert_array_equal(gap.get_ydata(), found.gap)


@pytest.mark.parametrize(("module", "method"), [("pandas", "to_frame"), ("matplotlib.figure", "plot")])
def test_missing_extras_are_named(module: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = study()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "gradwise\[plot\]"'):
        getattr(found, method)()


def test_nothing_heavy_is_imported_early() -> None:
    # scikit-learn itself imports pandas, and with it rich, where they are installed.
    code = (
        "import sys, gradwise; assert 'sklearn' not in sys.modules\n"
        "gradwise.capacity_study, gradwise.CapacityStudy\n"
        "assert not {'torch', 'keras', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
