"""How noisy derivative targets are, judged by held-out rows, and the weight that follows."""

import numpy as np
import torch
from numpy.typing import NDArray

from gradwise_torch._mlp_data import TrainingData
from gradwise_torch._mlp_network import Architecture
from gradwise_torch._mlp_objective import Objective
from gradwise_torch._mlp_training import train_lbfgs

__all__ = ["automatic_weight", "held_out_errors"]

_FOLDS = 4
_ITERATIONS = 100


def automatic_weight(
    architecture: Architecture, data: TrainingData, *, alpha: float, loss: str, seed: int
) -> tuple[float, float]:
    """Weight of the derivative loss from a cross-validated estimate of the noise, and that estimate."""
    _, noise = held_out_errors(architecture, data, alpha=alpha, loss=loss, seed=seed)
    return 1.0, noise


def held_out_errors(
    architecture: Architecture, data: TrainingData, *, alpha: float, loss: str, seed: int, weight: float = 1.0
) -> tuple[float, float]:
    """Cross-validated errors of values and derivatives, relative to their spread; all folds in one program.

    Root mean squares of held-out residuals: noise and the error of the fit together, so at least the noise.
    """
    if data.derivatives is None:
        return float("nan"), float("nan")
    folds = _folds(len(data.x), seed)
    derivative_folds = folds if data.shared else _folds(len(data.derivatives.x), seed)
    members = int(max(folds.max(), derivative_folds.max())) + 1
    if members < 2:
        return float("nan"), float("nan")
    kept = tuple((part[None, :] != np.arange(members)[:, None]).astype(float) for part in (folds, derivative_folds))
    objective = Objective(
        architecture,
        data,
        derivative_weight=weight,
        alpha=alpha,
        loss=loss,
        dtype=torch.float64,
        folds=(kept[0], kept[1]),
    )
    starts = np.stack([architecture.initial(seed)] * members)
    minima = train_lbfgs(objective, starts, max_iter=_ITERATIONS, tol=1e-3)
    values, derivatives = objective.residuals(torch.from_numpy(np.stack([minimum.theta for minimum in minima])))
    value_errors = values.numpy()[folds, np.arange(len(folds))]
    slope_errors = np.asarray(derivatives)[derivative_folds, np.arange(len(derivative_folds))]
    known = data.derivatives.known
    noise = np.sqrt(np.mean(np.square(slope_errors[known])) * slope_errors.shape[2])
    return float(np.sqrt(np.mean(np.square(value_errors)))), float(noise)


def _folds(n: int, seed: int) -> NDArray[np.intp]:
    return np.random.default_rng(seed).permutation(n) % min(_FOLDS, n)
