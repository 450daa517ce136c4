"""GradientEnhancedMLPRegressor: scikit-learn's checks, derivatives, and the relations between its arguments."""

import doctest
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import r2_score
from sklearn.neural_network import MLPRegressor
from sklearn.utils.estimator_checks import parametrize_with_checks

import gradwise.torch
from gradwise.torch import GradientEnhancedMLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@parametrize_with_checks([GradientEnhancedMLPRegressor((4,), max_iter=15, random_state=0)])
def test_scikit_learn_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    if "array_api" not in str(check):  # needs SCIPY_ARRAY_API=1, and no array API is claimed
        check(estimator)


@pytest.mark.parametrize("name", ["GradientEnhancedMLPRegressor", "SMTSurrogate"])
def test_examples_in_docstrings(name: str) -> None:
    """Looked up late, they are in no module that pytest searches for examples."""
    public = getattr(gradwise.torch, name)
    module = sys.modules[f"gradwise_torch.{'_smt' if name == 'SMTSurrogate' else '_mlp_regressor'}"]
    tests = doctest.DocTestFinder(recurse=False).find(public, name, module=False, globs=dict(vars(module)))
    assert tests[0].examples
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(tests[0]).failed == 0


def sample(n: int = 12, seed: int = 0) -> tuple[Any, Any, Any]:
    x = np.random.default_rng(seed).uniform(-1, 1, (n, 2))
    y = np.sin(3 * x[:, 0]) * x[:, 1]
    return x, y, np.stack([3 * np.cos(3 * x[:, 0]) * x[:, 1], np.sin(3 * x[:, 0])], axis=1)


def network(**parameters: Any) -> GradientEnhancedMLPRegressor:
    return GradientEnhancedMLPRegressor(**{"hidden_layer_sizes": (8,), "max_iter": 15, "random_state": 0} | parameters)


def two(n: int = 12) -> tuple[Any, Any, Any]:
    """Two outputs of different units."""
    x, y, dydx = sample(n)
    return x, np.stack([y, 100 * x[:, 1] ** 2], axis=1), np.stack([dydx, 200 * x * [0, 1]], axis=1)


def test_derivatives_lower_the_error() -> None:
    x, y, dydx = sample(20)
    test_x, test_y, test_dydx = sample(500, 1)
    plain, enhanced = (GradientEnhancedMLPRegressor((32, 32), max_iter=300, random_state=0) for _ in range(2))
    plain.fit(x, y)
    enhanced.fit(x, y, dydx)
    errors = [np.sqrt(np.mean((model.predict(test_x) - test_y) ** 2)) for model in (plain, enhanced)]
    assert errors[1] < 0.2 * errors[0]
    slope_errors = [np.sqrt(np.mean((m.predict_jacobian(test_x) - test_dydx) ** 2)) for m in (plain, enhanced)]
    assert slope_errors[1] < 0.2 * slope_errors[0]


def test_predict_jacobian_equals_central_differences() -> None:
    x, y, dydx = sample(12)
    model = GradientEnhancedMLPRegressor((8,), max_iter=20, random_state=0)
    model.fit(x, np.stack([y, 2 * y], axis=1), np.stack([dydx, 2 * dydx], axis=1))
    step = 1e-6
    moved = [(model.predict(x + step * e) - model.predict(x - step * e)) / (2 * step) for e in np.eye(2)]
    np.testing.assert_allclose(model.predict_jacobian(x), np.stack(moved, axis=2), rtol=1e-6, atol=1e-8)


