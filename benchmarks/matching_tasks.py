"""Cells of the gradient matching study: which fits there are, what one of them measures, and the file they are kept in.

A record is a line of JSON. What is in the file is not run again, except for our own rows when our code has changed.
"""

import json
import math
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matching_peers import METHODS, own_version
from matching_problems import PROBLEMS, Array, Problem, Sample, noisy

__all__ = [
    "NOISE",
    "TUNING_SEEDS",
    "Record",
    "Store",
    "Task",
    "chosen",
    "curve_tasks",
    "equal_time_tasks",
    "main_tasks",
    "measure",
    "median_seconds",
    "noise_tasks",
    "relative_errors",
    "tuning_tasks",
]

Record = dict[str, Any]
TUNING_SEEDS = (100,)
NOISE = (0.05, 0.2)  # relative to the root mean square of each partial derivative
PEERS = ("jenn", "GENN")  # networks with derivatives
CURVES = {"Rosenbrock 2-D": 20, "Wing weight": 50, "Water flow": 40, "B777 engine": 100}
ADAM_STEPS = (200, 600, 2000, 6000)
CURVE_STEPS = {"GI": (10, 30, 100, 300, 1000), "jenn": ADAM_STEPS, "GENN": ADAM_STEPS}
TUNING_LIMIT, LIMIT = 6, 120  # processor seconds of a fit; settings that need more are not chosen
GRADIENT_POINTS = 250  # of the test points, in random order: kriging takes minutes for 2000 gradients
# Kriging took 4, 11 and 45 s for 50, 100 and 200 airfoils in 16 dimensions (nRMSE .49, .40, .38).
LEFT_OUT = {("KRG", "Airfoil drag", 200), ("KRG", "Airfoil drag", 1000), ("GEKPLS", "Airfoil drag", 1000)}
# What the grid asks of 200 airfoils, 600 to 1200 points of kriging, is not positive definite or takes minutes.
FIXED = {
    ("GEKPLS", "Airfoil drag"): {"n_comp": 3, "extra_points": 1, "delta_x": 1e-2},
    ("jenn", "Airfoil drag"): {"max_iter": 1500},
}


@dataclass(frozen=True)
class Task:
    """One fit.

    Attributes
    ----------
    method, problem : str
        Names in METHODS and PROBLEMS.
    n, seed : int
        Training points, and the seed of the design, of the noise and of the first weights.
    noise : float
        Relative noise of the derivatives.
    c : int
        Value-only training on ``n (1 + c)`` points.
    iterations : int
        Bound on the iterations in place of that of the settings; 0: none.
    setting : int
        Which of the method's grid; -1: the one chosen for this problem.
    """

    method: str
    problem: str
    n: int
    seed: int
    noise: float = 0.0
    c: int = 0
    iterations: int = 0
    setting: int = -1

    @property
    def version(self) -> str:
        """Of the code that the result depends on, as far as it is ours."""
        return own_version() if METHODS[self.method].own else ""


