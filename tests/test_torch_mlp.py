"""GradientEnhancedMLPRegressor: scikit-learn's checks, derivatives, and the relations between its arguments."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from gradwise.torch import GradientEnhancedMLPRegressor


@pytest.fixture(autouse=True)
def few_iterations() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


# "on_skip": by default one check that needs SCIPY_ARRAY_API=1 is reported as a warning.
@parametrize_with_checks([GradientEnhancedMLPRegressor((4,), max_iter=15, random_state=0)])
def test_scikit_learn_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    if "array_api" in str(check):
        return
    check(estimator)


def sample(n: int, seed: int = 0) -> tuple[Any, Any, Any]:
    x = np.random.default_rng(seed).uniform(-1, 1, (n, 2))
    y = np.sin(3 * x[:, 0]) * x[:, 1]
    return x, y, np.stack([3 * np.cos(3 * x[:, 0]) * x[:, 1], np.sin(3 * x[:, 0])], axis=1)


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
