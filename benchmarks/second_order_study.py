"""What second derivatives and derivatives along directions bring: the two examples, ten seeds each.

Every method may choose among four weight decays, by the error of its first quantity on points of its own with two other
seeds; the weights of derivative losses are 1 throughout. Then every method trains for the same number of L-BFGS steps,
and again for as many steps as take the seconds of the slowest method. Seeds are paired: a seed gives all methods the
same initial weights, and the same points to those that have equally many. Nothing is chosen on the test points.
Run: ``PYTHONPATH=examples python benchmarks/second_order_study.py [--quick]`` or ``make bench-second-order`` (about ten
minutes of one core; goes on where it was stopped). Draws ``docs/images/second_order.png`` and puts its table into
``docs/second_order.md``.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import normal_modes
import numpy as np
import option_gamma
import torch
from reports import markdown, print_table
from rich.console import Console
from rich.progress import Progress

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = ["Problem", "draw", "problems", "study", "table"]

DECAYS = (0.0, 1e-4, 1e-3, 1e-2)
TUNING = (100, 101)  # seeds
ITERATIONS = 300
LONGEST = 8  # times as many steps as the others, at equal seconds
COLOURS = ("#333333", "#777777", "#aaaaaa", "#0072b2", "#d55e00")  # Okabe and Ito, and greys for values alone


@dataclass(frozen=True)
class Problem:
    """One of the examples, at one number of points."""

    name: str
    example: Any
    points: int
    quantities: tuple[str, ...]

    @property
    def methods(self) -> Sequence[Any]:
        """Rows of the table; the first is what the others are compared with."""
        return self.example.METHODS

    def cell(self, method: Any, seed: int, iterations: int, test_seed: int) -> dict[str, float]:
        """Errors by quantity, and seconds."""
        data = self.example.sample(self.points * method.valuations, seed)
        model, seconds = self.example.train(method, data, seed, iterations)
        return {**self.example.score(model, self.example.sample(2000, test_seed)), "seconds": seconds}


def problems() -> list[Problem]:
    """Those of the study."""
    greeks = ("price", "delta", "gamma")
    return [
        Problem("option, 32 points", option_gamma, 32, greeks),
        Problem("normal modes, 60 points", normal_modes, 60, ("energy", "forces")),
        Problem("option, 128 points", option_gamma, 128, greeks),
    ]


class Cells:
    """What was measured, kept in a file of JSON lines, so that nothing is measured twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.done: dict[str, dict[str, float]] = {entry["key"]: entry["result"] for entry in map(json.loads, lines)}

    def measure(self, problem: Problem, method: Any, seed: int, iterations: int, test_seed: int) -> dict[str, float]:
        """One training, or what it gave before."""
        key = (
            f"{problem.name}; {method.name}; decay {method.decay:g}; seed {seed}; {iterations} steps; test {test_seed}"
        )
        if key not in self.done:
            self.done[key] = problem.cell(method, seed, iterations, test_seed)
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "result": self.done[key]}) + "\n")
        return self.done[key]


def study(problem: Problem, cells: Cells, seeds: int, iterations: int) -> Iterator[dict[str, Any]]:
    """Rows of errors: method, kind of budget, steps, decay, and one array of errors over seeds for each quantity."""
    chosen: list[Any] = []
    seconds: list[float] = []
    for method in problem.methods:
        tuned = []
        for decay in DECAYS:
            runs = [cells.measure(problem, replace(method, decay=decay), seed, iterations, 20_000) for seed in TUNING]
            tuned.append((float(np.mean([np.log(run[problem.quantities[0]]) for run in runs])), decay, runs))
            yield {}
        _, decay, runs = min(tuned, key=lambda entry: entry[0])
        chosen.append(replace(method, decay=decay))
        seconds.append(float(np.median([run["seconds"] for _, _, runs in tuned for run in runs])))
    for budget in ("equal steps", "equal seconds"):
        for method, mine in zip(chosen, seconds, strict=True):
            factor = 1.0 if budget == "equal steps" else min(LONGEST, max(seconds) / mine)
            steps = round(factor * iterations / 10) * 10
            runs = [cells.measure(problem, method, seed, steps, 10_000) for seed in range(seeds)]
            errors = {name: np.array([run[name] for run in runs]) for name in (*problem.quantities, "seconds")}
            yield {"method": method, "budget": budget, "steps": steps, "errors": errors}


