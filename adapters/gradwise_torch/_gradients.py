"""Gradients of a loss that is evaluated once per member but should accumulate once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradwise._statistics import running_mean
from gradwise_torch._probe import WHOLE, Probe
from gradwise_torch._shards import is_dtensor, laid_out_like, local_of, shards_of
from gradwise_torch._weights import at_least_float32, total_square

__all__ = ["AddedGradients", "ClosureGradients", "MemberGradients"]


Accumulate = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]


class MemberGradients:
    """Averages the members' gradients; how ``.grad`` looks before and after is for the two kinds of it to say.

    Parameters
    ----------
    parameters : sequence of Tensor
        Those whose gradients are averaged.
    probe : Probe
        What squared norms look at.
    accumulate : callable
        ``accumulate(parameters, gradients)`` adds the mean to ``.grad`` (`add_gradients`, or together with other
        processes).
    """

    def __init__(self, parameters: Sequence[Tensor], probe: Probe, accumulate: Accumulate) -> None:
        self.accumulated = False  # whether a member's gradient may hold what was there before the members
        self._parameters = parameters
        self._probe = probe
        self._accumulate = accumulate
        self._given = [parameter.grad for parameter in parameters]
        self._mean: list[Tensor | None] = []

    def rewind(self) -> None:
        """Put ``.grad`` to where every member starts from."""
        raise NotImplementedError

    def restore(self) -> None:
        """Put ``.grad`` back to what it was before the members."""
        raise NotImplementedError

    def include(self, tensors: Sequence[Tensor]) -> None:
        """Average the gradients of these tensors as well, before the first member has any."""
        raise NotImplementedError

    def collect(self, fraction: float) -> Tensor:
        """Take in a member's gradients, as a fraction of all so far; return their squared norm."""
        for parameter in self._parameters:
            if parameter.grad is not None and is_dtensor(parameter):
                # Sequence parallelism leaves terms that are yet to be added up over the processes.
                parameter.grad = laid_out_like(parameter.grad, parameter)
        produced = [parameter.grad for parameter in self._parameters]
        if fraction == 1:
            # The next member may write to the same storage: a bucket, or what a CUDA graph leaves its results in, which
            # no property of the tensor tells.
            self._mean = [None if gradient is None else gradient.detach().clone() for gradient in produced]
        else:
            self._mean = _means(self._mean, produced, fraction)
        return square_norm(produced, self._probe)

    def finish(self) -> Tensor:
        """Leave the result in ``.grad``; return the squared norm of the members' mean."""
        norm = square_norm(self._mean, self._probe)  # first: the tensors may become those in .grad
        self._make_room()
        self._accumulate(self._parameters, self._mean)
        return norm

    def _make_room(self) -> None:
        """Put ``.grad`` to what the mean is added to."""
        raise NotImplementedError


class ClosureGradients(MemberGradients):
    """Gives every member the same ``.grad`` to start from and averages what the members made of it.

    Each member accumulates onto what stood in ``.grad`` before the step, as a plain closure would: whether the closure
    zeroes first, and how, then needs no guess. Tensors that somebody else holds (a flat buffer, DDP's buckets) stay the
    gradients' storage.
    """

    def __init__(self, parameters: Sequence[Tensor], probe: Probe, accumulate: Accumulate) -> None:
        super().__init__(parameters, probe, accumulate)
        self._start = [None if gradient is None else gradient.detach().clone() for gradient in self._given]

    def rewind(self) -> None:
        """Put back what was there before the members."""
        with torch.no_grad():
            for parameter, given, start in zip(self._parameters, self._given, self._start, strict=True):
                if given is not None and start is not None:
                    given.copy_(start)
                parameter.grad = given

    def restore(self) -> None:
        """The same."""
        self.rewind()

    def changed(self) -> bool:
        """Whether the closure has made any gradient; one that only dropped them has not (a step that is skipped)."""
        return any(
            parameter.grad is not None
            and (parameter.grad is not given or (start is not None and not torch.equal(parameter.grad, start)))
            for parameter, given, start in zip(self._parameters, self._given, self._start, strict=True)
        )

    def collect(self, fraction: float) -> Tensor:
        """Take in what a member made of the gradients."""
        if fraction == 1:
            kept = [p.grad is given for p, given in zip(self._parameters, self._given, strict=True)]
            self.accumulated = any(given is not None and own for given, own in zip(self._given, kept, strict=True))
            # A closure that sets them to None, as zero_grad does, never writes to what was there: no copy is needed.
            self._start = [start if own else None for start, own in zip(self._start, kept, strict=True)]
        return super().collect(fraction)

    @torch.no_grad()
    def _make_room(self) -> None:
        """Nothing: what was there is in the mean already. The storage stays where a member has left it in place."""
        for parameter, given in zip(self._parameters, self._given, strict=True):
            if given is not None and parameter.grad is given:
                given.zero_()
            else:
                parameter.grad = None


