"""Gradients of a closure that runs once per member but should accumulate once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradwise._statistics import running_mean

__all__ = ["MemberGradients"]


class MemberGradients:
    """Gives every member the same ``.grad`` to start from and averages what the members made of it.

    Each member accumulates onto what stood in ``.grad`` before the step, as a plain closure would: whether the closure
    zeroes first, and how, then needs no guess. Tensors that somebody else holds (a flat buffer, DDP's buckets) stay the
    gradients' storage.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.accumulated = False  # whether the closure may have added to what was there
        self._parameters = parameters
        self._given = [parameter.grad for parameter in parameters]
        self._start = [None if gradient is None else gradient.detach().clone() for gradient in self._given]
        self._mean: list[Tensor | None] = []
        self._count = 0

    def rewind(self) -> None:
        """Put back what was there before the members."""
        with torch.no_grad():
            for parameter, given, start in zip(self._parameters, self._given, self._start, strict=True):
                if given is not None and start is not None:
                    given.copy_(start)
                parameter.grad = given

    def changed(self) -> bool:
        """Whether the closure has made anything of the gradients."""
        return any(
            parameter.grad is not given or (given is not None and start is not None and not torch.equal(given, start))
            for parameter, given, start in zip(self._parameters, self._given, self._start, strict=True)
        )

    @torch.no_grad()
    def collect(self) -> Tensor:
        """Take in a member's gradients; return their squared norm."""
        produced = [parameter.grad for parameter in self._parameters]
        self._count += 1
        if self._count == 1:
            # Clones: the next member may write to the same storage.
            self._mean = [None if gradient is None else gradient.detach().clone() for gradient in produced]
            pairs = zip(produced, self._given, strict=True)
            self.accumulated = any(new is not None and new is old for new, old in pairs)
        else:
            self._mean = [_mean(*pair, self._count) for pair in zip(self._mean, produced, strict=True)]
        return _square_norm(produced)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Leave the mean in ``.grad``, in the same storage where it still is; return its squared norm."""
        for parameter, given, mean in zip(self._parameters, self._given, self._mean, strict=True):
            if given is not None and parameter.grad is given and mean is not None:
                given.copy_(mean)
            else:
                parameter.grad = mean
        return _square_norm(self._mean)


def _mean(mean: Tensor | None, value: Tensor | None, count: int) -> Tensor | None:
    """`running_mean` where a member may have produced no gradient (a branch not taken), which counts as zero."""
    if mean is None:
        if value is None:
            return None
        mean = torch.zeros_like(value)
    elif value is None:
        value = torch.zeros_like(mean)
    return running_mean(mean, value, count)  # sparse gradients too: over the union of their rows


def _square_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    present = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    if not present:
        return torch.zeros(())
    device = present[0].device
    norms = [torch.linalg.vector_norm(g.detach(), dtype=torch.promote_types(g.dtype, torch.float32)) for g in present]
    return torch.stack([norm.square().to(device=device, dtype=torch.float32) for norm in norms]).sum()
