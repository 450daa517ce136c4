"""Activations of the MLP regressor, with the two derivatives that matching input derivatives takes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "PIECEWISE_LINEAR", "Activation"]


class Activation(NamedTuple):
    """A function of z, its slope from z and its value, its curvature from z, value and slope."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor, Tensor], Tensor]


def _silu_slope(z: Tensor, h: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate + h * (1 - gate)


def _silu_curvature(z: Tensor, _h: Tensor, _s: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 - gate) * (2 + z * (1 - 2 * gate))


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def _gelu_slope(z: Tensor, _h: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * _density(z)


def _no_curvature(z: Tensor, _h: Tensor, _s: Tensor) -> Tensor:
    return torch.zeros_like(z)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(torch.nn.functional.silu, _silu_slope, _silu_curvature),
    "tanh": Activation(torch.tanh, lambda _z, h: 1 - h * h, lambda _z, h, s: -2 * h * s),
    "softplus": Activation(torch.nn.functional.softplus, lambda z, _h: torch.sigmoid(z), lambda _z, _h, s: s * (1 - s)),
    "gelu": Activation(torch.nn.functional.gelu, _gelu_slope, lambda z, _h, _s: _density(z) * (2 - z * z)),
    "sin": Activation(torch.sin, lambda z, _h: torch.cos(z), lambda _z, h, _s: -h),
    "logistic": Activation(torch.sigmoid, lambda _z, h: h * (1 - h), lambda _z, h, s: s * (1 - 2 * h)),
    "relu": Activation(torch.relu, lambda z, _h: (z > 0).to(z.dtype), _no_curvature),
    "identity": Activation(torch.clone, lambda z, _h: torch.ones_like(z), _no_curvature),
}
# Derivatives of such a network are piecewise constant.
PIECEWISE_LINEAR = ("relu", "identity")
