"""How near the population's gradient is to the exact one, that of infinite data, beside the mini-batch's own.

The second paper's abstract says: nearer. Here the data have a generator (MNIST-1D), so that the gradient on 100,000
rows that no training sees stands for the exact one. Along a plain training, at the same weights and from the same
mini-batches: the plain gradient, the population's at several sigmas, that of the sharded population, and the plain
gradient of as many rows as the population makes passes. The error of an estimate is ``|g - G| / |G|``; its cosine is
that with G.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from population.data import Rows, mnist1d, split
from population.networks import make
from population.training import NOISE, make_optimizer

__all__ = ["CELLS", "along_a_training", "measure"]

CELLS = ("mnist1d-1000 MLP", "mnist1d-1000 CNN", "mnist1d-1000 ResNet")
SIGMAS = (0.01, 0.03, 0.1, 0.3)
MOMENTS = (0.02, 0.1, 0.3, 0.6, 1.0)  # fractions of the training
DRAWS = 20  # mini-batches at each of them
FRESH = 100_000


@cache
def fresh(rows: int) -> Rows:
    """Rows that no split has, standardised like those that it has."""
    arguments: Any = get_dataset_args()
    arguments.num_samples, arguments.train_split, arguments.seed = rows, 1.0, 1
    made = make_dataset(arguments)
    mnist1d()  # both are divided by their own standard deviation: equal to 1 in 1,000 with so many rows
    return torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"])


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean loss at the weights as they are, for all parameters in one vector."""
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for inputs, labels in zip(x.split(5_000), y.split(5_000), strict=True):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        parts = torch.autograd.grad(loss, parameters)
        total += torch.cat([part.flatten() for part in parts]).double() * (len(inputs) / len(x))
    return total


def estimates(model: nn.Module, cell: Cell, seed: int, draw: int) -> Iterator[tuple[str, Tensor]]:
    """Gradients from one draw of rows, by name."""
    x, y = split(cell.source, cell.rows, cell.wrong_labels, seed).train
    batch = cell.recipe.batch
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(1_000 * seed + draw))
    small, large = rows[:batch], rows[: MEMBERS * batch]
    yield "mini-batch", gradient(model, x[small], y[small])
    yield f"{MEMBERS} x the batch", gradient(model, x[large], y[large])
    yield "all training rows", gradient(model, x, y)
    for sigma in SIGMAS:
        for name, taken, sharded in (("population", small, False), ("sharded population", large, True)):
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
    """Train plainly and call `look(model, fraction)` at the moments; in eval mode, so that rows do not mix."""
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
                look(model.eval(), moments[step])
                model.train()


def measure(name: str, seed: int, *, draws: int = DRAWS, rows: int = FRESH, epochs: int | None = None) -> list[Any]:
    """Errors and cosines along one training, a record for each moment and estimate: means over the draws."""
    cell = PRIMARY[name]
    cell = cell if epochs is None else replace(cell, recipe=replace(cell.recipe, epochs=epochs))
    records: list[Any] = []

    def look(model: nn.Module, fraction: float) -> None:
        exact = gradient(model, *fresh(rows))
        found: dict[str, list[tuple[float, float]]] = {}
        for draw in range(draws):
            for estimate, g in estimates(model, cell, seed, draw):
                error = float((g - exact).norm() / exact.norm())
                cosine = float(torch.dot(g, exact) / (g.norm() * exact.norm()))
                found.setdefault(estimate, []).append((error, cosine))
        for estimate, pairs in found.items():
            error, cosine = np.asarray(pairs).mean(axis=0).tolist()
            key = {"cell": name, "seed": seed, "moment": fraction, "estimate": estimate}
            records.append({**key, "error": error, "cosine": cosine, "norm": float(exact.norm())})

    along_a_training(cell, seed, look)
    return records


def run(path: Path, seeds: int) -> None:
    """All cells and seeds that the file lacks."""
    done = {(record["cell"], record["seed"]) for record in read(path)}
    for name in CELLS:
        for seed in range(seeds):
            if (name, seed) not in done:
                records = measure(name, seed)
                with path.open("a") as file:
                    file.write("".join(json.dumps(record) + "\n" for record in records))
                print(f"exact gradient: {name}, seed {seed}", flush=True)


def read(path: Path) -> list[Any]:
    """Records of whole trainings."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
