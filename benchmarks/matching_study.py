"""Gradient matching for surrogates beside jenn, GENN, kriging, GEKPLS, and beside more points without derivatives.

Run: ``make bench-matching``, which is ``python benchmarks/matching_study.py``; resumable: a record per fit goes to
``out/matching_study.jsonl``, tables to ``docs/matching_tables.md``, plots to ``docs/images``; ``--report`` writes those
of what is there; ``--quick`` is a smoke test. Results and their reading: docs/matching.md.
"""

import argparse
import multiprocessing
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from matching_peers import METHODS
from matching_problems import PROBLEMS
from matching_tasks import (
    Record,
    Store,
    Task,
    chosen,
    curve_tasks,
    equal_time_tasks,
    main_tasks,
    measure,
    noise_tasks,
    shortened,
    tuning_tasks,
    with_setting,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from threadpoolctl import threadpool_limits


def one_thread() -> None:
    """Of everything in this process: seconds are those of the processor."""
    import torch

    torch.set_num_threads(1)
    threadpool_limits(1)


def warm_up(methods: Sequence[str]) -> None:
    """What the first fit of a process pays for imports is in no record."""
    one_thread()
    problem = PROBLEMS["Branin"]
    for method in (METHODS[name] for name in methods):
        steps = {method.iterations: 2} if method.iterations else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two iterations do not converge
            method.fit(problem.draw(6, 999), problem, 0, {**method.grid[0], **steps})


def run(store: Store, tasks: Iterable[Task], title: str, workers: int) -> None:
    """Those of the tasks that the store lacks, with a progress bar."""
    missing = [with_setting(task, store) for task in store.missing(tasks)]
    if not missing:
        return
    methods = sorted({task.method for task, _ in missing})
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times) as progress:
        bar = progress.add_task(title, total=len(missing))

        def keep(record: Record) -> None:
            store.add(record)
            progress.advance(bar)

        if workers == 1:
            warm_up(methods)
            for task, setting in missing:
                keep(measure(task, setting))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=warm_up, initargs=(methods,)) as executor:
            for future in as_completed([executor.submit(measure, task, setting) for task, setting in missing]):
                keep(future.result())


def quick(folder: Path) -> Store:
    """A few iterations of every method on two problems: whether everything runs, not how well."""
    store = Store(folder / "matching_quick.jsonl")
    problems, methods = ["Branin", "B777 engine"], [name for name in METHODS if name != "GI, auto weight"]
    wanted = [task for task in main_tasks(problems, methods, 1) if task.n == PROBLEMS[task.problem].sizes[0]]
    run(store, shortened([task for task in wanted if task.c <= 1], 5), "quick", 1)
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--stages", nargs="+", default=["tune", "main", "time", "noise", "curves"])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where tables and plots go")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    parser.add_argument("--report", action="store_true", help="tables and plots of what is there; runs nothing")
    arguments = parser.parse_args()
    one_thread()
    if arguments.quick:
        print(f"{len(quick(arguments.out).records)} records")
        return
    store = Store(arguments.out / "matching_study.jsonl")
    if not arguments.report:
        problems, methods, seeds = arguments.problems, arguments.methods, arguments.seeds
        stages = {
            "tune": lambda: tuning_tasks(problems, methods),
            "main": lambda: [
                task
                for task in main_tasks(problems, methods, seeds)
                if task.method != "GI, defaults" or chosen(store, "GI", task.problem) != 0  # else they are the same
            ],
            "time": lambda: equal_time_tasks(store) if "GI" in methods else [],
            "noise": lambda: noise_tasks(problems, methods, seeds),
            "curves": lambda: [task for task in curve_tasks(seeds) if task.method in methods],
        }
        for stage in arguments.stages:
            for _ in range(4 if stage == "time" else 1):
                run(store, stages[stage](), stage, arguments.workers)
    from matching_report import report

    report(store, arguments.docs)


if __name__ == "__main__":
    main()
