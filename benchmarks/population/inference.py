"""Statistics of the population study: paired differences, intervals, Holm's correction, a mixed model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
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


def effect(differences: Sequence[float]) -> Effect:
    """Of differences over seeds; all equal ones have no width."""
    values = np.asarray(differences, dtype=np.float64)
    mean, error = float(values.mean()), float(stats.sem(values))
    if error == 0:
        return Effect(mean, mean, mean, float(mean == 0), len(values))
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    return Effect(mean, float(low), float(high), 2 * float(stats.t.sf(abs(mean / error), len(values) - 1)), len(values))


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Corrected for the number of tests."""
    return np.asarray(multipletests(p_values, method="holm")[1])


def non_inferior(differences: Sequence[float], margin: float) -> bool:
    """Whether differences are above ``-margin``: the lower end of the one-sided 97.5 % interval."""
    return effect(differences).low > -margin


def overall(differences: pd.DataFrame) -> Effect:
    """Mean over cells and seeds with random effects of the data set, the architecture, and their combination.

    Parameters
    ----------
    differences : DataFrame
        Columns ``difference``, ``source``, ``network``, ``cell``; a row for each seed (its split) of each cell.

    Returns
    -------
    Effect
        Wald's interval of restricted maximum likelihood; the residual is the effect of the split.
    """
    components = {name: f"0 + C({name})" for name in ("source", "network", "cell")}
    model = MixedLM.from_formula(
        "difference ~ 1", groups=np.ones(len(differences)), vc_formula=components, data=differences
    )
    fit = model.fit(reml=True, method=["powell", "lbfgs"])
    low, high = fit.conf_int().loc["Intercept"]
    return Effect(
        float(fit.params["Intercept"]), float(low), float(high), float(fit.pvalues["Intercept"]), len(differences)
    )
