"""Linear regression with derivatives against OLS, Ridge, RidgeCV and differential regression: where it helps.

Three settings: a Bachelier basket option (simulated payoffs, pathwise derivatives), the wing weight with noisy values
and exact derivatives, and scikit-learn's diabetes data with derivatives estimated from the training values alone. Over
training sizes, and over noise put on the derivatives. Every method has the same features, standardised, and the same
samples; errors are those on untouched points, for the first two against the noiseless truth.
Run: ``python benchmarks/ridge_study.py [--seeds N]``, ten minutes on one core; cells are appended to
``out/ridge_study.jsonl`` and not computed again; draws ``docs/images/ridge_study.png`` and prints the table of
``docs/ridge.md``.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from scipy.stats import norm, qmc
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from gradwise import GradientEnhancedRidge, GradientEnhancedRidgeCV, estimate_gradients
from gradwise._basis import derivatives, features, fitted_basis

__all__ = ["SETTINGS", "Data", "Setting", "cells", "differential_regression", "run", "wing_weight"]

Array = npt.NDArray[np.float64]

ALPHAS = tuple(10.0 ** np.arange(-6, 4))  # for RidgeCV as for ours
OUT = Path("out/ridge_study.jsonl")
PLOT = Path("docs/images/ridge_study.png")


class Data(NamedTuple):
    """Training data, and the truth on other points (derivatives: None if nobody knows them)."""

    x: Array
    y: Array
    dydx: Array
    test_x: Array
    test_y: Array
    test_dydx: Array | None


@dataclass(frozen=True)
class Setting:
    """A data set, its features, and what is varied."""

    name: str
    draw: Callable[[int, np.random.Generator], Data]
    degree: int
    sizes: tuple[int, ...]
    noisy_size: int | None  # training samples where noise is put on the derivatives; None for nowhere
    estimated: bool = False  # whether the derivatives are estimated from the values


# -- data --------------------------------------------------------------------------------------------------------------

HOLDINGS, STRIKE = np.array([0.5, 0.3, 0.2]), 110.0
ROOT = 20.0 * np.linalg.cholesky(0.5 * np.eye(3) + 0.5)  # 20 a year for each asset, correlations of a half


def basket_price(x: Array) -> tuple[Array, Array]:
    """Bachelier's price of the call at one year, and its derivatives with respect to the assets."""
    deviation = float(np.linalg.norm(HOLDINGS @ ROOT))
    distance = (x @ HOLDINGS - STRIKE) / deviation
    value = deviation * (distance * norm.cdf(distance) + norm.pdf(distance))
    return value, norm.cdf(distance)[:, None] * HOLDINGS


def basket(n: int, rng: np.random.Generator) -> Data:
    """Prices of three correlated assets at one year; the payoff of a call on their basket at two years, simulated.

    The values are single payoffs and the derivatives those of the payoff along the path: both right on average only.
    """
    x, test_x = (100 + rng.standard_normal((rows, 3)) @ ROOT.T for rows in (n, 2000))
    final = (x + rng.standard_normal((n, 3)) @ ROOT.T) @ HOLDINGS
    exercised = np.where(final > STRIKE, 1.0, 0.0)
    return Data(x, exercised * (final - STRIKE), exercised[:, None] * HOLDINGS, test_x, *basket_price(test_x))


# Wing area (ft^2), fuel weight (lb), aspect ratio, sweep (deg), dynamic pressure (lb/ft^2), taper ratio, thickness to
# chord, ultimate load factor, design gross weight (lb), paint weight (lb/ft^2); Forrester, Sobester and Keane (2008).
LOWER = np.array([150.0, 220.0, 6.0, -10.0, 16.0, 0.5, 0.08, 2.5, 1700.0, 0.025])
UPPER = np.array([200.0, 300.0, 10.0, 10.0, 45.0, 1.0, 0.18, 6.0, 2500.0, 0.08])
EXPONENTS = np.array([0.758, 0.0035, 0.6, 0.0, 0.006, 0.04, -0.3, 0.49, 0.49, 0.0])


