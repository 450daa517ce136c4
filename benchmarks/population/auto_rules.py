"""Rules that choose sigma before the final training, from what `population.auto_probes` saw.

A rule without a parameter is ready; the parameter of any other is fitted on cells that it is not judged on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from population.auto_probes import DEFAULT, GRID, SEARCHED, Record

__all__ = ["GROUPS", "RULES", "Pair", "Rule", "fitted"]


@dataclass(frozen=True)
class Pair:
    """A seed of a cell: what the probes saw, and what every sigma of the grid would give.

    Attributes
    ----------
    cell, network : str
    seed : int
    test : dict of float
        Macro-F1 on test rows, by sigma.
    best_fixed : float
        The sigma that was best on the validation rows of the cell's other seeds.
    probes : dict
        Records by probe.
    """

    cell: str
    network: str
    seed: int
    test: Mapping[float, float]
    best_fixed: float
    probes: Mapping[str, Record]


@dataclass(frozen=True)
class Rule:
    """How sigma is chosen, and what that costs.

    Attributes
    ----------
    choose : callable
        ``choose(probes, parameter) -> sigma``.
    cost : callable
        ``cost(probes)``, in trainings, without the final one.
    parameters : sequence
        Values to choose from; empty if there is nothing to fit.
    """

    choose: Callable[[Mapping[str, Record], Any], float]
    cost: Callable[[Mapping[str, Record]], float]
    parameters: Sequence[Any] = ()


# What is left out together when a parameter is fitted.
GROUPS: dict[str, Callable[[Pair], str]] = {
    "data sets": lambda pair: pair.cell.removesuffix(f" {pair.network}"),
    "architectures": lambda pair: pair.network,
}


def fitted(rule: Rule, pairs: Sequence[Pair]) -> Any:
    """The parameter of the best mean test score, every cell counting the same; the middle one of equal ones."""
    if not rule.parameters:
        return None
    cells = sorted({pair.cell for pair in pairs})
    worth = [
        fmean(
            fmean(
                pair.test[rule.choose(pair.probes, parameter)] - pair.test[DEFAULT] for pair in pairs if pair.cell == c
            )
            for c in cells
        )
        for parameter in rule.parameters
    ]
    best = np.flatnonzero(np.isclose(worth, max(worth), rtol=0, atol=1e-9))
    return rule.parameters[best[len(best) // 2]]


def _found(probe: str, key: str) -> Callable[[Mapping[str, Record], Any], float]:
    return lambda probes, _: probes[probe][key]


def _searching(probe: str) -> Callable[[Mapping[str, Record]], float]:
    return lambda probes: sum(one["cost"] for one in probes[probe]["worth"])


def _members(moment: int, key: str, sign: int, limits: Sequence[float]) -> Rule:
    """The largest sigma at which a statistic of the members is still above (or below) a limit; 0 always is."""

    def choose(probes: Mapping[str, Record], limit: float) -> float:
        values = probes["members"]["moments"][moment][key]
        return max(s for s, value in zip(GRID, values, strict=True) if s == 0 or sign * (value - limit) >= 0)

    return Rule(choose, lambda probes: probes["members"]["moments"][moment]["cost"], limits)


def _gap(key: str, sign: int, limits: Sequence[float]) -> Rule:
    """One sigma below a limit of over-fitting and a larger one above; over-fitting is that of plain training."""

    def choose(probes: Mapping[str, Record], parameter: tuple[float, float, float]) -> float:
        limit, low, high = parameter
        plain = probes["search"]["worth"][0]
        return high if sign * (plain["held_out"][key] - plain["train"][key]) > limit else low

    steps = [(limit, low, high) for low in GRID for high in GRID if low < high for limit in limits]
    return Rule(choose, lambda probes: probes["search"]["worth"][0]["cost"], steps)


_AGREEMENTS = np.linspace(0.1, 1.0, 37).tolist()
_RISES = np.geomspace(1e-5, 10, 49).tolist()
assert SEARCHED[0] == 0  # plain training is the first one of the search

RULES: dict[str, Rule] = {
    "one sigma for all cells": Rule(lambda _, sigma: sigma, lambda _: 0.0, GRID),
    "forks, log-loss": Rule(_found("forks", "sigma"), lambda probes: probes["forks"]["cost"]),
    "forks, scaled log-loss": Rule(_found("forks, scaled", "sigma"), lambda probes: probes["forks, scaled"]["cost"]),
    "agreement at 25 %": _members(0, "agreement", 1, _AGREEMENTS),
    "agreement at 60 %": _members(1, "agreement", 1, _AGREEMENTS),
    "rise of the loss at 25 %": _members(0, "rise", -1, _RISES),
    "rise of the loss at 60 %": _members(1, "rise", -1, _RISES),
    "gap of log-loss": _gap("log_loss", 1, np.geomspace(0.02, 5, 25).tolist()),
    "gap of accuracy": _gap("accuracy", -1, np.linspace(1, 60, 25).tolist()),
    "search over short trainings": Rule(_found("short search", "best"), _searching("short search")),
    "search over short trainings, cautious": Rule(_found("short search", "cautious"), _searching("short search")),
    "forks from half way to the end": Rule(
        _found("late forks", "best"),
        lambda probes: probes["late forks"]["shared"] + _searching("late forks")(probes),
    ),
    "grid search": Rule(_found("search", "best"), _searching("search")),
}
