"""Which part of a large tensor the statistics look at: a pass over all weights, for every member, would be felt."""

from dataclasses import dataclass
from math import inf

from torch import Tensor

__all__ = ["WHOLE", "Probe"]

BLOCKS = 8


@dataclass(frozen=True)
class Probe:
    """One of eight blocks of every large tensor, the same for all members of a step and their mean.

    Sums over it, times `factor`, estimate those over the tensor, without bias over the steps. Since members and mean
    are seen through the same window, what holds for gradients (their mean is not longer than the longest of them)
    holds for what is seen.

    Attributes
    ----------
    position : float
        Which block, from 0 to 1 (excluded): drawn for every step.
    large : float
        Every block has at least so many numbers; there are fewer than eight where this takes it.
    """

    position: float = 0.0
    large: float = 1 << 16

    def span(self, size: int) -> slice:
        """The numbers to look at in a tensor of that size."""
        blocks = self.factor(size)
        block = int(self.position * blocks)
        return slice(_edge(block, blocks, size), _edge(block + 1, blocks, size))

    def factor(self, size: int) -> int:
        """In how many blocks a tensor of that size is divided."""
        return max(1, min(BLOCKS, int(size / self.large)))

    def part(self, tensor: Tensor) -> Tensor:
        """What is looked at, flat, or the tensor itself."""
        size = tensor.numel()
        return tensor if self.factor(size) == 1 else tensor.flatten()[self.span(size)]


def _edge(block: int, blocks: int, size: int) -> int:
    return size if block == blocks else block * size // blocks // 16 * 16  # aligned: see the noise table


WHOLE = Probe(large=inf)
