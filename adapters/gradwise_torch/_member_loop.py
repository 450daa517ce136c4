"""One evaluation per member of the population, one after the other, combined as if there had been one."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradwise._statistics import running_mean
from gradwise_torch._buffers import MemberBuffers
from gradwise_torch._gradients import ClosureGradients, MemberGradients
from gradwise_torch._perturbation import Perturbation
from gradwise_torch._random import RandomStreams
from gradwise_torch._reduction import Reduction
from gradwise_torch._statistics import MemberRecord

__all__ = ["Loss", "MemberLoop", "all_finite", "as_scalar"]

Loss = Tensor | float


class MemberLoop:
    """Runs a loss and its backward once per member and leaves the mean of the gradients in ``.grad``.

    One object serves one step: noise, scales and dropout masks stay the same however often the inner optimizer
    evaluates it (LBFGS), so that a line search sees one function.

    Parameters
    ----------
    evaluate : callable
        ``evaluate(member, gradients) -> loss``, which has called backward. The member's weights are in place.
    perturbation : Perturbation
        Moves the weights.
    parameters : sequence of Tensor
        Those whose gradients are collected.
    gradients : type of MemberGradients
        What ``.grad`` is before each member and afterwards.
    sizes : sequence of int
        One entry per member: how much its loss and gradient count.
    masks : {"shared", "fresh", "own"}
        Random streams of the model: rewound for every member; started afresh for every one but the first, whose end
        they are left at; or simply used up (members with batches of their own).
    model : nn.Module or None
        Its buffers count once; its gradients are reduced once.
    on_nonfinite : {"raise", "skip"}
        What a loss that is not finite does.
    clean_forward : callable or None
        Run at the mean weights in the end, for the buffers to be made there.
    name : str
        What errors call the user's function.
    """

    def __init__(
        self,
        evaluate: Callable[[int, MemberGradients], Loss | None],
        perturbation: Perturbation,
        parameters: Sequence[Tensor],
        gradients: type[MemberGradients],
        *,
        sizes: Sequence[int],
        masks: Literal["shared", "fresh", "own"],
        model: nn.Module | None,
        on_nonfinite: Literal["raise", "skip"],
        clean_forward: Callable[[], object] | None,
        name: str = "closure",
    ) -> None:
        self.record = MemberRecord()
        self.skipped = 0
        self._evaluate = evaluate
        self._perturbation = perturbation
        self._probe = perturbation.probe()
        self._parameters = parameters
        self._gradients = gradients
        self._sizes = sizes
        self._masks = masks
        self._model = model
        self._on_nonfinite = on_nonfinite
        self._clean_forward = clean_forward
        self._name = name
        self._start: RandomStreams | None = None
        self._end: RandomStreams | None = None

    @torch.no_grad()
    def __call__(self) -> Loss | None:
        """One evaluation: the mean of the members' losses, with the mean of their gradients in ``.grad``."""
        self._perturbation.check_reduced()
        reduction = Reduction(self._model)
        reduction.begin()
        gradients = self._gradients(self._parameters, self._probe, reduction.accumulate)
        buffers = MemberBuffers(self._model)
        try:
            try:
                with reduction.apart():
                    loss = self._run(gradients, buffers)
            finally:
                self._perturbation.leave()
            if loss is not None:
                self._finish(gradients, buffers)
        except BaseException:
            gradients.restore()
            buffers.rewind()
            raise
        return loss

    def _run(self, gradients: MemberGradients, buffers: MemberBuffers) -> Loss | None:
        self.record = MemberRecord()
        mean_loss: Loss = math.nan
        counted = 0
        for member, size in enumerate(self._sizes):
            self._begin(member, gradients, buffers)
            with torch.enable_grad():
                loss = self._evaluate(member, gradients)
            if member == 0:
                self._after_first()
                if loss is None:
                    return self._without_loss(gradients, buffers)
            value = as_scalar(loss, member, self._name)
            if self._on_nonfinite == "skip" and not all_finite(value, self._parameters[0].device):
                self.skipped += 1
                continue
            counted += size
            fraction = size / counted
            square_norm = gradients.collect(fraction)
            self.record.add_losses(value, square_norm, self._perturbation.slope(self._probe), [size])
            mean_loss = running_mean(mean_loss, value, fraction)
            buffers.collect(fraction)
        self._check_finite()
        return mean_loss

    def _begin(self, member: int, gradients: MemberGradients, buffers: MemberBuffers) -> None:
        if self._masks != "own":
            if self._start is None:
                self._start = RandomStreams(self._devices())
            elif self._masks == "fresh" and member:
                self._start.start_from(self._perturbation.mask_seed(member))
            else:
                self._start.rewind()
        if member:
            gradients.rewind()
            buffers.rewind()
        self._perturbation.enter(member)
        if self.record.relative_sizes is None:
            self.record.relative_sizes = self._perturbation.relative_sizes()

    def _after_first(self) -> None:
        """The streams after one member are those after a plain step; they are put back there in the end."""
        if self._start is not None and self._end is None:
            self._end = RandomStreams(self._devices())
            if self._masks == "shared":
                self._start.keep_moved(self._end)

    def _finish(self, gradients: MemberGradients, buffers: MemberBuffers) -> None:
        end = self._end or RandomStreams(self._devices() if self._clean_forward else [])
        if self._clean_forward is None:
            buffers.finish()
        else:
            buffers.rewind()
            if self._start is not None:
                self._start.rewind()
            self._clean_forward()
        if self._start is not None or self._clean_forward is not None:
            end.rewind()
        mean_square_norm = gradients.finish()  # last: nothing else can fail any more
        if not gradients.accumulated:  # else what was in .grad before is in every member's gradient too
            self.record.mean_square_norm = mean_square_norm

    def _devices(self) -> set[torch.device]:
        return {parameter.device for parameter in self._parameters}

    def _without_loss(self, gradients: MemberGradients, buffers: MemberBuffers) -> None:
        """A closure that does nothing (Lightning's manual optimization passes one) leaves a plain step to take."""
        if not isinstance(gradients, ClosureGradients) or gradients.changed():
            msg = "`closure` must return the loss; got None after it produced gradients. End it with `return loss`"
            raise TypeError(msg)
        buffers.collect(1)
        buffers.finish()

    def _check_finite(self) -> None:
        if not self.record.members:
            msg = (
                f"`{self._name}` must return a finite loss for at least one member; all {len(self._sizes)} were NaN or "
                "infinite. Lower the learning rate or `sigma`, or look for the cause at the mean weights"
            )
            raise ValueError(msg)
        # One device sync for all members, and only in the mode that has not looked at each of them already.
        losses = self.record.loss_values() if self._on_nonfinite == "raise" else []
        bad = [member for member, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            msg = (
                f"`{self._name}` must return a finite loss; member {bad[0]} returned {losses[bad[0]]}. This evaluation "
                'does not count. Pass on_nonfinite="skip" to drop such members, or lower `sigma` or the learning rate'
            )
            raise ValueError(msg)


def all_finite(loss: Loss, device: torch.device) -> bool:
    """Whether the loss is finite, in all processes: they must drop the same members or drift apart."""
    finite = math.isfinite(float(loss))
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        flag = torch.tensor(float(finite), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MIN)
        return bool(flag.item())
    return finite


def as_scalar(loss: Any, member: int, name: str) -> Loss:
    """The loss that a user's function returned, detached."""
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and not loss.is_complex():
            return loss.detach().reshape(())
        got = f"a tensor of shape {tuple(loss.shape)}"
    elif isinstance(loss, int | float):
        return float(loss)
    else:
        got = type(loss).__name__
    msg = f"`{name}` must return one number, the loss; got {got} for member {member}. Reduce it, for example by .mean()"
    raise TypeError(msg)
