"""Differential machine learning: prices of a basket option learnt from 100,000 simulated paths and derivatives.

Every training row is one path: a random state of the market, one simulated payoff (a very noisy price), and the
payoff's derivative with respect to the state, which automatic differentiation gives for about the price of the payoff.
The method is Huge and Savine's (Differential Machine Learning, arXiv 2005.02347); the market is Bachelier's, whose
prices are known in closed form. A call has a kink, its pathwise derivative is a step; that of a digital option is zero
almost everywhere, so its step is smoothed to a ramp first. Both networks take the same optimizer steps.
Run: ``python examples/differential_ml.py`` (about a minute), ``--paths 8192`` for less, ``--quiet`` for no bar.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from gradwise.torch import GradientEnhancedMLPRegressor

Array = npt.NDArray[np.float64]
Payoff = Callable[[Array], tuple[Array, Array]]

ASSETS = 7
WEIGHTS = np.arange(1, ASSETS + 1) / np.arange(1, ASSETS + 1).sum()
STRIKE, YEARS, SPREAD = 100.0, 1.0, 20.0
# Standard deviation in one year of each asset, in money; correlations of one half.
VOLATILITY = np.linspace(10.0, 40.0, ASSETS)
COVARIANCE = np.outer(VOLATILITY, VOLATILITY) * (0.5 + 0.5 * np.eye(ASSETS)) * YEARS
DEVIATION = float(np.sqrt(WEIGHTS @ COVARIANCE @ WEIGHTS))
SMOOTHING = 0.25 * DEVIATION  # half width of the digital's ramp


def call(basket: Array) -> tuple[Array, Array]:
    """Payoff of a call, and its derivative with respect to the basket."""
    return np.maximum(basket - STRIKE, 0.0), (basket > STRIKE).astype(float)


def call_price(spot: Array) -> Array:
    """Bachelier's formula for the basket, which is normal."""
    moneyness = (spot @ WEIGHTS - STRIKE) / DEVIATION
    return DEVIATION * (moneyness * norm.cdf(moneyness) + norm.pdf(moneyness))


def digital(basket: Array) -> tuple[Array, Array]:
    """Payoff of 100 if the basket ends above the strike, as a ramp, and the ramp's derivative."""
    ramp = (basket - STRIKE) / (2 * SMOOTHING) + 0.5
    return 100 * np.clip(ramp, 0.0, 1.0), np.where((ramp > 0) & (ramp < 1), 100 / (2 * SMOOTHING), 0.0)


def digital_price(spot: Array) -> Array:
    """Price of the step itself, without ramp."""
    return 100 * norm.cdf((spot @ WEIGHTS - STRIKE) / DEVIATION)


OPTIONS: dict[str, tuple[Payoff, Callable[[Array], Array]]] = {
    "call": (call, call_price),
    "digital": (digital, digital_price),
}


def simulate(payoff: Payoff, paths: int, seed: int) -> tuple[Array, Array, Array]:
    """Spots today (paths, ASSETS), payoffs (paths,) and their pathwise derivatives (paths, ASSETS)."""
    rng = np.random.default_rng(seed)
    spot = STRIKE + SPREAD * rng.standard_normal((paths, ASSETS))
    end = spot + rng.multivariate_normal(np.zeros(ASSETS), COVARIANCE, size=paths, method="cholesky")
    value, slope = payoff(end @ WEIGHTS)
    return spot, value, slope[:, None] * WEIGHTS  # the end moves one to one with the spot


def compare(
    option: str, *, paths: int, epochs: int, seed: int, verbose: bool = False
) -> dict[str, tuple[float, float]]:
    """Root mean square error of the price, in money, and seconds: without and with derivatives."""
    payoff, price = OPTIONS[option]
    X, y, dydx = simulate(payoff, paths, seed)
    test = STRIKE + SPREAD * np.random.default_rng(seed + 10**6).standard_normal((4096, ASSETS))
    results: dict[str, tuple[float, float]] = {}
    for name, derivatives in (("values only", None), ("with derivatives", dydx)):
        model = GradientEnhancedMLPRegressor(
            (32, 32),
            activation="softplus",
            solver="adam",
            batch_size=1024,
            max_iter=epochs,
            learning_rate_init=0.02,
            dtype="float32",
            random_state=seed,
            verbose=verbose,
        )
        start = time.perf_counter()
        model.fit(X, y, derivatives)
        seconds = time.perf_counter() - start
        results[name] = float(np.sqrt(np.mean((model.predict(test) - price(test)) ** 2))), seconds
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prices from simulated paths, with and without derivatives.")
    parser.add_argument("--paths", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    for option in OPTIONS:
        results = compare(option, paths=arguments.paths, epochs=arguments.epochs, seed=0, verbose=not arguments.quiet)
        for name, (error, seconds) in results.items():
            print(f"{option:8s} {name:17s} price error {error:.3f}   {seconds:5.1f} s")
        if results["with derivatives"][0] > results["values only"][0]:
            raise SystemExit(option + ": the derivatives did not help")
