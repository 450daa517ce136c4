"""A multilayer perceptron as a function of one flat vector of weights, with its derivatives as plain operations."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ACTIVATIONS", "PIECEWISE_LINEAR", "Architecture"]

Activation = Callable[[Tensor], tuple[Tensor, Tensor]]
Layers = list[tuple[Tensor, Tensor]]


def _tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(z)
    return h, 1 - h * h


def _logistic(z: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.sigmoid(z)
    return h, h * (1 - h)


def _softplus(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.softplus(z), torch.sigmoid(z)


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(z)
    h = z * gate
    return h, gate + h * (1 - gate)


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    cumulative = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return z * cumulative, cumulative + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def _sin(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sin(z), torch.cos(z)


def _relu(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(z), (z > 0).to(z.dtype)


def _identity(z: Tensor) -> tuple[Tensor, Tensor]:
    return z, torch.ones_like(z)


# Value and slope of each: the slope is itself differentiated in training.
ACTIVATIONS: dict[str, Activation] = {
    "tanh": _tanh,
    "softplus": _softplus,
    "silu": _silu,
    "gelu": _gelu,
    "sin": _sin,
    "logistic": _logistic,
    "relu": _relu,
    "identity": _identity,
}
PIECEWISE_LINEAR = ("relu", "identity")


class Architecture(NamedTuple):
    """Sizes and activation. Weights are one vector `theta`, (n_parameters,) or for members (members, n_parameters)."""

    sizes: tuple[int, ...]
    """Inputs, hidden layers, outputs."""
    activation: str

    @property
    def n_parameters(self) -> int:
        """Length of a weight vector."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in self.fans)

    @property
    def fans(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    def initial(self, seed: int) -> NDArray[np.float64]:
        """Draw Xavier's normal weights; biases of hidden layers are uniform within one unit, those of the output 0.

        The inputs are standardised, so kinks and bends of the first layer start within the data.
        """
        rng = np.random.default_rng(seed)
        parts: list[NDArray[np.float64]] = []
        for layer, (fan_in, fan_out) in enumerate(self.fans):
            parts.append(rng.standard_normal(fan_in * fan_out) * math.sqrt(2 / (fan_in + fan_out)))
            last = layer == len(self.fans) - 1
            parts.append(np.zeros(fan_out) if last else rng.uniform(-1, 1, fan_out))
        return np.concatenate(parts)

    def penalised(self) -> NDArray[np.float64]:
        """Ones where a weight is penalised, zeros for biases, shape (n_parameters,)."""
        parts = [np.repeat([1.0, 0.0], [fan_in * fan_out, fan_out]) for fan_in, fan_out in self.fans]
        return np.concatenate(parts)

    def layers(self, theta: Tensor) -> Layers:
        """Weights (..., fan_in, fan_out) and biases (..., 1, fan_out) of each layer, as views of `theta`."""
        members = theta.shape[:-1]
        lengths = [length for fan_in, fan_out in self.fans for length in (fan_in * fan_out, fan_out)]
        parts = torch.split(theta, lengths, dim=-1)
        return [
            (weight.view(*members, fan_in, fan_out), bias.view(*members, 1, fan_out))
            for (fan_in, fan_out), weight, bias in zip(self.fans, parts[::2], parts[1::2], strict=True)
        ]

    def values(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs of shape (..., n, n_outputs) at `x` of shape (n, n_inputs)."""
        activation = ACTIVATIONS[self.activation]
        *hidden, (weight, bias) = self.layers(theta)
        for w, b in hidden:
            x = activation(torch.matmul(x, w) + b)[0]
        return torch.matmul(x, weight) + bias

    def values_and_jacobian(self, theta: Tensor, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Outputs at all rows of `x`, and their derivatives at the rows from `first` on.

        The adjoint of every output is carried back through the layers by plain operations, one row for each output, so
        that training needs an ordinary backward pass only.

        Returns
        -------
        values : Tensor of shape (..., n, n_outputs)
        jacobian : Tensor of shape (..., n - first, n_outputs, n_inputs)
        """
        activation = ACTIVATIONS[self.activation]
        *hidden, (weight, bias) = self.layers(theta)
        slopes: list[Tensor] = []
        for w, b in hidden:
            x, slope = activation(torch.matmul(x, w) + b)
            slopes.append(slope[..., first:, :] if first else slope)
        values = torch.matmul(x, weight) + bias
        n_outputs, rows = self.sizes[-1], values.shape[-2] - first
        members = theta.shape[:-1]
        adjoint = weight.mT[..., None, :]  # (..., n_outputs, 1, fan_in)
        for (w, _), slope in zip(reversed(hidden), reversed(slopes), strict=True):
            flat = (adjoint * slope[..., None, :, :]).reshape(*members, n_outputs * rows, w.shape[-1])
            adjoint = torch.matmul(flat, w.mT).view(*members, n_outputs, rows, w.shape[-2])
        jacobian = adjoint.transpose(-3, -2)
        return values, jacobian.expand(*members, rows, n_outputs, self.sizes[0])
