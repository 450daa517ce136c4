"""What a step costs: population gradients and gradient matching as ratios to a plain step of the same model.

Everything in one run: the library's paths, loops written by hand, IVON with as many samples, SAM, jenn; medians of
interleaved repeats; one thread, and all; SGD with momentum, and AdamW inside. Targets and what was measured come last.
``python benchmarks/speed.py [--repeats N] [--threads one|all|both] [--device cpu|cuda] [--compile] [--out FILE]``
writes JSON with every sample, and a Markdown file beside it. ``--compile`` adds ``vectorize="compile"`` and a compiled
plain step, which take tens of seconds for each model before they are timed.

On a GPU (``--device cuda --compile``) the same rows, bfloat16, and a plain step in CUDA graphs, with milliseconds;
threads do not matter there. That has been run only if there is a file from a GPU beside the others.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matching_ways import Regression, jenn_ways, matching_ways
from models import MODELS
from population_ways import INNERS, MEMBERS, PLAIN, Task, Way, ways
from reports import Comparison, environment, markdown, path_taken, print_table, write_json
from rich.console import Console
from rich.progress import Progress
from startup import startup_seconds
from targets import CHOSEN, verdicts
from threadpoolctl import threadpool_limits
from timing import Timing, interleaved

from gradwise_torch._paths import automatic_path

REGRESSIONS = {f"D = {outputs}": outputs for outputs in (1, 10, 100)}
JENN = {
    "10-32-32-1, 100 rows": Regression(10, 32, 1, 100, torch.float64),
    "20-256-256-1, 256 rows": Regression(dtype=torch.float64),
}
Advance = Callable[[], object]


def compare(
    comparison: Comparison, column: str, rows: Mapping[str, Way], task: Any, repeats: int, advance: Advance
) -> None:
    """Add a column: every way that is installed, on one task."""
    for row, way in rows.items():
        if not way.installed:
            comparison.absent[row] = "not installed"
    present = {row: way for row, way in rows.items() if way.installed}
    torch.compiler.reset()  # what is compiled for one model does not count against the limit of the next
    timings = interleaved(
        {row: way.build(task) for row, way in present.items()},
        repeats,
        synchronise=torch.cuda.synchronize if task.device == "cuda" else lambda: None,
        advance=advance,
    )
    comparison.columns[column] = {
        row: Timing([s / present[row].count for s in timing.seconds], timing.loops, timing.messages)
        for row, timing in timings.items()
    }


def population(
    inner: str,
    threads: int,
    repeats: int,
    *,
    compiled: bool = False,
    device: str = "cpu",
    models: Iterable[str] = tuple(MODELS),
    advance: Advance = lambda: None,
) -> Comparison:
    """The table of one inner optimizer."""
    rows = ways(compiled=compiled, cuda=device == "cuda")
    title = f"{inner}, {device}" if device == "cuda" else f"{inner}, {threads} thread{'s' * (threads > 1)}"
    comparison = Comparison(title, PLAIN, absolute=device == "cuda")
    for name in models:
        task = Task(MODELS[name], inner, device)
        compare(comparison, name, rows, task, repeats, advance)
        comparison.notes[name] = {
            row: path_taken(asked_path(row, task), timing.messages)
            for row, timing in comparison.columns[name].items()
            if row.split(",")[0] in ("auto", "loop", "vmap", "compile")
        }
    return comparison


def asked_path(row: str, task: Task) -> str:
    """The path of a row; the rule's, where it says auto."""
    path = row.split(",")[0]
    if path != "auto":
        return path
    model = task.problem.make()
    return automatic_path(model, list(model.parameters()), task.problem.shape[0], sharded="sharded" in row)


