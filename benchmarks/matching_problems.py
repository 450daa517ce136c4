"""Problems of the gradient matching study: designs, values, derivatives, and test data that no tuning sees.

Six formulas on Latin hypercubes, a Bachelier basket whose training data are single simulated payoffs, two engineering
data sets that the `smt` package ships, and four points of x sin x. `draw` gives training data, `test` what they are
judged on: other points for formulas, for the data sets rows that are set aside once and for all, so that also the seeds
that tune (from 100) never see them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm, qmc

__all__ = ["PROBLEMS", "Problem", "Sample", "noisy"]

Array = NDArray[np.float64]
TEST_POINTS = 2000  # of a formula
AIRFOIL_TEST_ROWS, ENGINE_TEST_ROWS = 8000, 256
MOST_POINTS = 1000  # of value-only training: cross-validation of more takes minutes
TEST_SEED = 20_000  # far from those of the designs


@dataclass(frozen=True)
class Sample:
    """Rows of a problem.

    Attributes
    ----------
    x : array of shape (n, d)
        Inputs, in units of the problem.
    y : array of shape (n, n_outputs)
        Values; noisy where the problem is simulated.
    dydx : array of shape (n, n_outputs, d)
        Their derivatives.
    """

    x: Array
    y: Array
    dydx: Array


@dataclass(frozen=True)
class Problem:
    """Where rows come from.

    Attributes
    ----------
    name : str
        As in the tables.
    dim, n_outputs : int
        Sizes of the inputs and of the outputs.
    sizes : tuple of int
        Training points of the study.
    draw : callable
        `draw(n, seed)`: training data.
    test : callable
        `test(seed)`: test data; of the same seed for all methods.
    validate : callable
        `validate(seed)`: what settings are chosen on; no row of `test`.
    noisy_values : bool
        Whether y of the training data is noisy (and known to be).
    max_size : int or None
        How many training rows there are, if finitely many.
    truth : callable or None
        Of a formula: noiseless values (n,) and derivatives (n, d) at x.
    """

    name: str
    dim: int
    n_outputs: int
    sizes: tuple[int, ...]
    draw: Callable[[int, int], Sample]
    test: Callable[[int], Sample]
    validate: Callable[[int], Sample]
    noisy_values: bool = False
    max_size: int | None = None
    truth: "Values | None" = None

    def extra(self, n: int) -> dict[int, int]:
        """Points for value-only training by c: as many as the runs that n gradients cost, ``n (1 + c)``, up to 1000."""
        sizes = {c: n * (1 + c) for c in sorted({1, 3, self.dim})}
        return {c: size for c, size in sizes.items() if size <= min(MOST_POINTS, self.max_size or MOST_POINTS)}


def noisy(sample: Sample, level: float, seed: int) -> Sample:
    """The sample with normal noise on its derivatives, `level` times the root mean square of each partial."""
    if level == 0:
        return sample
    rms = np.sqrt(np.mean(sample.dydx**2, axis=0))
    noise = np.random.default_rng([seed, 7]).standard_normal(sample.dydx.shape)
    return Sample(sample.x, sample.y, sample.dydx + level * rms * noise)


# -- formulas ----------------------------------------------------------------------------------------------------------

Values = Callable[[Array], tuple[Array, Array]]  # x -> values (n,), derivatives (n, d)


def _formula(name: str, limits: Array, values: Values, sizes: tuple[int, ...] | None = None) -> Problem:
    dim = len(limits)

    def sample(n: int, seed: int) -> Sample:
        x = latin_hypercube(limits, n, seed)
        y, dydx = values(x)
        return Sample(x, y[:, None], dydx[:, None, :])

    @cache
    def test(seed: int) -> Sample:
        return sample(TEST_POINTS, TEST_SEED + seed)

    return Problem(name, dim, 1, sizes or (5 * dim, 10 * dim), sample, test, test, truth=values)


def latin_hypercube(limits: Array, n: int, seed: int) -> Array:
    """Points between `limits`, of shape (d, 2): n of them; another design for each n."""
    unit = qmc.LatinHypercube(len(limits), rng=np.random.default_rng([seed, n])).random(n)
    return limits[:, 0] + unit * (limits[:, 1] - limits[:, 0])


def _of_smt(name: str, function: str, dim: int) -> Problem:
    import smt.problems

    problem = getattr(smt.problems, function)(ndim=dim)

    def values(x: Array) -> tuple[Array, Array]:
        return problem(x)[:, 0], np.stack([problem(x, j)[:, 0] for j in range(dim)], axis=1)

    return _formula(name, np.asarray(problem.xlimits, dtype=float), values)


def rastrigin(x: Array) -> tuple[Array, Array]:
    """``sum_j x_j^2 - 10 cos(2 pi x_j) + 10``."""
    y = (x**2 - 10 * np.cos(2 * np.pi * x) + 10).sum(axis=1)
    return y, 2 * x + 20 * np.pi * np.sin(2 * np.pi * x)


def x_sin_x(x: Array) -> tuple[Array, Array]:
    """``x sin x`` of the only column."""
    return (x * np.sin(x))[:, 0], np.sin(x) + x * np.cos(x)


def _x_sin_x() -> Problem:
    limits = np.array([[-np.pi, np.pi]])

    def draw(n: int, seed: int) -> Sample:
        """Equally spaced, as in the test of jenn that this is: seeds differ by the first weights only."""
        del seed
        x = np.linspace(limits[0, 0], limits[0, 1], n)[:, None]
        y, dydx = x_sin_x(x)
        return Sample(x, y[:, None], dydx[:, None, :])

    def test(seed: int) -> Sample:
        del seed
        return draw(1000, 0)

    return Problem("x sin x", 1, 1, (4,), draw, test, test, truth=x_sin_x)


# -- a basket option ---------------------------------------------------------------------------------------------------

BASKET_DIM, STRIKE, YEARS = 5, 1.0, 1.0
WEIGHTS = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
VOLATILITY = np.array([0.1, 0.15, 0.2, 0.25, 0.3])  # per square root of a year; prices are about 1
CORRELATION = 0.3 + 0.7 * np.eye(BASKET_DIM)
SPOTS = np.tile([0.5, 1.5], (BASKET_DIM, 1))


def basket_price(x: Array) -> tuple[Array, Array]:
    """Price and deltas of a call on a basket of Bachelier assets, in closed form.

    The basket is normal with mean ``m = w . x`` and variance ``v = T w' C w``, C the covariance; the price is
    ``(m - K) Phi(h) + sqrt(v) phi(h)`` with ``h = (m - K) / sqrt(v)``, its derivative by x ``w Phi(h)``.
    """
    covariance = CORRELATION * np.outer(VOLATILITY, VOLATILITY)
    deviation = np.sqrt(YEARS * WEIGHTS @ covariance @ WEIGHTS)
    h = (x @ WEIGHTS - STRIKE) / deviation
    return deviation * (h * norm.cdf(h) + norm.pdf(h)), norm.cdf(h)[:, None] * WEIGHTS


def basket_payoff(x: Array, seed: int) -> tuple[Array, Array]:
    """One simulated payoff for each row of x, ``max(w . S - K, 0)``, and its pathwise derivative by x."""
    factor = np.linalg.cholesky(CORRELATION) * VOLATILITY[:, None] * np.sqrt(YEARS)
    end = x + np.random.default_rng([seed, len(x), 3]).standard_normal(x.shape) @ factor.T
    excess = end @ WEIGHTS - STRIKE
    return np.maximum(excess, 0), (excess > 0)[:, None] * WEIGHTS


def _basket() -> Problem:
    exact = _formula("Bachelier basket", SPOTS, basket_price)

    def draw(n: int, seed: int) -> Sample:
        x = latin_hypercube(SPOTS, n, seed)
        y, dydx = basket_payoff(x, seed)
        return Sample(x, y[:, None], dydx[:, None, :])

    return replace(exact, draw=draw, noisy_values=True)


# -- data that smt ships -----------------------------------------------------------------------------------------------


def _smt_examples() -> Path:
    import smt

    return Path(str(smt.__file__)).parent / "examples"


@cache
def airfoil_rows() -> Sample:
    """Drag coefficients of 42 039 airfoils: 14 shape modes, Mach number, angle of attack (degrees); derivatives."""
    folder = _smt_examples() / "airfoil_parameters"
    values = pd.read_csv(folder / "cd_x_y.csv", sep=";", header=None).to_numpy(float)
    derivatives = pd.read_csv(folder / "cd_dy.csv", sep=";", header=None).to_numpy(float)
    return Sample(values[:, :-1], values[:, -1:], derivatives[:, None, :])


@cache
def engine_rows() -> Sample:
    """Thrust (N) and specific fuel consumption (N/N/s) of an engine at Mach number, altitude (km) and throttle."""
    from smt.examples.b777_engine.b777_engine import get_b777_engine

    x, y, dydx, _ = get_b777_engine()
    return Sample(x, y, dydx)


def _of_rows(
    name: str, rows: Callable[[], Sample], n_rows: int, n_test: int, shape: tuple[int, int], sizes: tuple[int, ...]
) -> Problem:
    n_outputs, dim = shape
    order = np.random.default_rng(TEST_SEED).permutation(n_rows)
    kept, others = order[:n_test], order[n_test:]

    def pick(which: NDArray[np.int64]) -> Sample:
        sample = rows()
        return Sample(sample.x[which], sample.y[which], sample.dydx[which])

    def draw(n: int, seed: int) -> Sample:
        return pick(np.random.default_rng([seed, n]).permutation(others)[:n])

    def test(seed: int) -> Sample:
        del seed
        return pick(kept)

    def validate(seed: int) -> Sample:
        """Rows outside the test rows and, drawn as they are from the end, outside the smaller training sets."""
        count = min(n_test, TEST_POINTS)
        return pick(np.random.default_rng([seed, sizes[0]]).permutation(others)[-count:])

    return Problem(name, dim, n_outputs, sizes, draw, test, validate, max_size=len(others))


PROBLEMS = {
    problem.name: problem
    for problem in (
        _of_smt("Rosenbrock 2-D", "Rosenbrock", 2),
        _of_smt("Rosenbrock 5-D", "Rosenbrock", 5),
        _of_smt("Branin", "Branin", 2),
        _formula("Rastrigin", np.tile([-1.0, 1.5], (2, 1)), rastrigin),
        _of_smt("Wing weight", "WingWeight", 10),
        _of_smt("Water flow", "WaterFlow", 8),
        _basket(),
        _of_rows("Airfoil drag", airfoil_rows, 42_039, AIRFOIL_TEST_ROWS, (1, 16), (200, 1000)),
        _of_rows("B777 engine", engine_rows, 1056, ENGINE_TEST_ROWS, (2, 3), (50, 100, 200)),
        _x_sin_x(),
    )
}
