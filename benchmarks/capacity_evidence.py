"""What the widths that `capacity_study` recommends cost in accuracy, beside cross-validation and Optuna.

Ten functions, each with several noisy data sets (one cell each, of its own seed). The regret of a rule is the test
error of networks trained on all rows at the width it chose, divided by the least over the grid in hindsight; geometric
means over three networks, of other seeds than those the rules saw, and then over data sets and functions, with
bootstrap intervals over functions. Cells are added to a file of JSON lines and skipped when they are there.
Run: ``python benchmarks/capacity_evidence.py [--datasets N]``; writes ``out/capacity_evidence.jsonl``, prints Markdown
tables, draws ``docs/images/capacity*.png``.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from capacity_functions import FUNCTIONS, Data, training_data, unseen_data, value_and_slopes
from capacity_network import fit
from capacity_rules import Fit, choices, studies
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gradwise import capacity_study

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["GRID", "cell", "draw", "draw_study", "missing", "needed_width", "regrets", "rows"]

Array = npt.NDArray[np.float64]
GRID = [1, 2, 3, 4, 6, 10, 20, 50]
FIRST_SEED = 1000  # data sets 0 and 1 were those of the pilots
TEST_SEEDS = 3
PATH = Path("out/capacity_evidence.jsonl")
PICTURE = Path("docs/images/capacity.png")
STUDY_PICTURE = Path("docs/images/capacity_study.png")
WITHOUT, WITH = "#d55e00", "#0072b2"  # Okabe and Ito


def cell(name: str, dataset: int, grid: list[int], fit_: Fit = fit) -> dict[str, Any]:
    """Everything about one data set, as JSON: choices, test errors by width, gap, processor seconds."""
    started = time.process_time()
    function = FUNCTIONS[name]
    data, unseen = training_data(function, FIRST_SEED + dataset), unseen_data(function, 2000)
    found = studies(fit_, grid, data, 1000 * dataset)
    chosen = choices(found)
    both, whole = found.both, found.whole
    errors: dict[str, dict[str, list[float]]] = {}
    for derivatives in (False, True):
        widths = sorted({*grid, *(choice.width for choice in chosen[derivatives].values())})
        errors[_key(derivatives)] = {
            str(width): _test_errors(fit_, data, unseen, width, derivatives) for width in widths
        }
    assert both.gap is not None
    assert both.rise_band is not None
    on_all = whole.derivative_errors(derivatives=False)
    assert on_all is not None
    return {
        "function": name,
        "dataset": dataset,
        "grid": grid,
        "choices": {
            _key(derivatives): {rule: [choice.width, choice.trainings] for rule, choice in by_rule.items()}
            for derivatives, by_rule in chosen.items()
        },
        "test_errors": errors,
        "gap": both.gap.tolist(),
        "rise_band": both.rise_band[1:].tolist(),
        "upper_bound": both.upper_bound,
        "need": both.need,
        "derivative_error": np.exp(np.log(on_all).mean(axis=0)).tolist(),
        "not_converged": both.not_converged / len(both.trainings),
        "seconds": time.process_time() - started,
    }


def _test_errors(fit_: Fit, data: Data, unseen: Data, width: int, derivatives: bool) -> list[float]:
    spread = unseen.y.std()
    slopes = data.dydx if derivatives else None
    models = [fit_(data.X, data.y, slopes, capacity=width, seed=500_000 + seed) for seed in range(TEST_SEEDS)]
    return [float(np.sqrt(np.mean((model.predict(unseen.X) - unseen.y) ** 2)) / spread) for model in models]


def _key(derivatives: bool) -> str:
    return "with" if derivatives else "without"


def missing(done: Iterable[dict[str, Any]], datasets: int) -> list[tuple[str, int]]:
    """Cells still to do, all functions of a data set before the next."""
    there = {(entry["function"], entry["dataset"]) for entry in done}
    return [(name, d) for d in range(datasets) for name in FUNCTIONS if (name, d) not in there]


def regrets(entries: Sequence[dict[str, Any]], key: str) -> dict[str, Array]:
    """Logarithm of the regret of each rule, one for each entry."""
    result: dict[str, list[float]] = {}
    for entry in entries:
        errors = {int(width): float(np.log(values).mean()) for width, values in entry["test_errors"][key].items()}
        least = min(errors[width] for width in entry["grid"])
        for rule, (width, _) in entry["choices"][key].items():
            result.setdefault(rule, []).append(errors[width] - least)
    return {rule: np.array(values) for rule, values in result.items()}


def _interval(values: Array, names: Sequence[str]) -> tuple[float, float, float]:
    """Mean over functions, and a 95 % bootstrap interval that draws functions, and data sets within them."""
    rng = np.random.default_rng(0)
    groups = [values[[other == name for other in names]] for name in dict.fromkeys(names)]
    draws = [
        np.mean([rng.choice(groups[g], len(groups[g])).mean() for g in rng.integers(len(groups), size=len(groups))])
        for _ in range(2000)
    ]
    lower, upper = np.quantile(draws, [0.025, 0.975])
    return float(np.mean([group.mean() for group in groups])), float(lower), float(upper)


def rows(entries: Sequence[dict[str, Any]], key: str, reference: str) -> list[list[str]]:
    """Rule, trainings, regret with interval, ratio to the reference rule with interval, worst, median width."""
    names = [entry["function"] for entry in entries]
    logs = regrets(entries, key)
    table: list[list[str]] = []
    for rule, values in sorted(logs.items(), key=lambda item: item[1].mean()):
        widths, trainings = zip(*(entry["choices"][key][rule] for entry in entries), strict=True)
        mean, ratio = _interval(values, names), _interval(values - logs[reference], names)
        table.append(
            [
                rule,
                f"{np.mean(trainings):.0f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*np.exp(mean)),
                "" if rule == reference else "{:.2f} ({:.2f} to {:.2f})".format(*np.exp(ratio)),
                f"{np.exp(values.max()):.1f}",
                f"{np.median(widths):.0f}",
            ]
        )
    return table


def needed_width(name: str, grid: Sequence[int], samples: int = 1000, threshold: float = 0.05) -> int | None:
    """Smallest width whose best of three noiseless students of many samples is within the threshold; None if none."""
    function = FUNCTIONS[name]
    x = np.random.default_rng(5).random((samples, function.inputs))
    data, unseen = Data(x, *value_and_slopes(function, x)), unseen_data(function, 2000)
    for width in grid:
        if min(_test_errors(fit, data, unseen, width, True)) < threshold:
            return width
    return None


def draw(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Gaps by width, regret against trainings, and the regret of every rule without and with derivatives."""
    names = [entry["function"] for entry in entries]
    figure = plt.figure(figsize=(10.8, 8.2), dpi=102, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 0.85])
    panels: dict[str, Any] = {
        **halves[0].subplot_mosaic([["gap", "spent"]], width_ratios=[1.25, 1]),
        **halves[1].subplot_mosaic([["without", "with"]]),
    }
    _draw_gaps(panels["gap"], entries)
    for key, colour in (("without", WITHOUT), ("with", WITH)):
        found = sorted(regrets(entries, key).items(), key=lambda item: -item[1].mean())
        _draw_rules(panels[key], entries, key, found, colour)
        spent = [np.mean([entry["choices"][key][rule][1] for entry in entries]) for rule, _ in found]
        marks = ["s" if rule.startswith(("gap: min", "need")) else "o" for rule, _ in found]
        for x, mark, (_, values) in zip(spent, marks, found, strict=True):
            panels["spent"].plot(x, np.exp(_interval(values, names)[0]), mark, color=colour, alpha=0.8, markersize=7)
        panels["spent"].plot([], [], "o", color=colour, label=f"trained {key} derivatives")
    panels["spent"].plot([], [], "s", color="#555555", label="of these: min(need, bound), need")
    panels["spent"].set_xlabel("trainings spent on one data set")
    panels["spent"].set_ylabel("regret")
    panels["spent"].set_title("Regret: test error / least over the grid", fontsize=10)
    panels["spent"].legend(fontsize=8)
    panels["spent"].grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _draw_gaps(axes: Any, entries: Sequence[dict[str, Any]]) -> None:
    colours = plt.get_cmap("tab10")
    for index, name in enumerate(dict.fromkeys(entry["function"] for entry in entries)):
        of = [entry for entry in entries if entry["function"] == name]
        axes.plot(of[0]["grid"], np.mean([e["gap"] for e in of], axis=0), ".-", color=colours(index), label=name)
    axes.axhline(np.log(1.5), color="#555555", linewidth=0.8, linestyle="--", label="log 1.5")
    axes.set_xscale("log")
    axes.set_xticks(entries[0]["grid"], [str(width) for width in entries[0]["grid"]])
    axes.minorticks_off()
    axes.set_xlabel("hidden nodes")
    axes.set_ylabel("gap: log error without - log error with")
    axes.set_title("The gap, mean over data sets", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=1.2)
    axes.grid(alpha=0.3)


