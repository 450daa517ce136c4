"""A training of the unchanged loop that can stop and fork, and training rows that are held out of it."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from population.arms import ARMS
from population.cells import Cell
from population.data import Rows, split
from population.networks import make
from population.training import Setup, logits, unchanged

__all__ = ["Run", "parted"]

HELD_OUT = 0.2


@dataclass
class Run:
    """A training of the unchanged loop that can stop anywhere and fork; of the cells whose rate decays by a cosine.

    Attributes
    ----------
    cell : Cell
        With the number of rows that the training sees.
    rows : (Tensor, Tensor)
    seed : int
        Of the weights, the batches and the noise: those of `population.training.train`, if the rows are the same.
    sigma : float
    done : int
        Steps.
    """

    cell: Cell
    rows: Rows
    seed: int
    sigma: float
    done: int = 0
    batches: Sequence[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.cell = replace(self.cell, rows=len(self.rows[1]))
        self.model = make(self.cell.network, self.cell.source, self.cell.look, self.seed).train()
        loss = nn.CrossEntropyLoss(label_smoothing=self.cell.recipe.label_smoothing)
        options = dict(ARMS["unchanged"].with_sigma(self.sigma).options)
        self.optimizer, self.step = unchanged(Setup(self.model, loss, self.cell, options, self.seed))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.cell.steps)
        self.batches = _batches(self.cell, self.seed)

    def until(self, step: int) -> "Run":
        """Train on to a step."""
        x, y = self.rows
        self.model.train()
        for rows in self.batches[self.done : step]:
            self.step(x[rows], y[rows])
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.done = step
        return self

    def fork(self, sigma: float) -> "Run":
        """The same weights, optimizer, rate, batches and directions of the noise, of another size from here on."""
        twin = Run(self.cell, self.rows, self.seed, sigma, self.done)
        twin.model.load_state_dict(self.model.state_dict())
        twin.optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))
        twin.scheduler.load_state_dict(self.scheduler.state_dict())
        return twin

    def logits(self, x: Tensor) -> NDArray[np.float64]:
        """Of the mean weights."""
        return logits(self.model.eval(), x)


def _batches(cell: Cell, seed: int) -> list[Tensor]:
    """Rows of every step, in the order of `population.training.train`."""
    generator = torch.Generator().manual_seed(seed)
    used = cell.rows // cell.recipe.batch * cell.recipe.batch
    epochs = (torch.randperm(cell.rows, generator=generator)[:used] for _ in range(cell.recipe.epochs))
    return [rows for order in epochs for rows in order.split(cell.recipe.batch)]


def parted(cell: Cell, seed: int) -> tuple[Rows, Rows]:
    """The training rows in those to train on and those that are held out, classes alike."""
    x, y = split(cell.source, cell.rows, cell.wrong_labels, seed).train
    fit, held = train_test_split(np.arange(len(y)), test_size=HELD_OUT, stratify=y.numpy(), random_state=seed)
    return (x[fit], y[fit]), (x[held], y[held])
