"""Can sigma choose itself? Rules against a table of fixed sigmas: ``python -m population.auto``.

A rule spends a part of a training on looking (`population.auto_probes`), chooses one sigma of a grid for this cell and
seed (`population.auto_rules`), and trains with it on all rows; that score is looked up among the trainings of the
unchanged loop in ``out/population.jsonl``. Probes are kept in ``out/population_auto.jsonl``, and a run goes on from
there; ``--report`` only prints the table of what there is.

A rule passes with all three: (1) against the best fixed sigma of other seeds, the mean's interval over cells ends
above -0.2 points; (2) no cell is significantly below -0.5 points against the default; (3) it costs less than the search
over three values on held-out rows.
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from statistics import fmean

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from population.auto_probes import DEFAULT, GRID, PROBES, Record
from population.auto_rules import GROUPS, RULES, Pair, Rule, fitted
from population.cells import PRIMARY, Cell
from population.inference import effect
from population.markdown import section, table
from population.study import one_thread, run
from population.tasks import SEEDS, Store, Task, read_lines, tuning_tasks

__all__ = ["FILE", "choices", "fixed", "judged", "pairs", "probed", "read", "report"]

VERSION = 1  # of the probes
FILE = "population_auto.jsonl"
PROBED = SEEDS[:6]
MARGIN, HARM = 0.2, 0.5  # points of macro-F1

Key = tuple[str, int, str]  # cell, seed, probe


def fixed(cell: str, seed: int, sigma: float) -> Task:
    """The training of the unchanged loop with a sigma; with 0 it is plain training, to the bit."""
    if sigma == 0:
        return Task(cell, "plain", seed)
    return Task(cell, "unchanged", seed, sigma=None if sigma == DEFAULT else sigma)


# -- probes ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[Key, Record]:
    """The probes of a file; a torn last line is one that was not made."""
    records = [record for record in read_lines(path) if record["version"] == VERSION]
    return {(record["cell"], record["seed"], record["probe"]): record for record in records}


def probed(name: str, cell: Cell, seed: int, probe: str) -> Record:
    """A probe's record; `cell` has its learning rate."""
    found = PROBES[probe](cell, seed)
    key = {"cell": name, "seed": seed, "probe": probe, "version": VERSION, "rate": cell.recipe.learning_rate}
    return {**key, **found}


def make(out: Path, cells: Iterable[str], seeds: Iterable[int], workers: int) -> None:
    """All probes that the file lacks, seed after seed; first the learning rates that the study has not yet tuned."""
    path = out / FILE
    store = Store(out / "population_auto_rates.jsonl")
    store.records.update(Store(out / "population.jsonl").records)
    done = read(path)
    missing = [key for key in product(seeds, cells, PROBES) if (key[1], key[0], key[2]) not in done]
    for name in dict.fromkeys(cell for _, cell, _ in missing):
        run(store, tuning_tasks(name, ["plain"]), f"{name}: rate", workers)
    jobs = [(name, store.configuration(fixed(name, seed, DEFAULT))[0], seed, probe) for seed, name, probe in missing]
    columns = (TextColumn("{task.description:28s}"), BarColumn(), MofNCompleteColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress,
        ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread) as executor,
        path.open("a") as file,
    ):
        bar = progress.add_task("sigma: probes", total=len(jobs))
        for future in as_completed([executor.submit(probed, *job) for job in jobs]):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
            progress.advance(bar)


# -- judgement ---------------------------------------------------------------------------------------------------------


def pairs(store: Store, probes: dict[Key, Record]) -> list[Pair]:
    """Seeds of cells with all probes and all trainings, at least two of a cell; a rate that differs is an error."""
    found: list[Pair] = []
    for name, cell in PRIMARY.items():
        table = {
            seed: {sigma: store.records[fixed(name, seed, sigma)] for sigma in GRID}
            for seed in SEEDS
            if all(fixed(name, seed, sigma) in store.records for sigma in GRID)
        }
        complete = [seed for seed in table if all((name, seed, probe) in probes for probe in PROBES)]
        for seed in complete if len(complete) > 1 else ():
            own = {probe: probes[name, seed, probe] for probe in PROBES}
            rates = [record["rate"] for record in (*own.values(), *table[seed].values())]
            if not math.isclose(min(rates), max(rates), rel_tol=1e-4):  # published ones have five digits
                msg = f"probes of {name!r}, seed {seed}, have another learning rate than its trainings; make them again"
                raise RuntimeError(msg)
            others = [records for other, records in table.items() if other != seed]
            validation = {sigma: fmean(records[sigma]["validation"]["f1"] for records in others) for sigma in GRID}
            test = {sigma: record["test"]["f1"] for sigma, record in table[seed].items()}
            best = max(GRID, key=validation.__getitem__)
            found.append(Pair(name, cell.network, seed, test, best, own))
    return found


