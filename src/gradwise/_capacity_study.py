"""What a capacity study found: errors by capacity, their gap, and the capacities it recommends."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradwise._capacity_statistics import last_before_rise, rise_band, within_one_standard_error
from gradwise._capacity_training import Job, Training

if TYPE_CHECKING:
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs] - used by name only
    from matplotlib.figure import Figure

__all__ = ["THRESHOLD", "CapacityStudy"]

Floats = NDArray[np.float64]
THRESHOLD = float(np.log(1.5))


@dataclass(frozen=True, repr=False)
class CapacityStudy:
    """Result of `capacity_study`, whose docstring defines what is computed.

    Properties are None where the study did not train the networks they are about. Rows of arrays are paired units
    (seed and fold), columns are capacities.

    Attributes
    ----------
    capacities : tuple of float
        The grid, ascending.
    trainings : mapping of Job to Training
        All of them, those that did not converge included.
    random_state : int
        Seeds the bootstrap.
    """

    capacities: tuple[float, ...]
    trainings: Mapping[Job, Training]
    random_state: int = 0

    @property
    def gap(self) -> Floats | None:
        """G(h) of shape (n_capacities,): mean over paired units of log error without - log error with derivatives."""
        gaps = self._gaps
        return None if gaps is None else gaps.mean(axis=0)

    @cached_property
    def rise_band(self) -> Floats | None:
        """Simultaneous 95 % lower band of G(h) - min over h' < h of G(h'), shape (n_capacities,).

        Of a study of networks without derivatives only: the same of the logarithm of their derivative error.
        """
        units = self._gaps
        if units is None and self.errors(derivatives=True) is None:
            units = self._logarithms(("derivative_error", False))
        return None if units is None else rise_band(units, rng=np.random.default_rng(self.random_state))

    @property
    def upper_bound(self) -> float | None:
        """The last capacity before `rise_band` exceeds log 1.5; None too if it never does."""
        index = None if self.rise_band is None else last_before_rise(self.rise_band, THRESHOLD)
        return None if index is None else self.capacities[index]

    @property
    def need(self) -> float | None:
        """The smallest capacity whose error with derivatives is within one standard error of the least."""
        values = self._complete("error", True)
        return None if values is None else self.capacities[within_one_standard_error(values)]

    @property
    def recommended_with(self) -> float | None:
        """Capacity for a network trained with derivatives: `need`."""
        return self.need

    @property
    def recommended_without(self) -> float | None:
        """Capacity for one trained without: the smaller of `need` and `upper_bound`; `best_without` without gap."""
        if self.gap is None or self.need is None:
            return self.best_without
        return self.need if self.upper_bound is None else min(self.need, self.upper_bound)

    @cached_property
    def best_with(self) -> float | None:
        """Capacity of the least unseen error with derivatives (see `capacity_study`): the better choice."""
        return self._least(True)

    @cached_property
    def best_without(self) -> float | None:
        """The same without derivatives."""
        return self._least(False)

    @property
    def not_converged(self) -> int:
        """Number of trainings that say they did not converge, or whose errors are not finite."""
        return sum(_failed(training) for training in self.trainings.values())

    def errors(self, *, derivatives: bool) -> Floats | None:
        """Held-out value errors of shape (n_units, n_capacities), relative to the spread of y; None without folds."""
        return self._table("error", derivatives)

    def derivative_errors(self, *, derivatives: bool) -> Floats | None:
        """Errors of derivatives that were not trained on, shape (n_units, n_capacities); None if not studied."""
        return self._table("derivative_error", derivatives)

    def to_frame(self) -> "pd.DataFrame":
        """One row for each training; needs pandas.

        Returns
        -------
        pandas.DataFrame
            Columns capacity, seed, fold (-1: none held out), derivatives (trained on?), error, derivative_error,
            converged (None: the model does not say), seconds.
        """
        from gradwise._capacity_plot import frame

        return frame(self)

    def plot(self) -> "Figure":
        """Draw errors and gap over capacity, with what is recommended; needs matplotlib.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from gradwise._capacity_plot import figure

        return figure(self)

    def __repr__(self) -> str:
        return f"<CapacityStudy: {self.summary()}>"

    def summary(self) -> str:
        """What it recommends, in words."""
        parts: list[str] = []
        if self.best_with is not None:
            parts.append(f"with derivatives take {self.best_with:g} (within one standard error: {self.need:g})")
        if self.best_without is not None:
            bound = "no upper bound shown" if self.upper_bound is None else f"upper bound {self.upper_bound:g}"
            rule = "" if self.need is None else f"; the smaller of need and bound: {self.recommended_without:g}"
            parts.append(f"without them {self.best_without:g} ({bound}{rule})")
        count = len(self.trainings)
        failed = f"; {self.not_converged} of {count} trainings did not converge" if self.not_converged else ""
        return ", ".join(parts) + f"; {count} trainings of {len(self.capacities)} capacities{failed}"

    @cached_property
    def _gaps(self) -> Floats | None:
        both = [self._table("error", derivatives) for derivatives in (False, True)]
        without, with_ = both
        if without is None or with_ is None:
            return None
        with np.errstate(invalid="ignore"):
            return _usable(np.log(without) - np.log(with_))

    def _logarithms(self, *columns: tuple[str, bool]) -> Floats | None:
        """Mean over the columns that are known of the logarithms, unit by unit."""
        tables = [self._table(name, derivatives) for name, derivatives in columns]
        known = [np.log(table) for table in tables if table is not None]
        return _usable(np.mean(known, axis=0)) if known else None

    def _least(self, derivatives: bool) -> float | None:
        units = self._logarithms(("error", derivatives), ("derivative_error", derivatives))
        return None if units is None else self.capacities[int(units.mean(axis=0).argmin())]

    def _complete(self, name: str, derivatives: bool) -> Floats | None:
        table = self._table(name, derivatives)
        return None if table is None else _usable(table)

    def _table(self, name: str, derivatives: bool) -> Floats | None:
        units = sorted({(job.seed, job.fold) for job in self.trainings if job.derivatives == derivatives})
        table = np.array(
            [
                [getattr(self.trainings[Job(capacity, *unit, derivatives)], name) for capacity in self.capacities]
                for unit in units
            ]
        )
        # NaN: not looked at (no fold, no derivative known there). Infinite: looked at, and hopeless.
        return None if not units or np.isnan(table).all() else table


def _failed(training: Training) -> bool:
    return training.converged is False or np.inf in {training.error, training.derivative_error}


def _usable(units: Floats) -> Floats:
    """Units that are finite at all capacities: a mean over others compares unlike things. `capacity_study` warns."""
    return units[np.isfinite(units).all(axis=1)]