class Store:
    """Records in a file of JSON lines; those of another version of our code do not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[Task, Record] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._take(json.loads(line))

    def _take(self, record: Record) -> None:
        task = Task(**record["task"])
        if record["version"] == task.version:
            self.records[task] = record

    def add(self, record: Record) -> None:
        """Append one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._take(record)

    def plain(self, method: str, problem: str, n: int, *, noise: float = 0.0, c: int = 0) -> list[Record]:
        """Of a cell, with the settings that were chosen: a record for each seed, without those that failed."""
        if method == "GI, defaults" and chosen(self, "GI", problem) == 0:
            method = "GI"
        return [
            record
            for task, record in sorted(self.records.items(), key=lambda item: item[0].seed)
            if task == Task(method, problem, n, task.seed, noise, c)
            and task.seed < TUNING_SEEDS[0]
            and "value" in record
        ]

    def by_steps(self, problem: str, n: int) -> dict[int, list[Record]]:
        """Ours by the bound on iterations, 0 being that of the settings; bounds that all seeds have."""
        full = self.plain("GI", problem, n)
        ladder = sorted(
            {task.iterations for task in self.records if (task.problem, task.n, task.method) == (problem, n, "GI")}
        )
        runs = {
            steps: [
                self.records[task]
                for task in (Task("GI", problem, n, record["task"]["seed"], iterations=steps) for record in full)
                if "value" in self.records.get(task, {})
            ]
            for steps in ladder
        }
        return {steps: records for steps, records in runs.items() if len(records) == len(full) > 0}

    def within(self, problem: str, n: int, seconds: float) -> list[Record]:
        """The longest of our runs with a median of at most `seconds`; empty if there is none."""
        fitting = [records for records in self.by_steps(problem, n).values() if median_seconds(records) <= seconds]
        return max(fitting, key=median_seconds, default=[])

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Those without a record, each once."""
        return [task for task in dict.fromkeys(tasks) if task not in self.records]


# -- which -------------------------------------------------------------------------------------------------------------


def applies(method: str, problem: Problem, n: int) -> bool:
    """Whether a method can take a problem, and in bearable time."""
    if (method, problem.name, n) in LEFT_OUT:
        return False
    if problem.n_outputs > 1:  # GENN and GEKPLS refuse the derivatives of a second output
        return method not in {"GENN", "GEKPLS", "KRG"}
    return method != "GEKPLS" or problem.dim > 1  # it needs two components


def cells(problems: Sequence[str], seeds: int) -> Iterator[tuple[Problem, int, int]]:
    """Problem, size, seed; seeds outermost, so that a study that is cut short has whole seeds."""
    for seed in range(seeds):
        for name in problems:
            for n in PROBLEMS[name].sizes:
                yield PROBLEMS[name], n, seed


def tuning_tasks(problems: Sequence[str], methods: Sequence[str]) -> list[Task]:
    """Each setting on other seeds, at the smallest size of each problem."""
    return [
        Task(method, name, PROBLEMS[name].sizes[0], seed, setting=setting)
        for seed in TUNING_SEEDS
        for name in problems
        for method in methods
        if applies(method, PROBLEMS[name], PROBLEMS[name].sizes[0])
        for setting in range(len(METHODS[method].grid))
        if len(METHODS[method].grid) > 1 and method not in {"without GI", "GI, auto weight"}
        if (method, name) != ("GEKPLS", "Airfoil drag")
    ]


def main_tasks(problems: Sequence[str], methods: Sequence[str], seeds: int) -> list[Task]:
    """Exact derivatives; value-only training also with the points that gradients would cost, at the smallest size."""
    tasks: list[Task] = []
    for problem, n, seed in cells(problems, seeds):
        for method in methods:
            if method == "GI, auto weight" or not applies(method, problem, n):
                continue
            tasks.append(Task(method, problem.name, n, seed))
            if method == "without GI" and n == problem.sizes[0]:
                tasks += [Task(method, problem.name, n, seed, c=c) for c in problem.extra(n)]
    return tasks


def noise_tasks(problems: Sequence[str], methods: Sequence[str], seeds: int) -> list[Task]:
    """Noisy derivatives, at the smallest size."""
    return [
        Task(method, problem.name, n, seed, noise=noise)
        for problem, n, seed in cells(problems, seeds)
        if n == problem.sizes[0]
        for noise in NOISE
        for method in methods
        if METHODS[method].derivatives and method != "GI, defaults" and applies(method, problem, n)
        if method != "jenn" or not applies("GENN", problem, n)  # the same code at other settings
    ]


def equal_time_tasks(store: Store) -> list[Task]:
    """Ours with fewer iterations, where no run of ours took at most a peer's seconds (medians over seeds).

    To be asked again until there is nothing to do: how long an iteration takes is only estimated.
    """
    tasks: list[Task] = []
    for problem, n in dict.fromkeys((task.problem, task.n) for task in store.records):
        for theirs in (store.plain(peer, problem, n) for peer in PEERS):
            ours = store.by_steps(problem, n)
            if not ours or not theirs or store.within(problem, n, median_seconds(theirs)):
                continue
            shortest = min(ours.values(), key=median_seconds)
            steps = float(np.median([record["n_iter"] for record in shortest]))
            steps = max(1, int(0.9 * steps * median_seconds(theirs) / median_seconds(shortest)))
            tasks += [Task("GI", problem, n, record["task"]["seed"], iterations=steps) for record in ours[0]]
    return tasks


def median_seconds(records: Sequence[Record]) -> float:
    """Over seeds."""
    return float(np.median([record["seconds"] for record in records]))


def curve_tasks(seeds: int) -> list[Task]:
    """Error against seconds: iterations varied."""
    return [
        Task(method, problem, n, seed, iterations=steps)
        for seed in range(seeds)
        for problem, n in CURVES.items()
        for method, ladder in CURVE_STEPS.items()
        if applies(method, PROBLEMS[problem], n)
        for steps in ladder
    ]


def chosen(store: Store, method: str, problem: str) -> int:
    """The setting with the smallest geometric mean of the value error on the tuning seed; 0 if none was tried."""
    method = {"without GI": "GI", "GI, auto weight": "GI"}.get(method, method)
    n = PROBLEMS[problem].sizes[0]
    scores: list[float] = []
    for setting in range(len(METHODS[method].grid)):
        tried = [store.records.get(Task(method, problem, n, seed, setting=setting)) for seed in TUNING_SEEDS]
        errors = [record.get("value", math.inf) for record in tried if record is not None]
        scores.append(float(np.mean(np.log(errors))) if errors else math.inf)
    return int(np.argmin(scores))


# -- one fit -----------------------------------------------------------------------------------------------------------


def relative_errors(values: Array, jacobian: Array, test: Sample, scale: Array) -> tuple[list[float], list[float]]:
    """Of each output: RMSE of the values over their standard deviation, and of the gradient over its root mean square.

    `jacobian` may be of the first rows only. Gradients are measured in units of `scale`, shape (d,): standard
    deviations of the inputs.
    """
    value = np.sqrt(np.mean((values - test.y) ** 2, axis=0)) / test.y.std(axis=0)
    dydx = test.dydx[: len(jacobian)]
    error = np.sum(((jacobian - dydx) * scale) ** 2, axis=-1).mean(axis=0)
    size = np.sum((dydx * scale) ** 2, axis=-1).mean(axis=0)
    return value.tolist(), np.sqrt(error / size).tolist()


class TooLongError(BaseException):
    """A fit took too long; no `Exception`, since optimisers catch those."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLongError in what takes more than so many processor seconds."""

    def stop(*_: object) -> None:
        msg = f"more than {seconds:g} processor seconds"
        raise TooLongError(msg)

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def measure(task: Task, setting: int) -> Record:
    """Fit and judge; an exception of the fit is part of the record."""
    problem, method = PROBLEMS[task.problem], METHODS[task.method]
    tuning = task.seed in TUNING_SEEDS
    train = noisy(problem.draw(task.n * (1 + task.c), task.seed), task.noise, task.seed)
    test = problem.validate(task.seed) if tuning else problem.test(task.seed)
    settings = dict(method.grid[setting if len(method.grid) > 1 else 0])
    if task.method == "without GI":
        settings.pop("alpha", None)
    if task.method == "GI, auto weight":
        settings["derivative_weight"] = "auto"
    settings |= FIXED.get((task.method, task.problem), {})
    if task.iterations:
        settings[method.iterations] = task.iterations
    limit = TUNING_LIMIT if tuning and task.problem != "Airfoil drag" else LIMIT
    record: Record = {"task": asdict(task), "version": task.version, "settings": settings}
    try:
        with warnings.catch_warnings(), limited(limit):
            warnings.simplefilter("ignore")  # of convergence
            model = method.fit(train, problem, task.seed, settings)
        values, jacobian = model.values(test.x), model.jacobian(test.x[:GRADIENT_POINTS])
    except (Exception, TooLongError) as error:  # noqa: BLE001 - a peer that fails is a result
        return {**record, "error": f"{type(error).__name__}: {error}"[:200]}
    value, derivative = relative_errors(values, jacobian, test, train.x.std(axis=0))
    return {
        **record,
        "seconds": model.seconds,
        "n_iter": model.n_iter,
        "value": float(np.sqrt(np.mean(np.square(value)))),
        "derivative": float(np.sqrt(np.mean(np.square(derivative)))),
        "values": value,
        "derivatives": derivative,
    }


def with_setting(task: Task, store: Store) -> tuple[Task, int]:
    """A task and the number of its setting."""
    return task, task.setting if task.setting >= 0 else chosen(store, task.method, task.problem)


def shortened(tasks: Iterable[Task], iterations: int) -> list[Task]:
    """The same with few iterations: for a smoke test."""
    return [replace(task, iterations=iterations) if METHODS[task.method].iterations else task for task in tasks]
