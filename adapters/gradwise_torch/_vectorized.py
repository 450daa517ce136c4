"""All members at once: one forward and one backward over stacked copies of the parameters."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from gradwise_torch._autograd_graph import graph_leaves
from gradwise_torch._batches import Batch
from gradwise_torch._double_backward import plain_attention
from gradwise_torch._stack import Holder, Members
from gradwise_torch._weights import at_least_float32

__all__ = [
    "Outcome",
    "arguments_of",
    "by_autograd",
    "by_functorch",
    "compiled",
    "kernels_for_vmap",
    "members_at_once",
]

Gradients = list[Tensor | None]
Differentiate = Callable[[Callable[..., Any], tuple[Any, ...], Any, str], tuple[Gradients, Tensor]]


class Outcome(NamedTuple):
    """What the members said: means over them, and statistics by member."""

    loss: Tensor
    gradients: Gradients  # as `Members.parameters`; None where the loss does not depend on one
    buffers: dict[str, Tensor]
    losses: Tensor
    square_norms: Tensor
    slopes: Tensor
    relative_sizes: Tensor
    mean_square_norm: Tensor


def members_at_once(
    differentiate: Differentiate,
    holder: Holder,
    loss_fn: Callable[..., Any],
    members: Members,
    batches: Sequence[tuple[slice, Any, Any]],
    weights: Tensor | None,
    randomness: str,
) -> Outcome:
    """One program for all members, which can be compiled as a whole.

    Parameters
    ----------
    differentiate : callable
        `by_autograd` or `by_functorch`.
    holder, loss_fn
        The model in a `Holder`, and the user's function of it.
    members : Members
        The weights.
    batches : sequence of (slice, (args, kwargs), (args, kwargs))
        Which members see which arguments, stacked where the second of the two says 0, shared where it says None.
    weights : Tensor of shape (members,), optional
        How much each counts; they sum to 1.
    randomness : {"same", "different"}
        Whether members have the same dropout masks.
    """
    count = len(weights) if weights is not None else batches[-1][0].stop
    moved = [members.noise.members(i, members.parameters[i].detach(), scale) for i, scale in enumerate(members.scales)]
    still = [p.detach().expand(count, *p.shape) for p in members.parameters[len(moved) :]]
    buffers = {name: buffer.expand(count, *buffer.shape).clone() for name, buffer in members.buffers.items()}
    parts: list[tuple[Gradients, Tensor]] = []
    for run, arguments, dims in batches:
        member_loss = partial(_member_loss, holder, loss_fn, members.names)
        inputs = ([row[run] for row in (*moved, *still)], {name: b[run] for name, b in buffers.items()}, *arguments)
        parts.append(differentiate(member_loss, inputs, (0, 0, *dims), randomness))
    losses = torch.cat([losses for _, losses in parts])
    if losses.shape != (count,):
        msg = f"the loss must be one number for each member; got shape {tuple(losses.shape)} for {count}"
        raise ValueError(msg)
    gradients = [_cat(rows) for rows in zip(*[gradients for gradients, _ in parts], strict=True)]
    return Outcome(
        _mean(losses, weights),
        [None if rows is None else _mean(rows, weights) for rows in gradients],
        {name: _mean(b, weights) if b.is_floating_point() else b[0] for name, b in buffers.items()},
        losses,
        *_statistics(gradients, moved, members.parameters, weights),
    )


def compiled() -> Callable[..., Outcome]:
    """`members_at_once`, compiled in one piece or not at all: what breaks the graph is quicker under plain vmap.

    A function of its own every time, since torch limits how often one may be compiled, for all models together.
    """
    own = FunctionType(members_at_once.__code__.replace(), globals(), members_at_once.__name__)
    return torch.compile(own, fullgraph=True)


def _statistics(
    gradients: Gradients, moved: list[Tensor], means: list[Tensor], weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``|g|^2`` and ``z . g`` of every member, ``|z|^2, |w|^2`` of the first, and ``|mean g|^2``."""
    everything = at_least_float32(torch.cat([rows.flatten(1) for rows in gradients if rows is not None], 1))
    mean = _mean(everything, weights)
    square_norms, mean_square_norm = everything.square().sum(1), mean.square().sum()
    used = [place for place in range(len(moved)) if gradients[place] is not None]
    if not used:
        return square_norms, torch.zeros_like(square_norms), square_norms.new_zeros(2), mean_square_norm
    w = at_least_float32(torch.cat([means[place].detach().flatten() for place in used]))
    z = torch.cat([moved[place].flatten(1) for place in used], 1) - w
    slopes = (z * everything[:, : z.shape[1]]).sum(1)  # those that move come first
    return square_norms, slopes, torch.stack([z[0].square().sum(), w.square().sum()]), mean_square_norm


