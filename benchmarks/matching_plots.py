"""Plots of the gradient matching study."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matching_problems import PROBLEMS
from matching_report import Cell, better_peer, by_seed, cells, comparisons
from matching_tasks import CURVE_STEPS, CURVES, Record, Store, Task, median_seconds

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["draw_curves", "draw_ratios"]

COLOURS = {"GI": "#0b6e4f", "jenn": "#d95f02", "GENN": "#7570b3", "GEKPLS": "#b8860b", "KRG": "#777777"}
MARKS = {"GI": "o", "jenn": "s", "GENN": "^"}
RESAMPLES = 2000


def draw_ratios(store: Store, path: Path) -> None:
    """A panel for each comparison: ratios by problem with intervals over seeds, and the geometric mean."""

    def equal_time(cell: Cell) -> tuple[Sequence[Record], Sequence[Record]]:
        peer = better_peer(store, cell)
        theirs = store.plain(peer or "", *cell)
        return (store.within(*cell, median_seconds(theirs)) if theirs else []), theirs

    def plain(method: str) -> Callable[[Cell], tuple[Sequence[Record], Sequence[Record]]]:
        return lambda cell: (store.plain("GI", *cell), store.plain(method, *cell))

    def many(cell: Cell) -> tuple[Sequence[Record], Sequence[Record]]:
        return store.plain("GI", *cell), store.plain("without GI", *cell, c=PROBLEMS[cell[0]].dim)

    panels = {
        "better of jenn and GENN,\nat equal time": ("better of jenn and GENN, at equal time", equal_time),
        "GEKPLS": ("GEKPLS", plain("GEKPLS")),
        "values only, N points": ("ours without GI, N points", plain("without GI")),
        "values only, N (1 + d) points": ("ours without GI, N (1 + d) points", many),
    }
    summary = comparisons(store)
    names = list(PROBLEMS)
    figure, axes = plt.subplots(1, len(panels), figsize=(10.8, 4.4), sharey=True, layout="constrained")
    for axis, (title, (key, pairs)) in zip(axes, panels.items(), strict=True):
        for row, name in enumerate(names):
            logs = _log_ratios(pairs, name)
            if len(logs):
                low, _, high = np.exp(_interval(logs))
                middle = summary[key].problems[name]
                axis.plot([low, high], [row, row], color="#0b6e4f" if middle < 1 else "#b2182b", lw=2)
                axis.plot(middle, row, "o", color="#0b6e4f" if middle < 1 else "#b2182b", ms=5)
            else:
                axis.text(0.1, row, "no such fit", ha="center", va="center", fontsize=7, color="#888888")
        if key in summary:
            ratio = summary[key]
            axis.axvspan(ratio.lower, ratio.upper, color="#0b6e4f", alpha=0.12, lw=0)
            axis.axvline(ratio.mean, color="#0b6e4f", lw=1)
            title = f"{title}\n{ratio.mean:.2f} ({ratio.lower:.2f} to {ratio.upper:.2f})"
        axis.axvline(1, color="black", lw=0.8, ls=":")
        axis.set(xscale="log", title=title, xlim=(0.01, 10))
        axis.title.set_fontsize(9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.supxlabel("error with GI / error of the other (below 1: GI is better)", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _log_ratios(pairs: Callable[[Cell], tuple[Sequence[Record], Sequence[Record]]], name: str) -> Any:
    """By seed: the mean over the sizes of a problem."""
    logs: dict[int, list[float]] = {}
    for cell in cells():
        if cell[0] == name:
            ours, theirs = map(by_seed, pairs(cell))
            for seed in ours.keys() & theirs.keys():
                logs.setdefault(seed, []).append(math.log(ours[seed] / theirs[seed]))
    return np.array([np.mean(values) for values in logs.values()])


def _interval(logs: Any) -> Any:
    """Median, and its 95 % bootstrap interval over seeds."""
    drawn = np.random.default_rng(0).choice(logs, size=(RESAMPLES, len(logs)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return np.array([low, np.median(logs), high])


def draw_curves(store: Store, path: Path) -> None:
    """Error against processor seconds, the number of iterations varied; medians over seeds."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(10.8, 3.3), layout="constrained")
    for axis, (problem, n) in zip(axes, CURVES.items(), strict=True):
        for method, mark in MARKS.items():
            points = _curve(store, method, problem, n)
            if len(points):
                axis.plot(points[:, 0], points[:, 1], mark, ls="-", ms=4, color=COLOURS[method], label=method)
        for method, style in (("GEKPLS", "D"), ("KRG", "X")):
            records = store.plain(method, problem, n)
            if records:
                error = float(np.median([record["value"] for record in records]))
                axis.plot(median_seconds(records), error, style, color=COLOURS[method], ms=6, label=method)
        axis.set(xscale="log", yscale="log", title=f"{problem}, N = {n}", xlabel="processor seconds")
        axis.title.set_fontsize(9)
        axis.grid(which="major", alpha=0.3)
    axes[0].set_ylabel("nRMSE of the value")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(store: Store, method: str, problem: str, n: int) -> Any:
    """Rows of seconds and error, medians over seeds."""
    runs: dict[int, list[Record]] = {}
    for task, record in store.records.items():
        if (
            "value" in record
            and task == Task(method, problem, n, task.seed, iterations=task.iterations)
            and task.iterations
        ):
            runs.setdefault(task.iterations, []).append(record)
    steps = [key for key in CURVE_STEPS[method] if key in runs]  # and not those of the comparison at equal time
    return np.array(
        [[median_seconds(runs[key]), np.median([record["value"] for record in runs[key]])] for key in steps]
    )
