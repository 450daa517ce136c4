"""One population backward over one batch: the members one by one, or all at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
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
    members_at_once,
)

__all__ = ["BatchWork"]


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
    def all_at_once(self, path: str, *, proven: bool) -> tuple[Tensor | None, str | None]:
        """The loss, or the reason why it cannot be done; neither if a loss is not finite, which the loop sees to."""
        # What is there before is of use only if this fails, and takes 100 us to keep.
        start = None if proven and not self.recalibrate else RandomStreams(self._devices())
        buffers = None if proven else MemberBuffers(self.model)
        members = Members.of(self.model, self.of_model, self.perturbation, len(self.sizes))
        try:
            outcome: Outcome = (_compiled() if path == "compile" else members_at_once)(
                by_functorch if path == "compile" else by_autograd,
                Holder(self.model),
                self.loss_fn,
                members,
                arguments_of(self.shards, self.batch, len(self.sizes)),
                self._weights(),
                "different" if self.sharded or not self.share_masks else "same",
            )
        except Exception as error:  # noqa: BLE001 - the loop will show whether it is the user's own
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            reason = None
            if bool(outcome.losses.isfinite().all()):
                self._take(members, outcome, start)
                return outcome.loss, None
        finally:
            torch.clear_autocast_cache()  # it holds casts of the stacked weights
        if buffers is not None:
            buffers.rewind()
        if start is not None:
            start.rewind()
        return None, reason

    def _take(self, members: Members, outcome: Outcome, start: RandomStreams | None) -> None:
        add_gradients(members.parameters, outcome.gradients)
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


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # In one piece or not at all: what breaks the graph is quicker under plain vmap.
    return torch.compile(members_at_once, fullgraph=True)
