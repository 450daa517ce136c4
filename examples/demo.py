"""Both plugins on real data: a table, and a picture of it in out/demo.png.

Run: ``make demo``, or ``python examples/demo.py [seeds]``. Nothing is tuned: sigma and derivative_weight are the
library's defaults (a second sigma is shown as well), and the test data are used once.
"""

import multiprocessing
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matching_wing_weight
import matplotlib as mpl
import numpy as np
import population_digits
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy import stats

mpl.use("Agg")
from matplotlib import pyplot as plt

EXPERIMENTS = {"population gradient": population_digits, "gradient matching": matching_wing_weight}
SEEDS = {"population gradient": 8, "gradient matching": 4}
Scores = dict[str, np.ndarray]  # method -> one row per seed, in the order of the seeds


def run_one(experiment: str, seed: int) -> dict[str, Any]:
    """One seed of one experiment, in a worker process."""
    torch.set_num_threads(1)
    return EXPERIMENTS[experiment].run(seed)


def run_all(seeds: dict[str, int]) -> dict[str, Scores]:
    """All seeds of both experiments on all cores, with a progress bar."""
    tasks = [(name, seed) for name, count in seeds.items() for seed in range(count)]
    results: dict[tuple[str, int], dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        bar = progress.add_task("training", total=len(tasks))
        futures = {pool.submit(run_one, *task): task for task in tasks}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            progress.advance(bar)
    return {
        name: {
            method.name: np.array([results[name, seed][method.name] for seed in range(count)])
            for method in EXPERIMENTS[name].METHODS
        }
        for name, count in seeds.items()
    }


def plus_minus(values: np.ndarray, digits: int) -> str:
    """Mean and standard error."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


def verdict(values: np.ndarray, baseline: np.ndarray) -> str:
    """What a paired t-test at 5% says of a score of which less is better."""
    if np.array_equal(values, baseline):
        return "equal to the bit"
    _, p = stats.ttest_rel(values, baseline)
    change = f"{100 * (values.mean() / baseline.mean() - 1):+.1f} % (p {f'= {p:.2f}' if p >= 0.01 else '< 0.01'})"
    if p > 0.05:
        return f"no difference shown: {change}"
    return f"{'helps' if values.mean() < baseline.mean() else 'hurts'}: {change}"


def population_table(scores: Scores) -> Table:
    """Accuracy and log-loss on held-out digits."""
    methods = population_digits.METHODS
    count = len(next(iter(scores.values())))
    table = Table(title=f"Population gradient: {population_digits.TRAINING_ROWS} digits to train on, {count} seeds")
    for header in ("method", "passes", "accuracy, %", "log-loss", "log-loss against AdamW, equal passes"):
        table.add_column(header, no_wrap=True)
    for method in methods:
        accuracy, loss = scores[method.name].T
        rival = next(m for m in methods if m.sigma is None and m.passes == method.passes)
        against = "" if method is rival else verdict(loss, scores[rival.name][:, 1])
        table.add_row(method.name, f"{method.passes}x", plus_minus(accuracy, 2), plus_minus(loss, 4), against)
    return table


def matching_table(scores: Scores) -> Table:
    """Relative error of the wing weight."""
    methods = matching_wing_weight.METHODS
    count = len(next(iter(scores.values())))
    table = Table(title=f"Gradient matching: wing weight, 10 inputs, {count} seeds")
    for header in ("data", "relative error", "against 40 values"):
        table.add_column(header, no_wrap=True)
    for method in methods:
        values = scores[method.name]
        against = "" if method is methods[0] else verdict(values, scores[methods[0].name])
        table.add_row(method.name, plus_minus(values, 4), against)
    return table


def draw(results: dict[str, Scores], path: Path) -> None:
    """One panel per plugin: every seed as a dot, paired by grey lines, the mean as a bar."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    population = {name: values[:, 1] for name, values in results["population gradient"].items()}
    panels = (
        (population, "log-loss on 1,697 held-out digits", "Population gradient around AdamW", "linear"),
        (results["gradient matching"], "error / standard deviation", "Gradient matching: wing weight", "log"),
    )
    for axis, (scores, label, title, kind) in zip(axes, panels, strict=True):
        rows = np.arange(len(scores))[::-1]
        values = np.stack(list(scores.values()))
        axis.plot(values, rows, color="0.85", linewidth=0.8, zorder=1)
        for row, seeds in zip(rows, values, strict=True):
            axis.scatter(seeds, np.full(len(seeds), row), s=14, color="tab:blue", zorder=2)
            axis.scatter(seeds.mean(), row, s=260, marker="|", linewidth=2.5, color="tab:orange", zorder=3)
        axis.set(
            yticks=rows,
            yticklabels=[textwrap.fill(name, 24) for name in scores],
            xlabel=label,
            title=title,
            xscale=kind,
        )
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("each dot one seed, lines join equal seeds, bars are means; less is better", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run, print, draw."""
    start = time.perf_counter()
    seeds = dict.fromkeys(SEEDS, int(sys.argv[1])) if len(sys.argv) > 1 else SEEDS
    results = run_all(seeds)
    console = Console(width=max(136, Console().width))
    console.print(population_table(results["population gradient"]))
    console.print(matching_table(results["gradient matching"]))
    path = Path("out/demo.png")
    draw(results, path)
    console.print(f"Mean ± standard error. Picture: {path}. {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
