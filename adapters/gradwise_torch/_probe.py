"""Which part of a large tensor the statistics look at: a pass over all weights, for every member, would be felt."""

from dataclasses import dataclass
from math import inf

from torch import Tensor

__all__ = ["WHOLE", "Probe"]

SHARE = 8


@dataclass(frozen=True)
class Probe:
    """A contiguous eighth of every large tensor, the same for all members of a step and their mean.

    Sums over it, times `factor`, estimate those over the tensor. Since members and mean are seen through the same
    window, what holds for gradients (their mean is not longer than the longest of them) holds for what is seen.

    Attributes
    ----------
    position : float
        Where the eighths stand, from 0 to 1: drawn for every step.
    large : float
        A tensor of up to so many numbers is looked at whole, and so many are looked at in every larger one.
    """

    position: float = 0.0
    large: float = 1 << 16

    def span(self, size: int) -> slice:
        """The numbers to look at in a tensor of that size."""
        if size <= self.large:
            return slice(0, size)
        length = max(int(self.large), size // SHARE)
        start = int(self.position * (size - length)) // 16 * 16  # aligned: see the noise table
        return slice(start, start + length)

    def factor(self, size: int) -> float:
        """Size of the tensor relative to what is looked at."""
        if size <= self.large:
            return 1.0
        span = self.span(size)
        return size / (span.stop - span.start)

    def part(self, tensor: Tensor) -> Tensor:
        """What is looked at, flat."""
        span = self.span(tensor.numel())
        return tensor.flatten()[span] if tensor.numel() > self.large else tensor


WHOLE = Probe(large=inf)
