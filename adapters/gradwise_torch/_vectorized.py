"""All members at once: one forward and one backward over stacked copies of the parameters."""

from collections.abc import Callable, Sequence
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

__all__ = ["Stack", "compiled_gradients", "stacked_gradients", "vmapped"]

COUNTED = (*AVERAGED, "num_batches_tracked")  # buffers that normalisation layers write to in a training-mode forward

Gradients = list[Tensor | None]
Transform = Callable[..., tuple[Gradients, Tensor]]


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

    Attributes
    ----------
    parameters : list of Tensor
        The model's trainable parameters, each once, those that are perturbed first.
    rows : list of Tensor
        Likewise, with a first axis for the member.
    names : dict
        All the names that the parameters have in a `Holder`, so that nobody need look for tied ones, to their places.
    buffers : dict
        Those of normalisation layers in training mode, by name, with a first axis for the member.
    own_buffers : list of Tensor
        Likewise, the model's own.
    """

    def __init__(self, model: nn.Module, perturbation: Perturbation, members: int) -> None:
        self.model = model
        self.members = members
        moved = {
            id(entry.parameter): (entry.parameter, rows)
            for entry, rows in zip(perturbation.entries, perturbation.stacked(members), strict=True)
            if rows is not None
        }
        still = [p for p in model.parameters() if p.requires_grad and id(p) not in moved]
        self._moved = len(moved)
        self.parameters = [*(parameter for parameter, _ in moved.values()), *still]
        self.rows = [*(rows for _, rows in moved.values()), *(p.detach().expand(members, *p.shape) for p in still)]
        self.names: dict[str, int] = {}
        self.buffers: dict[str, Tensor] = {}
        self.own_buffers: list[Tensor] = []
        places = {id(parameter): place for place, parameter in enumerate(self.parameters)}
        for prefix, module in model.named_modules(prefix="model", remove_duplicate=False):
            for name, parameter in module._parameters.items():
                if id(parameter) in places:
                    self.names[f"{prefix}.{name}"] = places[id(parameter)]
            for name, buffer in module._buffers.items() if module.training else ():
                if buffer is not None and name in COUNTED:
                    self.buffers[f"{prefix}.{name}"] = buffer.detach().expand(members, *buffer.shape).clone()
                    self.own_buffers.append(buffer)

    @torch.no_grad()
    def statistics(self, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """``|g|^2`` and ``z . g`` of every member."""
        moved = [place for place in range(self._moved) if gradients[place] is not None]
        flat = [gradient.flatten(1) for gradient in gradients if gradient is not None]
        everything = at_least_float32(torch.cat(flat, 1))
        square_norms = torch.linalg.vector_norm(everything, dim=1).square()
        if not moved:
            return square_norms, torch.zeros_like(square_norms)
        mean = torch.cat([self.parameters[place].flatten() for place in moved])
        z = torch.cat([self.rows[place].flatten(1) for place in moved], 1) - at_least_float32(mean)
        return square_norms, torch.linalg.vecdot(z, everything[:, : z.shape[1]])  # those that move come first

    @torch.no_grad()
    def relative_sizes(self) -> Tensor:
        """``|z|^2`` and ``|w|^2`` of the first member."""
        if not self._moved:
            return torch.zeros(2)
        mean = at_least_float32(torch.cat([parameter.flatten() for parameter in self.parameters[: self._moved]]))
        z = torch.cat([rows[0].flatten() for rows in self.rows[: self._moved]]) - mean
        return torch.stack([torch.dot(z, z), torch.dot(mean, mean)])


def stacked_gradients(
    stack: Stack,
    loss_fn: Callable[..., Any],
    batches: Sequence[Batch],
    transform: Transform,
    *,
    randomness: Literal["same", "different"],
) -> tuple[Gradients, Tensor]:
    """Gradients and losses of all members, each with a first axis for the member.

    Parameters
    ----------
    stack : Stack
        The members. Its buffers are written to.
    loss_fn : callable
        ``loss_fn(model, *args, **kwargs) -> mean loss``.
    batches : sequence of Batch
        One that all members share, or a shard for each, with sizes that are equal or one apart.
    transform : callable
        `vmapped`, or `compiled_gradients` after torch.compile.
    randomness : {"same", "different"}
        Whether members have the same dropout masks.

    Returns
    -------
    gradients : list
        As ``stack.parameters``; None where the loss does not depend on one.
    losses : Tensor of shape (members,)
    """
    holder = Holder(stack.model)
    if len(batches) == 1:
        batch, in_dims = batches[0], (0, 0, None, None)
        parts = [
            transform(holder, loss_fn, stack.names, stack.rows, stack.buffers, *batch.arguments(), in_dims, randomness)
        ]
    else:
        parts = []
        for run in _runs_of_equal_size(batches):
            batch = _stacked(batches[run])
            dims = [0 if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in batch.leaves]
            in_dims = (0, 0, *Batch(dims, batch.tree).arguments())
            rows = [row[run] for row in stack.rows]
            buffers = {name: buffer[run] for name, buffer in stack.buffers.items()}
            parts.append(
                transform(holder, loss_fn, stack.names, rows, buffers, *batch.arguments(), in_dims, randomness)
            )
    losses = torch.cat([losses for _, losses in parts])
    if losses.shape != (stack.members,):
        msg = f"the loss must be one number for each member; got shape {tuple(losses.shape)} for {stack.members}"
        raise ValueError(msg)
    return [_cat(gradients) for gradients in zip(*[gradients for gradients, _ in parts], strict=True)], losses.detach()


def vmapped(
    holder: Holder, loss_fn: Any, names: dict[str, int], rows: list[Tensor], *inputs: Any
) -> tuple[Gradients, Tensor]:
    """Forward under vmap, backward by plain autograd, which spares the small operations the layers of functorch."""
    *data, in_dims, randomness = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in rows]
    member_loss = partial(_member_loss, holder, loss_fn, names)
    losses: Tensor = vmap(member_loss, in_dims=in_dims, randomness=randomness)(leaves, *data)
    losses.sum().backward()
    return [leaf.grad for leaf in leaves], losses


def compiled_gradients(
    holder: Holder, loss_fn: Any, names: dict[str, int], rows: list[Tensor], *inputs: Any
) -> tuple[Gradients, Tensor]:
    """The same as one function for torch.compile, which cannot see a backward but can see ``torch.func.grad``."""
    *data, in_dims, randomness = inputs

    def member_loss(*inputs: Any) -> Any:
        return _member_loss(holder, loss_fn, names, *inputs)

    return vmap(grad_and_value(member_loss), in_dims=in_dims, randomness=randomness)(rows, *data)


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
