"""derivative_weight="auto": near or better than weight 1 at any noise, and what it says of the noise."""

from typing import Any

import numpy as np
import pytest

from gradwise.torch import GradientEnhancedMLPRegressor
from gradwise_torch._mlp_noise import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def product(x: Any) -> tuple[Any, Any]:
    y = np.sin(3 * x[:, 0]) * x[:, 1]
    return y, np.stack([3 * np.cos(3 * x[:, 0]) * x[:, 1], np.sin(3 * x[:, 0])], axis=1)


def smooth(x: Any) -> tuple[Any, Any]:
    """Four inputs, the last of which hardly matters."""
    y = np.exp(0.5 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.01 * x[:, 3]
    slopes = [0.5 * np.exp(0.5 * x[:, 0]), x[:, 2], x[:, 1], np.full(len(x), 0.01)]
    return y, np.stack(slopes, axis=1)


CASES = {"product": (product, 2, 30), "smooth": (smooth, 4, 40)}


def errors(case: str, noise: float, seed: int, weights: tuple[Any, ...]) -> tuple[list[float], Any]:
    """Test errors of the weights, relative to the spread of y; the last model."""
    function, n_inputs, n = CASES[case]
    rng = np.random.default_rng(seed)
    x, test_x = rng.uniform(-1, 1, (n, n_inputs)), rng.uniform(-1, 1, (500, n_inputs))
    (y, dydx), (test_y, _) = function(x), function(test_x)
    dydx = dydx + noise * np.sqrt(np.mean(dydx**2, axis=0)) * rng.standard_normal(dydx.shape)
    found, model = [], None
    for weight in weights:
        model = GradientEnhancedMLPRegressor((16, 16), derivative_weight=weight, max_iter=100, random_state=seed)
        model.fit(x, y, dydx)
        found.append(float(np.sqrt(np.mean((model.predict(test_x) - test_y) ** 2)) / test_y.std()))
    return found, model


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2, 0.5])
def test_near_or_better_than_weight_one(case: str, noise: float) -> None:
    (one, automatic), model = errors(case, noise, 0, (1.0, "auto"))
    assert automatic <= 1.1 * one
    assert model.derivative_weight_ in WEIGHTS
    if noise == 0.5:
        assert automatic < 0.8 * one
        assert model.derivative_weight_ < 1
    if noise == 0:
        assert model.derivative_weight_ == 1
    # The estimate holds the error of the fit as well, and the fit is short.
    assert 0.7 * noise < model.derivative_noise_ < 1.5 * noise + 0.4


def test_hopeless_derivatives_get_next_to_no_weight() -> None:
    one, automatic, none = errors("smooth", 5.0, 0, (1.0, "auto", 0.0))[0]
    assert automatic < 0.5 * one
    assert automatic < 1.5 * none


def test_it_is_repeatable_and_weighs_what_it_says() -> None:
    (first, again), model = errors("product", 0.3, 1, ("auto", "auto"))
    assert first == again == errors("product", 0.3, 1, (model.derivative_weight_,))[0][0]


def test_with_derivatives_at_other_points_several_outputs_and_gaps() -> None:
    rng = np.random.default_rng(0)
    x, where = rng.uniform(-1, 1, (12, 2)), rng.uniform(-1, 1, (20, 2))
    y, (_, slopes) = product(x)[0], product(where)
    both = np.stack([slopes, 2 * slopes], axis=1)
    both[0] = np.nan
    model = GradientEnhancedMLPRegressor((8,), derivative_weight="auto", max_iter=30, random_state=0)
    model.fit(x, np.stack([y, 2 * y], axis=1), both, X_dydx=where)
    assert model.derivative_weight_ in WEIGHTS
    assert 0 < model.derivative_noise_ < 2


def test_without_derivatives_or_with_few_rows() -> None:
    x = np.linspace(-1, 1, 3)[:, None]
    model = GradientEnhancedMLPRegressor((8,), derivative_weight="auto", max_iter=30, random_state=0)
    assert model.fit(x, x[:, 0]).derivative_weight_ == 0
    assert model.fit(x, x[:, 0], np.ones((3, 1))).derivative_weight_ == 1
    assert np.isnan(model.derivative_noise_)