def _draw_rules(
    axes: Any, entries: Sequence[dict[str, Any]], key: str, found: Sequence[tuple[str, Array]], colour: str
) -> None:
    names = [entry["function"] for entry in entries]
    labels: list[str] = []
    for place, (rule, values) in enumerate(found):
        mean, lower, upper = np.exp(_interval(values, names))
        axes.plot([lower, upper], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot([mean], [place], "o", color=colour)
        trainings = np.mean([entry["choices"][key][rule][1] for entry in entries])
        labels.append(f"{rule.replace(' at the training points', '')} [{trainings:.0f}]")
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("regret, with 95 % interval")
    axes.set_title(f"trained {key} derivatives [trainings]", fontsize=10)
    axes.grid(alpha=0.3, axis="x")


def draw_study(path: Path, widths: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 16, 32)) -> None:
    """One study as `CapacityStudy.plot` shows it."""
    data = training_data(FUNCTIONS["sin(3a) b + a^2, 2-D"], FIRST_SEED)
    study = capacity_study(fit, widths, data.X, data.y, data.dydx, n_seeds=3)
    print(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    study.plot().savefig(path)


def _markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def report(entries: Sequence[dict[str, Any]]) -> None:
    """Print what goes into docs/capacity.md: of the data sets that all functions have."""
    datasets = len({entry["dataset"] for entry in entries})
    print(f"{len(entries)} data sets: {len({e['function'] for e in entries})} functions, {datasets} of each\n")
    reference = "cross-validation, values"
    header = ["rule", "trainings", "regret (95 %)", "its ratio to cross-validation's", "worst", "median width"]
    for key in ("without", "with"):
        print(_markdown([f"{key} derivatives: {header[0]}", *header[1:]], rows(entries, key, reference)))
    body: list[list[str]] = []
    for name in dict.fromkeys(entry["function"] for entry in entries):
        of = [entry for entry in entries if entry["function"] == name]
        best: dict[str, list[int]] = {}
        for key in ("without", "with"):
            best[key] = [
                min(e["grid"], key=lambda width, e=e, key=key: np.log(e["test_errors"][key][str(width)]).mean())
                for e in of
            ]
        bounds = [np.inf if e["upper_bound"] is None else e["upper_bound"] for e in of]
        shown = sum(np.isfinite(bounds))
        logs = regrets(of, "without")
        body.append(
            [
                name,
                str(FUNCTIONS[name].samples),
                f"{np.median(best['without']):.0f}",
                f"{np.median(best['with']):.0f}",
                f"{np.median([e['need'] for e in of]):.0f}",
                f"{'none' if np.isinf(np.median(bounds)) else f'{np.median(bounds):.0f}'} ({shown} of {len(of)})",
                *(f"{np.exp(logs[rule].mean()):.2f}" for rule in ("gap: min(need, upper bound)", reference)),
                f"{np.exp(logs['derivative error at the training points, 5 seeds'].mean()):.2f}",
                f"{100 * np.mean([e['not_converged'] for e in of]):.0f} %",
            ]
        )
    titles = ["function", "N", "best without", "best with", "need", "upper bound (shown in)", "regret: gap"]
    print(_markdown([*titles, "cross-validation", "derivative error", "not converged"], body))


def main() -> None:
    """Measure what is missing, then report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--datasets", type=int, default=10)
    parser.add_argument("--report", action="store_true", help="only what was measured so far")
    options = parser.parse_args()
    PATH.parent.mkdir(exist_ok=True)
    entries = [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.exists() else []
    todo = [] if options.report else missing(entries, options.datasets)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar, PATH.open("a") as file:
        task = bar.add_task("", total=len(todo) + len(entries), completed=len(entries))
        for name, dataset in todo:
            bar.update(task, description=f"{name}, data set {dataset}")
            entry = cell(name, dataset, GRID)
            file.write(json.dumps(entry) + "\n")
            file.flush()
            entries.append(entry)
            bar.advance(task)
    whole = len(entries) // len(FUNCTIONS)
    entries = [entry for entry in entries if entry["dataset"] < whole]
    report(entries)
    for name in FUNCTIONS:
        if name.startswith("teacher"):
            print(f"{name}: noiseless students of 1,000 samples need {needed_width(name, range(1, 11))} hidden nodes")
    draw(entries, PICTURE)
    draw_study(STUDY_PICTURE)
    print(f"{sum(entry['seconds'] for entry in entries):.0f} processor seconds; {PICTURE}")


if __name__ == "__main__":
    main()