def choices(rule: Rule, found: Sequence[Pair], group: str) -> list[float]:
    """What a rule chooses for every pair, fitted on the pairs of other groups."""
    of = GROUPS[group]
    parameters = {one: fitted(rule, [pair for pair in found if of(pair) != one]) for one in {of(p) for p in found}}
    return [rule.choose(pair.probes, parameters[of(pair)]) for pair in found]


def judged(name: str, rule: Rule, found: Sequence[Pair], chosen: Sequence[float]) -> list[str]:
    """A row of the table."""
    against = {
        "best fixed": [pair.test[s] - pair.test[pair.best_fixed] for pair, s in zip(found, chosen, strict=True)],
        "default": [pair.test[s] - pair.test[DEFAULT] for pair, s in zip(found, chosen, strict=True)],
        "sigma 0": [pair.test[s] - pair.test[0.0] for pair, s in zip(found, chosen, strict=True)],
    }
    by_cell = {to: _by_cell(found, values) for to, values in against.items()}
    over_cells = {to: effect([fmean(values) for values in cells.values()]) for to, cells in by_cell.items()}
    harms = {cell: effect(values) for cell, values in by_cell["default"].items()}
    worst = min(harms, key=lambda cell: harms[cell].mean)
    cost, search = (1 + fmean(one.cost(pair.probes) for pair in found) for one in (rule, RULES["grid search"]))
    verdict = [over_cells["best fixed"].low > -MARGIN, all(one.high >= -HARM for one in harms.values()), cost < search]
    failed = ", ".join(str(number) for number, passed in enumerate(verdict, 1) if not passed)
    shown = [str(one) for one in over_cells.values()]
    return [name, *shown, f"{worst}: {harms[worst]}", f"{cost:.2f}", f"no: {failed}" if failed else "yes"]


def _by_cell(found: Sequence[Pair], values: Sequence[float]) -> dict[str, list[float]]:
    cells: dict[str, list[float]] = {}
    for pair, value in zip(found, values, strict=True):
        cells.setdefault(pair.cell, []).append(value)
    return cells


def report(store: Store, probes: dict[Key, Record]) -> str:
    """What the rules give, and what they choose, as Markdown."""
    found = pairs(store, probes)
    cells = list(dict.fromkeys(pair.cell for pair in found))
    if len(cells) < 2 or any(len({of(pair) for pair in found}) < 2 for of in GROUPS.values()):
        return ""
    every = {"best fixed sigma": [pair.best_fixed for pair in found]}
    rows: list[list[str]] = []
    for name, rule in RULES.items():
        for group in GROUPS if rule.parameters else ["data sets"]:
            title = f"{name} ({group} left out)" if rule.parameters else name
            every[title] = choices(rule, found, group)
            rows.append(judged(title, rule, found, every[title]))
    header = ["rule"]
    header += [f"minus {to}" for to in ("best fixed", "default", "sigma 0")]
    header += ["worst cell, minus default", "trainings", "passes"]
    chosen = [
        [title, *(_range(values) for values in _by_cell(found, sigmas).values())] for title, sigmas in every.items()
    ]
    half = (len(cells) + 1) // 2
    parts = [
        table(["mean sigma (least to most)", *cells[part]], [[row[0], *row[1:][part]] for row in chosen])
        for part in (slice(half), slice(half, None))
    ]
    text = (
        f"{len(found)} pairs of {len(cells)} cells, the unchanged loop; points of macro-F1, means over cells. A rule "
        f"passes if (1) its interval against the best fixed sigma of other seeds ends above -{MARGIN}, (2) no cell is "
        f"clearly below -{HARM} against the default, (3) it costs fewer trainings than the grid search (both with the "
        "final one)."
    )
    return section("Sigma that chooses itself", text, table(header, rows), *parts)


def _range(sigmas: Sequence[float]) -> str:
    return f"{fmean(sigmas):.2f} ({min(sigmas):g} to {max(sigmas):g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(PRIMARY), choices=list(PRIMARY))
    parser.add_argument("--seeds", type=int, default=len(PROBED), help="how many, from 0 on")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--report", action="store_true", help="only the table of what is there")
    arguments = parser.parse_args()
    if not arguments.report:
        make(arguments.out, arguments.cells, range(arguments.seeds), arguments.workers)
    print(report(Store(arguments.out / "population.jsonl"), read(arguments.out / FILE)))


if __name__ == "__main__":
    main()