def with_chosen(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Ratios with two more rows: the path that auto takes, whole and sharded."""
    ratios = comparison.ratios()
    for column, rows in ratios.items():
        for where in ("whole", "sharded"):
            path = comparison.notes.get(column, {}).get(f"auto, {where}")
            if f"{path}, {where}" in rows:
                rows[f"{CHOSEN}, {where}"] = rows[f"{path}, {where}"]
    return ratios


def matching(threads: int, repeats: int, *, device: str = "cpu", advance: Advance = lambda: None) -> Comparison:
    """The table of gradient matching."""
    title = f"matching, 20-256-256-D tanh, batch 256, SGD, {device}, {threads} thread{'s' * (threads > 1)}"
    comparison = Comparison(title, PLAIN, absolute=device == "cuda")
    for name, outputs in REGRESSIONS.items():
        rows = matching_ways(outputs, full=outputs <= 10)
        compare(comparison, name, rows, Regression(outputs=outputs, device=device), repeats, advance)
    return comparison


def against_jenn(threads: int, repeats: int, *, advance: Advance = lambda: None) -> Comparison:
    """The table of a full-batch epoch beside jenn's."""
    rows = jenn_ways()
    comparison = Comparison(f"one epoch, {threads} thread{'s' * (threads > 1)}", next(iter(rows)))
    for name, task in JENN.items():
        compare(comparison, name, rows, task, repeats, advance)
    return comparison


def measure(
    threads: Sequence[int], repeats: int, *, compiled: bool, device: str, progress: Progress
) -> list[list[Comparison]]:
    """All tables, a list for each number of threads."""
    tables: list[list[Comparison]] = []
    for count in threads:
        rows = len(ways(compiled=compiled, cuda=device == "cuda")) * len(MODELS) * len(INNERS)
        rows += sum(len(matching_ways(d, full=d <= 10)) for d in REGRESSIONS.values())
        rows += len(jenn_ways()) * len(JENN) * (device == "cpu")
        bar = progress.add_task(f"{count} thread{'s' * (count > 1)}", total=rows * (repeats + 1))
        advance = partial(progress.advance, bar)
        torch.set_num_threads(count)
        with threadpool_limits(count):  # numpy's, which jenn computes with
            tables.append(
                [
                    population(inner, count, repeats, compiled=compiled, device=device, advance=advance)
                    for inner in INNERS
                ]
            )
            tables[-1].append(matching(count, repeats, device=device, advance=advance))
            if device == "cpu":
                tables[-1].append(against_jenn(count, repeats, advance=advance))
        progress.update(bar, completed=rows * (repeats + 1))
    return tables


def report(tables: Sequence[Sequence[Comparison]], targets: list[list[str]], setting: Mapping[str, Any]) -> str:
    """The Markdown file."""
    text = [f"# Speed: {setting['device']}, {setting['cores']} cores, torch {setting['torch']}\n\n"]
    text.append(
        f"Medians of {setting['repeats']} interleaved repeats; {MEMBERS} members; ratios to the plain step.\n\n"
    )
    for comparison in (comparison for group in tables for comparison in group):
        text.append(markdown(comparison.header(), comparison.rows()))
        text += [f"* {message}\n" for message in comparison.messages()] + ["\n"]
    if targets:
        text += ["## Targets: one thread, SGD\n\n", markdown(["where", "what", "target", "measured", ""], targets)]
    return "".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", choices=["one", "all", "both"], default="both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/speed.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    console = Console(width=170)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"one": [1], "all": [cores], "both": sorted({1, cores})}[options.threads]
    if options.device == "cuda":
        threads = threads[-1:]
    with Progress(console=console) as progress:
        tables = measure(threads, options.repeats, compiled=options.compile, device=options.device, progress=progress)
    setting = {**environment(options.device), "threads": threads, "repeats": options.repeats, "members": MEMBERS}
    imports = startup_seconds(min(options.repeats, 5))
    targets: list[list[str]] = []
    if options.device == "cpu" and threads[0] == 1:
        seconds = {"seconds": {name: statistics.median(values) for name, values in imports.items()}}
        targets = verdicts(with_chosen(tables[0][0]) | tables[0][2].ratios() | seconds)
    for comparison in (comparison for group in tables for comparison in group):
        print_table(console, comparison.header(), comparison.rows())
        for message in comparison.messages():
            console.print(f"* {message}", highlight=False, markup=False)
    if targets:
        print_table(console, ["where", "what", "target", "measured", ""], targets)
    everything = {
        "environment": setting,
        "tables": [
            {"threads": count, **comparison.as_dict()}
            for count, group in zip(threads, tables, strict=True)
            for comparison in group
        ],
        "imports": imports,
        "targets": targets,
    }
    write_json(options.out, everything)
    options.out.with_suffix(".md").write_text(report(tables, targets, setting))


if __name__ == "__main__":
    main()
