"""Tables and plots of the gradient matching study, from its records."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matching_peers import METHODS
from matching_problems import PROBLEMS
from matching_statistics import Ratio, cell_ratio, geometric_mean
from matching_tasks import NOISE, PEERS, TUNING_SEEDS, Record, Store, chosen, median_seconds
from reports import markdown

__all__ = ["better_peer", "comparisons", "report"]

Cell = tuple[str, int]
OWN, SHORT = "GI", "GI, equal time"
HEAD = """# Gradient matching on surrogate problems: all tables

Made by `make bench-matching`; read in [matching.md](matching.md). Medians over seeds; empty: not possible, or left out.

"""
COLUMNS = ("GI", "GI, defaults", "without GI", "jenn", "GENN", "GEKPLS", "KRG")


def report(store: Store, docs: Path) -> None:
    """Write the tables and the plots of what there is."""
    from matching_plots import draw_curves, draw_ratios

    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    (docs / "matching_tables.md").write_text(tables(store))
    draw_ratios(store, images / "matching_ratios.png")
    draw_curves(store, images / "matching_curves.png")


# -- numbers -----------------------------------------------------------------------------------------------------------


def by_seed(records: Sequence[Record], column: str = "value") -> dict[int, float]:
    """One number for each seed."""
    return {record["task"]["seed"]: record[column] for record in records}


def cells() -> list[Cell]:
    """Problem and size, in the order of the tables."""
    return [(name, n) for name, problem in PROBLEMS.items() for n in problem.sizes]


def better_peer(store: Store, cell: Cell, noise: float = 0.0) -> str | None:
    """Of jenn and GENN the one with the smaller median error in a cell: on the test data, in favour of the peers."""
    medians = {
        peer: float(np.median([record["value"] for record in records]))
        for peer in PEERS
        if (records := store.plain(peer, *cell, noise=noise))
    }
    return min(medians, key=lambda peer: medians[peer]) if medians else None


def against(
    store: Store,
    theirs: Callable[[Cell], Sequence[Record]],
    *,
    noise: float = 0.0,
    own: str = OWN,
    column: str = "value",
) -> Ratio:
    """Ours over theirs, in all cells that both have."""
    return geometric_mean(
        {
            cell: cell_ratio(by_seed(store.plain(own, *cell, noise=noise), column), by_seed(theirs(cell), column))
            for cell in cells()
        }
    )


def at_equal_time(store: Store, column: str = "value") -> Ratio:
    """Ours, stopped at the time of the better of jenn and GENN, over that."""
    ratios: dict[Cell, float] = {}
    for cell in cells():
        peer = better_peer(store, cell)
        if peer is not None:
            theirs = store.plain(peer, *cell)
            ours = store.within(*cell, median_seconds(theirs))
            ratios[cell] = cell_ratio(by_seed(ours, column), by_seed(theirs, column))
    return geometric_mean(ratios)


def comparisons(store: Store) -> dict[str, Ratio]:
    """What is asked of the study: ratios of the value error, then those with noise, then of the derivative error."""

    def of(method: str, *, noise: float = 0.0, c: int = 0) -> Callable[[Cell], list[Record]]:
        return lambda cell: store.plain(method, *cell, noise=noise, c=c)

    def better(noise: float = 0.0) -> Callable[[Cell], list[Record]]:
        return lambda cell: store.plain(better_peer(store, cell, noise) or "", *cell, noise=noise)

    def value_only(c: int) -> Callable[[Cell], list[Record]]:
        """With c = 0: the dimension of the problem."""
        return lambda cell: store.plain("without GI", *cell, c=c or PROBLEMS[cell[0]].dim)

    rows = {
        "better of jenn and GENN, at equal time": at_equal_time(store),
        "better of jenn and GENN, each to its end": against(store, better()),
        "jenn": against(store, of("jenn")),
        "GENN": against(store, of("GENN")),
        "GEKPLS": against(store, of("GEKPLS")),
        "KRG (no derivatives)": against(store, of("KRG")),
        "ours without GI, N points": against(store, of("without GI")),
        "ours without GI, 2 N points": against(store, value_only(1)),
        "ours without GI, 4 N points": against(store, value_only(3)),
        "ours without GI, N (1 + d) points": against(store, value_only(0)),
        "our defaults against the better of jenn and GENN": against(store, better(), own="GI, defaults"),
        "our defaults against GEKPLS": against(store, of("GEKPLS"), own="GI, defaults"),
    }
    for noise in NOISE:
        rows[f"better of jenn and GENN, noise {noise:.0%}"] = against(store, better(noise), noise=noise)
        rows[f"GEKPLS, noise {noise:.0%}"] = against(store, of("GEKPLS", noise=noise), noise=noise)
        rows[f"ours without GI, noise {noise:.0%}"] = against(store, of("without GI"), noise=noise)
        auto = against(store, of("GI", noise=noise), noise=noise, own="GI, auto weight")
        rows[f'derivative_weight="auto" against 1, noise {noise:.0%}'] = auto
    rows["better of jenn and GENN, error of the derivative"] = against(store, better(), column="derivative")
    rows["better of jenn and GENN, error of the derivative, equal time"] = at_equal_time(store, "derivative")
    rows["GEKPLS, error of the derivative"] = against(store, of("GEKPLS"), column="derivative")
    return {name: ratio for name, ratio in rows.items() if ratio.problems}


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(store: Store) -> str:
    """All of them, as Markdown."""
    parts = [
        HEAD,
        "## Geometric means of error ratios, ours over the other's (below 1: ours is better)\n\n",
        _summary(store),
    ]
    for column, title in (
        ("value", "Median nRMSE of the value"),
        ("derivative", "Median relative error of the gradient"),
        ("seconds", "Median processor seconds of a fit (cross-validation included)"),
    ):
        parts += [f"## {title}\n\n", _by_method(store, column)]
    parts += [
        "## Median nRMSE of value-only training with the points that gradients would cost\n\n",
        _value_only(store),
    ]
    parts += ["## Median nRMSE of the value with noisy derivatives\n\n", _noise(store)]
    parts += ["## Settings, chosen on seed " + ", ".join(map(str, TUNING_SEEDS)) + "\n\n", _settings(store)]
    failed = [record for record in store.records.values() if "error" in record]
    for record in failed:
        task = record["task"]
        parts.append(
            f"* failed: {task['method']}, {task['problem']}, N = {task['n']}, seed {task['seed']}: {record['error']}\n"
        )
    return "".join(parts)


def _summary(store: Store) -> str:
    rows = [
        [name, f"{ratio.mean:.2f}", f"{ratio.lower:.2f} to {ratio.upper:.2f}", f"{ratio.wins} of {len(ratio.problems)}"]
        for name, ratio in comparisons(store).items()
    ]
    return markdown(["ours against", "ratio", "95 % interval", "problems won"], rows)


def _median(records: Sequence[Record], column: str = "value") -> float:
    return float(np.median([record[column] for record in records])) if records else math.nan


def cells_text(values: Sequence[float], *, best: bool = True, digits: int = 3) -> list[str]:
    """Numbers of a row, the smallest in bold; an empty cell for NaN."""
    known = [value for value in values if not math.isnan(value)]
    texts: list[str] = []
    for value in values:
        text = "" if math.isnan(value) else f"{value:.{digits}g}" if value < 10 ** (digits - 1) else f"{value:.0f}"
        texts.append(f"**{text}**" if best and text and value == min(known) else text)
    return texts


def _by_method(store: Store, column: str) -> str:
    rows: list[list[str]] = []
    for cell in cells():
        values = [_median(store.plain(method, *cell), column) for method in COLUMNS]
        peer = better_peer(store, cell)
        short = store.within(*cell, median_seconds(store.plain(peer, *cell))) if peer else []
        values.insert(1, _median(short, column))
        if not all(math.isnan(value) for value in values):
            texts = cells_text(values, best=column != "seconds", digits=2 if column == "seconds" else 3)
            counts = [count for method in COLUMNS if (count := len(store.plain(method, *cell)))]
            seeds = str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
            rows.append([f"{cell[0]}, {cell[1]}", *texts, seeds])
    return markdown(["problem, N", OWN, SHORT, *COLUMNS[1:], "seeds"], rows)


def _value_only(store: Store) -> str:
    rows: list[list[str]] = []
    for name, problem in PROBLEMS.items():
        n = problem.sizes[0]
        values = [_median(store.plain(OWN, name, n)), _median(store.plain("without GI", name, n))]
        values += [_median(store.plain("without GI", name, n, c=c)) for c in (1, 3, problem.dim)]
        if not math.isnan(values[0]):
            rows.append([f"{name}, {n}", *cells_text(values)])
    return markdown(["problem, N", "GI, N", "without, N", "2 N", "4 N", "N (1 + d)"], rows)


def _noise(store: Store) -> str:
    rows: list[list[str]] = []
    methods = [name for name, method in METHODS.items() if method.derivatives and name != "GI, defaults"]
    for name, problem in PROBLEMS.items():
        for noise in (0.0, *NOISE):
            values = [_median(store.plain(method, name, problem.sizes[0], noise=noise)) for method in methods]
            if not all(math.isnan(value) for value in values):
                without = _median(store.plain("without GI", name, problem.sizes[0]))
                rows.append([f"{name}, {problem.sizes[0]}", f"{noise:.0%}", *cells_text([*values, without])])
    return markdown(["problem, N", "noise", *methods, "without GI"], rows)


def _settings(store: Store) -> str:
    def text(settings: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"

    tuned = [
        name
        for name, method in METHODS.items()
        if len(method.grid) > 1 and name not in {"without GI", "GI, auto weight"}
    ]
    rows = [
        [name, *(text(dict(METHODS[method].grid[chosen(store, method, name)])) for method in tuned)]
        for name in PROBLEMS
    ]
    return markdown(["problem", *tuned], rows)
