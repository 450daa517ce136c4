"""What the MLP regressor minimises, and its gradient."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwise._matching import matching_numerators, reduce_terms
from gradwise_torch._mlp_data import TrainingData
from gradwise_torch._mlp_network import Architecture

__all__ = ["Objective"]


class _Tensors(NamedTuple):
    """The training data on the way to the loss; rows with derivatives come last."""

    x: Tensor
    y: Tensor
    weight: Tensor | None
    target: Tensor | None
    known: Tensor | None
    entry_weight: Tensor | None
    total: float
    """Total weight of the known entries."""
    first: int
    """The first row with derivatives."""


class Objective:
    """``MSE(y) + derivative_weight * L(dydx) + alpha / n * sum W**2``, in standardised units."""

    def __init__(
        self,
        architecture: Architecture,
        data: TrainingData,
        *,
        derivative_weight: float,
        alpha: float,
        loss: str,
        dtype: torch.dtype,
    ) -> None:
        self.architecture, self.loss, self.derivative_weight = architecture, loss, derivative_weight
        penalised = torch.as_tensor(architecture.penalised(), dtype=dtype)
        self.penalty = penalised * (alpha / data.total_weight)
        weighted = bool(np.any(data.weight != 1))
        as_tensor = lambda array: torch.as_tensor(array, dtype=dtype)  # noqa: E731
        self.scale = None if data.scale is None else as_tensor(data.scale)
        self.threshold = 1.0 if data.threshold is None else as_tensor(data.threshold)
        x, target, known, entry_weight, total, first = data.x, None, None, None, 1.0, 0
        if data.derivatives is not None:
            derivatives = data.derivatives
            first = 0 if data.shared else len(x)
            x = x if data.shared else np.concatenate([x, derivatives.x])
            target = as_tensor(derivatives.target)
            known = None if derivatives.known.all() else torch.as_tensor(derivatives.known)
            entry_weight = as_tensor(derivatives.weight) if np.any(derivatives.weight != 1) else None
            total = float((derivatives.known * derivatives.weight[:, None, None]).sum())
        self.data = _Tensors(
            x=as_tensor(x),
            y=as_tensor(data.y),
            weight=as_tensor(data.weight[:, None]) if weighted else None,
            target=target,
            known=known,
            entry_weight=entry_weight,
            total=total,
            first=first,
        )

    def terms(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss of the values and loss of the derivatives, without weight; for one weight vector."""
        data = self.data
        if data.target is None:
            values, jacobian = self.architecture.values(theta, data.x), None
        else:
            values, jacobian = self.architecture.values_and_jacobian(theta, data.x, data.first)
        residual = (values[: len(data.y)] - data.y).square()
        value_loss = torch.mean(residual if data.weight is None else data.weight * residual)
        if jacobian is None or data.target is None:
            return value_loss, None
        numerators = matching_numerators(
            jacobian,
            data.target,
            known=data.known,
            sample_weight=data.entry_weight,
            scale=self.scale,
            loss=self.loss,
            threshold=self.threshold,
            xp=torch,
        )
        factor = self.derivative_weight * self.architecture.sizes[0]
        return value_loss, reduce_terms(numerators, data.total, factor=factor, reduction="mean", xp=torch)

    def __call__(self, theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Loss and gradient at a weight vector of shape (n_parameters,)."""
        weights = torch.from_numpy(theta).to(self.penalty.dtype).requires_grad_()
        value_loss, derivative_loss = self.terms(weights)
        loss = value_loss if derivative_loss is None else value_loss + derivative_loss
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            shrink = self.penalty * weights
            loss = loss.detach() + torch.dot(shrink, weights)
            gradient = gradient.add_(shrink, alpha=2)
        return loss.item(), gradient.double().numpy()
