"""Tables of `population.exact_gradient`: errors and cosines, and which estimate is nearer, paired over seeds."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from population.exact_gradient import FILE, FRESH, MEMBERS, SIGMAS, read
from population.inference import Effect, effect
from population.markdown import section, shown, table

__all__ = ["exact_records", "exact_tables", "nearer"]

LARGER = f"{MEMBERS} x the batch"


def exact_records(folder: Path) -> pd.DataFrame:
    """A row for each cell, seed, moment and estimate."""
    return pd.DataFrame(read(folder / FILE))


def nearer(found: pd.DataFrame, ours: str, theirs: str) -> tuple[Effect, Effect]:
    """Ratio of the errors (geometric mean over moments, interval over seeds), and difference of the cosines."""
    wide: Any = found.pivot_table(index=["seed", "moment"], columns="estimate", values=["error", "cosine"])
    logs = np.log(wide["error"][ours] / wide["error"][theirs]).groupby("seed").mean()
    ratio = effect(logs.tolist())
    low, mean, high = np.exp([ratio.low, ratio.mean, ratio.high]).tolist()
    cosines = (wide["cosine"][ours] - wide["cosine"][theirs]).groupby("seed").mean()
    return Effect(mean, low, high, ratio.p, ratio.pairs), effect(cosines.tolist())


def exact_tables(folder: Path) -> str:
    """Nothing if it has not been measured."""
    found = exact_records(folder)
    if found.empty:
        return ""
    text = (
        f"Along plain trainings, G being the gradient on {FRESH:,} fresh rows: error `|g - G| / |G|` and cosine of "
        "estimates from one draw of training rows, means over draws and seeds. The population and the larger batch "
        f"cost {MEMBERS} passes over a mini-batch; the sharded population has the rows of the larger batch. The "
        f"standard error of G is {found['uncertain'].mean():.1%} of its length in the mean, "
        f"{found['uncertain'].max():.1%} at most."
    )
    pairs = [(f"{way}, sigma {sigma}", than) for way, than in _PAIRS for sigma in SIGMAS]
    cells = dict(tuple(found.groupby("cell", sort=False)))
    rows: list[list[str]] = []
    for ours, theirs in pairs:
        row = [f"{ours}, to {theirs}"]
        for cell in cells.values():
            ratio, cosine = nearer(cell, ours, theirs)
            star = "**" if not ratio.low <= 1 <= ratio.high else ""
            row += [f"{star}{ratio.mean:.3f} ({ratio.low:.3f} to {ratio.high:.3f}){star}", shown(cosine, "cosine")]
        rows.append(row)
    header = ["paired over seeds", *[f"{cell}: {what}" for cell in cells for what in ("error, ratio", "cosine, minus")]]
    comparison = "Over all moments; a ratio of errors below 1 and a positive difference of cosines are nearer:"
    return section(
        "The exact gradient",
        text,
        comparison,
        table(header, rows),
        "By moment, as parts of the training:",
        _means(found),
    )


_PAIRS = (("population", "mini-batch"), ("population", LARGER), ("sharded", LARGER))


def _means(found: pd.DataFrame) -> str:
    """Errors and cosines at every moment."""
    means: Any = found.pivot_table(index=["cell", "estimate"], columns="moment", values=["error", "cosine"])
    moments = sorted(found["moment"].unique())
    rows: list[list[str]] = []
    for key in dict.fromkeys(zip(found["cell"], found["estimate"], strict=True)):
        own = means.loc[key]
        rows.append([*key, *[f"{own[name, moment]:.2f}" for name in ("error", "cosine") for moment in moments]])
    header = ["cell", "estimate", *[f"{name} at {moment:g}" for name in ("error", "cosine") for moment in moments]]
    return table(header, rows)
