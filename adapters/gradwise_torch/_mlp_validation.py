"""Rows held out for early stopping: a network that learns from derivatives is judged by its values."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwise._scaling import DerivativeScaler
from gradwise_torch._mlp_data import Derivatives
from gradwise_torch._mlp_network import Architecture

__all__ = ["HeldOut", "Split", "hold_out"]

Floats = NDArray[np.float64]


class HeldOut(NamedTuple):
    """Rows that are not trained on."""

    X: Floats
    y: Floats
    weight: Floats | None

    def loss(
        self, architecture: Architecture, scaler: DerivativeScaler, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        """Mean squared error of standardised values, (members,), as a function of weights (members, n_parameters)."""
        X, y, _ = scaler.transform(self.X, self.y)
        x, target = torch.as_tensor(X, dtype=dtype), torch.as_tensor(y, dtype=dtype)
        weight = np.ones(len(self.X)) if self.weight is None else self.weight
        shares = torch.as_tensor(weight / weight.sum(), dtype=dtype)

        def validation(theta: Tensor) -> Tensor:
            with torch.no_grad():
                return ((architecture.values(theta, x) - target).square().mean(dim=2) * shares).sum(dim=1)

        return validation


class Split(NamedTuple):
    """Which rows are trained on and which are held out."""

    kept: NDArray[np.intp]
    held: NDArray[np.intp]

    def apply(
        self, X: Floats, y: Floats, weight: Floats | None, derivatives: Derivatives | None, *, shared: bool
    ) -> tuple[Floats, Floats, Floats | None, Derivatives | None, HeldOut]:
        """Training rows, and the others; derivatives at other points (not `shared`) are all kept."""
        held_out = HeldOut(X[self.held], y[self.held], None if weight is None else weight[self.held])
        if derivatives is not None and shared:
            x, target, known, row_weight = derivatives
            derivatives = Derivatives(x[self.kept], target[self.kept], known[self.kept], row_weight[self.kept])
            derivatives = derivatives if derivatives.known.any() else None
        return X[self.kept], y[self.kept], None if weight is None else weight[self.kept], derivatives, held_out


def hold_out(n: int, fraction: float, seed: int) -> Split:
    """Hold out a random `fraction` of n rows, at least one.

    Raises
    ------
    ValueError
        If nothing would be left.
    """
    count = max(1, round(fraction * n))
    if count >= n:
        msg = f"`early_stopping` needs rows to train on and rows to hold out; got {n} rows and fraction {fraction}"
        raise ValueError(msg)
    order = np.random.default_rng(seed).permutation(n)
    return Split(np.sort(order[count:]), np.sort(order[:count]))
