"""How often `check_derivatives` finds what is wrong, and whether it ever accuses exact derivatives.

Functions of 1 to 10 inputs (steep, oscillating and linear ones, two with several outputs), Latin hypercubes of 5, 10
and 20 points for each input, values without and with noise of 10 % of their standard deviation, inputs in random units;
exact derivatives, and the same with a defect. Run: ``PYTHONPATH=examples python benchmarks/check_derivatives_rates.py``
(five minutes of one core; goes on where it was stopped). Writes out/check_derivatives.jsonl,
out/check_derivatives.md and docs/images/check_derivatives.png.
"""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matching_wing_weight import LOWER, UPPER, wing_weight
from numpy.typing import NDArray
from reports import markdown
from rich.progress import track
from scipy.stats import qmc
from sklearn.exceptions import ConvergenceWarning

from gradwise import check_derivatives, finite_difference_jacobian
from gradwise._check_derivatives_findings import suggested_weight
from gradwise.torch import GradientEnhancedMLPRegressor

__all__ = ["DEFECTS", "FUNCTIONS", "Data", "outcome", "sample"]

Array = NDArray[np.float64]
ROOT = Path(__file__).parent.parent
SEEDS = 5
MULTIPLES, NOISES = (5, 10, 20), (0.0, 0.1)
CHOSEN = ("sign", "57.3 times too large", "main input 57.3 times too small", "rows shuffled", "noise of 100 %")


@dataclass(frozen=True)
class Function:
    """A function on the unit cube."""

    n_inputs: int
    values: Callable[[Array], Array]


@dataclass(frozen=True)
class Data:
    """What `check_derivatives` gets."""

    X: Array
    y: Array
    dydx: Array


def _ripples(u: Array) -> Array:
    x = 5.12 * (2 * u - 1)
    return (x**2 - 2 * np.cos(2 * np.pi * x)).sum(axis=1)


def _branin(u: Array) -> Array:
    a, b = 15 * u[:, 0] - 5, 15 * u[:, 1]
    return (b - 5.1 * (a / (2 * np.pi)) ** 2 + 5 * a / np.pi - 6) ** 2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a)


def _rosenbrock(u: Array) -> Array:
    x = 4 * u - 2
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(axis=1)


def _rastrigin(u: Array) -> Array:
    x = 5.12 * (2 * u - 1)
    return (x**2 - 10 * np.cos(2 * np.pi * x)).sum(axis=1)


def _friedman(u: Array) -> Array:
    return 10 * np.sin(np.pi * u[:, 0] * u[:, 1]) + 20 * (u[:, 2] - 0.5) ** 2 + 10 * u[:, 3] + 5 * u[:, 4]


def _wing_weight(u: Array) -> Array:
    return wing_weight(LOWER + u * (UPPER - LOWER))[0]


def _robot_arm(u: Array) -> Array:
    angles = 2 * np.pi * np.cumsum(u[:, :4], axis=1)
    return np.hypot((u[:, 4:] * np.cos(angles)).sum(axis=1), (u[:, 4:] * np.sin(angles)).sum(axis=1))


def _polar(u: Array) -> Array:
    return np.column_stack([(1 + u[:, 0]) * np.cos(3 * u[:, 1]), (1 + u[:, 0]) * np.sin(3 * u[:, 1])])


def _lorenz(u: Array) -> Array:
    x, y, z = (40 * u[:, 0] - 20, 50 * u[:, 1] - 25, 40 * u[:, 2] + 5)
    return np.column_stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


FUNCTIONS = {
    "linear, 3 inputs": Function(3, lambda u: u @ np.array([1.0, 2.0, -3.0])),
    "x sin x, 1": Function(1, lambda u: (2 * np.pi * u[:, 0] - np.pi) * np.sin(2 * np.pi * u[:, 0] - np.pi)),
    "Forrester, 1": Function(1, lambda u: (6 * u[:, 0] - 2) ** 2 * np.sin(12 * u[:, 0] - 4)),
    "Branin, 2": Function(2, _branin),
    "Rosenbrock, 2": Function(2, _rosenbrock),
    "polar to Cartesian, 2 to 2": Function(2, _polar),
    "Lorenz, 3 to 3": Function(3, _lorenz),
    "steep front, 3": Function(3, lambda u: np.tanh(10 * (u.sum(axis=1) - 1.5))),
    "Friedman, 5": Function(5, _friedman),
    "Rosenbrock, 5": Function(5, _rosenbrock),
    "wing weight, 10": Function(10, _wing_weight),
    "Friedman with 5 idle inputs, 10": Function(10, _friedman),
    "robot arm, 8": Function(8, _robot_arm),
    "Rastrigin, 2": Function(2, _rastrigin),
    "Rastrigin, 5": Function(5, _rastrigin),
}

