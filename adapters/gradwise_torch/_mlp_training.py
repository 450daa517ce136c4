"""From training data to trained weights: restarts, members, and the two solvers."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwise_torch._mlp_adam import adam
from gradwise_torch._mlp_lbfgs import Minimum, lbfgs, minimise_all
from gradwise_torch._mlp_objective import Objective
from gradwise_torch._mlp_progress import progress

__all__ = ["Settings", "best_of", "train", "train_lbfgs"]

Floats = NDArray[np.float64]

# Pairs of L-BFGS: after 200 iterations on four test functions, 40 left 0.4 to 0.75 of the loss that 10 left, in 1.2
# times the time.
_MEMORY = 40
# Rows times hidden units up to which members are evaluated in one call; beyond, one member fills the cache, and members
# one after the other are up to 1.4 times as fast.
_TOGETHER = 2**16


class Settings(NamedTuple):
    """Parameters of the estimator that the solvers take."""

    solver: str
    max_iter: int
    tol: float
    batch_size: int
    learning_rate: float
    patience: int
    verbose: bool
    seed: int


def train(
    objective: Objective, starts: Floats, settings: Settings, validation: Callable[[Tensor], Tensor] | None
) -> list[Minimum]:
    """Train from every start, (members, n_parameters), independently."""
    if settings.solver == "adam":
        with progress(settings.max_iter, show=settings.verbose, label="epochs") as report:
            return adam(
                objective,
                starts,
                n_epochs=settings.max_iter,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                seed=settings.seed,
                validation=validation,
                patience=settings.patience,
                tol=settings.tol,
                report=report,
            )
    with progress(settings.max_iter * len(starts), show=settings.verbose, label="iterations") as report:
        return train_lbfgs(objective, starts, max_iter=settings.max_iter, tol=settings.tol, report=report)


def train_lbfgs(
    objective: Objective,
    starts: Floats,
    *,
    max_iter: int,
    tol: float,
    memory: int = _MEMORY,
    report: Callable[[float], None] | None = None,
) -> list[Minimum]:
    """Train from every start by L-BFGS: in one vectorised program if the problem is small, else one after the other."""
    work = len(objective.x) * sum(objective.architecture.sizes[1:-1])
    size = len(starts) if work <= _TOGETHER or objective.folded else 1
    minima: list[Minimum] = []
    for group in np.split(starts, range(size, len(starts), size)):
        searches = [lbfgs(start, max_iter=max_iter, tol=tol, memory=memory, report=report) for start in group]
        minima += minimise_all(lambda points: _evaluate(objective, points), searches)
    return minima


def best_of(minima: list[Minimum], n_restarts: int) -> list[Minimum]:
    """Of each member's restarts, which stand side by side, the one with the least training loss."""
    groups = [minima[first : first + n_restarts] for first in range(0, len(minima), n_restarts)]
    return [min(group, key=lambda minimum: _rank(minimum.loss)) for group in groups]


def _rank(loss: float) -> float:
    return loss if np.isfinite(loss) else np.inf


def _evaluate(objective: Objective, points: Floats) -> tuple[Floats, Floats]:
    losses, gradients = objective(torch.from_numpy(points).to(objective.x.dtype))
    return losses.double().numpy(), gradients.double().numpy()
