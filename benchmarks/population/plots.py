"""Figures of the population study: ``population_*.png``, those for which there are records.

Colours are those of Okabe and Ito, which people with any kind of colour vision tell apart.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from population.arms import MEMBERS
from population.cells import PAIRS, PRIMARY, SECONDARY
from population.effects import DEFAULT_SIGMA, ENDPOINTS, GROUPS, curve, differences, over_cells, overfitting
from population.exact_report import LARGER, exact_records
from population.inference import Effect, effect
from population.tasks import CELLS, Store

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

__all__ = ["draw_arms", "draw_effects", "draw_exact", "draw_lengths", "draw_sigma", "draw_where", "save"]

BLUE, ORANGE, GREEN, SKY, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#999999", "#000000"
WAYS = {"closure": BLUE, "unchanged": ORANGE, "sharded": GREEN}
NAMES = {"closure": "closure", "unchanged": "unchanged loop", "sharded": "sharded"}
MARKS = {"MLP": "o", "CNN": "s", "ResNet": "^", "GRU": "D", "transformer": "P"}
BENDS = {"points": 1.0, "nats": 0.1}  # up to where an axis of effects is linear; it is logarithmic beyond
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def save(store: Store, folder: Path) -> list[Path]:
    """All figures, and their paths."""
    drawings: dict[str, Callable[[Store], Figure | None]] = {
        "effects": draw_effects,
        "arms": draw_arms,
        "sigma": draw_sigma,
        "lengths": draw_lengths,
        "where": draw_where,
        "exact": draw_exact,
    }
    written: list[Path] = []
    for name, draw in drawings.items():
        with mpl.rc_context(STYLE):
            figure = draw(store)
            if figure is not None:
                written.append(folder / f"population_{name}.png")
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(written[-1], dpi=150)
                plt.close(figure)
    return written


def draw_effects(store: Store) -> Figure | None:
    """Effects of the ways and of their controls in every primary cell: macro-F1 and log-loss."""
    cells = list(over_cells(store, "closure")[0])
    if not cells:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 1.4 + 0.52 * len(cells)), sharey=True, layout="constrained")
    for axis, endpoint in zip(axes, ("f1", "log_loss"), strict=True):
        for number, (way, colour) in enumerate(WAYS.items()):
            for control in (False, True):
                found = over_cells(store, f"{way}, sigma 0" if control else way, endpoint=endpoint)[0]
                for cell in [cell for cell in cells if cell in found]:
                    row = cells.index(cell) + 0.13 * (2 * number + control - 2.5)
                    _interval(axis, found[cell], row, colour, hollow=control)
        _zero(axis, endpoint)
        axis.set_axisbelow(True)
        for row in range(1, len(cells), 2):
            axis.axhspan(row - 0.5, row + 0.5, color="#f2f2f2", lw=0, zorder=0)
    axes[0].set_yticks(range(len(cells)), cells)
    axes[0].set_ylim(len(cells) - 0.5, -0.5)
    full = [_handle(colour, f"{NAMES[way]}, sigma {DEFAULT_SIGMA:g}") for way, colour in WAYS.items()]
    hollow = [_handle(colour, f"{NAMES[way]}, sigma 0", hollow=True) for way, colour in WAYS.items()]
    handles = [handle for pair in zip(full, hollow, strict=True) for handle in pair]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def draw_arms(store: Store) -> Figure | None:
    """Every arm's effect: the mean over cells with its interval, and the cells as faint dots."""
    rows: list[str | None] = []
    for arms in GROUPS.values():
        known = [arm for arm in arms if over_cells(store, arm)[0]]
        rows += [*([None] if rows and known else []), *known]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 1 + 0.25 * len(rows)), sharey=True, layout="constrained")
    for axis, endpoint in zip(axes, ("f1", "scaled_log_loss"), strict=True):
        for row, arm in enumerate(rows):
            if arm is not None:
                effects, over = over_cells(store, arm, endpoint=endpoint)
                means = [one.mean for one in effects.values()]
                jitter = np.random.default_rng(row).uniform(-0.2, 0.2, len(means))
                axis.plot(means, row + jitter, "o", ms=3.5, mew=0, color=BLACK, alpha=0.25)
                if over.pairs > 1:
                    ours = arm.split(",")[0] in WAYS
                    _interval(axis, over, row, BLUE if ours else ORANGE, hollow=arm.endswith("sigma 0"), size=6)
        _zero(axis, endpoint)
    axes[0].set_yticks([row for row, arm in enumerate(rows) if arm], [arm for arm in rows if arm])
    axes[0].set_ylim(len(rows) - 0.5, -0.7)
    handles = [_handle(BLUE, "population: mean over cells"), _handle(ORANGE, "others: mean over cells")]
    dot = Line2D([], [], marker="o", ls="", color=BLACK, alpha=0.3, ms=3.5, label="a cell")
    figure.legend(handles=[*handles, dot], loc="outside lower center", ncols=3)
    return figure


