"""Runs the population study: ``make bench-population``; goes on from ``out/population.jsonl``.

``--quick`` trains every arm for an epoch on two cells; ``--published`` starts from the published records; ``--stages``
and ``--cells`` choose parts. Two processes of one thread each by default. `population.report` makes tables and figures.
"""

import argparse
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from population.arms import ARMS, DEFAULT_SIGMA, LARGE_SIGMA, VARIANT_SIGMA
from population.cells import (
    CURVES,
    DEPTHS,
    DOMAINS,
    LADDER,
    LENGTHS,
    MENDED,
    NORMALISED,
    OVERFITTED,
    PRIMARY,
    SECONDARY,
)
from population.published import unpack
from population.tasks import CELLS, SEEDS, Store, Task, measure, tuning_tasks
from population.variants import CHANGES, MENDS, ONLY_NORMALISED

SIGMAS = (0.05, 0.2, 0.4, 0.8)  # of the curves, beside the default and 0
# Equal to plain training to the bit: three seeds suffice to see it.
CONTROLS = ["closure, sigma 0", "unchanged, sigma 0"]
DEFAULTS = ["plain", "closure", "unchanged", "sharded", "sharded, sigma 0"]
TIMED = "plain, equal seconds"  # needs the times of others
RIVALS = [name for name in ARMS if name not in {*CONTROLS, *DEFAULTS, TIMED}]
SECONDARY_SEEDS = SEEDS[:6]
REGULARIZED = ["label smoothing", "weight decay", "SAM", "closure, sigma tuned"]
PUBLISHED = Path(__file__).parents[2] / "docs"


def one_thread() -> None:
    """Of everything in this process: seconds are those of a thread, and not those of denormal numbers."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # vanishing gradients made steps 1.6 times as slow; scores do not notice


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
    """The learning rate, then the population with its defaults, and its controls."""
    run(store, tuning_tasks(cell, ["plain"]), f"{cell}: rate", workers)
    controls = [Task(cell, arm, seed) for seed in SEEDS[:3] for arm in CONTROLS]
    run(store, [*(Task(cell, arm, seed) for seed in SEEDS for arm in DEFAULTS), *controls], cell, workers)


def unchanged(store: Store, cell: str, workers: int) -> None:
    """The unchanged loop over sigma."""
    tasks = [Task(cell, "unchanged", seed, sigma=sigma) for seed in SEEDS for sigma in SIGMAS]
    run(store, tasks, f"{cell}: sigma, unchanged", workers)


def closure(store: Store, cell: str, workers: int) -> None:
    """The closure over sigma: all values on six cells, and one that looked good there on all of them."""
    sigmas = SIGMAS if cell in CURVES else (LARGE_SIGMA,)
    tasks = [Task(cell, "closure", seed, sigma=sigma) for seed in SEEDS for sigma in sigmas]
    run(store, tasks, f"{cell}: sigma, closure", workers)


def moved(store: Store, cell: str, workers: int) -> None:
    """The closure over sigma where depth or length of the training are others."""
    run(store, tuning_tasks(cell, ["plain"]), f"{cell}: rate", workers)
    tasks = [Task(cell, arm, seed) for seed in SECONDARY_SEEDS for arm in ("plain", "closure")]
    tasks += [Task(cell, "closure", seed, sigma=sigma) for seed in SECONDARY_SEEDS for sigma in SIGMAS[:-1]]
    run(store, tasks, f"{cell}: sigma", workers)


def overfitted(store: Store, cell: str, workers: int) -> None:
    """Sigma tuned and three of the rivals where a longer training over-fits."""
    run(store, tuning_tasks(cell, REGULARIZED), f"{cell}: settings", workers)
    run(store, [Task(cell, arm, seed) for seed in SECONDARY_SEEDS for arm in REGULARIZED], f"{cell}: rivals", workers)


def variants(store: Store, cell: str, workers: int) -> None:
    """Other populations, at one sigma, and the library's at that sigma; beside the six cells, those that mend."""
    sigma = None if VARIANT_SIGMA == DEFAULT_SIGMA else VARIANT_SIGMA
    ours = [Task(cell, way, seed, sigma=sigma) for seed in SEEDS for way in ("closure", "unchanged")]
    names = [name for name in CHANGES if name not in ONLY_NORMALISED or CELLS[cell].normalised]
    tried = [name for name in names if cell in CURVES or name in MENDS]
    run(store, [*ours, *(Task(cell, f"variant: {name}", seed) for seed in SEEDS for name in tried)], cell, workers)