def ratio(errors: Any, reference: Any) -> tuple[float, float, float]:
    """Geometric mean of paired ratios, and its 95 % interval (normal, of the logarithms)."""
    logs = np.log(errors / reference)
    centre, half = logs.mean(), 1.96 * logs.std(ddof=1) / np.sqrt(len(logs)) if len(logs) > 1 else np.nan
    return float(np.exp(centre)), float(np.exp(centre - half)), float(np.exp(centre + half))


def table(problem: Problem, rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Geometric means of the errors, and in brackets the ratio to the first method with the same budget."""
    header = [problem.name, "budget", "steps", "seconds", *problem.quantities]
    reference = {row["budget"]: row["errors"] for row in reversed(rows) if row["method"].name == rows[0]["method"].name}
    lines = []
    for row in rows:
        line = [row["method"].name, row["budget"], str(row["steps"]), f"{row['errors']['seconds'].mean():.1f}"]
        for name in problem.quantities:
            errors = row["errors"][name]
            centre, low, high = ratio(errors, reference[row["budget"]][name])
            own = row["method"].name == rows[0]["method"].name
            mean = np.exp(np.log(errors).mean())
            line.append(f"{mean:.4f}" + ("" if own else f" ({centre:.2f}: {low:.2f} to {high:.2f})"))
        lines.append(line)
    return header, lines


def draw(done: Sequence[tuple[Problem, Sequence[dict[str, Any]]]], path: Path) -> None:
    """Errors at equal seconds: every seed a dot, the geometric mean a line."""
    figure, axes = plt.subplots(1, len(done), figsize=(10.8, 4.8), layout="constrained", squeeze=False)
    ordered = sorted(done, key=lambda pair: (-len(pair[0].quantities), pair[0].points))
    for (problem, rows), ax in zip(ordered, axes[0], strict=True):
        shown = [row for row in rows if row["budget"] == "equal seconds"]
        width = 0.8 / len(shown)
        greys = sum(not _derivatives(row["method"]) for row in shown)
        for k, row in enumerate(shown):
            colour = COLOURS[k] if k < greys else COLOURS[3 + k - greys]
            for q, name in enumerate(problem.quantities):
                errors = row["errors"][name]
                x = q + (k - (len(shown) - 1) / 2) * width
                jitter = np.linspace(-0.3, 0.3, len(errors)) * width
                ax.plot(x + jitter, errors, "o", color=colour, markersize=3.5, alpha=0.55, markeredgewidth=0)
                mean = np.exp(np.log(errors).mean())
                label = row["method"].name if q == 0 else None
                ax.hlines(mean, x - 0.45 * width, x + 0.45 * width, color=colour, linewidth=3, label=label)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks(range(len(problem.quantities)), problem.quantities)
        ax.set_title(problem.name, fontsize=11)
        ax.grid(axis="y", alpha=0.3)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    axes[0][0].set_ylabel("test error / standard deviation")
    figure.suptitle("Equal seconds of training; lines: geometric means, dots: seeds. Grey: values only", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=105)
    plt.close(figure)


def _derivatives(method: Any) -> bool:
    return any(getattr(method, name, 0) for name in ("delta", "gamma", "modes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two seeds, few steps, one problem of each kind")
    parser.add_argument("--cells", type=Path, default=Path("out/second_order.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/second_order.png"))
    parser.add_argument("--text", type=Path, default=Path("docs/second_order.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen, seeds, iterations = problems(), options.seeds, ITERATIONS
    if options.quick:
        chosen, seeds, iterations = chosen[:2], 2, 20
    cells = Cells(options.cells)
    done: list[tuple[Problem, list[dict[str, Any]]]] = []
    with Progress() as progress:
        bar = progress.add_task("second order", total=sum((len(DECAYS) + 2) * len(p.methods) for p in chosen))
        for problem in chosen:
            rows = []
            for row in study(problem, cells, seeds, iterations):
                progress.advance(bar)
                rows += [row] if row else []
            done.append((problem, rows))
    text = ""
    for problem, rows in done:
        header, lines = table(problem, rows)
        print_table(Console(width=150), header, lines)
        text += markdown(header, lines)
    publish(options.text, text)
    draw(done, options.figure)


def publish(path: Path, tables: str) -> None:
    """Put the tables between the two marks of the page, or begin a page with them."""
    begin, end = "<!-- measured -->\n", "<!-- end -->\n"
    page = path.read_text() if path.exists() else f"{begin}{end}"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}{tables}{end}{after}")


if __name__ == "__main__":
    main()
