"""Ratios of errors between methods: paired by seed, one number for each problem, bootstrapped over problems."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ratio", "cell_ratio", "geometric_mean"]

RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over problems.

    Attributes
    ----------
    mean, lower, upper : float
        Geometric mean of the problems' ratios, and its 95 % bootstrap interval.
    problems : dict
        Ratio of each problem, the geometric mean over its cells.
    """

    mean: float
    lower: float
    upper: float
    problems: dict[str, float]

    @property
    def wins(self) -> int:
        """Problems with a ratio below 1."""
        return sum(ratio < 1 for ratio in self.problems.values())


def cell_ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """Median over the common seeds of ``ours / theirs``; NaN if there is none."""
    common = sorted(ours.keys() & theirs.keys())
    return math.exp(float(np.median([math.log(ours[seed] / theirs[seed]) for seed in common]))) if common else math.nan


def geometric_mean(cells: Mapping[tuple[str, int], float], seed: int = 0) -> Ratio:
    """Of ratios by problem and size; problems count alike and are what is resampled, for sizes of one are alike.

    Parameters
    ----------
    cells : mapping of (problem, size) to float
        NaN: not measured, left out.
    seed : int
        Of the bootstrap.
    """
    logs: dict[str, list[float]] = {}
    for (problem, _), ratio in cells.items():
        if not math.isnan(ratio):
            logs.setdefault(problem, []).append(math.log(ratio))
    if not logs:
        return Ratio(math.nan, math.nan, math.nan, {})
    means = np.array([np.mean(values) for values in logs.values()])
    lower, upper = np.exp(np.quantile(_resampled(means, seed), [0.025, 0.975]))
    problems = dict(zip(logs, np.exp(means).tolist(), strict=True))
    return Ratio(float(np.exp(means.mean())), float(lower), float(upper), problems)


def _resampled(values: NDArray[np.floating[Any]], seed: int) -> NDArray[np.floating[Any]]:
    """Means of samples drawn with replacement."""
    return values[np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