def test_members_average_and_their_spread_is_the_deviation() -> None:
    x, y, dydx = two()
    model = network(n_estimators=3).fit(x, y, dydx)
    members = []
    for weights in model.weights_:
        alone = network(n_estimators=1, max_iter=1).fit(x, y, dydx)
        alone.weights_ = weights[None]
        members.append(alone.predict(x))
    mean, std = model.predict(x, return_std=True)
    np.testing.assert_allclose(mean, np.mean(members, axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, np.std(members, axis=0, ddof=1), rtol=1e-9)
    np.testing.assert_array_equal(model.predict(x), mean)
    # The first member starts as the only one does. 1e-5: rounding of batched products, grown over 15 iterations.
    np.testing.assert_allclose(members[0], network().fit(x, y, dydx).predict(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`return_std` needs"):
        network().fit(x, y).predict(x, return_std=True)


def test_the_spread_is_larger_away_from_the_data() -> None:
    x, y, dydx = sample(20)
    model = network(n_estimators=5, max_iter=100).fit(x, y, dydx)
    assert model.predict(4 * x, return_std=True)[1].mean() > 5 * model.predict(x, return_std=True)[1].mean()


def test_restarts_keep_the_least_training_loss() -> None:
    x, y, dydx = sample()
    one, several = network().fit(x, y, dydx), network(n_restarts=5).fit(x, y, dydx)
    assert several.loss_ < one.loss_
    assert len(several.weights_) == 1


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_initial_weights_do_not_depend_on_derivatives(solver: str) -> None:
    """The first loss, before any step of note, is the paired comparison's common start."""
    x, y, dydx = sample()
    tiny: dict[str, Any] = {"solver": solver, "max_iter": 1, "learning_rate_init": 1e-12}
    if solver == "adam":
        weights = [network(**tiny).fit(x, y, *extra).weights_ for extra in ((), (dydx,))]
        np.testing.assert_allclose(weights[0], weights[1], atol=1e-11)
        with_validation = network(early_stopping=True, **tiny).fit(x, y, dydx).weights_
        np.testing.assert_allclose(weights[0], with_validation, atol=1e-11)
    else:
        sizes = [np.linalg.norm(network(max_iter=1).fit(x, y, *extra).weights_) for extra in ((), (dydx,))]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.5)


def test_weight_zero_is_no_derivatives_bit_for_bit() -> None:
    x, y, dydx = sample()
    plain = network().fit(x, y)
    for arguments in ({"dydx": dydx}, {"dydx": "not even looked at"}, {"dydx": dydx, "X_dydx": x + 1}):
        model = network(derivative_weight=0).fit(x, y, **arguments)
        np.testing.assert_array_equal(model.predict(x), plain.predict(x))
    unknown = network().fit(x, y, np.full_like(dydx, np.nan))
    np.testing.assert_array_equal(unknown.predict(x), plain.predict(x))
    assert (plain.derivative_weight_, unknown.derivative_weight_) == (0.0, 0.0)


def test_mask_and_nan_mean_the_same_and_hide_what_stands_there() -> None:
    x, y, dydx = two()
    known = np.random.default_rng(0).random(dydx.shape) > 0.4
    known[3] = False  # a row without any
    by_nan = network().fit(x, y, np.where(known, dydx, np.nan)).predict(x)
    by_mask = network().fit(x, y, np.where(known, dydx, 1e9), mask=known).predict(x)
    np.testing.assert_array_equal(by_nan, by_mask)
    assert np.isfinite(by_nan).all()
    assert not np.allclose(by_nan, network().fit(x, y, dydx).predict(x))


def test_derivatives_at_the_points_of_the_values_are_derivatives() -> None:
    x, y, dydx = sample()
    # 1e-6: the same loss, added up in another order.
    expected = network().fit(x, y, dydx).predict(x)
    np.testing.assert_allclose(network().fit(x, y, dydx, X_dydx=x).predict(x), expected, rtol=1e-6, atol=1e-8)


def test_derivatives_at_other_points_help() -> None:
    x, y, dydx = sample(40)
    test_x, test_y, _ = sample(500, 1)
    settings: dict[str, Any] = {"hidden_layer_sizes": (32, 32), "max_iter": 200}
    with_them = network(**settings).fit(x[:5], y[:5], dydx[5:], X_dydx=x[5:])
    assert with_them.score(test_x, test_y) > 0.95 > network(**settings).fit(x[:5], y[:5]).score(test_x, test_y) + 0.2


def test_one_value_and_derivatives_are_enough() -> None:
    x, y, dydx = sample(40)
    test_x, test_y, _ = sample(500, 1)
    model = network(hidden_layer_sizes=(32, 32), max_iter=300)
    assert model.fit(x[:1], y[:1], dydx, X_dydx=x).score(test_x, test_y) > 0.95


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_a_weight_of_two_is_a_row_given_twice(solver: str) -> None:
    x, y, dydx = two()
    dydx[0, 0, 0] = np.nan
    times = np.random.default_rng(0).integers(0, 3, len(x))
    rows = np.repeat(np.arange(len(x)), times)
    how: dict[str, Any] = {"solver": solver, "max_iter": 8, "batch_size": 99}
    weighted = network(**how).fit(x, y, dydx, sample_weight=times)
    repeated = network(**how).fit(x[rows], y[rows], dydx[rows])
    # 1e-5: rounding, grown over 8 iterations.
    np.testing.assert_allclose(weighted.predict(x), repeated.predict(x), rtol=1e-5, atol=1e-5)


def test_weights_that_remove_everything_are_refused() -> None:
    x, y, _ = sample()
    with pytest.raises(ValueError, match=r"(?i)sample.weight"):
        network().fit(x, y, sample_weight=np.zeros(len(x)))
    with pytest.raises(ValueError, match="no negative entries"):
        network().fit(x, y, sample_weight=-np.ones(len(x)))


scales = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)


@settings(max_examples=20)
@given(
    unit_x=st.tuples(scales, scales),
    unit_y=scales,
    shift=st.floats(-10, 10),
    scale=st.sampled_from(["block", "per_input"]),
)
def test_units_do_not_matter(unit_x: tuple[float, float], unit_y: float, shift: float, scale: str) -> None:
    x, y, dydx = sample()
    reference = network(max_iter=5, scale=scale).fit(x, y, dydx).predict(x)
    units = np.array(unit_x)
    moved_x, moved_y = (x + shift) * units, (y + shift) * unit_y
    moved = network(max_iter=5, scale=scale).fit(moved_x, moved_y, dydx * unit_y / units).predict(moved_x)
    # 1e-6: rounding of the standardised data, grown over 5 iterations.
    np.testing.assert_allclose(moved / unit_y - shift, reference, rtol=1e-6, atol=1e-6)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    x, y, dydx = two()
    order = np.random.default_rng(seed).permutation(len(x))
    reference = network(max_iter=5).fit(x, y, dydx).predict(x)
    moved = network(max_iter=5).fit(x[order], y[order], dydx[order]).predict(x)
    np.testing.assert_allclose(moved, reference, rtol=1e-6, atol=1e-6)  # rounding, grown over 5 iterations


def test_constant_columns_and_outputs() -> None:
    x, y, dydx = sample()
    wide = np.insert(x, 1, 7.0, axis=1)
    model = network().fit(wide, y, np.insert(dydx, 1, 0.0, axis=1))
    assert np.isfinite(model.predict(wide)).all()
    flat = network(max_iter=50).fit(x, np.full(len(x), 3.0), np.zeros_like(x))
    np.testing.assert_allclose(flat.predict(x), 3.0, atol=0.1)


def test_jenn_layout_has_samples_last() -> None:
    x, y, dydx = two()
    known = ~np.isnan(dydx)
    known[0, 0, 0] = False
    rows = network().fit(x, y, dydx, mask=known)
    columns = network(dydx_layout="jenn").fit(x.T, y.T, np.moveaxis(dydx, 0, -1), mask=np.moveaxis(known, 0, -1))
    np.testing.assert_array_equal(columns.predict(x.T), rows.predict(x).T)
    np.testing.assert_array_equal(columns.predict_jacobian(x.T), np.moveaxis(rows.predict_jacobian(x), 0, -1))
    assert columns.score(x.T, y.T) == pytest.approx(r2_score(y, rows.predict(x)))
    other = network(dydx_layout="jenn").fit(x.T, y.T, np.moveaxis(dydx[:5], 0, -1), X_dydx=x[:5].T)
    np.testing.assert_array_equal(other.predict(x.T).T, network().fit(x, y, dydx[:5], X_dydx=x[:5]).predict(x))
    with pytest.raises(ValueError, match=r"`dydx` must have shape \(n_outputs, n_inputs, n\)"):
        network(dydx_layout="jenn").fit(x.T, y.T, dydx[:, 0].T)
    with pytest.raises(ValueError, match=r"`y` must have shape \(n_outputs, n\)"):
        network(dydx_layout="jenn").fit(x.T, y[:, 0])


def test_relu_warns_only_with_derivatives() -> None:
    x, y, dydx = sample()
    with pytest.warns(UserWarning, match="piecewise linear"):
        network(activation="relu").fit(x, y, dydx)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        network(activation="relu").fit(x, y)
        network(activation="relu", derivative_weight=0).fit(x, y, dydx)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dydx": np.ones((12, 2, 2))}, r"`dydx` must have shape \(12, 1, 2\) or \(12, 2\) to go with `X`"),
        ({"dydx": np.ones((1, 2))}, r"`dydx` must have shape \(12, 1, 2\) or \(12, 2\)"),
        ({"dydx": np.ones((2, 12))}, "`dydx` must have shape"),
        ({"dydx": np.full((12, 2), np.inf)}, "`dydx` must be finite or NaN"),
        ({"dydx": np.ones((12, 2)), "mask": np.ones((12, 1, 2), dtype=bool)}, "`mask` must have the shape of `dydx`"),
        ({"dydx": np.ones((12, 2)), "X_dydx": np.ones((5, 2))}, r"shape \(5, 1, 2\) or \(5, 2\) to go with `X_dydx`"),
        ({"mask": np.ones((12, 2), dtype=bool)}, "`mask` must come with `dydx`"),
        ({"X_dydx": np.ones((5, 2))}, "`X_dydx` must come with `dydx`"),
    ],
)
def test_wrong_derivatives(change: dict[str, Any], message: str) -> None:
    x, y, _ = sample()
    with pytest.raises(ValueError, match=message):
        network().fit(x, y, **change)