def draw_sigma(store: Store) -> Figure | None:
    """Effect over sigma, a panel for each cell; sigmas are spaced equally."""
    curves = {(cell, way): curve(store, cell, way) for cell in PRIMARY for way in ("closure", "unchanged")}
    curves = {key: found for key, found in curves.items() if len(found) > 2}  # more than 0 and the default
    cells = list(dict.fromkeys(cell for cell, _ in curves))
    if not cells:
        return None
    sigmas = sorted({sigma for found in curves.values() for sigma in found})
    figure, axes = _panels(cells, sigmas, 4)
    for axis, cell in zip(axes, cells, strict=True):
        for way, shift in (("closure", -0.08), ("unchanged", 0.08)):
            found = curves.get((cell, way), {})
            _line(axis, _places(found, sigmas, shift), list(found.values()), WAYS[way])
    handles = [_handle(WAYS[way], NAMES[way]) for way in ("closure", "unchanged")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    _bent(axes[0], "y", "points")
    return figure


def draw_lengths(store: Store) -> Figure | None:
    """Effect of the closure over sigma, in the shorter and in the longer training."""
    curves = {pair: [curve(store, cell, "closure") for cell in pair] for pair in PAIRS}
    curves = {pair: found for pair, found in curves.items() if all(found)}
    if not curves:
        return None
    sigmas = sorted({sigma for found in curves.values() for one in found for sigma in one if 0 < sigma < 0.5})
    figure, axes = _panels([next(cell for cell in pair if cell in PRIMARY) for pair in curves], sigmas, 3)
    for axis, (pair, found) in zip(axes, curves.items(), strict=True):
        for cell, one, colour, shift in zip(pair, found, (SKY, BLUE), (-0.06, 0.06), strict=True):
            kept = {sigma: effect for sigma, effect in one.items() if sigma in sigmas}
            label = f"{CELLS[cell].recipe.epochs} epochs"
            _line(axis, _places(kept, sigmas, shift), list(kept.values()), colour, label=label)
        axis.legend(loc="lower left")
    _bent(axes[0], "y", "points")
    return figure


def _panels(titles: Sequence[str], sigmas: Sequence[float], columns: int) -> tuple[Figure, list[Any]]:
    """A panel for each title, of effects over sigma, with common axes."""
    columns = min(columns, len(titles))
    lines = -(-len(titles) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(9.2, 0.8 + 2 * lines), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in grid.flat[len(titles) :]:
        axis.set_visible(False)
    for axis, title in zip(grid.flat, titles, strict=False):
        axis.axhline(0, color=BLACK, lw=0.8)
        axis.set_title(title.replace(" wrong labels", "\nwrong labels"))
        axis.set_xticks(range(len(sigmas)), [f"{sigma:g}" for sigma in sigmas])
        axis.tick_params(labelsize=8, labelbottom=True)
    for axis in grid[-1]:
        axis.set_xlabel("sigma")
    figure.supylabel("macro-F1, points, minus plain training (logarithmic beyond 1)", fontsize=9)
    return figure, list(grid.flat)[: len(titles)]


def _places(found: Iterable[float], sigmas: Sequence[float], shift: float) -> NDArray[np.float64]:
    return np.array([sigmas.index(sigma) for sigma in found]) + shift


def draw_where(store: Store) -> Figure | None:
    """Effect of the closure over the number of training rows, and over the degree of over-fitting."""
    arms = {"closure": BLUE, "closure, sigma tuned": ORANGE}
    found = {arm: over_cells(store, arm)[0] for arm in arms}
    if len(found["closure"]) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.9), sharey=True, layout="constrained")
    kinds = list(MARKS)
    for cell in SECONDARY:
        values = list(differences(store, cell, "closure").values())
        if len(values) > 1:
            axes[1].plot(overfitting(store, cell), effect(values).mean, MARKS[CELLS[cell].network], color=GREY, ms=3.5)
    for number, (arm, effects) in enumerate(found.items()):
        for cell, one in effects.items():
            kind = CELLS[cell].network
            wrong = 0.5 if CELLS[cell].wrong_labels else 0.0
            places = (
                CELLS[cell].rows * 1.07 ** (kinds.index(kind) - 2 + wrong + 0.25 * number),
                overfitting(store, cell) + 0.25 * number,
            )
            for axis, x in zip(axes, places, strict=True):
                error = [[one.mean - one.low], [one.high - one.mean]]
                axis.errorbar(x, one.mean, error, fmt=MARKS[kind], color=arms[arm], ms=5, lw=1)
    axes[0].set(
        xscale="log", xlabel="training rows (shifted a little)", ylabel="macro-F1, points, minus plain training"
    )
    sizes = sorted({CELLS[cell].rows for cell in PRIMARY})
    axes[0].set_xlim(0.7 * sizes[0], 1.4 * sizes[-1])
    axes[0].set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes[0].minorticks_off()
    axes[1].set_xlabel("over-fitting of plain training: accuracy, training minus test, points")
    _bent(axes[0], "y", "points")
    for axis in axes:
        axis.axhline(0, color=BLACK, lw=0.8)
    handles = [_handle(colour, arm) for arm, colour in arms.items()]
    shapes = [Line2D([], [], marker=mark, ls="", color=BLACK, ms=5, label=kind) for kind, mark in MARKS.items()]
    faint = Line2D([], [], marker="o", ls="", color=GREY, ms=3.5, label="secondary cells, closure")
    figure.legend(handles=[*handles, faint, *shapes], loc="outside lower center", ncols=4)
    return figure


