"""One training of the population study: the loop is the same for all arms, the step is what differs."""

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gradwise import Population
from gradwise.torch import PopulationGradient
from population.arms import Arm
from population.cells import Cell, Recipe
from population.data import REGRESSION, split
from population.networks import make
from population.variants import CHANGES, Members

__all__ = ["Trained", "logits", "make_optimizer", "train"]

Step = Callable[[Tensor, Tensor], object]
NOISE = 1_000_003  # the noise of a seed is no other random number of it


@dataclass(frozen=True)
class Trained:
    """A trained network, what it cost and how it came about.

    Attributes
    ----------
    model : nn.Module
        In eval mode, with the weights of the last step (or their average, for that arm).
    seconds : float
        Of this thread's processor, for the steps alone.
    steps : int
    """

    model: nn.Module
    seconds: float
    steps: int


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The inner optimizer of a recipe; weight decay is decoupled in all of them, for tensors of two axes or more."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    rate = recipe.learning_rate
    if recipe.optimizer in {"sgd", "momentum"}:
        if recipe.weight_decay:
            msg = "weight decay is only decoupled in AdamW"
            raise ValueError(msg)
        return torch.optim.SGD(groups, lr=rate, momentum=0.9 if recipe.optimizer == "momentum" else 0.0)
    return torch.optim.AdamW(groups, lr=rate, fused=True)  # with weight decay 0 it is Adam


def train(cell: Cell, arm: Arm, seed: int) -> Trained:
    """Train a cell, as `population.arms.prepared` made it; a seed gives all arms the same rows, weights and batches."""
    x, y = split(cell.source, cell.rows, cell.wrong_labels, seed).train
    model = make(cell.network, cell.source, cell.look, seed).train()
    recipe = cell.recipe
    loss = Squared() if cell.source in REGRESSION else nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    options = dict(arm.options)
    decay = options.pop("decay", None)
    optimizer, step = WAYS[arm.way](Setup(model, loss, cell, options, seed))
    average = (
        None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    )
    scheduler = None
    if recipe.decay == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cell.steps)
    batches = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    began = time.thread_time()
    steps = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(x), generator=batches)
        for rows in order[: len(x) // recipe.batch * recipe.batch].split(recipe.batch):
            step(x[rows], y[rows])
            if scheduler is not None:
                scheduler.step()
            if average is not None:
                average.update_parameters(model)
            steps += 1
    seconds = time.thread_time() - began
    optimizer.zero_grad()
    return Trained((model if average is None else average.module).eval(), seconds, steps)


class Squared(nn.Module):
    """Mean squared error of one output."""

    def forward(self, predicted: Tensor, y: Tensor) -> Tensor:
        """Of outputs (rows, 1) and numbers (rows,)."""
        return nn.functional.mse_loss(predicted.squeeze(-1), y)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> NDArray[np.float64]:
    """Of every row, in double precision."""
    return np.concatenate([model(rows).double().numpy() for rows in x.split(1_000)])


# -- ways to make a step -----------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What a way is made from."""

    model: nn.Module
    loss_fn: nn.Module
    cell: Cell
    options: dict[str, Any]
    seed: int

    def backward(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        """What a closure does."""
        optimizer.zero_grad()
        loss = self.loss_fn(self.model(x), y)
        loss.backward()
        return loss


def plain(setup: Setup) -> tuple[torch.optim.Optimizer, Step]:
    """Forward, backward, step."""
    optimizer = make_optimizer(setup.model, setup.cell.recipe)
    return optimizer, _loop(setup, optimizer)


def unchanged(setup: Setup) -> tuple[torch.optim.Optimizer, Step]:
    """The same loop with a wrapped optimizer."""
    optimizer = _wrapped(setup)
    return optimizer, _loop(setup, optimizer)


def closure(setup: Setup) -> tuple[torch.optim.Optimizer, Step]:
    """Members that share the batch."""
    optimizer = _wrapped(setup)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return optimizer.step(lambda: setup.backward(optimizer, x, y))

    return optimizer, step


def sharded(setup: Setup) -> tuple[torch.optim.Optimizer, Step]:
    """Members that have rows of their own."""
    optimizer = _wrapped(setup)

    def loss_of(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return setup.loss_fn(network(x), y)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        return optimizer.step_batch(loss_of, x, y, sharded=True, vectorize="loop")

    return optimizer, step


def sam(setup: Setup) -> tuple[torch.optim.Optimizer, Step]:
    """Sharpness-aware minimization; BatchNorm's statistics are those of the first pass, as its authors advise."""
    recipe = setup.cell.recipe
    inner = make_optimizer(setup.model, recipe)
    kind: Any = importlib.import_module("pytorch_optimizer").SAM
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in inner.param_groups]
    keywords: dict[str, Any] = {"fused": True} if isinstance(inner, torch.optim.AdamW) else {}
    if recipe.optimizer == "momentum":
        keywords["momentum"] = 0.9
    optimizer = kind(groups, type(inner), rho=setup.options["rho"], lr=recipe.learning_rate, **keywords)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = setup.backward(optimizer, x, y)

        def again() -> Tensor:
            with _statistics_kept(setup.model):
                return setup.backward(optimizer, x, y)

        optimizer.step(again)
        return loss

    return optimizer, step


def ivon(setup: Setup) -> tuple[torch.optim.Optimizer, Step]:
    """Variational learning: one sample a step, in the place of the recipe's optimizer."""
    kind: Any = importlib.import_module("ivon").IVON
    optimizer = kind(setup.model.parameters(), lr=setup.options["rate"], ess=setup.cell.rows)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with optimizer.sampled_params(train=True):
            loss = setup.backward(optimizer, x, y)
        optimizer.step()
        return loss

    return optimizer, step


def variant(setup: Setup) -> tuple[torch.optim.Optimizer, Step]:
    """Another population than the library's."""
    size, sigma = setup.options["population_size"], setup.options["sigma"]
    population = Population(size, sigma, antithetic=size > 1, seed=setup.seed + NOISE)
    change = CHANGES[setup.options["change"]]
    members = Members(setup.model, replace(population, scale=change.scale), change, setup.cell.steps)
    optimizer = make_optimizer(setup.model, setup.cell.recipe)

    def step(x: Tensor, y: Tensor) -> None:
        members.gradients(lambda: setup.backward(optimizer, x, y))
        norms = members.norms()
        optimizer.step()
        members.after(norms)

    return optimizer, step


WAYS: dict[str, Callable[[Setup], tuple[torch.optim.Optimizer, Step]]] = {
    "plain": plain,
    "unchanged": unchanged,
    "closure": closure,
    "sharded": sharded,
    "sam": sam,
    "ivon": ivon,
    "variant": variant,
}


def _wrapped(setup: Setup) -> PopulationGradient:
    inner = make_optimizer(setup.model, setup.cell.recipe)
    return PopulationGradient(inner, setup.model, seed=setup.seed + NOISE, **setup.options)


def _loop(setup: Setup, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = setup.backward(optimizer, x, y)
        optimizer.step()
        return loss

    return step


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