def mends(store: Store, cell: str, workers: int) -> None:
    """What may let networks with batch normalisation bear a larger sigma."""
    tasks = [Task(cell, f"variant: {name}", seed, sigma=LARGE_SIGMA) for seed in SEEDS for name in sorted(MENDS)]
    control = [Task(cell, "variant: norms kept", seed, sigma=0.0) for seed in SEEDS]
    run(store, [*tasks, *control], f"{cell}: mends", workers)


def rivals(store: Store, cell: str, workers: int) -> None:
    """What is tuned, and what has more passes or seconds."""
    run(store, tuning_tasks(cell, RIVALS), f"{cell}: settings", workers)
    run(store, [Task(cell, arm, seed) for seed in SEEDS for arm in RIVALS], f"{cell}: rivals", workers)
    run(store, [Task(cell, TIMED, seed) for seed in SEEDS], f"{cell}: seconds", workers)


def secondary(store: Store, cell: str, workers: int) -> None:
    """Plain training and two of the population's ways, with the cell's own learning rate."""
    arms = ("plain", "closure", "unchanged")
    run(store, [Task(cell, arm, seed) for seed in SECONDARY_SEEDS for arm in arms], cell, workers)


def ladder(store: Store, cell: str, workers: int) -> None:
    """The same with all seeds: a margin is to be judged."""
    run(store, [Task(cell, arm, seed) for seed in SEEDS for arm in ("plain", "closure", "unchanged")], cell, workers)


def domains(store: Store, cell: str, workers: int) -> None:
    """The population, its default and its tuned sigma, on another kind of problem."""
    primary(store, cell, workers)
    tuned = ["closure, sigma tuned", "unchanged, sigma tuned"]
    run(store, tuning_tasks(cell, tuned), f"{cell}: settings", workers)
    run(store, [Task(cell, arm, seed) for seed in SEEDS for arm in tuned], f"{cell}: tuned", workers)


STAGES = {
    "primary": (primary, list(PRIMARY)),
    "unchanged": (unchanged, list(PRIMARY)),
    "normalised": (primary, list(NORMALISED)),
    "variants": (variants, [*CURVES, "mnist1d-1000 ResNet", *NORMALISED]),
    "mends": (mends, MENDED),
    "rivals": (rivals, list(PRIMARY)),
    "closure": (closure, list(PRIMARY)),
    "depths": (moved, list(DEPTHS)),
    "lengths": (moved, list(LENGTHS)),
    "over-fitted": (overfitted, OVERFITTED),
    "domains": (domains, list(DOMAINS)),
    "ladder": (ladder, [f"ladder: {name}" for name in LADDER]),
    "secondary": (secondary, list(SECONDARY)),
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
    parser.add_argument("--published", action="store_true", help="go on from the records in docs")
    parser.add_argument("--quick", action="store_true", help="a smoke test of some seconds")
    arguments = parser.parse_args()
    if arguments.quick:
        store = Store(arguments.out / "population_quick.jsonl")
        quick(store)
        print(f"{len(store.records)} records")
        return
    store = Store(arguments.out / "population.jsonl")
    if arguments.published:
        unpack(PUBLISHED, store)
    for stage in arguments.stages:
        function, names = STAGES[stage]
        for name in names:
            if arguments.cells is None or name in arguments.cells:
                function(store, name, arguments.workers)


if __name__ == "__main__":
    main()
