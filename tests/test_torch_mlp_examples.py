"""examples/differential_ml.py: its formulas, its derivatives, and that derivatives lower the error of the price."""

import numpy as np
import pytest


def test_prices_are_means_of_payoffs() -> None:
    from differential_ml import ASSETS, COVARIANCE, OPTIONS, STRIKE, WEIGHTS

    spot = STRIKE + np.random.default_rng(0).uniform(-20, 20, (3, ASSETS))
    noise = np.random.default_rng(1).multivariate_normal(np.zeros(ASSETS), COVARIANCE, size=40_000)
    for payoff, price in OPTIONS.values():
        ends = payoff((spot[:, None] + noise) @ WEIGHTS)[0]
        error = ends.std(axis=1) / np.sqrt(len(noise))
        # 4 standard errors, and what smoothing the digital's step costs: its ramp is a quarter deviation to each side.
        np.testing.assert_array_less(np.abs(ends.mean(axis=1) - price(spot)), 4 * error + 0.5)


def test_pathwise_derivatives_equal_central_differences() -> None:
    from differential_ml import OPTIONS, simulate

    for payoff, _ in OPTIONS.values():
        basket, step = np.linspace(40, 160, 1000), 1e-6
        difference = (payoff(basket + step)[0] - payoff(basket - step)[0]) / (2 * step)
        np.testing.assert_allclose(payoff(basket)[1], difference, atol=1e-6)
        _, _, slopes = simulate(payoff, 100, 0)
        assert slopes.shape == (100, 7)
        assert 0 < np.mean(slopes[:, 0] > 0) < 1


@pytest.mark.parametrize("option", ["call", "digital"])
def test_derivatives_lower_the_error_of_the_price(option: str) -> None:
    from differential_ml import compare

    results = compare(option, paths=8192, epochs=20, seed=0)
    assert results["with derivatives"][0] < 0.8 * results["values only"][0]
