"""Statistics of the population study: paired differences, intervals, Holm's correction, a mixed model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests

__all__ = ["Effect", "effect", "holm", "non_inferior", "overall"]


@dataclass(frozen=True)
class Effect:
    """A mean of paired differences.

    Attributes
    ----------
    mean, low, high : float
        With its 95 % interval (Student's t).
    p : float
        Two-sided.
    pairs : int
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"

    @property
    def half_width(self) -> float:
        """Of the interval, which is symmetric."""
        return (self.high - self.low) / 2

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def effect(differences: Sequence[float]) -> Effect:
    """Of differences over seeds; all equal ones have no width."""
    values = np.asarray(differences, dtype=np.float64)
    return _student(float(values.mean()), float(stats.sem(values)), len(values) - 1, len(values))


def _student(mean: float, error: float, freedom: int, pairs: int) -> Effect:
    if error == 0:
        return Effect(mean, mean, mean, float(mean == 0), pairs)
    low, high = stats.t.interval(0.95, freedom, mean, error)
    return Effect(mean, float(low), float(high), 2 * float(stats.t.sf(abs(mean / error), freedom)), pairs)


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Corrected for the number of tests."""
    return np.asarray(multipletests(p_values, method="holm")[1])


def non_inferior(differences: Sequence[float], margin: float) -> bool:
    """Whether differences are above ``-margin``: the lower end of the one-sided 97.5 % interval."""
    return effect(differences).low > -margin


def overall(differences: pd.DataFrame) -> Effect:
    """Mean over cells and seeds in a mixed model with crossed random effects.

    ``y = mean + sum_k Z_k u_k + e``: every column but the differences is a grouping with a variance of its own.
    Restricted maximum likelihood, written out over the few hundred rows that there are: the variances, in units of that
    of the residual, are bounded by zero from below, where those of such small studies often lie. (The likelihood of
    statsmodels' MixedLM is the same; its parameters have no such bound, and near zero it does not converge.)

    Parameters
    ----------
    differences : DataFrame
        Columns ``difference``, ``cell`` and whatever else groups rows: data set, architecture, split.

    Returns
    -------
    Effect
        Student's interval with one degree of freedom less than there are cells; it is still too short if one of the
        groupings of few levels varies much.
    """
    y = differences["difference"].to_numpy(dtype=np.float64)
    if np.ptp(y) == 0:
        return _student(float(y[0]), 0.0, 1, len(y))
    names = [str(name) for name in differences.columns if name != "difference"]
    same = [np.equal.outer(*(2 * [differences[name].factorize()[0]])).astype(np.float64) for name in names]

    def solved(ratios: NDArray[np.float64]) -> tuple[float, float, float]:
        """Minus twice the restricted log-likelihood, the mean and its variance."""
        covariance = np.eye(len(y)) + sum((r * part for r, part in zip(ratios, same, strict=True)), np.zeros(()))
        factor = np.linalg.cholesky(covariance)
        ones, scaled = np.linalg.solve(factor, np.stack([np.ones_like(y), y], axis=1)).T
        information = float(ones @ ones)
        mean = float(ones @ scaled) / information
        residual = float(np.square(scaled - mean * ones).sum()) / (len(y) - 1)
        log_determinant = 2 * float(np.log(np.diag(factor)).sum())
        value = log_determinant + np.log(information) + (len(y) - 1) * np.log(residual)
        return value, mean, residual / information

    found = optimize.minimize(
        lambda ratios: solved(ratios)[0], np.full(len(same), 0.1), method="L-BFGS-B", bounds=[(0, None)] * len(same)
    )
    _, mean, variance = solved(found.x)
    return _student(mean, variance**0.5, len(set(differences["cell"])) - 1, len(y))
