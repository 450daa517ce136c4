"""Tables of the population study, from the records that there are, as Markdown.

``python -m population.report`` writes them, the records (`population.published`) and the figures:
``docs/population_study_tables.md`` and ``docs/images/population_*.png``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from population import auto, published
from population.arms import ARMS
from population.cells import PRIMARY, SECONDARY
from population.costs import costs
from population.effects import (
    ENDPOINTS,
    GROUPS,
    MARGIN,
    clear_cells,
    curve,
    differences,
    mixed,
    over_cells,
    overfitting,
    records,
    score,
    setting,
)
from population.exact_report import exact_tables
from population.inference import holm
from population.markdown import both_ends, section, shown, table
from population.other_cells import depths_and_lengths, domains, ladder, mends, secondary, variants
from population.tasks import CELLS, Store

__all__ = ["ENDPOINTS", "differences", "report", "write"]

RIVALS = [arm for group in list(GROUPS.values())[1:] for arm in group if "sigma tuned" not in arm]
INTRODUCTION = """# Population study: tables

Written by `python -m population.report` from the records of all trainings (`population_study.csv.gz`). An effect is a
mean of paired differences over seeds (the same rows, initial weights and batches), `±` half of its 95 % interval
(Student's t); bold where the interval leaves out zero. Only the primary endpoint is corrected for multiple tests;
everything else is descriptive: of twenty such intervals about one misses by chance. Scores are those of test rows that
no choice has seen. For log-losses and calibration errors, less is better."""


def report(store: Store) -> str:
    """All tables of which there is something to show."""
    parts = [
        _primary(store),
        _arms(store),
        _rivals(store),
        *[_endpoint(store, endpoint) for endpoint in ENDPOINTS],
        costs(store),
        _settings(store),
        _sigmas(store, "closure", list(PRIMARY)),
        _sigmas(store, "unchanged", list(PRIMARY)),
        depths_and_lengths(store),
        _where(store),
        secondary(store),
        ladder(store),
        domains(store),
        variants(store),
        mends(store),
        auto.report(store, auto.read(store.path.parent / auto.FILE)),
        exact_tables(store.path.parent),
    ]
    found = [part for part in parts if part]
    return "\n\n".join([INTRODUCTION, *found] if found else []) + "\n"


def _primary(store: Store) -> str:
    """The primary endpoint: the closure with its default minus plain training."""
    effects, over = over_cells(store, "closure")
    if not effects:
        return ""
    corrected = holm([one.p for one in effects.values()])
    rows = [
        [cell, f"{score(store, cell):.2f}", both_ends(one), _p(one.p), _p(p), str(one.pairs)]
        for (cell, one), p in zip(effects.items(), corrected, strict=True)
    ]
    if len(effects) == len(PRIMARY):
        every = mixed(store, "closure")
        rows.append(["all, mixed model", "", both_ends(every), _p(every.p), "", str(every.pairs)])
        rows.append(["all, a number for each cell", "", both_ends(over), _p(over.p), "", f"{over.pairs} cells"])
    text = (
        "The closure with its default (sigma 0.1, 4 members) minus plain training, points of macro-F1. Holm's "
        f"correction is for the {len(effects)} cells. The mixed model has random effects of the data set, the "
        "architecture, the cell and the split (restricted maximum likelihood with variances of zero or more; t with "
        "one degree of freedom less than there are cells); the last row takes the cells' means for independent numbers."
    )
    return section("Primary endpoint", text, table(["cell", "plain", "effect", "p", "p, Holm", "seeds"], rows))


def _arms(store: Store) -> str:
    """All arms and endpoints, over the cells."""
    rows: list[list[str]] = []
    for arm in [arm for group in GROUPS.values() for arm in group]:
        effects, over = over_cells(store, arm)
        if over.pairs > 1:
            counts = [str(clear_cells(list(effects.values()), above=above)) for above in (True, False)]
            others = [shown(over_cells(store, arm, endpoint=name)[1], name) for name in ENDPOINTS if name != "f1"]
            both = [shown(over), shown(mixed(store, arm))]
            rows.append([arm, *both, f"{counts[0]} / {counts[1]} of {over.pairs}", *others])
    header = [
        "minus plain",
        "macro-F1",
        "mixed model",
        "better / worse",
        "accuracy",
        "log-loss",
        "scaled log-loss",
        "calibration",
    ]
    text = (
        "Mean over the primary cells (the interval takes their means for independent numbers), the same of macro-F1 by "
        "the mixed model of the primary endpoint (its interval is mostly wider: cells share data and architectures), "
        "and the number of cells whose own interval of macro-F1 is above / below zero. Settings were chosen for "
        "macro-F1, not for calibration."
    )
    return section("All arms over the cells", text, table(header, rows)) if rows else ""


def _rivals(store: Store) -> str:
    """The population minus each of the others."""
    ours = ["closure", "closure, sigma tuned", "unchanged, sigma tuned"]
    rows: list[list[str]] = []
    for rival in RIVALS:
        found = [over_cells(store, arm, to=rival)[1] for arm in ours]
        losses = over_cells(store, ours[1], to=rival, endpoint="log_loss")[1]
        if any(one.pairs > 1 for one in found):
            model = mixed(store, ours[1], to=rival)
            high = "" if model.pairs < 2 else "yes" if model.low > -MARGIN else "not shown"
            effects = [shown(one) for one in (*found, model)]
            rows.append([rival, *effects, high, shown(losses, "log_loss")])
    header = [
        "macro-F1 minus that of",
        *ours,
        "tuned closure, mixed model",
        f"tuned closure above -{MARGIN}",
        "tuned closure, log-loss",
    ]
    text = (
        "The population minus each other method, mean over the primary cells as above. Above the margin: the mixed "
        f"model's interval of the tuned closure (as many settings as its rivals have) lies above -{MARGIN} points."
    )
    return section("The population against the others", text, table(header, rows)) if rows else ""


def _endpoint(store: Store, endpoint: str) -> str:
    """Every arm minus plain training in every cell."""
    tables: list[str] = []
    for title, arms in GROUPS.items():
        found = {arm: over_cells(store, arm, endpoint=endpoint) for arm in arms}
        cells = [cell for cell in PRIMARY if any(cell in effects for effects, _ in found.values())]
        rows = [[cell, *[shown(effects.get(cell), endpoint) for effects, _ in found.values()]] for cell in cells]
        if len(cells) > 1:
            rows.append(["mean over cells", *[shown(over, endpoint) for _, over in found.values()]])
        if rows:
            tables.append(f"{title[0].upper()}{title[1:]}:\n\n{table(['minus plain', *arms], rows)}")
    name = ENDPOINTS[endpoint]
    return section(f"{name[0].upper()}{name[1:]}: every arm in every cell", *tables) if tables else ""


def _settings(store: Store) -> str:
    tuned = [arm for arm in ARMS if ARMS[arm].knob is not None]
    cells = [cell for cell in PRIMARY if records(store, cell, "plain")]
    rows = [[cell, *[_number(setting(store, cell, arm)) for arm in tuned]] for cell in cells]
    text = (
        "By the mean macro-F1 on validation rows of three seeds of their own. For plain training the setting is a "
        "factor on the cell's learning rate, which all arms without a rate of their own take over."
    )
    return section("Settings that were chosen", text, table(["cell", *tuned], rows)) if rows else ""


def _sigmas(store: Store, arm: str, cells: Sequence[str]) -> str:
    """Effects over sigma, in the cells where it was moved."""
    tables: list[str] = []
    for endpoint in ("f1", "log_loss"):
        curves = {cell: curve(store, cell, arm, endpoint) for cell in cells}
        curves = {cell: found for cell, found in curves.items() if len(found) > 2}  # more than 0 and the default
        sigmas = sorted({sigma for found in curves.values() for sigma in found})
        rows = [[cell, *[shown(found.get(sigma), endpoint) for sigma in sigmas]] for cell, found in curves.items()]
        if rows:
            tables.append(table([f"{ENDPOINTS[endpoint].split(',')[0]}, sigma", *[f"{s:g}" for s in sigmas]], rows))
    return section(f"Effect over sigma: {arm}", "Minus plain training.", *tables) if tables else ""


def _where(store: Store) -> str:
    """Rank correlations of the effect with what cells are."""
    rows: list[list[str]] = []
    for title, names in (("primary cells", list(PRIMARY)), ("all cells", [*PRIMARY, *SECONDARY])):
        for arm in ("closure", "closure, sigma tuned"):
            effects = {
                cell: fmean(values.values()) for cell in names if len(values := differences(store, cell, arm)) > 1
            }
            if len(effects) > 3 and (arm == "closure" or title == "primary cells"):
                gaps, sizes = [overfitting(store, cell) for cell in effects], [CELLS[cell].rows for cell in effects]
                ranks = [_ranked(values, list(effects.values())) for values in (gaps, sizes)]
                rows.append([f"{arm}, {title}", str(len(effects)), *ranks])
    header = ["effect on macro-F1", "cells", "over-fitting", "training rows"]
    text = (
        "Spearman's rank correlation, over cells, of the effect with the degree of over-fitting (accuracy of plain "
        "training on its own rows minus that on test rows) and with the number of training rows."
    )
    return section("Where it helps", text, table(header, rows)) if rows else ""


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _ranked(x: Sequence[float], y: Sequence[float]) -> str:
    """Spearman's correlation; nothing where one of both is all the same."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return ""
    found: Any = spearmanr(x, y)
    return f"{found.statistic:+.2f} (p {found.pvalue:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def write(store: Store, docs: Path) -> None:
    """Tables, records and figures."""
    from population import plots  # matplotlib only where there are pictures

    (docs / "population_study_tables.md").write_text(report(store))
    published.save(store, docs)
    plots.save(store, docs / "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    write(Store(arguments.out / "population.jsonl"), arguments.docs)


if __name__ == "__main__":
    main()
