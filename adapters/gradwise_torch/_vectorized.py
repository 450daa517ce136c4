"""All members at once: one forward and one backward over stacked copies of the parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gradwise_torch._batches import Batch
from gradwise_torch._buffers import AVERAGED
from gradwise_torch._perturbation import Perturbation
from gradwise_torch._weights import at_least_float32

__all__ = ["Stack", "StackedResult", "compiled_gradients", "stacked_gradients", "vmapped"]

COUNTED = (*AVERAGED, "num_batches_tracked")  # buffers that normalisation layers write to in a training-mode forward


@dataclass(frozen=True)
class StackedResult:
    """What the members said; all but the sizes have a first axis for the member."""

    losses: Tensor
    gradients: dict[str, Tensor | None]  # by the parameter's name in the model
    buffers: dict[str, Tensor]  # likewise
    square_norms: Tensor
    slopes: Tensor
    relative_sizes: Tensor


class Holder(nn.Module):
    """Makes a loss function of a model a module, whose parameters can be exchanged for the whole of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``loss_fn(model, *args, **kwargs)``."""
        return loss_fn(self.model, *args, **kwargs)


class Stack:
    """Members of a model as stacked parameters; memory is that of all members.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    perturbation : Perturbation
        What the members are.
    members : int
        How many.
    """

    def __init__(self, model: nn.Module, perturbation: Perturbation, members: int) -> None:
        self.members = members
        self.model = model
        moved = {id(entry.parameter): i for i, entry in enumerate(perturbation.entries)}
        noises = [perturbation.noises(member) for member in range(members)] if moved else []
        self.parameters: dict[str, Tensor] = {}
        self._moved: list[tuple[str, Tensor]] = []
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                place = moved.get(id(parameter))
                scale = None if place is None else perturbation.scales[place]
                if place is None or scale is None:
                    self.parameters[name] = parameter.detach().expand(members, *parameter.shape)
                    continue
                stacked = torch.empty(members, *parameter.shape, dtype=parameter.dtype, device=parameter.device)
                for member, out in enumerate(stacked.unbind()):
                    noises[member][place].move(out, parameter, scale)
                self.parameters[name] = stacked
                self._moved.append((name, parameter))
        self.buffers = {
            f"{prefix}.{name}" if prefix else name: buffer.detach().expand(members, *buffer.shape).clone()
            for prefix, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name in COUNTED and module.training
        }

    def result(self, losses: Tensor, gradients: dict[str, Tensor | None]) -> StackedResult:
        """The losses and gradients with what they say of each other."""
        present = [at_least_float32(g).flatten(1) for g in gradients.values() if g is not None]
        norms = [torch.linalg.vector_norm(g, dim=1).square() for g in present]
        slopes: list[Tensor] = []
        sizes: list[Tensor] = []
        for name, parameter in self._moved:
            mean = at_least_float32(parameter.detach())
            z = at_least_float32(self.parameters[name].detach()) - mean
            sizes.append(torch.stack([z[0].square().sum(), mean.square().sum()]).float())
            gradient = gradients[name]
            if gradient is not None:
                slopes.append(torch.linalg.vecdot(z.flatten(1), at_least_float32(gradient).flatten(1)))
        nothing = losses.new_zeros(self.members)
        return StackedResult(
            losses.detach(),
            gradients,
            self.buffers,
            _sum(norms, nothing),
            _sum(slopes, nothing),
            _sum(sizes, losses.new_zeros(2)),
        )


def stacked_gradients(
    stack: Stack,
    loss_fn: Callable[..., Any],
    batches: Sequence[Batch],
    transform: Callable[..., tuple[dict[str, Tensor | None], Tensor]],
    *,
    randomness: Literal["same", "different"],
) -> StackedResult:
    """Losses and gradients of all members.

    Parameters
    ----------
    stack : Stack
        The members.
    loss_fn : callable
        ``loss_fn(model, *args, **kwargs) -> mean loss``.
    batches : sequence of Batch
        One that all members share, or a shard for each, with sizes that are equal or one apart.
    transform : callable
        `vmapped`, or `compiled_gradients` after torch.compile.
    randomness : {"same", "different"}
        Whether members have the same dropout masks.
    """
    sharded = len(batches) > 1
    holder = Holder(stack.model)
    parts: list[tuple[dict[str, Tensor | None], Tensor]] = []
    for run in _runs_of_equal_size(batches) if sharded else [slice(0, stack.members)]:
        batch = _stacked(batches[run]) if sharded else batches[0]
        dims = [0 if sharded and isinstance(leaf, Tensor) and leaf.ndim else None for leaf in batch.leaves]
        parameters, buffers = (
            {f"model.{name}": tensor[run] for name, tensor in group.items()}
            for group in (stack.parameters, stack.buffers)
        )
        in_dims = (0, 0, *Batch(dims, batch.tree).arguments())
        parts.append(transform(holder, loss_fn, parameters, buffers, *batch.arguments(), in_dims, randomness))
    losses = torch.cat([losses for _, losses in parts])
    if losses.shape != (stack.members,):
        msg = f"the loss must be one number for each member; got shape {tuple(losses.shape)} for {stack.members}"
        raise ValueError(msg)
    return stack.result(losses, {name: _cat([g[f"model.{name}"] for g, _ in parts]) for name in stack.parameters})


def vmapped(
    holder: Holder,
    loss_fn: Callable[..., Any],
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_dims: Any,
    randomness: str,
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Forward under vmap, backward by plain autograd, which spares the small operations the layers of functorch."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    member_loss = partial(_member_loss, holder, loss_fn)
    losses = vmap(member_loss, in_dims=in_dims, randomness=randomness)(leaves, buffers, args, kwargs)
    losses.sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}, losses


def compiled_gradients(
    holder: Holder,
    loss_fn: Callable[..., Any],
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_dims: Any,
    randomness: str,
) -> tuple[dict[str, Tensor | None], Tensor]:
    """The same as one function for torch.compile, which cannot see a backward but can see ``torch.func.grad``."""

    def member_loss(*inputs: Any) -> Any:
        return _member_loss(holder, loss_fn, *inputs)

    return vmap(grad_and_value(member_loss), in_dims=in_dims, randomness=randomness)(parameters, buffers, args, kwargs)


def _member_loss(
    holder: Holder,
    loss_fn: Callable[..., Any],
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    return functional_call(holder, {**parameters, **buffers}, (loss_fn, *args), kwargs)


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
    if len(parts) == 1:
        return parts[0]
    some = [part for part in parts if part is not None]
    return torch.cat(some) if len(some) == len(parts) else None


def _sum(rows: Sequence[Tensor], nothing: Tensor) -> Tensor:
    device = nothing.device
    return torch.stack([nothing.float(), *(row.to(device=device, dtype=torch.float32) for row in rows)]).sum(0)
