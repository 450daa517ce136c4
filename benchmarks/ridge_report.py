"""Tables and the plot of `ridge_study`."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from reports import markdown
from ridge_study import DIFFERENTIAL, FOLDS, LEVELS, METHODS, OURS, OURS_CV, SETTINGS, TWICE, Setting

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

__all__ = ["draw", "ratio", "tables"]

Frame = Any  # pandas is typed only half: a column of a table may be anything

COLORS = {
    "OLS": "#b0b0b0",
    "Ridge": "#808080",
    "RidgeCV": "#000000",
    TWICE: "#8c564b",
    DIFFERENTIAL: "#ff7f0e",
    OURS: "#7fb8e6",
    OURS_CV: "#1f5fa8",
    FOLDS: "#2ca02c",
}
DRAWN = SETTINGS[:3]
STEPS = (0.0, *LEVELS["random"])


def ratio(ours: npt.ArrayLike, theirs: npt.ArrayLike, *, seed: int = 0) -> tuple[float, float, float]:
    """Geometric mean of paired ratios and its 95 % bootstrap interval over the pairs."""
    logs = np.log(np.asarray(ours) / np.asarray(theirs))
    draws = np.random.default_rng(seed).choice(logs, (4000, len(logs))).mean(axis=1)
    low, high = np.exp(np.quantile(draws, [0.025, 0.975]))
    return float(np.exp(logs.mean())), float(low), float(high)


def tables(rows: list[dict[str, Any]]) -> str:
    """Two tables as Markdown: over training sizes, and over noise of the derivatives."""
    frame = _frame(rows)
    exact = frame[frame.level == 0]
    lines = []
    for setting in SETTINGS:
        for n in setting.sizes:
            errors = _errors(exact, setting, n)
            if OURS_CV not in errors or "RidgeCV" not in errors:
                continue
            cells = [_number(errors[method]) if method in errors else "" for method in METHODS]
            smallest = min(np.median(errors[method]) for method in errors if method != TWICE)
            for k, method in enumerate(METHODS):
                if method in errors and method != TWICE and np.median(errors[method]) <= smallest * 1.0001:
                    cells[k] = f"**{cells[k]}**"
            lines.append([setting.name, str(n), *cells, _ratio(errors[OURS_CV], errors["RidgeCV"])])
    header = ["test nRMSE, median", "N", *map(_short, METHODS), "ours, CV / RidgeCV"]
    noise = []
    for setting in SETTINGS:
        if setting.noisy_size is None:
            continue
        plain = _errors(exact, setting, setting.noisy_size)
        for kind in LEVELS:
            for method in (DIFFERENTIAL, OURS, OURS_CV):
                cells = []
                for level in STEPS:
                    part = exact if level == 0 else frame[(frame.level == level) & (frame.kind == kind)]
                    errors = _errors(part, setting, setting.noisy_size)
                    known = method in errors and "RidgeCV" in plain
                    cells.append(_ratio(errors[method], plain["RidgeCV"]) if known else "")
                noise.append([f"{setting.name}, N = {setting.noisy_size}", kind, _short(method), *cells])
    percent = [f"{100 * level:g} %" for level in STEPS]
    return markdown(header, lines) + markdown(
        ["error / that of RidgeCV", "error of derivatives", "method", *percent], noise
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Error over training size above, over noise of the derivatives below: medians over seeds, quartiles for three."""
    frame = _frame(rows)
    figure, axes = plt.subplots(2, len(DRAWN), figsize=(11.6, 7.4), layout="constrained")
    for k, setting in enumerate(DRAWN):
        mine = frame[frame.setting == setting.name]
        exact = mine[mine.level == 0]
        if mine.empty:
            continue
        for method in METHODS:
            _line(axes[0, k], exact[exact.method == method], "n", method, "-")
        for method in (DIFFERENTIAL, OURS, OURS_CV):
            for kind, style in (("random", "-"), ("systematic", ":")):
                noisy = mine[(mine.level > 0) & (mine.kind == kind)]
                part = pd.concat([exact[exact.n == setting.noisy_size], noisy])
                part = part.assign(level=part.level.map(STEPS.index))  # evenly spaced
                _line(axes[1, k], part[part.method == method], "level", method, style)
        level = exact[(exact.n == setting.noisy_size) & (exact.method == "RidgeCV")].error.median()
        axes[1, k].axhline(level, color=COLORS["RidgeCV"], lw=1.6)
        axes[0, k].set(title=setting.name, xscale="log", xlabel="training samples N")
        axes[0, k].set_xticks(setting.sizes, [str(n) for n in setting.sizes])
        axes[0, k].minorticks_off()
        axes[1, k].set(title=f"{setting.name}, N = {setting.noisy_size}")
        axes[1, k].set_xlabel("error of the derivatives, % of their rms")
        axes[1, k].set_xticks(range(len(STEPS)), [f"{100 * level:g}" for level in STEPS])
        medians = exact.groupby(["method", "n"]).error.median()
        for axis, largest in ((axes[0, k], medians[["Ridge", "RidgeCV"]].max()), (axes[1, k], 3 * level)):
            if setting.estimated:
                axis.set_ylim(0.95 * exact.groupby(["method", "n"]).error.quantile(0.25).min(), 1.25)
            else:
                axis.set_yscale("log")
                # OLS with about as many samples as features is off any scale.
                axis.set_ylim(0.8 * medians.min(), 1.6 * largest if np.isfinite(largest) else None)
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("test error of values (nRMSE)")
    axes[1, 0].set_ylabel("test error of values (nRMSE)")
    handles = [Line2D([], [], color=COLORS[m], marker="o", ms=3, label=m) for m in METHODS]
    handles += [
        Line2D([], [], color="k", ls=s, label=f"{t} error (below)") for s, t in (("-", "random"), (":", "systematic"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    with Image.open(path) as picture:  # a palette: a third of the bytes
        picture.convert("RGB").quantize(128).save(path, optimize=True)


def _line(axis: Axes, part: Frame, x: str, method: str, style: str) -> None:
    if part.empty:
        return
    quartiles = part.groupby(x).error.quantile([0.25, 0.5, 0.75]).unstack()
    axis.plot(quartiles.index, quartiles[0.5], style, color=COLORS[method], marker="o", ms=3, lw=1.6)
    if style == "-" and method in {"RidgeCV", DIFFERENTIAL, OURS_CV}:  # more would cover each other
        axis.fill_between(quartiles.index, quartiles[0.25], quartiles[0.75], color=COLORS[method], alpha=0.15, lw=0)


def _frame(rows: list[dict[str, Any]]) -> Frame:
    wanted = [row for row in rows if row["cell"]["level"] in (0.0, *LEVELS[row["cell"]["kind"]])]
    return pd.DataFrame([{**row["cell"], "error": row["error"], "seconds": row["seconds"]} for row in wanted])


def _errors(frame: Frame, setting: Setting, n: int) -> dict[str, npt.NDArray[np.float64]]:
    part = frame[(frame.setting == setting.name) & (frame.n == n)].sort_values("seed")
    return {str(method): group.error.to_numpy() for method, group in part.groupby("method")}


def _short(method: str) -> str:
    return method.replace("GradientEnhancedRidgeCV", "ours, CV").replace("GradientEnhancedRidge", "ours")


def _number(errors: npt.NDArray[np.float64]) -> str:
    return f"{np.median(errors):.3g}"


def _ratio(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> str:
    paired = min(len(ours), len(theirs))
    middle, low, high = ratio(ours[:paired], theirs[:paired])
    return f"{middle:.2g} [{low:.2g}, {high:.2g}]"