def by_autograd(
    member_loss: Callable[..., Any], inputs: tuple[Any, ...], in_dims: Any, randomness: str, *, strict: bool = False
) -> tuple[Gradients, Tensor]:
    """Forward under vmap, backward by plain autograd, which spares the small operations the layers of functorch.

    `strict` looks for tensors that are not the members' and still get a gradient.
    """
    rows, *others = inputs
    leaves = [row.requires_grad_() for row in map(Tensor.detach, rows)]
    with torch.enable_grad():
        losses: Tensor = vmap(member_loss, in_dims=in_dims, randomness=randomness)(leaves, *others)
        total = losses.sum()
        if strict and not {id(leaf) for leaf in graph_leaves(total)} <= set(map(id, leaves)):
            msg = (
                "the loss has gradients for tensors that are not parameters of the model it is given: captured ones, "
                "or those of another module"
            )
            raise ValueError(msg)
        total.backward()
    return [leaf.grad for leaf in leaves], losses.detach()


@contextmanager
def kernels_for_vmap(device: torch.device) -> Iterator[None]:
    """Plain attention on CPUs, whose fused one has no batching rule; and no warning where vmap loops for want of one.

    That is slower and no less right, and torch would warn every time.
    """
    functorch: Any = torch._C._functorch  # type: ignore[reportAttributeAccessIssue] - C extension
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        with plain_attention() if device.type == "cpu" else nullcontext():
            yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)  # as it is by default; torch does not tell


def by_functorch(
    member_loss: Callable[..., Any], inputs: tuple[Any, ...], in_dims: Any, randomness: str
) -> tuple[Gradients, Tensor]:
    """The same for torch.compile, which cannot see a backward but can see ``torch.func.grad``."""

    def loss_of(*inputs: Any) -> Any:
        return member_loss(*inputs)

    gradients, losses = vmap(grad_and_value(loss_of), in_dims=in_dims, randomness=randomness)(*inputs)
    return gradients, losses


def arguments_of(shards: Sequence[Batch], batch: Batch, members: int) -> list[tuple[slice, Any, Any]]:
    """The `batches` of `members_at_once`: one that all share, or the shards, stacked where their sizes are equal."""
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in batch.leaves):
        msg = "the batch holds tensors that require gradients"
        raise ValueError(msg)
    if not shards:
        return [(slice(0, members), batch.arguments(), (None, None))]
    result: list[tuple[slice, Any, Any]] = []
    for run in _runs_of_equal_size(shards):
        stacked = _stacked(shards[run])
        dims = [0 if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in stacked.leaves]
        result.append((run, stacked.arguments(), Batch(dims, stacked.tree).arguments()))
    return result


def _member_loss(
    holder: Holder,
    loss_fn: Any,
    names: dict[str, int],
    parameters: list[Tensor],
    buffers: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    tensors = {**{name: parameters[place] for name, place in names.items()}, **buffers}
    return functional_call(holder, tensors, (loss_fn, *args), kwargs, tie_weights=False)


def _runs_of_equal_size(batches: Sequence[Batch]) -> list[slice]:
    """Neighbours that can be stacked: at most two runs, since sizes are at most one apart."""
    sizes = [batch.rows() for batch in batches]
    large = sizes.count(sizes[0])
    return [run for run in (slice(0, large), slice(large, len(sizes))) if run.start < run.stop]


def _stacked(shards: Sequence[Batch]) -> Batch:
    first = shards[0]
    if any(isinstance(leaf, np.ndarray) for leaf in first.leaves):
        msg = "the batch holds numpy arrays, which vmap cannot go along"
        raise TypeError(msg)
    leaves = [
        torch.stack([shard.leaves[i] for shard in shards]) if isinstance(leaf, Tensor) and leaf.ndim else leaf
        for i, leaf in enumerate(first.leaves)
    ]
    return Batch(leaves, first.tree)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    some = [part for part in parts if part is not None]
    if not some:
        return None  # the loss does not depend on it
    return some[0] if len(parts) == 1 else torch.cat(some)  # of one program, so that all are there or none


def _mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the first axis; weighted, where members count differently."""
    if weights is None:
        return rows.mean(0)
    return (rows * weights.to(rows).view(-1, *[1] * (rows.ndim - 1))).sum(0)  # not tensordot: autocast would cast it
