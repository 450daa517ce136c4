"""The K-member closure: what the inner optimizer calls in place of the user's."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradwise._population import Population
from gradwise._statistics import running_mean
from gradwise_torch._buffers import MemberBuffers
from gradwise_torch._random import RandomStreams, start_streams_from
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
        parameters: Sequence[Tensor],
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
        self._closure = closure
        self._weights = weights
        self._entries = entries
        self._parameters = parameters
        self._population = population
        self._step = step
        self._rank = rank
        self._model = model
        self._on_nonfinite = on_nonfinite
        self._share_masks = share_masks
        self._clean_forward = clean_forward
        self._scales: list[Any] | None = None
        self._start: RandomStreams | None = None
        self._end: RandomStreams | None = None

    def __call__(self) -> Loss | None:
        """One evaluation: the mean of the members' losses, with the mean of their gradients in ``.grad``."""
        if self._scales is None:
            self._scales = self._weights.scales(self._entries, self._population, self._step)
        incoming = [parameter.grad for parameter in self._parameters]
        buffers = MemberBuffers(self._model)
        try:
            return self._evaluate(incoming, buffers)
        except BaseException:
            self._put(incoming)
            buffers.rewind()
            raise

    def _evaluate(self, incoming: list[Tensor | None], buffers: MemberBuffers) -> Loss | None:
        record = self.record = MemberRecord(skipped=self.record.skipped)
        gradients: list[Tensor | None] = []
        mean_loss: Loss = math.nan
        for member in range(self._population.size):
            self._begin(member, buffers)
            # Each member accumulates onto what stood in .grad before the step, as a plain closure would; whether that
            # one zeroes first, and how, then needs no guess.
            given = [None if gradient is None else gradient.clone() for gradient in incoming]
            self._put(given)
            loss, moments = self._run(member)
            if member == 0:
                self._after_first()
                if loss is None:
                    return self._without_loss(incoming, given, buffers)
                # A closure that dropped .grad will drop it again: no need to clone for the next member.
                incoming = [
                    gradient if parameter.grad is start else None
                    for parameter, gradient, start in zip(self._parameters, incoming, given, strict=True)
                ]
            value = _as_scalar(loss, member)
            if self._on_nonfinite == "skip" and not math.isfinite(float(value)):
                record.skipped += 1
                continue
            produced = [parameter.grad for parameter in self._parameters]
            record.add(value, produced, moments)
            count = len(record.losses)
            gradients = (
                produced if count == 1 else [_mean(*pair, count) for pair in zip(gradients, produced, strict=True)]
            )
            mean_loss = running_mean(mean_loss, value, count)
            buffers.collect(count)
        self._check_finite(record)
        record.close(gradients)
        self._put(gradients)
        self._finish(buffers)
        return mean_loss

    def _begin(self, member: int, buffers: MemberBuffers) -> None:
        if self._start is None:
            devices = {parameter.device for parameter in self._parameters}
            self._start = RandomStreams(devices)
        elif not self._share_masks and member:
            start_streams_from(
                self._population.device_seed(
                    step=self._step, stream=member, tensor=len(self._parameters), rank=self._rank
                )
            )
        else:
            self._start.rewind()
        if member:
            buffers.rewind()

    def _run(self, member: int) -> tuple[Loss | None, tuple[Tensor, Tensor, Tensor]]:
        assert self._scales is not None
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
            self._end = RandomStreams({parameter.device for parameter in self._parameters})
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

    def _without_loss(self, incoming: list[Tensor | None], given: list[Tensor | None], buffers: MemberBuffers) -> None:
        """A closure that does nothing (Lightning's manual optimization passes one) leaves a plain step to take."""
        unchanged = all(
            parameter.grad is start and (start is None or torch.equal(start, _not_none(gradient)))
            for parameter, start, gradient in zip(self._parameters, given, incoming, strict=True)
        )
        if not unchanged:
            msg = "`closure` must return the loss; got None after it produced gradients. End it with `return loss`"
            raise TypeError(msg)
        self._put(incoming)
        buffers.collect(1)
        buffers.finish()

    def _check_finite(self, record: MemberRecord) -> None:
        if not record.losses:
            msg = (
                f"`closure` must return a finite loss for at least one member; all {self._population.size} were NaN or "
                "infinite. Lower the learning rate or `sigma`, or look for the cause at the mean weights"
            )
            raise ValueError(msg)
        # One device sync for all members, and only in the mode that has not looked at each of them already.
        if self._on_nonfinite == "raise" and not all(math.isfinite(loss) for loss in record.loss_values()):
            first = next(i for i, loss in enumerate(record.loss_values()) if not math.isfinite(loss))
            msg = (
                f"`closure` must return a finite loss; member {first} returned {record.loss_values()[first]}. The step "
                'was not taken. Pass on_nonfinite="skip" to drop such members, or lower `sigma`'
            )
            raise ValueError(msg)

    def _put(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


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


def _mean(mean: Tensor | None, value: Tensor | None, count: int) -> Tensor | None:
    """`running_mean` where a member may have produced no gradient (a branch not taken), which counts as zero."""
    if mean is None and value is None:
        return None
    mean = torch.zeros_like(_not_none(value)) if mean is None else mean
    value = torch.zeros_like(mean) if value is None else value
    if not value.is_sparse:
        return running_mean(mean, value, count)
    # Over the union of both sets of indices, where entries can be subtracted one by one.
    mean, value = (mean + 0 * value).coalesce(), (value + 0 * mean).coalesce()
    combined = running_mean(mean.values(), value.values(), count)
    return torch.sparse_coo_tensor(mean.indices(), combined, mean.shape, is_coalesced=True, check_invariants=False)


def _not_none(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
