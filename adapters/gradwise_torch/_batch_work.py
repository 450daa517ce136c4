"""One population backward over one batch: the members one by one, or all at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradwise_torch._batches import Batch
from gradwise_torch._buffers import MemberBuffers
from gradwise_torch._gradients import AddedGradients, add_gradients
from gradwise_torch._member_loop import MemberLoop, as_scalar
from gradwise_torch._perturbation import Perturbation
from gradwise_torch._random import RandomStreams
from gradwise_torch._statistics import MemberRecord
from gradwise_torch._vectorized import (
    Holder,
    Members,
    Outcome,
    arguments_of,
    by_autograd,
    by_functorch,
    compiled,
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
    proven, refused : bool
        Whether it has worked; whether it cannot.
    unused : frozenset of int
        Places of the parameters that have no gradient.
    """

    path: str
    proven: bool = False
    refused: bool = False
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
        first_time = not way.proven
        # What is there before is of use only if this fails, and takes 100 us to keep.
        start = RandomStreams(self._devices()) if first_time or self.recalibrate else None
        buffers = MemberBuffers(self.model) if first_time else None
        members = Members.of(self.model, self.of_model, self.perturbation, len(self.sizes))
        task = (
            Holder(self.model),
            self.loss_fn,
            members,
            arguments_of(self.shards, self.batch, len(self.sizes)),
            self._weights(),
            "different" if self.sharded or not self.share_masks else "same",
        )
        try:
            outcome = way.program(*task)
            if way.path == "compile" and first_time and start is not None:
                way.unused = self._unused(outcome, task, start)
        except Exception as error:  # noqa: BLE001 - the loop will show whether it is the user's own
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            reason = None
            way.proven = True
            if bool(outcome.losses.isfinite().all()):
                self._take(members, outcome, start, way.unused)
                return outcome.loss, None
        finally:
            torch.clear_autocast_cache()  # it holds casts of the stacked weights
        if buffers is not None:
            buffers.rewind()
        if start is not None:
            start.rewind()
        return None, reason

    def _unused(self, outcome: Outcome, task: Any, start: RandomStreams) -> frozenset[int]:
        """Parameters without a gradient. Functorch gives zeros, to which optimizers would apply their weight decay."""
        if all(gradient is None or bool(gradient.any()) for gradient in outcome.gradients):
            return frozenset()
        end = RandomStreams(self._devices())
        start.rewind()
        gradients = members_at_once(by_autograd, *task).gradients
        end.rewind()
        return frozenset(place for place, gradient in enumerate(gradients) if gradient is None)

    def _take(self, members: Members, outcome: Outcome, start: RandomStreams | None, unused: frozenset[int]) -> None:
        gradients = [None if place in unused else g for place, g in enumerate(outcome.gradients)]
        add_gradients(members.parameters, gradients)
        self.record.add_members(outcome.losses, outcome.square_norms, outcome.slopes)
        self.record.relative_sizes = outcome.relative_sizes
        self.record.mean_square_norm = outcome.mean_square_norm
        if self.recalibrate and start is not None:
            end = RandomStreams(self._devices())
            start.rewind()
            self._clean_forward()
            end.rewind()
        else:
            for name, buffer in members.buffers.items():
                buffer.copy_(outcome.buffers[name])

    def _weights(self) -> Tensor | None:
        """What each member counts, as a fraction; None if that is the same for all."""
        if len(set(self.sizes)) == 1:
            return None
        first = self.parameters[0]
        return torch.tensor(self.sizes, device=first.device, dtype=torch.float64) / sum(self.sizes)

    def _evaluate(self, member: int) -> Tensor:
        args, kwargs = (self.shards[member] if self.sharded else self.batch).arguments()
        loss = self.loss_fn(self.model, *args, **kwargs)
        as_scalar(loss, member, "loss_fn")  # the more helpful error
        loss.backward()
        return loss

    def _clean_forward(self) -> None:
        args, kwargs = self.batch.arguments()
        with torch.no_grad():
            self.loss_fn(self.model, *args, **kwargs)

    def _devices(self) -> set[torch.device]:
        return {parameter.device for parameter in self.parameters}
