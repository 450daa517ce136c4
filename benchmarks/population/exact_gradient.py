"""How near the population's gradient is to the exact one, that of infinite data, beside the mini-batch's own.

The second paper's abstract says: nearer. Here the data have a generator (MNIST-1D), so that the gradient on 100,000
rows that no training sees stands for the exact one, G. Along plain trainings (the cell's own recipe), at the same
weights and from the same mini-batches: the plain gradient, the population's at several sigmas, that of the sharded
population, and the plain gradient of as many rows as the population makes passes. The error of an estimate is
``|g - G| / |G|``; its cosine is that with G.

``python -m population.exact_gradient``: about five minutes of one core; goes on from ``out/population_exact.jsonl``.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn

from gradwise.torch import PopulationGradient
from population.arms import MEMBERS
from population.cells import PRIMARY, Cell
from population.data import Rows, split
from population.networks import make
from population.tasks import read_lines
from population.training import NOISE, make_optimizer

__all__ = ["CELLS", "FILE", "measure", "read", "run"]

FILE = "population_exact.jsonl"
CELLS = ("mnist1d-1000 MLP", "mnist1d-1000 CNN", "mnist1d-1000 ResNet")
SEEDS = range(5)
SIGMAS = (0.03, 0.1, 0.3)
MOMENTS = (0.02, 0.1, 0.3, 0.6, 1.0)  # fractions of the training
DRAWS = 10  # mini-batches at each of them
FRESH = 100_000
CHUNK = 5_000  # rows in memory at once; the spread of their gradients is what says how exact the exact one is


@cache
def fresh(rows: int) -> Rows:
    """Rows that no split has; the package divides them by their own deviation, which so many rows have in common."""
    arguments: Any = get_dataset_args()
    arguments.num_samples, arguments.train_split, arguments.seed = rows, 1.0, 1
    made = make_dataset(arguments)
    return torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"])


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean loss at the weights as they are, for all parameters in one vector."""
    parts = torch.autograd.grad(_loss(model, x, y), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts]).double()


def exact(model: nn.Module, rows: int) -> tuple[Tensor, float]:
    """Gradient on fresh rows, and the length of its standard error."""
    parts = torch.stack([gradient(model, x, y) for x, y in zip(*(t.split(CHUNK) for t in fresh(rows)), strict=True)])
    deviations = parts.std(0) if len(parts) > 1 else torch.full_like(parts[0], torch.nan)
    return parts.mean(0), float(deviations.norm() / len(parts) ** 0.5)


def estimates(model: nn.Module, cell: Cell, seed: int, draw: int) -> Iterator[tuple[str, Tensor]]:
    """Gradients from one draw of rows, by name: one pass over a mini-batch, or `MEMBERS` times that cost."""
    x, y = split(cell.source, cell.rows, cell.wrong_labels, seed).train
    batch = cell.recipe.batch
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(1_000 * seed + draw))
    small, large = rows[:batch], rows[: MEMBERS * batch]
    yield "mini-batch", gradient(model, x[small], y[small])
    yield f"{MEMBERS} x the batch", gradient(model, x[large], y[large])
    for sigma in SIGMAS:
        for name, taken, sharded in (("population", small, False), ("sharded", large, True)):
            optimizer = PopulationGradient(
                torch.optim.SGD(model.parameters()),
                model,
                population_size=MEMBERS,
                sigma=sigma,
                seed=seed + NOISE + 1_000 * draw,
            )
            optimizer.zero_grad()
            optimizer.backward(_loss, x[taken], y[taken], sharded=sharded, vectorize="loop")
            grads = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]
            optimizer.zero_grad()
            yield f"{name}, sigma {sigma}", torch.cat(grads).double()


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def along_a_training(cell: Cell, seed: int, look: Callable[[nn.Module, float], None]) -> None:
    """Train plainly and call `look(model, fraction)` at the moments.

    In training mode, as every step of the study is: with the running statistics of BatchNorm, which do not follow
    perturbed weights, the members' gradients would be of another network. The exact gradient has the statistics of
    `CHUNK` rows.
    """
    x, y = split(cell.source, cell.rows, cell.wrong_labels, seed).train
    model = make(cell.network, cell.source, cell.look, seed).train()
    optimizer = make_optimizer(model, cell.recipe)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cell.steps)
    batches = torch.Generator().manual_seed(seed)
    moments = {max(1, round(fraction * cell.steps)): fraction for fraction in MOMENTS}
    step = 0
    for _ in range(cell.recipe.epochs):
        for rows in torch.randperm(len(x), generator=batches).split(cell.recipe.batch):
            optimizer.zero_grad()
            _loss(model, x[rows], y[rows]).backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if step in moments:
                look(model, moments[step])


def measure(name: str, seed: int, *, draws: int = DRAWS, rows: int = FRESH, epochs: int | None = None) -> list[Any]:
    """Errors and cosines along one training, a record for each moment and estimate: means over the draws."""
    cell = PRIMARY[name] if epochs is None else PRIMARY[name].changed({"epochs": epochs})
    x, y = split(cell.source, cell.rows, cell.wrong_labels, seed).train
    records: list[Any] = []

    def look(model: nn.Module, fraction: float) -> None:
        truth, uncertain = exact(model, rows)
        norm = truth.norm()
        found: dict[str, list[tuple[float, float]]] = {}
        every = [("all training rows", gradient(model, x, y))]
        for estimate, g in [*every, *(pair for draw in range(draws) for pair in estimates(model, cell, seed, draw))]:
            error, cosine = (g - truth).norm() / norm, torch.dot(g, truth) / (g.norm() * norm)
            found.setdefault(estimate, []).append((float(error), float(cosine)))
        for estimate, pairs in found.items():
            error, cosine = np.mean(pairs, axis=0).tolist()
            key = {"cell": name, "seed": seed, "moment": fraction, "estimate": estimate}
            records.append({**key, "error": error, "cosine": cosine, "uncertain": uncertain / float(norm)})

    along_a_training(cell, seed, look)
    return records


def run(path: Path) -> None:
    """All trainings that the file lacks, a line for each."""
    done = {(record["cell"], record["seed"]) for record in read(path)}
    for name in CELLS:
        for seed in SEEDS:
            if (name, seed) not in done:
                records = measure(name, seed)
                with path.open("a") as file:
                    file.write(json.dumps(records) + "\n")
                print(f"exact gradient: {name}, seed {seed}", flush=True)


def read(path: Path) -> list[Any]:
    """Records of whole trainings; a torn last line is a training that was not made."""
    return [record for records in read_lines(path) for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    run(arguments.out / FILE)


if __name__ == "__main__":
    main()