def test_a_mask_must_be_boolean() -> None:
    x, y, dydx = sample()
    with pytest.raises(TypeError, match=r"`mask` must be boolean; got float64. Pass `mask != 0`"):
        network().fit(x, y, dydx, mask=np.ones_like(dydx))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation", "swish", "`activation` must be one of"),
        ("solver", "sgd", "`solver` must be one of"),
        ("derivative_weight", "half", '`derivative_weight` must be a number or "auto"'),
        ("derivative_weight", -1.0, "finite and not negative"),
        ("alpha", float("nan"), "finite and not negative"),
        ("scale", "lambda", "`scale` must be one of"),
        ("derivative_loss", "mae", "`derivative_loss` must be one of"),
        ("hidden_layer_sizes", (4, 0), "`hidden_layer_sizes` must be a positive whole number"),
        ("max_iter", 0, "`max_iter` must be a positive"),
        ("n_estimators", True, "`n_estimators` must be a positive"),
        ("batch_size", 0, 'whole number or "auto"'),
        ("validation_fraction", 1.0, "`validation_fraction` must be between 0 and 1"),
        ("learning_rate_init", 0, "`learning_rate_init` must be between 0 and inf"),
        ("dtype", "float16", "`dtype` must be one of"),
        ("dydx_layout", "smt", "`dydx_layout` must be one of"),
    ],
)
def test_wrong_parameters(name: str, value: Any, message: str) -> None:
    x, y, dydx = sample()
    with pytest.raises(ValueError, match=message):
        network(**{name: value}).fit(x, y, dydx)