# Exact derivatives that do harm: ripples of 3 % of the variance with most of the derivatives' size.
WEIGHED = {"wing weight": FUNCTIONS["wing weight, 10"], "ripples": Function(2, _ripples)}
CANDIDATES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def sample(name: str, n: int, seed: int, noise: float = 0.0) -> Data:
    """Points of a Latin hypercube in random units, values, and derivatives exact to about eight digits."""
    function = FUNCTIONS[name]
    rng = np.random.default_rng(seed)
    u = qmc.LatinHypercube(function.n_inputs, rng=rng).random(n)
    y = function.values(u)
    jacobian = finite_difference_jacobian(function.values, u, step=1e-6)
    units = np.exp(2 * rng.standard_normal(function.n_inputs))
    noisy = y + noise * y.std(axis=0) * rng.standard_normal(y.shape)
    return Data(u * units, noisy, jacobian / units)


def _main_input(data: Data) -> int:
    return int(np.argmax(np.square(data.dydx * data.X.std(axis=0)).sum(axis=(0, 1))))


def _column(factor: float) -> Callable[[Data, np.random.Generator], Array]:
    def change(data: Data, _: np.random.Generator) -> Array:
        dydx = data.dydx.copy()
        dydx[..., _main_input(data)] *= factor
        return dydx

    return change


def _noise(size: float) -> Callable[[Data, np.random.Generator], Array]:
    def change(data: Data, rng: np.random.Generator) -> Array:
        spread = np.sqrt(np.square(data.dydx).mean(axis=0))
        return data.dydx + size * spread * rng.standard_normal(data.dydx.shape)

    return change


def _nothing_but_noise(data: Data, rng: np.random.Generator) -> Array:
    return np.sqrt(np.square(data.dydx).mean(axis=0)) * rng.standard_normal(data.dydx.shape)


@dataclass(frozen=True)
class Defect:
    """What is done to exact derivatives, and the kinds of finding that name it."""

    change: Callable[[Data, np.random.Generator], Array]
    kinds: tuple[str, ...]


UNITS, NOISE, ROWS = ("wrong units",), ("noise", "hopeless noise"), ("misaligned rows", "hopeless noise", "noise")
DEFECTS = {
    "none": Defect(lambda data, _: data.dydx, ()),
    "sign": Defect(lambda data, _: -data.dydx, ("wrong sign",)),
    "sign of the main input": Defect(_column(-1), ("wrong sign",)),
    "57.3 times too large": Defect(lambda data, _: 57.3 * data.dydx, UNITS),
    "57.3 times too small": Defect(lambda data, _: data.dydx / 57.3, UNITS),
    "2 times too large": Defect(lambda data, _: 2 * data.dydx, UNITS),
    "main input 57.3 times too large": Defect(_column(57.3), UNITS),
    "main input 57.3 times too small": Defect(_column(1 / 57.3), UNITS),
    "transposed": Defect(lambda data, _: data.dydx.swapaxes(1, 2), ("transposed",)),
    "rows shifted by one": Defect(lambda data, _: np.roll(data.dydx, 1, axis=0), ROWS),
    "rows shuffled": Defect(lambda data, rng: data.dydx[rng.permutation(len(data.X))], ROWS),
    "noise of 20 %": Defect(_noise(0.2), NOISE),
    "noise of 50 %": Defect(_noise(0.5), NOISE),
    "noise of 100 %": Defect(_noise(1.0), ROWS),
    "noise of 200 %": Defect(_noise(2.0), ROWS),
    "nothing but noise": Defect(_nothing_but_noise, ROWS),
}


def outcome(name: str, n: int, seed: int, noise: float, defect: str) -> tuple[str, tuple[str, ...]] | None:
    """Verdict and kinds of finding; None where the defect is none (a transposed row, shuffled equal rows)."""
    data = sample(name, n, seed, noise)
    if defect == "transposed" and data.dydx.shape[1] == 1:
        return None
    if name.startswith("linear") and defect.startswith("rows"):
        return None
    report = check_derivatives(data.X, data.y, DEFECTS[defect].change(data, np.random.default_rng(1000 + seed)))
    kinds = dict.fromkeys(finding.kind for finding in report.findings if finding.kind != "input hardly matters")
    return report.verdict, tuple(kinds)


def cells(seeds: int) -> Iterator[tuple[str, int, float, int, str]]:
    """Everything to measure."""
    for name in FUNCTIONS:
        for multiple in MULTIPLES:
            for noise in NOISES:
                for seed in range(seeds):
                    for defect in DEFECTS:
                        yield name, multiple, noise, seed, defect


def measure(path: Path, seeds: int) -> list[dict[str, object]]:
    """Outcomes of all cells, those of earlier runs included."""
    path.parent.mkdir(exist_ok=True)
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    wanted = set(cells(seeds))
    results = [result for result in results if tuple(result["cell"]) in wanted]
    done = {tuple(result["cell"]) for result in results}
    todo = [cell for cell in cells(seeds) if cell not in done]
    with path.open("a") as file:
        for cell in track(todo, "check_derivatives"):
            name, multiple, noise, seed, defect = cell
            found = outcome(name, multiple * FUNCTIONS[name].n_inputs, seed, noise, defect)
            results.append({"cell": list(cell), "outcome": found})
            file.write(json.dumps(results[-1]) + "\n")
    return results


