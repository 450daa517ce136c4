"""SMTSurrogate: the calls of SMT give what the regressor gives."""

from typing import Any

import numpy as np
import pytest

from gradwise.torch import GradientEnhancedMLPRegressor, SMTSurrogate

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def data() -> tuple[Any, Any, Any]:
    x = np.random.default_rng(0).uniform(-1, 1, (12, 2))
    y = np.stack([np.sin(2 * x[:, 0]) * x[:, 1], x[:, 0] ** 2], axis=1)
    zero = np.zeros(len(x))
    slopes = [
        np.stack([2 * np.cos(2 * x[:, 0]) * x[:, 1], 2 * x[:, 0]], axis=1),
        np.stack([np.sin(2 * x[:, 0]), zero], axis=1),
    ]
    return x, y, np.stack(slopes, axis=2)


def network() -> GradientEnhancedMLPRegressor:
    return GradientEnhancedMLPRegressor((8,), max_iter=30, n_estimators=2, tol=0.5, random_state=0)


def test_calls_equal_those_of_the_regressor() -> None:
    x, y, dydx = data()
    surrogate, model = SMTSurrogate(network()), network().fit(x, y, dydx)
    surrogate.set_training_values(x, y)
    for kx in range(2):
        surrogate.set_training_derivatives(x, dydx[:, :, kx], kx)
    surrogate.train()
    mean, std = model.predict(x, return_std=True)
    np.testing.assert_array_equal(surrogate.predict_values(x), mean)
    np.testing.assert_array_equal(surrogate.predict_variances(x), std**2)
    for kx in range(2):
        np.testing.assert_array_equal(surrogate.predict_derivatives(x, kx), model.predict_jacobian(x)[:, :, kx])


def test_missing_partials_are_unknown() -> None:
    x, y, dydx = data()
    surrogate, partly = SMTSurrogate(network()), dydx.copy()
    partly[:, :, 0] = np.nan
    surrogate.set_training_values(x, y)
    surrogate.set_training_derivatives(x, dydx[:, :, 1], 1)
    surrogate.train()
    np.testing.assert_array_equal(surrogate.predict_values(x), network().fit(x, y, partly).predict(x))


def test_derivatives_at_other_points() -> None:
    x, y, dydx = data()
    surrogate = SMTSurrogate(network())
    surrogate.set_training_values(x[:5], y[:5])
    for kx in range(2):
        surrogate.set_training_derivatives(x[5:], dydx[5:, :, kx], kx)
    surrogate.train()
    expected = network().fit(x[:5], y[:5], dydx[5:], X_dydx=x[5:]).predict(x)
    np.testing.assert_array_equal(surrogate.predict_values(x), expected)


def test_one_output_may_be_flat_and_values_may_stand_alone() -> None:
    x, y, _ = data()
    surrogate = SMTSurrogate(network())
    surrogate.set_training_values(x, y[:, 0])
    surrogate.train()
    assert surrogate.predict_values(x).shape == (12, 1)
    assert surrogate.predict_derivatives(x, 1).shape == (12, 1)


def test_errors() -> None:
    x, y, dydx = data()
    surrogate = SMTSurrogate(network())
    with pytest.raises(ValueError, match="`train` must be called"):
        surrogate.predict_values(x)
    with pytest.raises(ValueError, match="`set_training_values` must be called"):
        surrogate.train()
    with pytest.raises(ValueError, match="one row for each of the 12"):
        surrogate.set_training_values(x, y[:-1])
    with pytest.raises(ValueError, match="from 0 to 1; got 2"):
        surrogate.set_training_derivatives(x, y, 2)
    surrogate.set_training_values(x, y)
    surrogate.set_training_derivatives(x, dydx[:, :, 0], 0)
    surrogate.set_training_derivatives(x + 1, dydx[:, :, 1], 1)
    with pytest.raises(ValueError, match="input 1 are at others"):
        surrogate.train()
    with pytest.raises(ValueError, match='must have dydx_layout "sklearn"'):
        SMTSurrogate(GradientEnhancedMLPRegressor(dydx_layout="jenn"))


def test_default_has_variances_and_the_model_given_is_not_fitted() -> None:
    x, y, _ = data()
    model = network()
    surrogate = SMTSurrogate(model)
    surrogate.set_training_values(x, y)
    surrogate.train()
    assert not hasattr(model, "weights_")
    assert SMTSurrogate().model.n_estimators > 1
