"""What a model's derivatives are compared with: Jacobians, their norms, or products of them or of Hessians."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradwise._matching import gradient_norms, known_entries
from gradwise_torch._target_shapes import as_directional, as_hessian, as_jacobian, as_norms, as_tangents

__all__ = ["Goal", "Targets"]


class Goal(NamedTuple):
    """Targets in the form of the core: something computed from derivatives must equal something known."""

    kind: str
    """ "jacobian", "jvp", "norm", "hvp" or "curvature"."""
    target: Tensor
    """Shape (batch, n_outputs, width)."""
    mask: Tensor | None
    sample_weight: Tensor | None
    project: Callable[[Tensor], Tensor]
    """From rows of the Jacobian, (batch, n_rows, n_inputs), to (batch, n_rows, width); with `second`, from products of
    Hessians with directions, (batch, n_rows, n_directions * n_inputs)."""
    multiplier: int
    """How many entries of an output the loss adds up: all inputs of a Jacobian, but the mean over directions."""
    second: Tensor | None = None
    """Directions for second derivatives, shape (batch, n_directions, n_inputs)."""
    informative: bool = True
    """Whether the targets say something about the data; None (zero) and norms do not."""

    def known(self) -> Tensor | None:
        """Which entries of the target count; None if all do and that is cheap to see."""
        unrestricted = self.mask is None and self.sample_weight is None
        # Any NaN makes a sum NaN, in a tenth of the time of comparing every entry. Not on other devices, where reading
        # the sum would wait for everything before it.
        if unrestricted and self.target.device.type == "cpu" and math.isfinite(self.target.detach().sum().item()):
            return None
        return known_entries(self.target, mask=self.mask, sample_weight=self.sample_weight, xp=torch)


class Targets(NamedTuple):
    """The user's arguments of one call."""

    jacobian: Tensor | None
    mask: Tensor | None
    sample_weight: Tensor | None
    tangents: Tensor | None
    jvp: Tensor | None
    norm: Tensor | float | None
    hvp: Tensor | None
    curvature: Tensor | None
    name: str = "target_jacobian"
    """What the user calls `jacobian`."""

    @property
    def second_order(self) -> bool:
        """Whether second derivatives are asked for."""
        return self.hvp is not None or self.curvature is not None

    def goal(self, x: Tensor, n_outputs: int, *, scale: str) -> Goal:
        """Check shapes and values against inputs `x` and bring everything to (batch, n_outputs, ...), in x's precision.

        Raises
        ------
        ValueError
            If shapes or combinations are wrong.
        TypeError
            If the mask is not boolean.
        """
        self._check_combination(scale)
        shape = tuple(x.shape)
        # float32 at least, under autocast and for half-precision models too: a sum of squares needs it.
        like = x.detach() if x.dtype.itemsize >= 4 else x.detach().float()
        weight = self._checked_weight(shape[0], like)
        if self.tangents is not None:
            return self._along_tangents(self.tangents, shape, n_outputs, weight, like)
        if self.norm is not None:
            norm = self.norm if isinstance(self.norm, Tensor) else like.new_full((shape[0], n_outputs), self.norm)
            target = as_norms("target_norm", norm, shape[0], n_outputs)
            mask = None if self.mask is None else as_norms("mask", self.mask, shape[0], n_outputs)
            return Goal("norm", _plain(target, like), mask, weight, _norms, 1, informative=False)
        n_inputs = math.prod(shape[1:])
        full = (shape[0], n_outputs, n_inputs)
        jacobian = like.new_zeros(()).expand(full) if self.jacobian is None else self.jacobian
        target = as_jacobian(self.name, jacobian, shape, n_outputs)
        mask = None if self.mask is None else as_jacobian("mask", self.mask, shape, n_outputs)
        informative = self.jacobian is not None
        return Goal("jacobian", _plain(target, like), mask, weight, _rows, n_inputs, informative=informative)

    def _along_tangents(
        self, tangents: Tensor, shape: tuple[int, ...], n_outputs: int, weight: Tensor | None, like: Tensor
    ) -> Goal:
        along, n_directions = as_tangents(tangents, shape)
        along, mask = _plain(along, like), self.mask
        if self.hvp is not None:
            target = as_hessian("target_hvp", self.hvp, shape, n_outputs, n_directions)
            mask = None if mask is None else as_hessian("mask", mask, shape, n_outputs, n_directions)
            return Goal("hvp", _plain(target, like), mask, weight, _rows, math.prod(shape[1:]), second=along)
        mask = None if mask is None else as_directional("mask", mask, shape[0], n_outputs, n_directions)
        if self.curvature is not None:
            target = as_directional("target_curvature", self.curvature, shape[0], n_outputs, n_directions)
            return Goal("curvature", _plain(target, like), mask, weight, _twice_along(along), 1, second=along)
        target = as_directional("target_jvp", self.jvp, shape[0], n_outputs, n_directions)
        return Goal("jvp", _plain(target, like), mask, weight, _along(along), 1)

    def _check_combination(self, scale: str) -> None:
        named = (
            (self.name, self.jacobian),
            ("tangents", self.tangents),
            ("target_jvp", self.jvp),
            ("target_hvp", self.hvp),
            ("target_curvature", self.curvature),
            ("target_norm", self.norm),
        )
        given = [name for name, value in named if value is not None]
        directional = given[:1] == ["tangents"] and len(given) == 2 and given[1] != "target_norm"
        if not directional and given not in ([], [self.name], ["target_norm"]):
            msg = (
                f"targets must be one of `{self.name}`, `target_norm`, or `tangents` together with one of "
                f"`target_jvp`, `target_hvp`, `target_curvature`; got {' and '.join(f'`{name}`' for name in given)}. "
                "For several in one forward pass use several GradientMatching and their `from_outputs`"
            )
            raise ValueError(msg)
        if scale != "none" and given in ([], ["target_norm"]):
            name = given[0] if given else f"{self.name}=None"
            msg = (
                f"`{name}` must go with scale 'none': {'a norm' if given else 'zero, which None means,'} has no scale "
                f'of its own; got scale {scale!r}. Use GradientMatching(scale="none"), or pass targets'
            )
            raise ValueError(msg)
        if scale == "per_input" and self.tangents is not None and self.hvp is None:
            msg = "`tangents` must go with scale 'block' or 'none', as directions are no inputs; got scale 'per_input'"
            raise ValueError(msg)
        if self.mask is not None and self.mask.dtype != torch.bool:
            msg = f"`mask` must be boolean; got {self.mask.dtype}. Pass `mask != 0`"
            raise TypeError(msg)

    def _checked_weight(self, batch: int, like: Tensor) -> Tensor | None:
        weight = self.sample_weight
        if weight is None:
            return None
        if tuple(weight.shape) != (batch,):
            msg = f"`sample_weight` must have shape ({batch},), one weight for each row; got {tuple(weight.shape)}"
            raise ValueError(msg)
        if not bool((weight >= 0).all()):
            msg = f"`sample_weight` must not be negative or NaN; got {weight.min().item()}"
            raise ValueError(msg)
        return _plain(weight, like)


def _plain(tensor: Tensor, like: Tensor) -> Tensor:
    # autograd cannot save a tensor that was made in inference mode.
    tensor = tensor.to(like.device, like.dtype)
    return tensor.clone() if tensor.is_inference() else tensor


def _along(tangents: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.einsum("boj,bdj->bod", rows, tangents)


def _twice_along(tangents: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda products: torch.einsum("bodj,bdj->bod", products.unflatten(2, tuple(tangents.shape[1:])), tangents)


def _norms(rows: Tensor) -> Tensor:
    return gradient_norms(rows, xp=torch)[..., None]


def _rows(rows: Tensor) -> Tensor:
    return rows
