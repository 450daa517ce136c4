"""One population backward over one batch: the members one by one, or all at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradwise_torch._batches import Batch
from gradwise_torch._buffers import MemberBuffers
from gradwise_torch._gradients import AddedGradients, add_gradients, square_norm
from gradwise_torch._member_loop import MemberLoop, as_scalar
from gradwise_torch._perturbation import Perturbation
from gradwise_torch._random import RandomStreams
from gradwise_torch._statistics import MemberRecord
from gradwise_torch._vectorized import Stack, compiled_gradients, stacked_gradients, vmapped

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
    parameters : list of Tensor
        Whose gradients are collected.
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
            self.parameters,
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

    def all_at_once(self, path: str, *, proven: bool) -> tuple[Tensor | None, str | None]:
        """The loss, or the reason why it cannot be done; neither if a loss is not finite, which the loop sees to."""
        # Where the streams stand is of use only if this fails, and takes 60 us to find out.
        start = None if proven and not self.recalibrate else RandomStreams(self._devices())
        buffers = MemberBuffers(self.model)
        try:
            with torch.enable_grad():
                stack = Stack(self.model, self.perturbation, len(self.sizes))
                gradients, losses = stacked_gradients(
                    stack,
                    self.loss_fn,
                    self.shards or [self.batch],
                    _compiled() if path == "compile" else vmapped,
                    randomness="different" if self.sharded or not self.share_masks else "same",
                )
        except Exception as error:  # noqa: BLE001 - the loop will show whether it is the user's own
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            reason = None
            if bool(losses.isfinite().all()):
                return self._take(stack, gradients, losses, start), None
        finally:
            torch.clear_autocast_cache()  # it holds casts of the stacked weights
        buffers.rewind()
        if start is not None:
            start.rewind()
        return None, reason

    @torch.no_grad()
    def _take(
        self, stack: Stack, gradients: list[Tensor | None], losses: Tensor, start: RandomStreams | None
    ) -> Tensor:
        weights = None if len(set(self.sizes)) == 1 else losses.new_tensor(self.sizes) / sum(self.sizes)
        means = [None if gradient is None else _mean(gradient, weights) for gradient in gradients]
        add_gradients(stack.parameters, means)
        self.record.add_members(losses, *stack.statistics(gradients))
        self.record.relative_sizes = stack.relative_sizes()
        self.record.mean_square_norm = square_norm(means)
        if self.recalibrate and start is not None:
            end = RandomStreams(self._devices())
            start.rewind()
            self._clean_forward()
            end.rewind()
        else:
            for own, rows in zip(stack.own_buffers, stack.buffers.values(), strict=True):
                own.copy_(_mean(rows, weights) if rows.is_floating_point() else rows[0])
        return _mean(losses, weights)

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
    return torch.compile(compiled_gradients)


def _mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the first axis; weighted, where members count differently."""
    return rows.mean(0) if weights is None else torch.tensordot(weights.to(rows), rows, 1)