def wing_weight(x: Array) -> tuple[Array, Array]:
    """Weight (lb) and its derivatives."""
    sweep = np.radians(x[:, 3])
    # cos enters as A / cos^2 to the 0.6 and t/c / cos to the -0.3: together to the power -0.9.
    main = 0.036 * 100**-0.3 * np.prod(x**EXPONENTS, axis=1) * np.cos(sweep) ** -0.9
    slopes = main[:, None] * EXPONENTS / x
    slopes[:, 3] = main * 0.9 * np.tan(sweep) * np.pi / 180
    slopes[:, 0] += x[:, 9]
    slopes[:, 9] += x[:, 0]
    return main + x[:, 0] * x[:, 9], slopes


def wing(n: int, rng: np.random.Generator) -> Data:
    """Wing weights with noise of 5 % of their spread, exact derivatives."""
    x, test_x = (qmc.scale(qmc.LatinHypercube(10, rng=rng).random(rows), LOWER, UPPER) for rows in (n, 2000))
    (y, dydx), (test_y, test_dydx) = wing_weight(x), wing_weight(test_x)
    return Data(x, y + 0.05 * test_y.std() * rng.standard_normal(n), dydx, test_x, test_y, test_dydx)


def diabetes(n: int, rng: np.random.Generator) -> Data:
    """Progression of diabetes; derivatives by local linear fits to the training values, which hold nothing new."""
    loaded: Any = load_diabetes(return_X_y=True)
    x, y = loaded
    order = rng.permutation(len(x))
    train, test = order[:n], order[342:]  # 100 to test
    return Data(x[train], y[train], estimate_gradients(x[train], y[train]), x[test], y[test], None)


SETTINGS = (
    Setting("basket option", basket, 5, (50, 100, 200, 500, 1000), 200),
    Setting("wing weight", wing, 2, (20, 40, 80, 160, 320), 40),
    Setting("diabetes, degree 2", diabetes, 2, (40, 80, 160, 320), 160, estimated=True),
    Setting("diabetes, linear", diabetes, 1, (40, 80, 160, 320), None, estimated=True),
)
LEVELS = {"random": (0.1, 0.25, 0.5, 1.0, 2.0, 4.0), "systematic": (0.1, 0.25, 0.5, 1.0)}


def spoiled(dydx: Array, level: float, kind: str, rng: np.random.Generator) -> Array:
    """Derivatives with an error of `level` times the root mean square of each column.

    "random": independent Gaussian noise in each entry; "systematic": each column times ``1 + level`` or ``1 - level``,
    which no averaging over samples removes.
    """
    if kind == "systematic":
        return dydx * (1 + level * rng.choice([-1.0, 1.0], dydx.shape[1]))
    return dydx + level * np.sqrt(np.nanmean(dydx**2, axis=0)) * rng.standard_normal(dydx.shape)


# -- methods -----------------------------------------------------------------------------------------------------------


def differential_regression(phi: Array, slopes: Array, y: Array, dydx: Array) -> tuple[Array, float]:
    """Coefficients and intercept of differential regression, after the idea of Huge and Savine (2020); our code.

    Minimises ``mean (y - b - phi.w)**2 + sum_j c_j mean (d_j phi.w - dydx_j)**2`` with ``c_j = mean y**2 / mean
    dydx_j**2``: one scale for each input, and neither a penalty nor a weight to choose.
    """
    rows, targets = [np.hstack([phi, np.ones((len(y), 1))])], [y]
    for j in range(dydx.shape[1]):
        known = np.isfinite(dydx[:, j])
        square = np.mean(dydx[known, j] ** 2) if known.any() else 0.0
        if square > 0:
            factor = np.sqrt(np.mean(y**2) / square * len(y) / known.sum())
            rows.append(factor * np.hstack([slopes[known, :, j], np.zeros((known.sum(), 1))]))
            targets.append(factor * dydx[known, j])
    solution: Any = np.linalg.lstsq(np.vstack(rows), np.concatenate(targets), rcond=None)[0]
    return solution[:-1], float(solution[-1])


def standard_features(degree: int) -> Pipeline:
    """The features of every method."""
    return make_pipeline(StandardScaler(), PolynomialFeatures(degree, include_bias=False), StandardScaler())


