"""Runs the population study: ``make bench-population``; goes on from ``out/population.jsonl``.

``--quick`` trains every arm for an epoch on two cells; ``--report`` only writes the tables of what is there
(``out/population.md``); ``--stages`` and ``--cells`` choose parts. Two processes of one thread each by default.
"""

import argparse
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from population.arms import ARMS
from population.cells import CURVES, LADDER, PRIMARY, SECONDARY
from population.report import report
from population.tasks import CELLS, SEEDS, Store, Task, measure, tuning_tasks

SECONDARY_ARMS = ("plain", "closure", "unchanged")
SECONDARY_SEEDS = SEEDS[:6]
CURVE_SIGMAS = (0.03, 0.1, 0.2, 0.3, 0.5)
TUNED_LATER = [name for name, arm in ARMS.items() if arm.knob is not None and arm.knob[0] != "rate"]
RATES = [name for name, arm in ARMS.items() if arm.knob is not None and arm.knob[0] == "rate"]
TIMED = "plain, equal seconds"  # needs the times of others


def one_thread() -> None:
    """Of everything in this process: seconds are those of a thread."""
    import torch

    torch.set_num_threads(1)


def run(store: Store, tasks: Iterable[Task], title: str, workers: int) -> None:
    """Those that the store lacks, with a progress bar."""
    missing = [(task, *store.configuration(task)) for task in store.missing(tasks)]
    if not missing:
        return
    columns = (TextColumn("{task.description:28s}"), BarColumn(), MofNCompleteColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress,
        ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread) as executor,
    ):
        bar = progress.add_task(title, total=len(missing))
        for future in as_completed([executor.submit(measure, *job) for job in missing]):
            store.add(future.result())
            progress.advance(bar)


def primary(store: Store, cell: str, workers: int) -> None:
    """One cell of the primary grid: rates, then the other settings, then ten seeds of every arm."""
    run(store, tuning_tasks(cell, ["plain"]), f"{cell}: rate", workers)
    later = [*TUNED_LATER, *(name for name in RATES if name != "plain")]
    run(store, tuning_tasks(cell, later), f"{cell}: settings", workers)
    arms = [name for name in ARMS if name != TIMED]
    run(store, [Task(cell, arm, seed) for seed in SEEDS for arm in arms], cell, workers)
    run(store, [Task(cell, TIMED, seed) for seed in SEEDS], f"{cell}: seconds", workers)


def curves(store: Store, cell: str, workers: int) -> None:
    """The closure over sigma, all seeds."""
    tasks = [Task(cell, "closure", seed, sigma=sigma) for sigma in CURVE_SIGMAS for seed in SEEDS]
    run(store, tasks, f"{cell}: sigma", workers)


def secondary(store: Store, cell: str, workers: int) -> None:
    """Plain training and two of the population's ways, with the cell's own learning rate."""
    run(store, [Task(cell, arm, seed) for arm in SECONDARY_ARMS for seed in SECONDARY_SEEDS], cell, workers)


STAGES = {
    "primary": (primary, list(PRIMARY)),
    "secondary": (secondary, list(SECONDARY)),
    "ladder": (secondary, [f"ladder: {name}" for name in LADDER]),
    "curves": (curves, CURVES),
}


def quick(store: Store) -> None:
    """Every arm for an epoch, its first setting, on two cells: whether it runs, not how well."""
    one_thread()
    for cell in ("digits-200 CNN", "digits-200 ResNet"):
        short = CELLS[cell].changed({"epochs": 1})
        for name, arm in ARMS.items():
            task = Task(cell, name, 0)
            store.add(measure(task, short, arm.at(arm.values[0] if arm.values else None)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--cells", nargs="+", help="names of cells; all by default")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--report", action="store_true", help="only the tables of what is there")
    parser.add_argument("--quick", action="store_true", help="a smoke test of some seconds")
    arguments = parser.parse_args()
    if arguments.quick:
        store = Store(arguments.out / "population_quick.jsonl")
        quick(store)
        print(f"{len(store.records)} records")
        return
    store = Store(arguments.out / "population.jsonl")
    for stage in () if arguments.report else arguments.stages:
        function, names = STAGES[stage]
        for name in names:
            if arguments.cells is None or name in arguments.cells:
                function(store, name, arguments.workers)
    tables = arguments.out / "population.md"
    tables.write_text(report(store))
    print(f"tables: {tables}")


if __name__ == "__main__":
    main()
