"""One population backward over one batch: the members one by one, or all at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradwise_torch._autograd_graph import graph_leaves
from gradwise_torch._batches import Batch
from gradwise_torch._buffers import MemberBuffers
from gradwise_torch._gradients import AddedGradients, MemberGradients, add_gradients
from gradwise_torch._member_loop import MemberLoop, as_scalar
from gradwise_torch._perturbation import Perturbation
from gradwise_torch._random import RandomStreams
from gradwise_torch._stack import Holder, Members
from gradwise_torch._statistics import MemberRecord
from gradwise_torch._vectorized import (
    Outcome,
    arguments_of,
    by_autograd,
    by_functorch,
    compiled,
    kernels_for_vmap,
    members_at_once,
)

__all__ = ["BatchWork", "Way"]


@dataclass
class Way:
    """What has been found out about one way to compute the members of one loss function.

    Attributes
    ----------
    path : {"vmap", "compile"}
        Which it is.
    refused : bool
        Whether it cannot be taken.
    trained : tuple of int
        Ids of the parameters with which it has worked.
    unused : frozenset of int
        Ids of those among them that had no gradient.
    """

    path: str
    refused: bool = False
    trained: tuple[int, ...] = ()
    unused: frozenset[int] = frozenset()

    @cached_property
    def program(self) -> Callable[..., Outcome]:
        """`members_at_once`, compiled if that is the way."""
        if self.path == "compile":
            return partial(compiled(), by_functorch)
        return partial(members_at_once, by_autograd)


@dataclass
class BatchWork:
    """What `BatchOptimizer.backward` was asked for, and the two ways to do it.

    Attributes
    ----------
    model, loss_fn, batch
        ``loss_fn(model, *batch)`` is the mean loss.
    shards : list of Batch
        One for each member, or none if they share the batch.
    sizes : list of int
        How much each member counts.
    parameters, of_model : list of Tensor
        The optimizer's parameters and the model's: the gradients of both are collected.
    recalibrate : bool
        Whether BatchNorm statistics come from one more forward, at the mean weights.
    record, skipped
        What came of it.
    """

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batch: Batch
    shards: list[Batch]
    sizes: list[int]
    perturbation: Perturbation
    parameters: list[Tensor]
    of_model: list[Tensor]
    on_nonfinite: Literal["raise", "skip"]
    share_masks: bool
    recalibrate: bool
    record: MemberRecord = field(default_factory=MemberRecord)
    skipped: int = 0

    @property
    def sharded(self) -> bool:
        """Whether every member has rows of its own."""
        return bool(self.shards)

    def one_by_one(self) -> Tensor:
        """The plain loop."""
        loop = MemberLoop(
            self._evaluate,
            self.perturbation,
            list({id(parameter): parameter for parameter in (*self.parameters, *self.of_model)}.values()),
            AddedGradients,
            sizes=self.sizes,
            masks="own" if self.sharded else "shared" if self.share_masks else "fresh",
            model=self.model,
            on_nonfinite=self.on_nonfinite,
            clean_forward=self._clean_forward if self.recalibrate else None,
            name="loss_fn",
        )
        try:
            loss = loop()
        finally:
            self.record = loop.record
            self.skipped = loop.skipped
        assert isinstance(loss, Tensor)
        return loss

    @torch.no_grad()
    def all_at_once(self, way: Way) -> tuple[Tensor | None, str | None]:
        """The loss, or the reason why it cannot be done; neither if a loss is not finite, which the loop sees to."""
        # Under vmap, what torch.compile returns runs the original anyway, and it cannot be compiled once more.
        model: nn.Module = getattr(self.model, "_orig_mod", self.model)
        members = Members.of(model, self.of_model, self.perturbation, len(self.sizes))
        trained = tuple(map(id, members.parameters))
        first_time = way.trained != trained
        start = RandomStreams(self._devices(), only_torch=not first_time and not self.recalibrate)
        buffers = MemberBuffers(self.model)
        try:
            task = (
                Holder(model),
                self.loss_fn,
                members,
                arguments_of(self.shards, self.batch, len(self.sizes)),
                self._weights(),
                "different" if self.sharded or not self.share_masks else "same",
            )
            with kernels_for_vmap(self.parameters[0].device):
                outcome = self._rehearse(way, task) if first_time else way.program(*task)
                if first_time and way.path == "compile":
                    start.rewind()
                    buffers.rewind()
                    outcome = way.program(*task)
        except Exception as error:  # noqa: BLE001 - the loop will show whether it is the user's own
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            reason = None
            way.trained = trained
            if bool(outcome.losses.isfinite().all()):
                self._take(members, outcome, start, way)
                return outcome.loss, None
        finally:
            torch.clear_autocast_cache()  # it holds casts of the stacked weights
        buffers.rewind()
        start.rewind()
        return None, reason

    def _rehearse(self, way: Way, task: Any) -> Outcome:
        """The first time: whether vmap computes what a loop would, and leaves nothing behind."""
        attributes = [(module, dict(vars(module))) for module in self.model.modules()]
        outcome = members_at_once(partial(by_autograd, strict=True), *task)
        if any(_is_of_vmap(leaf) for module, _ in attributes for leaf in pytree.tree_leaves(vars(module))):
            for module, before in attributes:
                vars(module).clear()
                vars(module).update(before)
            msg = "a module keeps an intermediate result (a buffer or another attribute), which is vmap's own"
            raise ValueError(msg)
        # Functorch gives zeros where there is no gradient, to which optimizers would apply their weight decay.
        pairs = zip(task[2].parameters, outcome.gradients, strict=True)
        way.unused = frozenset(id(parameter) for parameter, gradient in pairs if gradient is None)
        return outcome

    def _take(self, members: Members, outcome: Outcome, start: RandomStreams, way: Way) -> None:
        if self.recalibrate:
            end = RandomStreams(self._devices())
            start.rewind()
            self._clean_forward()
            end.rewind()
        else:
            for name, buffer in members.buffers.items():
                buffer.copy_(outcome.buffers[name])
        pairs = list(zip(members.parameters, outcome.gradients, strict=True))
        add_gradients(
            members.parameters,
            [None if id(p) in way.unused and not _any(g) else _laid_out_like(p, g) for p, g in pairs],
        )
        self.record.add_losses(outcome.losses, outcome.square_norms, outcome.slopes, self.sizes)
        self.record.relative_sizes = outcome.relative_sizes
        self.record.mean_square_norm = outcome.mean_square_norm

    def _weights(self) -> Tensor | None:
        """What each member counts, as a fraction; None if that is the same for all."""
        if len(set(self.sizes)) == 1:
            return None
        first = self.parameters[0]
        return torch.tensor(self.sizes, device=first.device, dtype=torch.float64) / sum(self.sizes)

    def _evaluate(self, member: int, gradients: MemberGradients) -> Tensor:
        args, kwargs = (self.shards[member] if self.sharded else self.batch).arguments()
        loss = self.loss_fn(self.model, *args, **kwargs)
        if not isinstance(loss, Tensor):
            msg = f"`loss_fn` must return one number, the loss, as a tensor; got {type(loss).__name__}"
            raise TypeError(msg)
        as_scalar(loss, member, "loss_fn")  # the more helpful error
        if member == 0:  # criteria with weights, inputs: theirs are gradients of the mean loss too
            gradients.include(graph_leaves(loss))
        loss.backward()
        return loss

    def _clean_forward(self) -> None:
        args, kwargs = self.batch.arguments()
        with torch.no_grad():
            self.loss_fn(self.model, *args, **kwargs)

    def _devices(self) -> set[torch.device]:
        return {parameter.device for parameter in self.parameters}


def _is_of_vmap(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf)  # type: ignore[reportAttributeAccessIssue] - C extension


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _laid_out_like(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """With the parameter's strides, as autograd makes gradients: fused optimizers walk through memory."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