def _named(kinds: list[str], defect: str) -> bool:
    return any(kind in found for found in kinds for kind in DEFECTS[defect].kinds)


def tables(results: list[dict[str, object]]) -> str:
    """Markdown: rates of each defect by number of samples, and of some defects by function."""
    by_defect: dict[str, dict[int, Counter[str]]] = {defect: {m: Counter() for m in MULTIPLES} for defect in DEFECTS}
    by_function: dict[str, dict[str, Counter[str]]] = {
        name: {defect: Counter() for defect in DEFECTS} for name in FUNCTIONS
    }
    for result in results:
        if result["outcome"] is None:
            continue
        name, multiple, _, _, defect = result["cell"]  # type: ignore[misc]
        verdict, kinds = result["outcome"]  # type: ignore[misc]
        keys = [verdict, "all", *(["named"] if _named(kinds, defect) else []), *(["alarm"] if kinds else [])]
        by_defect[defect][multiple].update(keys)
        by_function[name][defect].update(keys)

    def percent(counter: Counter[str], key: str) -> str:
        return f"{100 * counter[key] / counter['all']:.0f}" if counter["all"] else ""

    header = ["defect", *(f"named, {m} d" for m in MULTIPLES), *(f'"use", {m} d' for m in MULTIPLES)]
    rows = [
        [
            defect,
            *(percent(counters[m], "alarm" if defect == "none" else "named") for m in MULTIPLES),
            *(percent(counters[m], "use") for m in MULTIPLES),
        ]
        for defect, counters in by_defect.items()
    ]
    second = [
        [name, f"{counters['none']['alarm']} of {counters['none']['all']}", percent(counters["none"], "use")]
        + [percent(counters[defect], "named") for defect in CHOSEN]
        for name, counters in by_function.items()
    ]
    names = ["function, inputs", "exact: accused", 'exact: "use"', *CHOSEN]
    return markdown(header, rows) + markdown(names, second)


def weights(path: Path, seeds: int = 5) -> str:
    """Markdown: the error of a network by relative noise and weight of the derivatives; and of unresolved ripples."""
    done = (
        {tuple(cell): error for cell, error in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    )
    cells = [
        (name, n, size, weight, seed)
        for name, n, sizes in (
            ("wing weight", 50, (0.1, 0.2, 0.5, 1.0)),
            ("ripples", 20, (0.0,)),
            ("ripples", 40, (0.0,)),
        )
        for size in sizes
        for weight in CANDIDATES
        for seed in range(seeds)
    ]
    for cell in track([cell for cell in cells if cell not in done], "weights"):
        done[cell] = _network_error(*cell)
        with path.open("a") as file:
            file.write(json.dumps([list(cell), done[cell]]) + "\n")
    rows = [
        [f"{name}, {n} samples, noise {100 * size:.0f} %"]
        + [f"{np.median([done[name, n, size, weight, seed] for seed in range(seeds)]):.3f}" for weight in CANDIDATES]
        + [f"{suggested_weight(size):.2g}" if size else ""]
        for name, n, size in dict.fromkeys(cell[:3] for cell in cells)
    ]
    return markdown(["test error at weight", *(f"{weight:g}" for weight in CANDIDATES), "suggested"], rows)


def _network_error(name: str, n: int, size: float, weight: float, seed: int) -> float:
    function = WEIGHED[name]
    rng = np.random.default_rng(seed)
    X, new = qmc.LatinHypercube(function.n_inputs, rng=rng).random(n), rng.uniform(size=(1000, function.n_inputs))
    y, test = function.values(X), function.values(new)
    data = Data(X, y, finite_difference_jacobian(function.values, X, step=1e-6))
    model = GradientEnhancedMLPRegressor(
        (32, 32), derivative_weight=weight, alpha=1e-3, max_iter=200, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as many steps for all
        model.fit(X, y, _noise(size)(data, rng))
    return float(np.sqrt(np.mean(np.square(model.predict(new) - test))) / test.std())


def picture(path: Path) -> None:
    """Reports on one function: all is well, a wrong sign, radians for degrees, noise."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    data = sample("Friedman, 5", 60, 0, 0.05)
    plots = ("none", "sign", "57.3 times too small", "noise of 100 %")
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", height_ratios=(3, 2))
    for column, defect in enumerate(plots):
        report = check_derivatives(data.X, data.y, DEFECTS[defect].change(data, np.random.default_rng(0)))
        report.plot(axes[:, column])
        axes[0, column].set_xlabel("predicted difference (std)")
        axes[0, column].set_ylabel("difference of values (std)" if column == 0 else "")
    figure.suptitle("check_derivatives on the Friedman function, 60 samples, 5 % noise in y")
    path.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(path, dpi=85)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    text = tables(measure(ROOT / "out" / "check_derivatives.jsonl", arguments.seeds))
    text += weights(ROOT / "out" / "check_derivatives_weights.jsonl")
    (ROOT / "out" / "check_derivatives.md").write_text(text)
    print(text)
    picture(ROOT / "docs" / "images" / "check_derivatives.png")
