"""The weight of noisy derivatives: by cross-validation of the values, over rows, in one vectorised program."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gradwise_torch._mlp_data import TrainingData
from gradwise_torch._mlp_network import Architecture
from gradwise_torch._mlp_objective import Objective
from gradwise_torch._mlp_training import train_lbfgs

__all__ = ["WEIGHTS", "Choice", "choose_weight"]

# From exact derivatives to hopeless ones, which get next to no weight.
WEIGHTS = (1.0, 0.1, 0.01, 0.001, 0.0)
_FOLDS = 4
_ITERATIONS = 150


class Choice(NamedTuple):
    """What cross-validation found."""

    weight: float
    noise: float
    """Root mean square of held-out residuals of the derivatives, relative to that of the derivatives."""
    errors: NDArray[np.float64]
    """Held-out mean squared error of the standardised values for each of `WEIGHTS`."""


def choose_weight(architecture: Architecture, data: TrainingData, *, alpha: float, loss: str, seed: int) -> Choice:
    """Cross-validate the values over 4 folds of rows, for every weight, in fits of up to 150 iterations of L-BFGS.

    All fits start from the same weights and run as one program. Chosen is the largest weight whose held-out mean
    squared error of the values is within one standard error (of the paired differences, over rows) of the least. With
    fewer than 4 rows with values the weight is 1.
    """
    n = len(data.x)
    if data.derivatives is None or n < _FOLDS:
        return Choice(1.0, float("nan"), np.full(len(WEIGHTS), np.nan))
    folds = np.random.default_rng(seed).permutation(n) % _FOLDS
    others = len(data.derivatives.x)
    derivative_folds = folds if data.shared else np.random.default_rng(seed).permutation(others) % _FOLDS
    weights, fold_of = np.repeat(np.array(WEIGHTS), _FOLDS), np.tile(np.arange(_FOLDS), len(WEIGHTS))
    kept, kept_derivatives = ((part != fold_of[:, None]).astype(float) for part in (folds, derivative_folds))
    objective = Objective(
        architecture,
        data,
        derivative_weight=weights,
        alpha=alpha,
        loss=loss,
        dtype=torch.float64,
        folds=(kept, kept_derivatives),
    )
    starts = np.stack([architecture.initial(seed)] * len(weights))
    # Few pairs: with many short fits, their products would take most of the time.
    minima = train_lbfgs(objective, starts, max_iter=_ITERATIONS, tol=1e-3, memory=20)
    values, slopes = objective.residuals(torch.from_numpy(np.stack([minimum.theta for minimum in minima])))
    slopes = np.asarray(slopes)
    # (weights, rows): each row's error in the fit that has not seen it.
    squares = np.square(np.asarray(values)).mean(axis=2).reshape(len(WEIGHTS), _FOLDS, n)[:, folds, np.arange(n)]
    errors = np.average(squares, axis=1, weights=data.weight)
    best = int(np.argmin(errors))
    differences = squares - squares[best]
    spread = np.sqrt(np.average(np.square(differences), axis=1, weights=data.weight) / n)
    chosen = int(np.argmax(errors - errors[best] <= spread))
    part = slopes.reshape(len(WEIGHTS), _FOLDS, *slopes.shape[1:])[chosen]
    residuals = part[derivative_folds, np.arange(others)][data.derivatives.known]
    return Choice(WEIGHTS[chosen], float(np.sqrt(np.mean(residuals**2) * slopes.shape[-1])), errors)
