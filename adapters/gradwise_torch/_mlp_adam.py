"""Adam with mini-batches for the MLP regressor: a one-cycle learning rate, and early stopping on held-out values."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwise_torch._mlp_lbfgs import Minimum
from gradwise_torch._mlp_objective import Objective

__all__ = ["adam", "one_cycle"]

_WARM_UP = 0.1
# As in Adam's paper (Kingma & Ba, arXiv 1412.6980) and in torch.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


def one_cycle(step: int, n_steps: int, peak: float) -> float:
    """Learning rate of a step: up to `peak` linearly in the first tenth, then down to 0 along half a cosine."""
    done = (step + 0.5) / n_steps
    if done < _WARM_UP:
        return peak * done / _WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def adam(
    objective: Objective,
    starts: NDArray[np.float64],
    *,
    n_epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    validation: Callable[[Tensor], Tensor] | None,
    patience: int,
    tol: float,
    report: Callable[[float], None] | None,
) -> list[Minimum]:
    """Train all members at once, on the same batches; each epoch visits every row once.

    Where derivatives are known at other rows than values, every batch has its share of both. With `validation`,
    training stops when no member's validation loss has fallen by `tol` of itself for `patience` epochs, and every
    member gets the weights of its best epoch. Otherwise the whole cycle runs.

    Parameters
    ----------
    objective : Objective
    starts : array of shape (members, n_parameters)
    n_epochs, batch_size, learning_rate, patience, tol
    seed : int
        Of the order of the rows.
    validation : callable, optional
        From weights (members, n_parameters) to losses (members,) on held-out rows.
    report : callable, optional
        Receives the mean loss of every epoch.
    """
    rng = np.random.default_rng(seed)
    theta = torch.as_tensor(starts).to(objective.x.dtype).clone()
    # By hand: the first step of a torch optimizer imports torch's compiler, which takes seconds.
    mean, variance = torch.zeros_like(theta), torch.zeros_like(theta)
    n, others = len(objective.x), 0
    if objective.x_derivatives is not None and not objective.shared:
        others = len(objective.x_derivatives)
    n_batches = max(1, math.ceil(max(n, others) / batch_size))
    curve: list[NDArray[np.float64]] = []
    best, best_loss = theta.clone(), torch.full((len(theta),), math.inf, dtype=theta.dtype)
    waited, step, stopped = 0, 0, False
    for _ in range(n_epochs):
        rows = np.array_split(rng.permutation(n), n_batches)
        derivative_rows = np.array_split(rng.permutation(others), n_batches)
        total = torch.zeros(len(theta), dtype=theta.dtype)
        for part, other in zip(rows, derivative_rows, strict=True):
            if len(part) == 0 and len(other) == 0:
                continue
            batch = objective.batch(torch.from_numpy(part), torch.from_numpy(other))
            losses, gradient = objective(theta, batch)
            rate = one_cycle(step, n_epochs * n_batches, learning_rate)
            step += 1
            mean.lerp_(gradient, 1 - _BETA1)
            variance.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            root = (variance / (1 - _BETA2**step)).sqrt_().add_(_EPSILON)
            theta.addcdiv_(mean, root, value=-rate / (1 - _BETA1**step))
            total += losses
        curve.append((total / n_batches).double().numpy())
        if report is not None:
            report(float(curve[-1].mean()))
        if validation is None:
            continue
        held_out = validation(theta)
        gained = held_out < best_loss * (1 - tol)
        better = held_out < best_loss
        best[better], best_loss[better] = theta[better], held_out[better]
        waited = 0 if bool(gained.any()) else waited + 1
        if waited >= patience:
            stopped = True
            break
    final = theta if validation is None else best
    losses = objective(final)[0].double().numpy()
    finite = np.isfinite(losses)
    return [
        Minimum(
            weights.double().numpy(),
            float(loss),
            [float(epoch[member]) for epoch in curve],
            bool(finite[member]) and (stopped or step > 0),
        )
        for member, (weights, loss) in enumerate(zip(final, losses, strict=True))
    ]
