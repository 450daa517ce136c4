"""The seed of the noise, where nobody gives one, and what processes that train together have to agree on."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwise_torch._shards import is_dtensor

__all__ = ["choose_seed"]


def choose_seed(seed: int | None, taken: Iterable[int], model: nn.Module | None, parameters: Sequence[Tensor]) -> int:
    """`seed`, or torch's own seed plus one for each that is `taken` already; the same in processes that need the same.

    Shards of one member come from one seed. Replicas have other members by their rank, whatever the seeds; theirs are
    made equal because a checkpoint holds only one of them, and a resumed run must not have other noise. Of seeds that
    differ the lowest counts, which costs a message or two.

    Raises
    ------
    ValueError
        In all processes, if they were given different seeds for one member.
    """
    chosen = _free(taken) if seed is None else seed
    sharded = [group for parameter in parameters if is_dtensor(parameter) for group in _groups_of(parameter)]
    replicated = [] if model is None or seed is not None else _groups_of_wrappers(model)
    seeds = {chosen}
    for group in dict.fromkeys((*sharded, *replicated)):
        seeds = _seeds_in(group, seeds)
    if seed is not None and len(seeds) > 1:  # only now: others may wait for this process along another axis of the mesh
        msg = (
            f"`seed` must be the same in all processes that hold parts of one model; got {sorted(seeds)}. "
            "Members of replicas differ by themselves"
        )
        raise ValueError(msg)
    return min(seeds)


def _free(taken: Iterable[int]) -> int:
    used = set(taken)
    seed = torch.initial_seed() % 2**63
    while seed in used:
        seed += 1
    return seed


def _groups_of(parameter: Any) -> list[Any]:
    mesh = parameter.device_mesh
    return [] if mesh.get_coordinate() is None else [mesh.get_group(axis) for axis in range(mesh.ndim)]


def _groups_of_wrappers(model: nn.Module) -> list[Any]:
    return [m.process_group for m in model.modules() if isinstance(m, DistributedDataParallel)]


def _seeds_in(group: Any, seeds: set[int]) -> set[int]:
    everybodys: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everybodys, seeds, group)
    return set().union(*everybodys)
