"""Capacity studies as a table and as a picture; pandas and matplotlib are imported when asked for."""

from dataclasses import asdict
from typing import Any

import numpy as np

from gradwise._capacity_study import THRESHOLD, CapacityStudy

__all__ = ["figure", "frame"]

WITHOUT, WITH, BOUND = "#d55e00", "#0072b2", "#555555"  # Okabe and Ito: distinct without colour vision too


def frame(study: CapacityStudy) -> Any:
    """One row for each training, sorted."""
    try:
        import pandas as pd  # pyright: ignore[reportMissingTypeStubs] - pandas ships its types elsewhere
    except ImportError as error:
        msg = '`to_frame` needs pandas: pip install "gradwise[plot]"'
        raise ImportError(msg) from error
    rows = [asdict(job) | asdict(training) for job, training in study.trainings.items()]
    order = ["capacity", "derivatives", "seed", "fold"]
    return pd.DataFrame(rows).sort_values(order, ignore_index=True)


def figure(study: CapacityStudy) -> Any:
    """Errors above, the gap (or the derivative error) and its band below."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = '`plot` needs matplotlib: pip install "gradwise[plot]"'
        raise ImportError(msg) from error
    gap, band = study.gap, study.rise_band
    made: Any = Figure(figsize=(7.5, 4.2 if band is None else 7.0), dpi=110, layout="constrained")
    panels: list[Any] = list(made.subplots(1 if band is None else 2, 1, sharex=True, squeeze=False)[:, 0])
    for derivatives in (False, True):
        _errors(panels[0], study, derivatives)
    panels[0].set_yscale("log")
    panels[0].set_ylabel("relative error")
    panels[0].set_title(f"{len(study.trainings)} trainings, {study.not_converged} of them not converged", fontsize=10)
    if band is not None:
        _rise(panels[1], study, gap, band)
    for capacity, colour, style, name in (
        (study.best_with, WITH, "-", "take with derivatives"),
        (study.best_without, WITHOUT, "-", "take without"),
        (study.need, WITH, ":", "need"),
        (study.upper_bound, BOUND, ":", "upper bound"),
    ):
        if capacity is not None:
            for axes in panels:
                axes.axvline(capacity, color=colour, linestyle=style, linewidth=1.5, alpha=0.4)
            panels[-1].lines[-1].set(alpha=1, label=f"{name}: {capacity:g}")
    panels[-1].set_xlabel("capacity")
    for axes in panels:
        if study.capacities[0] > 0:
            axes.set_xscale("log")
            axes.set_xticks(study.capacities, [f"{capacity:g}" for capacity in study.capacities])
            axes.minorticks_off()
        axes.legend(fontsize=8, loc="best", framealpha=0.8)
        axes.grid(alpha=0.3)
    return made


def _errors(axes: Any, study: CapacityStudy, derivatives: bool) -> None:
    """Curves of the networks with or without derivatives, with rings where some did not converge."""
    colour, name = (WITH, "with") if derivatives else (WITHOUT, "without")
    capacities = np.array(study.capacities)
    held_out, unseen = study.errors(derivatives=derivatives), study.derivative_errors(derivatives=derivatives)
    tables = (
        (held_out, "-", "o", "values held out"),
        (unseen, ":", ".", "derivatives held out" if derivatives else "derivatives at the training points"),
    )
    for table, style, marker, what in tables:
        if table is not None:
            logs = np.log(table[np.isfinite(table).all(axis=1)])  # the units that the means are of
            label = f"{name} derivatives: {what}"
            axes.plot(capacities, np.exp(logs.mean(axis=0)), style, marker=marker, color=colour, label=label)
            lower, upper = np.exp(np.quantile(logs, [0.25, 0.75], axis=0))
            axes.fill_between(capacities, lower, upper, color=colour, alpha=0.12 if style == "-" else 0.06, linewidth=0)
    mine = [(job.capacity, training) for job, training in study.trainings.items() if job.derivatives == derivatives]
    failed = np.array([sum(at == capacity and t.converged is False for at, t in mine) for capacity in capacities])
    shown = held_out if held_out is not None else unseen
    if failed.any() and shown is not None:
        middle = np.exp(np.log(shown[np.isfinite(shown).all(axis=1)]).mean(axis=0))
        axes.scatter(
            capacities[failed > 0],
            middle[failed > 0],
            s=40 + 200 * failed[failed > 0] * len(capacities) / len(mine),
            facecolors="none",
            edgecolors=colour,
            label=f"{name}: some did not converge (the larger, the more)",
        )


def _rise(axes: Any, study: CapacityStudy, gap: Any, band: Any) -> None:
    """The gap, the band of its rise, and the line that the band must cross."""
    rise = "log derivative error" if gap is None else "G"
    if gap is not None:
        axes.plot(study.capacities, gap, "o-", color="black", label="gap G: log error without - log error with")
    label = f"rise of {rise} over its least so far: 95 % lower band"
    axes.plot(study.capacities[1:], band[1:], "v--", color=BOUND, label=label)
    axes.axhline(THRESHOLD, color=BOUND, linewidth=0.8, label="log 1.5")
    axes.set_ylabel("natural logarithm")