class AddedGradients(MemberGradients):
    """Gives every member an empty ``.grad`` and in the end adds the mean to what was there, as one backward does."""

    def __init__(self, parameters: Sequence[Tensor], probe: Probe, accumulate: Accumulate) -> None:
        super().__init__([], probe, accumulate)
        self._start: list[Tensor | None] = []
        self.include(parameters)

    def include(self, tensors: Sequence[Tensor]) -> None:
        """Average the gradients of these tensors as well."""
        known = set(map(id, self._parameters))
        new = [tensor for tensor in tensors if id(tensor) not in known]
        given = [tensor.grad for tensor in new]
        # A view may be a bucket that the members' own backwards write to (DDP's gradient_as_bucket_view).
        self._start += [g.detach().clone() if g is not None and is_view(g) else g for g in given]
        self._given += given
        self._parameters = [*self._parameters, *new]
        for tensor in new:
            tensor.grad = None

    def rewind(self) -> None:
        """Begin with no gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        """Give the gradients from before the members back, in their own storage."""
        for parameter, given, start in zip(self._parameters, self._given, self._start, strict=True):
            if given is not None and start is not None and start is not given:
                given.copy_(start)
            parameter.grad = given

    def _make_room(self) -> None:
        """What was there before."""
        self.restore()


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Accumulate in ``.grad``."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad + gradient
            else:
                parameter.grad = laid_out_like(parameter.grad, gradient)
                local_of(parameter.grad).add_(local_of(gradient))


def is_view(gradient: Tensor) -> bool:
    """Whether somebody else may own the storage."""
    return not gradient.is_sparse and (gradient._is_view() or gradient.storage_offset() != 0)


def _means(means: Sequence[Tensor | None], values: Sequence[Tensor | None], fraction: float) -> list[Tensor | None]:
    """`running_mean` where a member may have produced no gradient (a branch not taken), which counts as zero."""
    result: list[Tensor | None] = []
    dense: tuple[list[Tensor], list[Tensor]] = [], []
    for mean, value in zip(means, values, strict=True):
        if mean is None and value is not None:
            mean = torch.zeros_like(value)
        elif value is None and mean is not None:
            value = torch.zeros_like(mean)
        if mean is not None and value is not None:
            if mean.is_sparse or value.is_sparse or mean.dtype != value.dtype:
                mean = running_mean(mean, value, fraction)  # over the union of the rows
            else:
                dense[0].append(local_of(mean))
                dense[1].append(local_of(value))
        result.append(mean)
    if dense[0]:
        torch._foreach_lerp_(*dense, fraction)  # type: ignore[reportPrivateImportUsage] - no public name; `running_mean` in place
    return result


def square_norm(gradients: Sequence[Tensor | None], probe: Probe = WHOLE) -> Tensor:
    """``|g|^2`` over all tensors as estimated from the probe and this process's shards; no device sync.

    In float32 or better.
    """
    present = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    here = [local_of(g) for g in present]
    parts = [at_least_float32(probe.part(g.detach())) for g in here]
    norms = torch._foreach_norm(parts) if parts else []  # type: ignore[reportPrivateImportUsage] - no public name
    return total_square(norms, [probe.factor(h.numel()) * shards_of(g) for g, h in zip(present, here, strict=True)])
