"""Where ``vectorize="vmap"`` beats ``"loop"``, and whether ``"auto"`` knows: a grid of models and batches, one thread.

Dense networks of widths 16 to 1024 and one to three hidden layers with 8 to 1024 rows, two convolutional ones and three
transformers; whole batches and sharded ones; eight members. Cells whose passes are all arithmetic are left out. The
last line says in how many cells the path of "auto" takes over 10 % longer than the better of the two.
Run: ``python benchmarks/vectorize_rule.py [--repeats N]``; writes ``out/vectorize_rule.json`` and a Markdown table.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from models import Problem, Transformer, cnn, mlp
from population_ways import PLAIN, Task, batch_step, plain
from reports import environment, markdown, path_taken, print_table, write_json
from rich.console import Console
from rich.progress import track
from timing import interleaved

from gradwise_torch._paths import automatic_path

__all__ = ["Cell", "grid", "measure", "misses"]

TOLERANCE = 1.10
WORK = 1.5e8  # weights x rows that one member may see


@dataclass(frozen=True)
class Cell:
    """What was measured of one model, batch and way to use it; times in seconds.

    Attributes
    ----------
    vectorised : str
        The path that ran when vmap was asked for.
    auto : str
        The path that the rule chooses.
    """

    model: str
    weights: int
    rows: int
    sharded: bool
    plain: float
    loop: float
    vmap: float
    vectorised: str
    auto: str
    messages: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Time of auto's path over that of the better one."""
        return (self.vmap if self.auto == "vmap" else self.loop) / min(self.loop, self.vmap)

    def texts(self) -> list[str]:
        """A row of the table."""
        return [
            self.model,
            str(self.weights),
            str(self.rows),
            "sharded" if self.sharded else "whole",
            f"{1000 * self.plain:.3g}",
            f"{self.loop / self.plain:.2f}x",
            f"{self.vmap / self.plain:.2f}x" + ("*" if self.messages else ""),
            f"{self.vmap / self.loop:.2f}",
            self.auto,
            f"{self.loss:.2f}" if self.loss > TOLERANCE else "",
        ]


HEADER = ["model", "weights", "rows", "batch", "plain, ms", "loop", "vmap", "vmap / loop", "auto", "auto / best"]


def grid() -> dict[str, Problem]:
    """The models and batches, by name."""
    problems: dict[str, Problem] = {}
    for depth in (1, 2, 3):
        for width in (16, 64, 256, 1024):
            for rows in (8, 64, 256, 1024):
                widths = (64, *[width] * depth, 10)
                problems[f"MLP {'-'.join(map(str, widths))}/{rows}"] = Problem(_make(mlp, *widths), (rows, 64))
    for channels in (8, 32):
        for rows in (8, 32, 64, 256)[: 4 if channels == 8 else 3]:
            problems[f"CNN {channels}/{rows}"] = Problem(_make(cnn, channels), (rows, 1, 28, 28))
    for width in (32, 64, 128):
        for rows in (8, 32, 128):
            problems[f"transformer {width}/{rows}"] = Problem(_make(Transformer, width), (rows, 16, width))
    return problems


def _make(kind: Callable[..., torch.nn.Module], *sizes: int) -> Callable[[], torch.nn.Module]:
    return lambda: kind(*sizes)


def measure(name: str, problem: Problem, repeats: int, *, work: float = WORK) -> list[Cell]:
    """One cell for whole batches, where they are not too much work, and one for sharded ones."""
    task = Task(problem)
    model = problem.make()
    weights, rows = sum(p.numel() for p in model.parameters()), problem.shape[0]
    cells: list[Cell] = []
    for sharded in (False, True):
        if weights * rows / (8 if sharded else 1) > work:
            continue
        steps = {path: batch_step(task, sharded=sharded, path=path) for path in ("loop", "vmap")}
        timings = interleaved({PLAIN: plain(task), **steps}, repeats)
        cells.append(
            Cell(
                name.partition("/")[0],
                weights,
                rows,
                sharded,
                timings[PLAIN].median,
                timings["loop"].median,
                timings["vmap"].median,
                path_taken("vmap", timings["vmap"].messages),
                automatic_path(model, list(model.parameters()), rows, sharded=sharded),
                tuple(timings["vmap"].messages),
            )
        )
    return cells


def misses(cells: Iterable[Cell]) -> list[Cell]:
    """Where auto takes too long, worst first."""
    return sorted((cell for cell in cells if cell.loss > TOLERANCE), key=lambda cell: -cell.loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/vectorize_rule.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[Cell] = []
    for name, problem in track(grid().items(), "cells"):
        cells += measure(name, problem, options.repeats)
    rows = [cell.texts() for cell in cells]
    print_table(Console(width=130), HEADER, rows)
    worst = misses(cells)
    named = "; ".join(f"{c.model}, {c.rows} rows, {c.texts()[3]}: {c.auto} {c.loss:.2f}x the best" for c in worst[:10])
    verdict = f"auto takes over 10 % longer than the best in {len(worst)} of {len(cells)} cells; the worst: {named}"
    print(verdict)
    write_json(options.out, {"environment": environment("cpu"), "threads": 1, "cells": [asdict(c) for c in cells]})
    options.out.with_suffix(".md").write_text(markdown(HEADER, rows) + verdict + "\n")


if __name__ == "__main__":
    main()
