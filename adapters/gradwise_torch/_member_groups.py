"""Which processes hold one member together: those with different parts of the same tensors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradwise_torch._shards import is_dtensor

__all__ = ["member_group", "process"]


def member_group(parameters: Iterable[Tensor]) -> int:
    """The word of the noise keys that tells the members of processes apart.

    Processes that hold different shards of the same tensor (FSDP, tensor parallelism) are one group and have one
    member. Groups count from 0, in the order of their lowest ranks: without DTensors that is the rank of the process,
    under FSDP 0 for all of them, under HSDP the index of the replica.

    Parameters
    ----------
    parameters : iterable of Tensor
        All parameters of the model and of the optimizer, also those that are not perturbed: a tensor parallel layer
        must see the same member of the layer before it in all its processes.
    """
    rank = process()
    if rank < 0:
        return 0
    divided: dict[Any, set[int]] = {}
    for parameter in parameters:
        if is_dtensor(parameter):
            tensor: Any = parameter
            axes = {axis for axis, placement in enumerate(tensor.placements) if hasattr(placement, "dim")}
            divided.setdefault(tensor.device_mesh, set()).update(axes)
    lowest = list(range(torch.distributed.get_world_size()))

    def find(of: int) -> int:
        while lowest[of] != of:
            of = lowest[of]
        return of

    for mesh, axes in divided.items():
        for group in _joined(mesh, axes):
            first = min(map(find, group))
            for other in group:
                lowest[find(other)] = first
    return sum(lowest[other] == other for other in range(find(rank)))


def process() -> int:
    """The rank of this process; -1 as long as it knows of no other."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else -1


def _joined(mesh: Any, axes: set[int]) -> list[list[int]]:
    """Ranks of the mesh that differ only in some of its axes, a list for each combination of the others.

    A part of a larger mesh is seen differently by every process, and is joined in all of it, where that can be found
    by the names of the axes. Otherwise a group's index is its lowest rank: an index as good, but one that changes with
    the number of processes.
    """
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    names, of_root = mesh.mesh_dim_names, root.mesh_dim_names
    if root is not mesh and names and of_root and set(names) <= set(of_root):
        axes = {of_root.index(names[axis]) for axis in axes}
        mesh = root
    ranks: Tensor = mesh.mesh
    order = [axis for axis in range(ranks.ndim) if axis not in axes]
    together = ranks.permute(*order, *sorted(axes)).flatten(len(order)) if axes else ranks.unsqueeze(-1)
    return together.reshape(-1, together.shape[-1]).tolist()
