"""The K-member closure: what the inner optimizer calls in place of the user's."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradwise._population import Population
from gradwise._statistics import running_mean
from gradwise_torch._buffers import MemberBuffers
from gradwise_torch._gradients import MemberGradients
from gradwise_torch._random import RandomStreams
from gradwise_torch._statistics import MemberRecord
from gradwise_torch._weights import Entry, Weights

__all__ = ["PopulationClosure"]

Loss = Tensor | float


class PopulationClosure:
    """Runs the user's closure once per member of the population and leaves the mean of the gradients in ``.grad``.

    One object serves one step: noise, scales and dropout masks stay the same however often the inner optimizer
    evaluates it (LBFGS), so that a line search sees one function.
    """

    def __init__(
        self,
        closure: Callable[[], Loss | None],
        weights: Weights,
        entries: Sequence[Entry],
        groups: Sequence[dict[str, Any]],
        population: Population,
        *,
        step: int,
        rank: int,
        model: nn.Module | None,
        on_nonfinite: Literal["raise", "skip"],
        share_masks: bool,
        clean_forward: Callable[[], object] | None,
    ) -> None:
        self.record = MemberRecord()
        self.skipped = 0
        self._closure = closure
        self._weights = weights
        self._entries = entries
        self._parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self._population = population
        self._step = step
        self._rank = rank
        self._model = model
        self._on_nonfinite = on_nonfinite
        self._share_masks = share_masks
        self._clean_forward = clean_forward
        self._scales = weights.scales(entries, groups, population, step)
        self._start: RandomStreams | None = None
        self._end: RandomStreams | None = None

    def __call__(self) -> Loss | None:
        """One evaluation: the mean of the members' losses, with the mean of their gradients in ``.grad``."""
        gradients = MemberGradients(self._parameters)
        buffers = MemberBuffers(self._model)
        try:
            return self._evaluate(gradients, buffers)
        except BaseException:
            gradients.rewind()
            buffers.rewind()
            raise

    def _evaluate(self, gradients: MemberGradients, buffers: MemberBuffers) -> Loss | None:
        self.record = MemberRecord()
        mean_loss: Loss = math.nan
        for member in range(self._population.size):
            self._begin(member, gradients, buffers)
            loss, moments = self._run(member)
            if member == 0:
                self._after_first()
                if loss is None:
                    return self._without_loss(gradients, buffers)
            value = _as_scalar(loss, member)
            if self._on_nonfinite == "skip" and not self._finite_everywhere(value):
                self.skipped += 1
                continue
            square_norm = gradients.collect()
            self.record.add_member(moments, loss=value, square_norm=square_norm)
            mean_loss = running_mean(mean_loss, value, self.record.members)
            buffers.collect(self.record.members)
        self._check_finite()
        mean_square_norm = gradients.finish()
        if not gradients.accumulated:  # else what was in .grad before is in every member's gradient too
            self.record.mean_square_norm = mean_square_norm
        self._finish(buffers)
        return mean_loss

    def _begin(self, member: int, gradients: MemberGradients, buffers: MemberBuffers) -> None:
        if self._start is None:
            self._start = RandomStreams(self._devices())
        elif not self._share_masks and member:
            self._start.start_from(
                self._population.device_seed(
                    step=self._step, stream=member, tensor=len(self._parameters), rank=self._rank
                )
            )
        else:
            self._start.rewind()
        if member:
            gradients.rewind()
            buffers.rewind()

    def _run(self, member: int) -> tuple[Loss | None, Tensor]:
        self._weights.enter(
            self._entries,
            self._scales,
            self._population,
            step=self._step,
            member=member,
            rank=self._rank,
            paired=True,
        )
        try:
            with torch.enable_grad():
                loss = self._closure()
            return loss, self._weights.moments()
        finally:
            self._weights.leave()

    def _after_first(self) -> None:
        """The streams after one member are those after a plain step; they are put back there in the end."""
        if self._end is None:
            assert self._start is not None
            self._end = RandomStreams(self._devices())
            if self._share_masks:
                self._start.keep_moved(self._end)

    def _finish(self, buffers: MemberBuffers) -> None:
        assert self._start is not None
        assert self._end is not None
        if self._clean_forward is None:
            buffers.finish()
        else:
            buffers.rewind()
            self._start.rewind()
            self._clean_forward()
        self._end.rewind()

    def _devices(self) -> set[torch.device]:
        return {parameter.device for parameter in self._parameters}

    def _without_loss(self, gradients: MemberGradients, buffers: MemberBuffers) -> None:
        """A closure that does nothing (Lightning's manual optimization passes one) leaves a plain step to take."""
        if gradients.changed():
            msg = "`closure` must return the loss; got None after it produced gradients. End it with `return loss`"
            raise TypeError(msg)
        buffers.collect(1)
        buffers.finish()

    def _finite_everywhere(self, loss: Loss) -> bool:
        """Whether the loss is finite, in all processes: they must drop the same members or drift apart."""
        finite = math.isfinite(float(loss))
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            flag = torch.tensor(float(finite), device=self._parameters[0].device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MIN)
            return bool(flag.item())
        return finite

    def _check_finite(self) -> None:
        if not self.record.members:
            msg = (
                f"`closure` must return a finite loss for at least one member; all {self._population.size} were NaN or "
                "infinite. Lower the learning rate or `sigma`, or look for the cause at the mean weights"
            )
            raise ValueError(msg)
        # One device sync for all members, and only in the mode that has not looked at each of them already.
        losses = self.record.loss_values() if self._on_nonfinite == "raise" else []
        bad = [member for member, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            msg = (
                f"`closure` must return a finite loss; member {bad[0]} returned {losses[bad[0]]}. This evaluation does "
                'not count. Pass on_nonfinite="skip" to drop such members, or lower `sigma` or the learning rate'
            )
            raise ValueError(msg)


def _as_scalar(loss: Any, member: int) -> Loss:
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and not loss.is_complex():
            return loss.detach().reshape(())
        got = f"a tensor of shape {tuple(loss.shape)}"
    elif isinstance(loss, int | float):
        return float(loss)
    else:
        got = type(loss).__name__
    msg = (
        f"`closure` must return one number, the loss; got {got} for member {member}. Reduce it, for example by .mean()"
    )
    raise TypeError(msg)
