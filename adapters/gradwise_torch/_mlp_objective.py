"""What the MLP regressor minimises, and its gradient, for many members at once."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwise._matching import matching_numerators, reduce_terms
from gradwise_torch._mlp_data import TrainingData
from gradwise_torch._mlp_network import Architecture, Pass

__all__ = ["Batch", "Objective"]

Floats = NDArray[np.float64]


class Batch(NamedTuple):
    """Rows on the way to the loss; those with derivatives come last."""

    x: Tensor
    y: Tensor
    weight: Tensor | None
    """Of rows of y, with mean 1: (n, 1), or (members, n, 1)."""
    target: Tensor | None
    known: Tensor | None
    """Which entries of `target` count; None for all."""
    entry_weight: Tensor | None
    """Of entries of `target`, of its shape or with members in front."""
    total: Tensor | float
    """Sum of the weights of the known entries; of each member, (members,), if they differ."""
    first: int
    """The first row of x with derivatives."""


class Objective:
    """``MSE(y) + derivative_weight * L(dydx) + alpha / n * sum W**2``, in standardised units.

    Parameters
    ----------
    architecture : Architecture
    data : TrainingData
    derivative_weight : float or array of shape (members,)
    alpha : float
    loss : {"mse", "huber"}
    dtype : torch.dtype
    folds : pair of arrays of shape (members, n) and (members, rows), optional
        Factors 0 or 1 of the weights of values and of derivatives for each member, which is not to learn from all rows.
    """

    def __init__(
        self,
        architecture: Architecture,
        data: TrainingData,
        *,
        derivative_weight: float | Floats,
        alpha: float,
        loss: str,
        dtype: torch.dtype,
        folds: tuple[Floats, Floats] | None = None,
    ) -> None:
        def tensor(array: Any) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype)

        self.architecture, self.loss = architecture, loss
        self.derivative_weight = tensor(derivative_weight) if np.ndim(derivative_weight) else derivative_weight
        # Members differ in more than their initial weights.
        self.folded = folds is not None or np.ndim(derivative_weight) > 0
        self.penalty = tensor(architecture.penalised()) * (alpha / data.total_weight)
        self.scale = None if data.scale is None else tensor(data.scale)
        self.threshold = 1.0 if data.threshold is None else tensor(data.threshold)
        weight = data.weight if folds is None else folds[0] * data.weight
        self.weight = None if np.all(weight == 1) else tensor((weight / weight.mean(-1, keepdims=True))[..., None])
        self.x, self.y = tensor(data.x), tensor(data.y)
        self.shared = data.shared or data.derivatives is None
        self.x_derivatives = self.target = self.known = self.entry_weight = None
        if data.derivatives is not None:
            part = data.derivatives
            self.x_derivatives = self.x if data.shared else tensor(part.x)
            self.target = tensor(part.target)
            self.known = None if part.known.all() else torch.as_tensor(part.known)
            weight = part.weight if folds is None else folds[1] * part.weight
            if np.any(weight != 1):
                self.entry_weight = tensor(weight[..., None, None] * np.ones(part.target.shape))
        self.everything = self.batch(slice(None), slice(None))

    def batch(self, rows: Any, derivative_rows: Any) -> Batch:
        """These rows of the values, and of the derivatives (which are ignored where both are at the same rows)."""
        x, y = self.x[rows], self.y[rows]
        weight = None if self.weight is None else self.weight[..., rows, :]
        if self.target is None or self.x_derivatives is None:
            return Batch(x, y, weight, None, None, None, 1.0, 0)
        first = 0
        if self.shared:
            derivative_rows = rows
        else:
            x, first = torch.cat([x, self.x_derivatives[derivative_rows]]), len(x)
        target = self.target[derivative_rows]
        known = None if self.known is None else self.known[derivative_rows]
        entries = None if self.entry_weight is None else self.entry_weight[..., derivative_rows, :, :]
        total: Tensor | float = float(target.numel() if known is None else known.sum())
        if entries is not None:
            counted = entries if known is None else entries * known
            total = counted.sum(dim=(-3, -2, -1))
            total = float(total) if total.ndim == 0 else total
        return Batch(x, y, weight, target, known, entries, total, first)

    def losses(self, values: Tensor, jacobian: Tensor | None, batch: Batch) -> Tensor:
        """Loss of each member without the penalty, (members,), from its outputs and derivatives."""
        squares = (values[:, : len(batch.y)] - batch.y).square()
        losses = torch.mean(squares if batch.weight is None else batch.weight * squares, dim=(1, 2))
        if jacobian is None or batch.target is None:
            return losses
        numerators = matching_numerators(
            jacobian,
            batch.target.expand_as(jacobian),
            known=None if batch.known is None else batch.known.expand_as(jacobian),
            sample_weight=batch.entry_weight,
            scale=self.scale,
            loss=self.loss,
            threshold=self.threshold,
            xp=torch,
        )
        # "none" multiplies each term by the number of terms, so that their mean is the mean: here a term is a member.
        factor = self.architecture.sizes[0] / len(values)
        matching = reduce_terms(numerators, batch.total, factor=factor, reduction="none", xp=torch)
        return losses + self.derivative_weight * matching

    def __call__(self, theta: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Losses (members,) and gradients (members, n_parameters) at theta (members, n_parameters)."""
        batch = self.everything if batch is None else batch
        with torch.no_grad():
            run = Pass(self.architecture, theta, batch.x, None if batch.target is None else batch.first)
            with torch.enable_grad():
                outputs = [run.values.requires_grad_()]
                if run.jacobian is not None:
                    outputs.append(run.jacobian.detach().requires_grad_())
                losses = self.losses(outputs[0], outputs[1] if len(outputs) > 1 else None, batch)
                slopes = torch.autograd.grad(losses.sum(), outputs)
            gradient = run.gradient(slopes[0], slopes[1] if len(slopes) > 1 else None)
            shrink = self.penalty * theta
            return losses.detach() + (shrink * theta).sum(dim=1), gradient.add_(shrink, alpha=2)

    def residuals(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of values, (members, n, n_outputs), and of derivatives, scaled, (members, rows, n_outputs, n_inputs)."""
        batch = self.everything
        with torch.no_grad():
            run = Pass(self.architecture, theta, batch.x, None if batch.target is None else batch.first)
            values = run.values[:, : len(batch.y)] - batch.y
            if run.jacobian is None or batch.target is None or self.scale is None:
                return values, None
            return values, self.scale * (run.jacobian - batch.target)
