"""The records of the population study as they are published, and what a run goes on from with ``--published``.

``docs/population_study.csv.gz`` has a row for every training; the probes of `population.auto` and the gradients of
`population.exact_gradient` are compressed as they are.
"""

import gzip
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from population.arms import ARMS, VARIANTS
from population.tasks import VERSION, Record, Store, Task

__all__ = ["FILE", "load", "records_table", "save", "unpack"]

FILE = "population_study.csv.gz"
OTHERS = ("population_auto.jsonl", "population_exact.jsonl")
PARTS = ("train", "validation", "test")
PLAIN = ("rate", "seconds", "steps")  # of a record, beside scores


def records_table(store: Store) -> pd.DataFrame:
    """A row for every training; scores with five significant digits.

    Rows of the seeds from 100 on chose settings, and have no test scores. ``setting`` is what the arm's knob stood at.
    """
    rows: list[dict[str, Any]] = []
    chosen = cache(partial(_setting, store))
    for task, record in store.records.items():
        scores = {f"{part}_{name}": value for part in PARTS for name, value in record.get(part, {}).items()}
        row = {
            "cell": task.cell,
            "arm": task.arm,
            "seed": task.seed,
            "setting": chosen(task.cell, task.arm) if task.setting is None else ARMS[task.arm].values[task.setting],
            "sigma": record["options"].get("sigma"),
            **{name: record[name] for name in PLAIN},
            **scores,
        }
        rows.append({name: _rounded(value) for name, value in row.items()})
    table = pd.DataFrame(rows)
    return table.sort_values(["cell", "arm", "sigma", "setting", "seed"], ignore_index=True) if rows else table


def _setting(store: Store, cell: str, arm: str) -> float | None:
    """What was chosen; None if there was nothing to choose, and while the choice is not complete."""
    try:
        return store.chosen(cell, arm)
    except RuntimeError:
        return None


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def save(store: Store, folder: Path) -> None:
    """Write them; the same records make the same bytes."""
    records_table(store).to_csv(folder / FILE, index=False, compression={"method": "gzip", "mtime": 0})
    for name in OTHERS:
        if (store.path.parent / name).exists():
            lines = sorted((store.path.parent / name).read_bytes().splitlines(keepends=True))
            (folder / f"{name}.gz").write_bytes(gzip.compress(b"".join(lines), mtime=0))


def unpack(folder: Path, store: Store) -> None:
    """Add those that the store lacks; the other files come beside it where there are none."""
    for record in load(folder / FILE):
        if Task(**record["task"]) not in store.records:
            store.add(record)
    for name in OTHERS:
        if (folder / f"{name}.gz").exists() and not (store.path.parent / name).exists():
            (store.path.parent / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))


def load(path: Path) -> list[Record]:
    """The records of a table, as `Store.add` takes them."""
    return [_record(row) for row in pd.read_csv(path).to_dict("records")]


def _record(row: dict[Any, Any]) -> Record:
    present: dict[str, Any] = {
        str(name): value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))
    }
    cell, name, seed = present["cell"], present["arm"], int(present["seed"])
    arm = {**ARMS, **VARIANTS}[name]
    setting = arm.values.index(present["setting"]) if "test_f1" not in present and "test_r2" not in present else None
    sigma = present.get("sigma")
    curve = arm.knob is None and sigma != arm.options.get("sigma", sigma)  # a point of a curve
    parts: Record = {part: {} for part in PARTS}
    for column, value in present.items():
        part, _, score = column.partition("_")
        if part in parts:
            parts[part][score] = value
    return {
        "task": vars(Task(cell, name, seed, setting, sigma if curve else None)),
        "version": VERSION,
        "options": {} if sigma is None else {"sigma": sigma},
        **{plain: present[plain] for plain in PLAIN},
        **{part: scores for part, scores in parts.items() if scores},
    }