def draw_exact(store: Store) -> Figure | None:
    """Error and cosine of gradients along plain trainings."""
    found = exact_records(store.path.parent)
    if found.empty:
        return None
    styles = {
        "mini-batch": ("mini-batch", GREY, "o-"),
        "population, sigma 0.1": (f"population of {MEMBERS}, sigma 0.1", BLUE, "s--"),
        "population, sigma 0.3": (f"population of {MEMBERS}, sigma 0.3", SKY, "^--"),
        LARGER: (f"{MEMBERS} x the batch", BLACK, "o-"),
        "sharded, sigma 0.1": (f"{MEMBERS} x the batch, sharded, sigma 0.1", GREEN, "s--"),
        "all training rows": ("all training rows", ORANGE, "x:"),
    }
    cells = list(found["cell"].unique())
    moments = sorted(found["moment"].unique())
    figure, axes = plt.subplots(
        2, len(cells), figsize=(9.2, 5.2), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for column, cell in enumerate(cells):
        for row, value in enumerate(("error", "cosine")):
            axis = axes[row][column]
            for estimate, (label, colour, style) in styles.items():
                own: Any = found[(found["cell"] == cell) & (found["estimate"] == estimate)]
                effects = [effect(own[own["moment"] == moment][value].tolist()) for moment in moments]
                line = _line(axis, np.arange(len(moments)), effects, colour, style, label)
                if style == "o-":  # wide: others lie on top of it
                    line.set(linewidth=4, alpha=0.4)
        axes[0][column].set(title=cell, yscale="log")
        axes[1][column].axhline(0, color=BLACK, lw=0.8)
        axes[1][column].set_xticks(range(len(moments)), [f"{100 * moment:g} %" for moment in moments])
    axes[0][0].set_ylabel("error, as a part of the exact\n(lower is nearer)")
    axes[1][0].set_ylabel("cosine with the exact\n(higher is nearer)")
    axes[1][len(cells) // 2].set_xlabel("of the training")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _interval(axis: Any, one: Effect, row: float, colour: str, *, hollow: bool = False, size: float = 4) -> None:
    """A dot with its interval, lying."""
    axis.plot([one.low, one.high], [row, row], color=colour, lw=1.2, zorder=2)
    axis.plot(one.mean, row, "o", color=colour, ms=size, mfc="white" if hollow else colour, zorder=3)


def _line(axis: Any, x: Any, found: list[Effect], colour: str, style: str = "o-", label: str | None = None) -> Any:
    """Means with their intervals; the line of the means."""
    means = [one.mean for one in found]
    widths = [one.half_width for one in found]
    return axis.errorbar(x, means, widths, fmt=style, color=colour, ms=3.5, lw=1.2, label=label)[0]


def _bent(axis: Any, direction: Literal["x", "y"], unit: str) -> None:
    """Linear around zero and logarithmic beyond, when everything is drawn: effects differ by factors of a hundred."""
    bend = BENDS[unit]
    getattr(axis, f"set_{direction}scale")("symlog", linthresh=bend)
    low, high = (1.3 * end if abs(end) > bend else end for end in getattr(axis, f"get_{direction}lim")())
    getattr(axis, f"set_{direction}lim")(low, high)
    sizes = [bend * step for step in (0.5, 1, 4, 16, 64)]
    ticks = [tick for tick in (*(-size for size in sizes), 0.0, *sizes) if low <= tick <= high]
    set_ticks = getattr(axis, f"set_{direction}ticks")
    set_ticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    set_ticks([], minor=True)


def _handle(colour: str, label: str, *, hollow: bool = False) -> Line2D:
    return Line2D([], [], marker="o", ms=5, color=colour, mfc="white" if hollow else colour, label=label)


def _zero(axis: Any, endpoint: str) -> None:
    """A line where nothing changes, and what the axis says."""
    axis.axvline(0, color=BLACK, lw=0.8)
    side = "left" if "loss" in endpoint else "right"
    unit = ENDPOINTS[endpoint].rsplit(", ", 1)[1]
    bend = f"({side} is better; logarithmic beyond {BENDS[unit]:g})"
    axis.set_xlabel(f"{ENDPOINTS[endpoint]},\nminus plain training\n{bend}")
    _bent(axis, "x", unit)
    axis.grid(axis="y", visible=False)
