"""DTensors: the part of a tensor that this process holds, where it lies in the whole, and what only the whole knows.

Nothing here imports ``torch.distributed.tensor``: without it in the process there are no DTensors.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradwise._population import Population

__all__ = ["Shard", "dtensor_of", "is_dtensor", "laid_out_like", "local_of", "shards_of", "version_of", "whole_scales"]

_PLAIN = frozenset((Tensor, nn.Parameter))  # what nearly all tensors are; these questions are asked often

Places = tuple[int, int] | Tensor
"""Which indices of an axis: from where to where, or each of them."""


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is spread over processes."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Any) -> Tensor:
    """What this process holds of a DTensor, without autograd: writing to it writes to the DTensor. Else the tensor."""
    # Not to_local(), which makes a new view of a parameter, with a version counter that nobody else advances.
    return tensor if type(tensor) in _PLAIN or not is_dtensor(tensor) else tensor._local_tensor


def version_of(tensor: Any) -> int:
    """A number that grows when anybody writes to the tensor, or to what this process holds of it."""
    # Operations on a DTensor count for it alone, and those on its local tensor for that one.
    if type(tensor) in _PLAIN or not is_dtensor(tensor):
        return tensor._version
    return tensor._version + tensor._local_tensor._version


def dtensor_of(local: Tensor, like: Any) -> Tensor:
    """A tensor of shards laid out like the DTensor `like`, of which `local` is the one of this process."""
    if not is_dtensor(like):
        return local
    # Shape and stride are given, or the other processes would be asked for theirs.
    return type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def laid_out_like(tensor: Any, like: Any) -> Tensor:
    """The tensor, spread over processes as `like` is: parts that are yet to be added up (gradients) are added up."""
    if not is_dtensor(tensor) or tensor.placements == like.placements:
        return tensor
    return tensor.redistribute(placements=like.placements)


def shards_of(tensor: Any) -> int:
    """In how many parts a tensor is divided between processes."""
    if not is_dtensor(tensor):
        return 1
    return math.prod(tensor.device_mesh.size(place) for place, _ in _divisions(tensor))


@dataclass(frozen=True)
class Shard:
    """Where the part of this process lies in a DTensor.

    Attributes
    ----------
    shape : tuple of int
        That of the whole tensor.
    local_shape : tuple of int
        That of the part, which may be empty.
    places : tuple
        For every axis, which indices of the whole the part has.
    span : tuple of int or None
        From where to where it goes in the flattened whole, if it is in one piece there.
    mesh : DeviceMesh
        The processes.
    divisions : tuple of (int, int)
        Each axis of the mesh along which the tensor is divided, and the tensor's axis that is divided there.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    places: tuple[Places, ...]
    span: tuple[int, int] | None
    mesh: Any
    divisions: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, name: str, tensor: Any) -> "Shard | None":
        """The part that this process has of a DTensor; None for other tensors."""
        if not is_dtensor(tensor):
            return None
        mesh = tensor.device_mesh
        divisions = _divisions(tensor) if mesh.get_coordinate() else ()  # this process may have no part in the mesh
        if any(placement.is_partial() for placement in tensor.placements):
            msg = f"`{name}` must be replicated or sharded along every axis of its mesh; got {tensor.placements}"
            raise ValueError(msg)
        shape, local_shape = tuple(tensor.shape), tuple(local_of(tensor).shape)
        indices = [torch.arange(size) for size in shape]
        for place, axis in divisions:
            factor = getattr(tensor.placements[place], "split_factor", 1)
            indices[axis] = _share(indices[axis], mesh.get_local_rank(place), mesh.size(place), factor)
        if 0 not in local_shape and tuple(map(len, indices)) != local_shape:
            msg = (
                f"`{name}` must be sharded in a way that is known here; {tensor.placements} of shape {shape} should "
                f"leave {tuple(map(len, indices))} on this process, which has {local_shape}. Exclude it with `perturb`"
            )
            raise ValueError(msg)
        places = tuple(map(_as_range, indices))
        return cls(shape, local_shape, places, _span(shape, local_shape, places), mesh, divisions)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the tensor is here."""
        return 0 in self.local_shape

    def cut(self, whole: Tensor) -> Tensor:
        """The part of this process of a tensor that is here as a whole."""
        for axis, places in enumerate(self.places):
            if isinstance(places, Tensor):
                whole = whole.index_select(axis, places.to(whole.device))
            else:
                whole = whole.narrow(axis, places[0], places[1] - places[0])
        return whole


def _divisions(tensor: Any) -> tuple[tuple[int, int], ...]:
    # Both kinds of sharding have a `dim`; their classes are related in some versions of torch and not in others.
    return tuple((place, axis.dim) for place, axis in enumerate(tensor.placements) if hasattr(axis, "dim"))


def _share(indices: Tensor, rank: int, ranks: int, factor: int) -> Tensor:
    """The indices that remain for one of the ranks: its chunk, or (strided sharding) its chunk of every piece."""
    mine = [chunks[rank] for piece in indices.chunk(factor) if len(chunks := piece.chunk(ranks)) > rank]
    return torch.cat([*mine, indices[:0]])


def _as_range(indices: Tensor) -> Places:
    start = int(indices[0]) if len(indices) else 0
    stop = start + len(indices)
    return (start, stop) if torch.equal(indices, torch.arange(start, stop)) else indices


def _span(shape: Sequence[int], local_shape: Sequence[int], places: Sequence[Places]) -> tuple[int, int] | None:
    if 0 in local_shape:
        return 0, 0
    start, runs = 0, False  # whether an axis before this one has more than one index
    for whole, local, of_axis in zip(shape, local_shape, places, strict=True):
        if isinstance(of_axis, Tensor) or (runs and local != whole):
            return None
        runs = runs or local > 1
        start = start * whole + of_axis[0]
    return start, start + math.prod(local_shape)


@torch.no_grad()
def whole_scales(
    scales: Sequence[Tensor | None], shards: Sequence[Shard | None], population: Population
) -> list[Tensor | None]:
    """Scales of whole tensors from those of the parts: the root of the mean of their squares, over all processes.

    The means of all tensors go together: one message along every axis of the mesh (for FSDP2 and HSDP: one). All
    processes get the same bits. Nothing is sent where no axis that the scale averages over is divided.
    """
    result = list(scales)
    squares: dict[int, Tensor] = {}  # by place in the list
    waiting: dict[tuple[Any, int], list[int]] = {}  # by mesh and axis of it
    for place, (scale, shard) in enumerate(zip(scales, shards, strict=True)):
        if scale is None or shard is None:
            continue
        averaged = population.averaged_axes(len(shard.shape))
        along = [(shard.mesh, axis) for axis, divided in shard.divisions if divided in averaged]
        for key in along:
            waiting.setdefault(key, []).append(place)
        if along:
            fraction = math.prod(shard.local_shape[axis] / max(1, shard.shape[axis]) for axis in averaged)
            # Double: squares of tiny float32 weights underflow. The mean of nothing is NaN, and counts nothing.
            squares[place] = scale.double().square() * fraction if fraction else torch.zeros_like(scale).double()
    for (mesh, axis), places in waiting.items():
        for place, square in zip(places, _sums([squares[place] for place in places], mesh, axis), strict=True):
            squares[place] = square
    for place, square in squares.items():
        scale = result[place]
        assert scale is not None
        result[place] = square.sqrt().to(scale.dtype)
    for place, shard in enumerate(shards):
        if shard is not None and shard.is_empty:
            result[place] = None  # nothing here moves
    return result


def _sums(values: Sequence[Tensor], mesh: Any, axis: int) -> list[Tensor]:
    flat = torch.cat([value.to(mesh.device_type).reshape(-1) for value in values])  # parameters may be offloaded
    torch.distributed.all_reduce(flat, group=mesh.get_group(axis))
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape).to(value.device) for part, value in zip(parts, values, strict=True)]
