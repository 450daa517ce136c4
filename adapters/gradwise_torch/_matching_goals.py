"""What a model's derivatives are compared with: a Jacobian, its products with directions, or the norms of its rows."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradwise._matching import gradient_norms, known_entries
from gradwise_torch._target_shapes import as_directional, as_jacobian, as_norms, as_tangents

__all__ = ["Goal", "Targets"]


class Goal(NamedTuple):
    """Targets in the form of the core: something computed from rows of the Jacobian must equal something known."""

    kind: str
    """ "jacobian", "jvp" or "norm"."""
    target: Tensor
    """Shape (batch, n_outputs, width)."""
    mask: Tensor | None
    sample_weight: Tensor | None
    project: Callable[[Tensor], Tensor]
    """From rows of the Jacobian, (batch, n_rows, n_inputs), to (batch, n_rows, width)."""
    multiplier: int
    """How many entries of an output the loss adds up: all inputs of a Jacobian, but the mean over directions."""

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
    name: str
    """What the user calls `jacobian`."""

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
        if self.tangents is not None and self.jvp is not None:
            tangents, n_directions = as_tangents(self.tangents, shape)
            target = as_directional("target_jvp", self.jvp, shape[0], n_outputs, n_directions)
            mask = None if self.mask is None else as_directional("mask", self.mask, shape[0], n_outputs, n_directions)
            return Goal("jvp", _plain(target, like), mask, weight, _along(_plain(tangents, like)), 1)
        if self.norm is not None:
            norm = self.norm if isinstance(self.norm, Tensor) else like.new_full((shape[0], n_outputs), self.norm)
            target = as_norms("target_norm", norm, shape[0], n_outputs)
            mask = None if self.mask is None else as_norms("mask", self.mask, shape[0], n_outputs)
            return Goal("norm", _plain(target, like), mask, weight, _norms, 1)
        n_inputs = math.prod(shape[1:])
        full = (shape[0], n_outputs, n_inputs)
        jacobian = like.new_zeros(()).expand(full) if self.jacobian is None else self.jacobian
        target = as_jacobian(self.name, jacobian, shape, n_outputs)
        mask = None if self.mask is None else as_jacobian("mask", self.mask, shape, n_outputs)
        return Goal("jacobian", _plain(target, like), mask, weight, _rows, n_inputs)

    def _check_combination(self, scale: str) -> None:
        named = (
            (self.name, self.jacobian),
            ("tangents", self.tangents),
            ("target_jvp", self.jvp),
            ("target_norm", self.norm),
        )
        given = [name for name, value in named if value is not None]
        if given not in ([], [self.name], ["tangents", "target_jvp"], ["target_norm"]):
            msg = (
                f"targets must be one of `{self.name}`, `tangents` together with `target_jvp`, or `target_norm`; got "
                f"{' and '.join(f'`{name}`' for name in given)}"
            )
            raise ValueError(msg)
        if scale != "none" and given in ([], ["target_norm"]):
            name = given[0] if given else f"{self.name}=None"
            msg = (
                f"`{name}` must go with scale 'none': {'a norm' if given else 'zero, which None means,'} has no scale "
                f'of its own; got scale {scale!r}. Use GradientMatching(scale="none"), or pass targets'
            )
            raise ValueError(msg)
        if scale == "per_input" and self.tangents is not None:
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


def _norms(rows: Tensor) -> Tensor:
    return gradient_norms(rows, xp=torch)[..., None]


def _rows(rows: Tensor) -> Tensor:
    return rows
