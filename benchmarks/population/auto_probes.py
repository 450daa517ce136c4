"""What a rule for sigma may look at before the final training, and what the look costs.

A probe is a part of a training of the unchanged loop, or several of them: forks, members around the weights of a plain
training, trainings on a part of the rows. Each sees the training rows of its cell and seed, and nothing else of them.
Its cost is in trainings: steps over those of the cell's own training; a pass forward counts as a third of a step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from gradwise.torch import PopulationGradient
from population.auto_training import Run, parted
from population.cells import Cell
from population.data import Rows, split
from population.networks import make
from population.scores import log_losses, scores, temperature
from population.training import NOISE

__all__ = ["DEFAULT", "GRID", "PROBES", "SEARCHED", "Record", "decided", "losses", "neighbours"]

GRID = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
DEFAULT = 0.1
FORKS = (0.15, 0.35, 0.55, 0.75)  # fractions of the training
LENGTH = 0.04  # of a fork
MOMENTS = (0.25, 0.6)  # at which members are looked at
MEMBERS, DRAWS = 8, 3  # members, and mini-batches
SEARCHED = (0.0, 0.1, 0.4)  # by the grid search that a rule has to be cheaper than
SHORT = (0.0, 0.1, 0.2, 0.4)  # by the search over short trainings
SHORTER = 0.25

Record = dict[str, Any]
Losses = NDArray[np.float64]
Probe = Callable[[Cell, int], Record]


def losses(found: NDArray[np.float64], labels: Tensor, *, scaled: bool) -> Losses:
    """Log-loss of every row; scaled by the temperature that suits these rows, so that softness alone earns nothing."""
    known = labels.numpy()
    return log_losses(found / (temperature(found, known) if scaled else 1.0), known)


# -- forks -------------------------------------------------------------------------------------------------------------


def neighbours(sigma: float) -> list[float]:
    """Of the grid: 0, half of it, itself and its double; beside 0 the two least."""
    place = max(1, GRID.index(sigma))
    return sorted({0.0, *GRID[place - 1 : place + 2]})


def decided(found: dict[float, Losses], current: float) -> tuple[float, dict[float, float]]:
    """The sigma of the least mean loss if its paired t to the current one is below -2, else the current one.

    Parameters
    ----------
    found : dict of arrays
        Losses of the same rows for every candidate.
    current : float

    Returns
    -------
    float
    dict
        The t of every candidate.
    """
    t = {sigma: _paired_t(values - found[current]) for sigma, values in found.items()}
    best = min(found, key=lambda sigma: found[sigma].mean())
    return (best if t[best] < -2 else current), t


def _paired_t(differences: Losses) -> float:
    error = float(stats.sem(differences))
    return float(differences.mean()) / error if error else 0.0


def forks(cell: Cell, seed: int, *, scaled: bool) -> Record:
    """Forks of a training on four fifths of the rows, which goes on with the winner of each comparison."""
    fit, held = parted(cell, seed)
    run = Run(cell, fit, seed, DEFAULT)
    length = max(1, round(LENGTH * run.cell.steps))
    steps, passes, path = 0, 0, []
    for fraction in FORKS:
        mark = round(fraction * run.cell.steps)
        steps += mark - run.done
        run.until(mark)
        twins = {sigma: run.fork(sigma).until(mark + length) for sigma in neighbours(run.sigma)}
        found = {sigma: losses(twin.logits(held[0]), held[1], scaled=scaled) for sigma, twin in twins.items()}
        sigma, t = decided(found, run.sigma)
        path.append(
            {
                "at": fraction,
                "from": run.sigma,
                "to": sigma,
                "losses": [[s, float(values.mean()), t[s]] for s, values in found.items()],
            }
        )
        run = twins[sigma]
        steps += len(twins) * length
        passes += len(twins) * len(held[1])
    return {"sigma": run.sigma, "path": path, "cost": _cost(cell, steps, passes)}


# -- members -----------------------------------------------------------------------------------------------------------


def members(cell: Cell, seed: int) -> Record:
    """Agreement and rise of the loss of members at every sigma, at moments of a plain training on all rows."""
    run = Run(cell, split(cell.source, cell.rows, cell.wrong_labels, seed).train, seed, 0.0)
    moments: list[Record] = []
    looks = MEMBERS * DRAWS * (len(GRID) - 1) + DRAWS
    for fraction in MOMENTS:
        run.until(round(fraction * cell.steps))
        found = [_around(run, sigma) for sigma in GRID]
        agreement, loss = np.asarray(found).T
        rise = loss - loss[0]
        moments.append({"agreement": agreement.tolist(), "rise": rise.tolist(), "loss": float(loss[0])})
        moments[-1]["cost"] = _cost(cell, run.done + looks, 0)  # a rule needs one of the moments
    return {"moments": moments}


def _around(run: Run, sigma: float) -> tuple[float, float]:
    """Agreement and mean loss of members around the weights, which stay: means over mini-batches."""
    model = make(run.cell.network, run.cell.source, run.cell.look, run.seed).train()
    model.load_state_dict(run.model.state_dict())
    inner = torch.optim.SGD(model.parameters())
    around = PopulationGradient(inner, model, population_size=MEMBERS, sigma=sigma, seed=run.seed + NOISE)
    found: list[tuple[float, float]] = []
    for rows in run.batches[run.done : run.done + DRAWS]:
        around.zero_grad()
        around.backward(_loss, run.rows[0][rows], run.rows[1][rows], vectorize="loop")
        found.append((around.statistics.agreement, around.statistics.loss_mean))
    agreement, loss = np.asarray(found).mean(axis=0).tolist()
    return agreement, loss


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


# -- trainings on a part of the rows -----------------------------------------------------------------------------------


def searched(cell: Cell, seed: int, *, sigmas: Sequence[float], shorter: float = 1.0) -> Record:
    """Trainings on four fifths of the rows, with a whole schedule each."""
    fit, held = parted(cell, seed)
    short = cell.changed({"epochs": max(1, round(shorter * cell.recipe.epochs))})
    return _compared(cell, [Run(short, fit, seed, sigma) for sigma in sigmas], held)


def late_forks(cell: Cell, seed: int) -> Record:
    """One training on four fifths of the rows, which forks half way; the forks go on to the end of the schedule."""
    fit, held = parted(cell, seed)
    run = Run(cell, fit, seed, DEFAULT)
    run.until(run.cell.steps // 2)
    found = _compared(cell, [run.fork(sigma) for sigma in SEARCHED], held)
    return {**found, "shared": _cost(cell, run.done, 0)}


def _compared(cell: Cell, runs: Sequence[Run], held: Rows) -> Record:
    """What runs are worth on held-out rows when they have come to their end.

    The best one has the least scaled log-loss; a cautious choice leaves the default only if that is significant.
    """
    found: dict[float, Losses] = {}
    worth: list[Record] = []
    for run in runs:
        begun = run.done
        run.until(run.cell.steps)
        seen, unseen = ((run.logits(x), y.numpy()) for x, y in (run.rows, held))
        found[run.sigma] = losses(unseen[0], held[1], scaled=True)
        worth.append(
            {
                "sigma": run.sigma,
                "train": scores(*seen, scaled_by=temperature(*unseen)),
                "held_out": scores(*unseen, scaled_by=temperature(*unseen)),
                "cost": _cost(cell, run.done - begun, cell.rows),
            }
        )
    cautious, t = decided(found, DEFAULT)
    best = min(found, key=lambda sigma: found[sigma].mean())
    return {"best": best, "cautious": cautious, "t": list(t.values()), "worth": worth}


def _cost(cell: Cell, steps: int, passes: int) -> float:
    """In trainings of the cell; `passes` are rows that only went forward."""
    return (steps + passes / cell.recipe.batch / 3) / cell.steps


PROBES: dict[str, Probe] = {
    "forks": lambda cell, seed: forks(cell, seed, scaled=False),
    "forks, scaled": lambda cell, seed: forks(cell, seed, scaled=True),
    "members": members,
    "search": lambda cell, seed: searched(cell, seed, sigmas=SEARCHED),
    "short search": lambda cell, seed: searched(cell, seed, sigmas=SHORT, shorter=SHORTER),
    "late forks": late_forks,
}
