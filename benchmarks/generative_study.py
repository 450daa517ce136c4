"""Does gradient information help a GAN? Nine arms that differ in one loss term of the discriminator.

Digits of scikit-learn; arms, networks and scores are those of ``examples/generative``. Three weights for each arm are
tried on two tuning seeds; then ten others, paired over arms (data split, weights, batches, noise). A run goes on until
both budgets are reached, equal steps and equal seconds, and its averaged generator is scored at each, never picked.
Run: ``make bench-generative``; cells go to ``out/generative.jsonl``, and those that are there are not run again.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from scipy import stats
from sklearn.model_selection import train_test_split
from statsmodels.stats.multitest import multipletests
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from generative.acgan import Generator, train
from generative.digits import Classifier, Split, split, train_classifier
from generative.scores import Scores, score
from generative.terms import ARMS, Arm, Data

STEPS, SECONDS = 700, (1.25, 2.5, 3.75, 5.0)
TUNING_SEEDS, SEEDS = (100, 101), tuple(range(10))
DRAWS = 4  # samples of the reference's size over whose noise a score is averaged
INFORMED, PLAIN, R1, BOTH = "teacher gradients", "plain", "R1", "R1 + teacher gradients"
OUT, IMAGES = Path("out"), Path("docs/images")
CELLS = OUT / "generative.jsonl"


class Problem(NamedTuple):
    """Data and classifiers of one seed."""

    split: Split
    data: Data
    scorer: Classifier
    reference: NDArray[np.float64]

    def score(self, generator: Generator) -> dict[str, float]:
        """Mean scores of generated images with the reference's labels, and how many show the class asked for."""
        labels = self.split.reference_labels
        rows, right = [], []
        for draw in range(DRAWS):
            images = generator.sample(labels, seed=draw)
            rows.append(score(self.reference, self.scorer.features(images)))
            right.append((self.scorer(images).argmax(1) == labels).double().mean().item())
        return dict(zip(Scores._fields, np.mean(rows, axis=0).tolist(), strict=True)) | {"class": float(np.mean(right))}

    def floor(self) -> dict[str, float]:
        """Scores of as many real images that the GAN was trained on, for `DRAWS` draws."""
        known, labels = self.split.x.numpy(), self.split.labels.numpy()
        counts = len(self.reference)
        rows = []
        for draw in range(DRAWS):
            images, _ = train_test_split(known, stratify=labels, train_size=counts, random_state=draw)
            rows.append(score(self.reference, self.scorer.features(torch.tensor(images))))
        return dict(zip(Scores._fields, np.mean(rows, axis=0).tolist(), strict=True))


@cache
def floor(seed: int) -> dict[str, float]:
    """Real images against real ones."""
    return problem(seed).floor()


@cache
def problem(seed: int) -> Problem:
    """The problem of `seed`: a new split, teacher and scorer."""
    parts = split(seed)
    teacher = train_classifier(parts.x, parts.labels, seed=2 * seed)
    scorer = train_classifier(parts.scorer_x, parts.scorer_labels, seed=2 * seed + 1)
    return Problem(parts, Data(parts.x, parts.labels, teacher, seed), scorer, scorer.features(parts.reference_x))


Key = tuple[str, str, float, float, int]


def key(cell: dict[str, Any]) -> Key:
    return cell["phase"], cell["arm"], cell["weight"], cell["r1_weight"], cell["seed"]


