"""Trainings of the population study: which there are, what settings they have, and the file of those that are done."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from population.arms import ARMS, BORROWS_RATE, VARIANTS, Arm, prepared
from population.cells import Cell, cells
from population.data import REGRESSION, split
from population.scores import regression_scores, scores, temperature
from population.training import logits, train

__all__ = ["SEEDS", "TUNING_SEEDS", "Record", "Store", "Task", "measure", "read_lines", "tuning_tasks"]

VERSION = 1  # of the code that makes records; those of another do not count
SEEDS = tuple(range(10))
TUNING_SEEDS = (100, 101, 102)
CELLS = cells()

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A training.

    Attributes
    ----------
    cell, arm : str
    seed : int
        Those from 100 on choose settings, and never look at test rows.
    setting : int or None
        Index of the arm's setting while it is tuned; None takes the one that was chosen, if the arm has a knob.
    sigma : float or None
        In the place of the arm's, for curves over it.
    """

    cell: str
    arm: str
    seed: int
    setting: int | None = None
    sigma: float | None = None


def read_lines(path: Path) -> Iterator[Any]:
    """Of a file of JSON lines, if there is one; a torn last line is one that was not made."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


class Store:
    """Records in a file of JSON lines, one for each training; a torn last line is one that was not made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[Task, Record] = {}
        for record in read_lines(path):
            if record["version"] == VERSION:
                self.records[Task(**record["task"])] = record

    def add(self, record: Record) -> None:
        """Append one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records[Task(**record["task"])] = record

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those without a record, each once."""
        return [task for task in dict.fromkeys(tasks) if task not in self.records]

    def chosen(self, cell: str, arm: str) -> float | None:
        """The setting of the best mean score on the validation rows of the tuning seeds; None if nothing was tuned."""
        found: defaultdict[int, list[float]] = defaultdict(list)
        for task, record in self.records.items():
            if (task.cell, task.arm) == (cell, arm) and task.setting is not None:
                found[task.setting].append(record["validation"][CELLS[cell].endpoint])
        if not found:
            return None
        if any(len(values) != len(TUNING_SEEDS) for values in found.values()) or len(found) != len(ARMS[arm].values):
            msg = f"tuning of {arm!r} on {cell!r} is not complete"
            raise RuntimeError(msg)
        return ARMS[arm].values[max(sorted(found), key=lambda setting: fmean(found[setting]))]

    def slowdown(self, cell: str) -> float:
        """Seconds of the closure with its default over those of plain training: medians over seeds."""
        seconds = {
            arm: median(
                record["seconds"]
                for task, record in self.records.items()
                if (task.cell, task.arm) == (cell, arm) and task.setting is None and task.sigma is None
            )
            for arm in ("closure", "plain")
        }
        return seconds["closure"] / seconds["plain"]

    def configuration(self, task: Task) -> tuple[Cell, Arm]:
        """The cell and the arm of a task with every setting in its place."""
        arm = {**ARMS, **VARIANTS}[task.arm]
        setting = self.chosen(task.cell, task.arm) if task.setting is None else arm.values[task.setting]
        lender = BORROWS_RATE.get(task.arm, "plain")
        rate = self.chosen(task.cell, lender) if arm.knob is None or arm.knob[0] != "rate" else setting
        stretch = self.slowdown(task.cell) if task.arm == "plain, equal seconds" else 1.0
        arm = arm.at(setting)
        if task.sigma is not None:
            arm = arm.with_sigma(task.sigma)
        return prepared(CELLS[task.cell], arm, rate=1.0 if rate is None else rate, stretch=stretch), arm


def tuning_tasks(cell: str, arms: Iterable[str]) -> list[Task]:
    """Every setting of the arms on the tuning seeds."""
    return [
        Task(cell, arm, seed, setting)
        for arm in arms
        for setting in range(len(ARMS[arm].values))
        for seed in TUNING_SEEDS
    ]


def measure(task: Task, cell: Cell, arm: Arm) -> Record:
    """Train, and score: test rows only where nothing is chosen any more."""
    trained = train(cell, arm, task.seed)
    parts = split(cell.source, cell.rows, cell.wrong_labels, task.seed)
    rows = {"train": parts.train, "validation": parts.validation}
    if task.seed not in TUNING_SEEDS:
        rows["test"] = parts.test
    found = {name: (logits(trained.model, x), y.numpy()) for name, (x, y) in rows.items()}
    if cell.source in REGRESSION:
        scored: Record = {name: regression_scores(*pair) for name, pair in found.items()}
    else:
        scaled_by = temperature(*found["validation"])
        scored = {name: scores(*pair, scaled_by=scaled_by) for name, pair in found.items()}
        scored["temperature"] = scaled_by
    return {
        "task": asdict(task),
        "version": VERSION,
        "rate": cell.recipe.learning_rate,
        "options": dict(arm.options),
        "seconds": trained.seconds,
        "steps": trained.steps,
        **scored,
    }