def test_not_converged_warns() -> None:
    x, y, dydx = sample()
    with pytest.warns(ConvergenceWarning, match="after 3 iterations; raise `max_iter`"):
        model = network(max_iter=3).fit(x, y, dydx)
    assert (model.converged_, model.n_iter_, len(model.loss_curve_)) == (False, 3, 3)
    model = network(max_iter=500, tol=0.5).fit(x, y, dydx)
    assert model.converged_
    assert model.n_iter_ < 500


def test_without_derivatives_it_is_a_regularised_network_as_scikit_learn_has_it() -> None:
    """The same objective: MLPRegressor's weights, put in, have almost no gradient."""
    import torch

    from gradwise_torch._mlp_data import prepare
    from gradwise_torch._mlp_network import Architecture
    from gradwise_torch._mlp_objective import Objective

    x, y, _ = sample(30)
    data, _ = prepare(x, y[:, None], None, None, scale="block", shared=True)
    theirs = MLPRegressor(
        hidden_layer_sizes=(3,),
        activation="tanh",
        solver="lbfgs",
        alpha=0.3,
        max_iter=20_000,
        tol=1e-10,
        random_state=0,
    )
    theirs.fit(data.x, data.y[:, 0])
    pairs = zip(theirs.coefs_, theirs.intercepts_, strict=True)
    theta = np.concatenate([part.ravel() for pair in pairs for part in pair])
    architecture = Architecture((2, 3, 1), "tanh")
    ours = Objective(architecture, data, derivative_weight=0.0, alpha=0.3, loss="mse", dtype=torch.float64)
    loss, gradient = ours(torch.tensor(theta[None]))
    assert loss.item() == pytest.approx(2 * theirs.loss_, rel=1e-9)
    assert gradient.abs().max().item() < 1e-4