VALUES_ONLY: dict[str, Callable[[], Any]] = {
    "OLS": LinearRegression,
    "Ridge": Ridge,
    "RidgeCV": lambda: RidgeCV(ALPHAS),
}
TWICE = "RidgeCV, 2N values"
DIFFERENTIAL, OURS, OURS_CV = "differential regression", "GradientEnhancedRidge", "GradientEnhancedRidgeCV"
FOLDS = "GradientEnhancedRidgeCV, estimates within folds"
METHODS = (*VALUES_ONLY, TWICE, DIFFERENTIAL, OURS, OURS_CV, FOLDS)


def run(setting: Setting, n: int, level: float, kind: str, seed: int, method: str) -> dict[str, Any]:
    """Errors of one method on one training set, as a share of the spread of the truth."""
    rng = np.random.default_rng([seed, n])  # every method sees the same samples
    data = setting.draw(2 * n if method == TWICE else n, rng)
    dydx = spoiled(data.dydx, level, kind, np.random.default_rng([seed, n, 1]))
    basis = fitted_basis(standard_features(setting.degree), data.x, None)
    start, choice = time.process_time(), {}
    if method in {OURS, OURS_CV, FOLDS}:
        basis = standard_features(setting.degree)
        if method != OURS:
            known, cv = (estimate_gradients, 5) if method == FOLDS else (dydx, None)
            chosen = GradientEnhancedRidgeCV(ALPHAS, basis=basis, cv=cv).fit(data.x, data.y, known)
            choice = {"alpha": chosen.alpha_, "derivative_weight": chosen.derivative_weight_}
        else:
            chosen = GradientEnhancedRidge(basis=basis).fit(data.x, data.y, dydx)
        basis, coef, intercept = chosen.basis_, chosen.coef_, chosen.intercept_
    elif method == DIFFERENTIAL:
        phi, slopes = features(basis, data.x), derivatives(basis, data.x)
        coef, intercept = differential_regression(phi, slopes, data.y, dydx)
    else:
        model = VALUES_ONLY[method.split(",")[0]]().fit(features(basis, data.x), data.y)
        coef, intercept = model.coef_, model.intercept_
    seconds = time.process_time() - start
    error = np.sqrt(np.mean((features(basis, data.test_x) @ coef + intercept - data.test_y) ** 2)) / data.test_y.std()
    slope_error = None
    if data.test_dydx is not None:
        residual = coef @ derivatives(basis, data.test_x) - data.test_dydx
        spread = data.x.std(axis=0)  # each input's derivative in units of y
        slope_error = float(np.sqrt(np.mean((residual * spread) ** 2) / np.mean((data.test_dydx * spread) ** 2)))
    return {"error": float(error), "derivative_error": slope_error, "seconds": seconds, **choice}


@dataclass(frozen=True)
class Cell:
    """One fit."""

    setting: str
    n: int
    level: float
    kind: str
    seed: int
    method: str


def cells(seeds: int, settings: tuple[Setting, ...] = SETTINGS) -> Iterator[Cell]:
    """All fits of the study; values alone know no noise of derivatives."""
    for seed in range(seeds):
        for setting in settings:
            for n in setting.sizes:
                for method in METHODS:
                    if method != (TWICE if setting.estimated else FOLDS):
                        yield Cell(setting.name, n, 0.0, "random", seed, method)
            if setting.noisy_size is None:
                continue
            for kind, levels in LEVELS.items():
                for level in levels:
                    for method in (DIFFERENTIAL, OURS, OURS_CV):
                        yield Cell(setting.name, setting.noisy_size, level, kind, seed, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    known = {Cell(**json.loads(line)["cell"]) for line in lines}
    by_name = {setting.name: setting for setting in SETTINGS}
    with arguments.out.open("a") as file:
        todo = [cell for cell in cells(arguments.seeds) if cell not in known]
        for cell in track(todo, description="linear regression"):
            result = run(by_name[cell.setting], cell.n, cell.level, cell.kind, cell.seed, cell.method)
            file.write(json.dumps({"cell": asdict(cell), **result}) + "\n")
            file.flush()
    from ridge_report import draw, tables

    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    draw(rows, arguments.plot)
    Console(width=160).print(tables(rows), markup=False, highlight=False)


if __name__ == "__main__":
    main()