class Cells:
    """What has been measured, as JSON lines; a cell is measured once, also by several processes in different orders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[Key, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Take in what other processes have measured meanwhile."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        for cell in (json.loads(line) for line in lines if line.endswith("\n")):
            self.known.setdefault(key(cell), cell)

    def measure(self, phase: str, arm: Arm, weight: float, r1_weight: float, seed: int) -> dict[str, Any]:
        """The cell, from the file if it is there."""
        r1_weight = r1_weight if arm.beside_r1 else 0.0
        if (phase, arm.name, weight, r1_weight, seed) not in self.known:
            self.read()
        known = self.known.get((phase, arm.name, weight, r1_weight, seed))
        if known is not None:
            return known
        setting = problem(seed)
        run = train(
            setting.split.x,
            setting.split.labels,
            seed=seed,
            term=arm.build(setting.data, weight, r1_weight),
            steps=(STEPS,),
            seconds=SECONDS if phase == "final" else (),
        )
        cell = {"phase": phase, "arm": arm.name, "weight": weight, "r1_weight": r1_weight, "seed": seed}
        cell |= {"steps": run.steps, "process_seconds": run.seconds, "floor": floor(seed)}
        cell["at_steps"] = setting.score(run.at_steps[STEPS])
        cell["at_seconds"] = {str(time): setting.score(generator) for time, generator in run.at_seconds.items()}
        if phase == "final" and seed == SEEDS[0]:
            pixels = run.at_steps[STEPS].sample(grid_labels(), seed=0)
            cell["grid"] = np.round((pixels.numpy() + 1) * 127.5).astype(int).tolist()
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self.known[key(cell)] = cell
        return cell


def grid_labels() -> Tensor:
    """Eight rows of the ten digits."""
    return torch.arange(10).repeat(8)


def in_order(items: Sequence[Any], *, reverse: bool) -> Sequence[Any]:
    return items[::-1] if reverse else items


def tune(cells: Cells, progress: Progress, *, reverse: bool = False) -> dict[str, float]:
    """The weight of each arm with the least mean KID over the tuning seeds, at equal steps."""
    best: dict[str, float] = {}
    task = progress.add_task("tuning", total=sum(len(arm.weights) for arm in ARMS) * len(TUNING_SEEDS))
    for arms in ([arm for arm in ARMS if not arm.beside_r1], [arm for arm in ARMS if arm.beside_r1]):
        kid: dict[str, dict[float, float]] = {arm.name: defaultdict(float) for arm in arms}
        todo = [(seed, arm, weight) for seed in TUNING_SEEDS for arm in arms for weight in arm.weights]
        for seed, arm, weight in in_order(todo, reverse=reverse):
            cell = cells.measure("tuning", arm, weight, best.get(R1, 0.0), seed)
            kid[arm.name][weight] += np.nan_to_num(cell["at_steps"]["kid"], nan=np.inf)
            progress.advance(task)
        best |= {name: min(sums, key=sums.__getitem__) for name, sums in kid.items()}
    return best


def final(
    cells: Cells, best: dict[str, float], progress: Progress, *, reverse: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """All arms with their weights on the seeds that count."""
    task = progress.add_task("final", total=len(ARMS) * len(SEEDS))
    measured: dict[tuple[str, int], dict[str, Any]] = {}
    for seed, arm in in_order([(seed, arm) for seed in SEEDS for arm in ARMS], reverse=reverse):
        measured[arm.name, seed] = cells.measure("final", arm, best[arm.name], best.get(R1, 0.0), seed)
        progress.advance(task)
    return {arm.name: [measured[arm.name, seed] for seed in SEEDS] for arm in ARMS}


# -- statistics --------------------------------------------------------------------------------------------------------

BUDGETS = {"equal steps": "at_steps", "equal seconds": "at_seconds"}


def values(cells: list[dict[str, Any]], budget: str, name: str) -> NDArray[np.float64]:
    """One score of all seeds, at the end of a budget."""
    scored = [cell[BUDGETS[budget]] for cell in cells]
    if budget == "equal seconds":
        scored = [by_time[str(SECONDS[-1])] for by_time in scored]
    return np.array([s[name] for s in scored])


class Difference(NamedTuple):
    """Of an arm and another one, paired over seeds."""

    mean: float
    low: float
    high: float
    p: float
    holm: float


def wilcoxon(d: NDArray[np.float64]) -> Any:
    """Two-sided signed-rank test, exact for ten seeds."""
    return stats.wilcoxon(d)


def differences(pairs: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> dict[str, Difference]:
    """Mean difference of each pair, its 95 % t interval, Wilcoxon's p and the same after Holm's correction."""
    rows: dict[str, tuple[float, float, float, float]] = {}
    for name, (a, b) in pairs.items():
        d = a - b
        half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5
        rows[name] = float(d.mean()), float(d.mean() - half), float(d.mean() + half), float(wilcoxon(d).pvalue)
    corrected: Any = multipletests([row[3] for row in rows.values()], method="holm")[1]
    return {name: Difference(*row, holm=float(holm)) for (name, row), holm in zip(rows.items(), corrected, strict=True)}


def against(results: dict[str, list[dict[str, Any]]], budget: str, other: str, *, flip: bool) -> dict[str, Difference]:
    """KID of every arm less that of `other` (with `flip`, the other way round), over one Holm family."""
    base = values(results[other], budget, "kid")
    pairs = {name: (values(cells, budget, "kid"), base) for name, cells in results.items() if name != other}
    return differences({name: (b, a) if flip else (a, b) for name, (a, b) in pairs.items()})


# -- what is published -------------------------------------------------------------------------------------------------


def tables(results: dict[str, list[dict[str, Any]]], best: dict[str, float]) -> list[Table]:
    """Scores and differences at both budgets."""
    out = []
    for budget in BUDGETS:
        table = Table(title=budget)
        for column in ("arm", "weight", "KID x 1000", "less plain", "p, Holm", "informed less this", "p, Holm"):
            table.add_column(column)
        for column in ("Frechet", "precision", "recall", "class", "steps", "s"):
            table.add_column(column)
        plain = against(results, budget, PLAIN, flip=False)
        informed = against(results, budget, INFORMED, flip=True)
        for name, cells in results.items():
            row = [name, f"{best[name]:g}" if name != PLAIN else "", mean_error(1000 * values(cells, budget, "kid"), 1)]
            for family in (plain, informed):
                d = family.get(name)
                row += ["", ""] if d is None else [interval(d), f"{d.holm:.3f}"]
            row += [mean_error(values(cells, budget, "frechet"), 2)]
            row += [mean_error(values(cells, budget, n), 3) for n in ("precision", "recall", "class")]
            seconds = np.mean([c["process_seconds"] / c["steps"] for c in cells])
            steps = STEPS if budget == "equal steps" else SECONDS[-1] / seconds
            table.add_row(*row, f"{steps:.0f}", f"{steps * seconds:.1f}")
        floors = [cells["floor"] for cells in results[PLAIN]]
        floor = {n: np.array([f[n] for f in floors]) for n in Scores._fields}
        row = ["real images", "", mean_error(1000 * floor["kid"], 1), *[""] * 4, mean_error(floor["frechet"], 2)]
        table.add_row(*row, *(mean_error(floor[n], 3) for n in ("precision", "recall")))
        out.append(table)
    return out


def beside_r1(results: dict[str, list[dict[str, Any]]]) -> Table:
    """What the information adds to R1: one comparison a budget, corrected for the two budgets."""
    pairs = {b: (values(results[BOTH], b, "kid"), values(results[R1], b, "kid")) for b in BUDGETS}
    table = Table("budget", "KID x 1000, less R1", "p, Holm", title=f"{BOTH}, less R1 alone")
    for budget, d in differences(pairs).items():
        table.add_row(budget, interval(d), f"{d.holm:.3f}")
    return table


def mean_error(numbers: NDArray[np.float64], digits: int) -> str:
    """Mean and standard error."""
    return f"{numbers.mean():.{digits}f} ± {numbers.std(ddof=1) / len(numbers) ** 0.5:.{digits}f}"


def interval(d: Difference) -> str:
    """In thousandths."""
    return f"{1000 * d.mean:+.1f} [{1000 * d.low:+.1f}, {1000 * d.high:+.1f}]"


def markdown(table: Table) -> str:
    """A rich table for a document."""
    columns = [list(column.cells) for column in table.columns]
    lines = [[str(column.header) for column in table.columns], ["---"] * len(columns), *zip(*columns, strict=True)]
    return f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def tuning_table(cells: Cells) -> Table:
    """Mean KID of all weights on the tuning seeds."""
    table = Table(title="tuning: KID x 1000, mean of two seeds, by weight")
    for column in ("arm", "weights", "KID x 1000"):
        table.add_column(column)
    for arm in ARMS:
        mine = [c for c in cells.known.values() if c["phase"] == "tuning" and c["arm"] == arm.name]
        kids = [1000 * np.mean([c["at_steps"]["kid"] for c in mine if c["weight"] == w]) for w in arm.weights]
        table.add_row(arm.name, ", ".join(f"{w:g}" for w in arm.weights), ", ".join(f"{k:.1f}" for k in kids))
    return table


def draw_effects(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Differences to plain with intervals at both budgets, and KID against process time."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.8, 4.4), layout="constrained", width_ratios=(1.25, 1))
    names = [name for name in results if name != PLAIN]
    for (budget, color), shift in zip((("equal steps", "C0"), ("equal seconds", "C1")), (-0.14, 0.14), strict=True):
        plain = against(results, budget, PLAIN, flip=False)
        for i, name in enumerate(names):
            d = plain[name]
            label = f"{budget}" if i == 0 else None
            left.plot([1000 * d.low, 1000 * d.high], [i + shift] * 2, color=color, lw=2)
            face = color if d.holm < 0.05 else "white"
            left.plot(1000 * d.mean, i + shift, "o", color=color, markerfacecolor=face, label=label)
    left.axvline(0, color="grey", lw=1)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("KID less that of the plain GAN, x 1000 (left is better)")
    left.set_title(f"{len(results[PLAIN])} paired seeds: mean, 95 % interval; filled: p < 0.05 after Holm", fontsize=9)
    left.legend(fontsize=8)
    shown = {PLAIN: "k", INFORMED: "C3", "shuffled gradients": "C4", R1: "C2", BOTH: "C8"}
    for name, color in shown.items():
        if name not in results:
            continue
        kid = [1000 * np.mean([c["at_seconds"][str(t)]["kid"] for c in results[name]]) for t in SECONDS]
        right.plot(SECONDS, kid, "o-", color=color, ms=4, label=name)
    floor = 1000 * np.mean([c["floor"]["kid"] for c in results[PLAIN]])
    right.axhline(floor, color="grey", ls="--", lw=1, label="real against real")
    right.set_xlabel("process time of training, s")
    right.set_ylabel("KID x 1000 of the averaged generator")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_grids(grids: dict[str, NDArray[Any]], path: Path) -> None:
    """Samples of every arm with the same noise and labels, beside real images."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 5, figsize=(10.8, 4.0), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, images) in zip(axes.flat, grids.items(), strict=False):
        tiles = np.asarray(images).reshape(8, 10, 8, 8)
        tiles = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=60)
        axis.imshow(tiles.transpose(0, 2, 1, 3).reshape(80, 100), cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as picture:  # a quarter of the bytes, and grey it is anyway
        grey = picture.convert("L").quantize(16)
    grey.save(path, optimize=True)


def real_grid(seed: int) -> NDArray[np.int64]:
    """Real images of the reference, in the grid's order."""
    parts = split(seed)
    rows = [torch.nonzero(parts.reference_labels == c)[:8, 0] for c in range(10)]
    chosen = torch.stack(rows, 1).reshape(-1)
    return np.round((parts.reference_x[chosen].numpy() + 1) * 127.5).astype(int)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reverse", action="store_true", help="a second process: the other way round; no tables")
    reverse = parser.parse_args(arguments).reverse
    mpl.use("Agg")
    torch.set_num_threads(1)
    cells = Cells(CELLS)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        best = tune(cells, progress, reverse=reverse)
        results = final(cells, best, progress, reverse=reverse)
    if reverse:
        return
    shown = [*tables(results, best), beside_r1(results), tuning_table(cells)]
    Console(width=220).print(*shown)
    (OUT / "generative.md").write_text("\n".join(map(markdown, shown)))
    draw_effects(results, IMAGES / "generative.png")
    grids = {"real images": real_grid(SEEDS[0])} | {name: np.array(cells[0]["grid"]) for name, cells in results.items()}
    draw_grids(grids, IMAGES / "generative_samples.png")


if __name__ == "__main__":
    main()
