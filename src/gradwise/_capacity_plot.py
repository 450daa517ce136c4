"""Capacity studies as a table and as a picture; pandas and matplotlib are imported when asked for."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gradwise._capacity_study import CapacityStudy

__all__ = ["figure", "frame"]

WITHOUT, WITH, BOUND = "#d55e00", "#0072b2", "#555555"  # Okabe and Ito: distinct without colour vision too


def frame(study: "CapacityStudy") -> Any:
    """One row for each training, sorted."""
    try:
        import pandas as pd  # pyright: ignore[reportMissingTypeStubs] - pandas ships its types elsewhere
    except ImportError as error:
        msg = '`to_frame` needs pandas: pip install "gradwise[plot]"'
        raise ImportError(msg) from error
    rows = [asdict(job) | asdict(training) for job, training in study.trainings.items()]
    order = ["capacity", "derivatives", "seed", "fold"]
    return pd.DataFrame(rows).sort_values(order, ignore_index=True)


def figure(study: "CapacityStudy") -> Any:
    """Errors above, the gap (or the derivative error) and its band below."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = '`plot` needs matplotlib: pip install "gradwise[plot]"'
        raise ImportError(msg) from error
    from gradwise._capacity_study import THRESHOLD

    made: Any = Figure(figsize=(7.5, 7.0), dpi=110, layout="constrained")
    top, bottom = made.subplots(2, 1, sharex=True)
    for derivatives, colour, name in ((False, WITHOUT, "without"), (True, WITH, "with")):
        held_out = study.errors(derivatives=derivatives)
        unseen = study.derivative_errors(derivatives=derivatives)
        if held_out is not None:
            _curve(top, study, held_out, colour, "-", f"{name} derivatives: values held out")
        if unseen is not None:
            where = "held out" if derivatives else "at the training points"
            _curve(top, study, unseen, colour, ":", f"{name} derivatives: derivatives {where}")
        failed = [
            (job.capacity, held_out if held_out is not None else unseen)
            for job, training in study.trainings.items()
            if job.derivatives == derivatives and training.converged is False
        ]
        share = {capacity: sum(at == capacity for at, _ in failed) for capacity in study.capacities}
        of = sum(job.derivatives == derivatives for job in study.trainings) / len(study.capacities)
        shown = held_out if held_out is not None else unseen
        marked = [index for index, capacity in enumerate(study.capacities) if share[capacity]]
        if marked and shown is not None:
            top.scatter(
                [study.capacities[index] for index in marked],
                [_middle(shown)[index] for index in marked],
                s=[40 + 160 * share[study.capacities[index]] / of for index in marked],
                facecolors="none",
                edgecolors=colour,
                label=f"{name}: some did not converge (area: how many)",
            )
    top.set_yscale("log")
    top.set_ylabel("relative error")
    gap, band = study.gap, study.rise_band
    if gap is not None:
        bottom.plot(study.capacities, gap, "o-", color="black", label="gap G: log error without - log error with")
    if band is not None:
        rise = "G" if gap is not None else "log derivative error"
        bottom.plot(
            study.capacities[1:],
            band[1:],
            "v--",
            color=BOUND,
            label=f"rise of {rise}: 95 % lower band",
        )
        bottom.axhline(THRESHOLD, color=BOUND, linewidth=0.8, label="log 1.5")
    for capacity, colour, style, name in (
        (study.best_with, WITH, "-", "take with derivatives"),
        (study.best_without, WITHOUT, "-", "take without"),
        (study.need, WITH, ":", "need"),
        (study.upper_bound, BOUND, ":", "upper bound"),
    ):
        if capacity is not None:
            bottom.axvline(capacity, color=colour, linestyle=style, linewidth=1.5, label=f"{name}: {capacity:g}")
            top.axvline(capacity, color=colour, linestyle=style, linewidth=1.5, alpha=0.4)
    bottom.set_xlabel("capacity")
    bottom.set_ylabel("logarithm (natural)")
    for axes in (top, bottom):
        if study.capacities[0] > 0:
            axes.set_xscale("log")
            axes.set_xticks(study.capacities, [f"{capacity:g}" for capacity in study.capacities])
            axes.minorticks_off()
        axes.legend(fontsize=8, loc="best", framealpha=0.8)
        axes.grid(alpha=0.3)
    top.set_title(f"{len(study.trainings)} trainings, {study.not_converged} of them not converged", fontsize=10)
    return made


def _curve(axes: Any, study: "CapacityStudy", table: Any, colour: str, style: str, label: str) -> None:
    marker = "o" if style == "-" else "."
    axes.plot(study.capacities, _middle(table), style, marker=marker, color=colour, label=label)
    lower, upper = np.quantile(table, [0.25, 0.75], axis=0)
    axes.fill_between(study.capacities, lower, upper, color=colour, alpha=0.12 if style == "-" else 0.06, linewidth=0)


def _middle(table: Any) -> Any:
    """Geometric mean over units; infinite where a unit is."""
    return np.exp(np.log(table).mean(axis=0))