@pytest.mark.parametrize("derivative_loss", ["mse", "huber"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adam_learns(derivative_loss: str, dtype: str) -> None:
    x, y, dydx = sample(300)
    test_x, test_y, _ = sample(500, 1)
    model = network(
        hidden_layer_sizes=(32, 32),
        solver="adam",
        max_iter=60,
        batch_size=32,
        learning_rate_init=0.05,
        dtype=dtype,
        derivative_loss=derivative_loss,
    )
    assert model.fit(x, y, dydx).score(test_x, test_y) > 0.98
    assert model.converged_
    assert len(model.loss_curve_) == 60


def test_adam_with_derivatives_at_other_points() -> None:
    x, y, dydx = sample(300)
    test_x, test_y, _ = sample(500, 1)
    model = network(hidden_layer_sizes=(32, 32), solver="adam", max_iter=100, batch_size=32, learning_rate_init=0.05)
    assert model.fit(x[:10], y[:10], dydx[10:], X_dydx=x[10:]).score(test_x, test_y) > 0.95


def test_early_stopping_stops_and_keeps_the_best_epoch() -> None:
    x, _, _ = sample(60)
    noise = np.random.default_rng(0).normal(size=len(x))  # nothing to learn
    how: dict[str, Any] = {"solver": "adam", "max_iter": 400, "hidden_layer_sizes": (32, 32), "early_stopping": True}
    model = network(n_iter_no_change=5, **how).fit(x, noise)
    assert model.n_iter_ < 200
    assert model.converged_
    fresh_x, _, _ = sample(500, 1)
    full = network(**{**how, "early_stopping": False}).fit(x, noise)
    assert np.std(model.predict(fresh_x)) < 0.5 * np.std(full.predict(fresh_x))
    with pytest.raises(ValueError, match="`early_stopping` needs rows"):
        network(**how).fit(x[:1], noise[:1])


def test_huber_withstands_outliers() -> None:
    x, y, dydx = sample(30)
    test_x, test_y, _ = sample(500, 1)
    wrong = dydx.copy()
    wrong[::7] *= -10
    scores = [
        network(hidden_layer_sizes=(32, 32), max_iter=150, derivative_loss=loss).fit(x, y, wrong).score(test_x, test_y)
        for loss in ("mse", "huber")
    ]
    assert scores[1] > scores[0] + 0.1
