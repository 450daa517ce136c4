"""The members of one step: which tensors move, how far, and with which noise."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradwise._noise import Window
from gradwise._population import Population
from gradwise_torch._fsdp import Gathered
from gradwise_torch._noise import Noise, StackedNoise
from gradwise_torch._probe import Probe
from gradwise_torch._shards import local_of
from gradwise_torch._weights import Entry, Weights

__all__ = ["Perturbation"]


class Perturbation:
    """Moves the weights from the mean to one member after another; scales are those of the weights when it is made.

    Parameters
    ----------
    weights : Weights
        Keeps the mean.
    entries : sequence of Entry
        The tensors.
    groups : sequence of dict
        The optimizer's groups: one may set its own ``"sigma"``.
    population : Population
        What a member is.
    step : int
        A word of the keys.
    first : int
        The stream of the first member; those before it have been used in this step.
    paired : bool
        Whether members share a batch, so that antithetic ones may be pairs.
    rank : int
        The word of the keys that tells the members of processes apart (`member_group`).
    gathered : Gathered
        What must be gathered again when the weights have moved.
    """

    def __init__(
        self,
        weights: Weights,
        entries: Sequence[Entry],
        groups: Sequence[dict[str, Any]],
        population: Population,
        *,
        step: int,
        first: int = 0,
        paired: bool,
        rank: int,
        gathered: Gathered,
    ) -> None:
        self.entries = entries
        self.scales = weights.scales(entries, groups, population, step)
        self._weights = weights
        self._population = population
        self._step = step
        self._rank = rank
        self._gathered = gathered
        self._paired = paired
        self._first = first * (2 if paired and population.antithetic else 1)
        self._noises: list[Noise] = []

    def stacked(self, members: int) -> tuple[list[Tensor], list[Tensor], StackedNoise]:
        """The tensors that move, their scales, and the noise of so many members of them."""
        moved = [(entry, scale) for entry, scale in zip(self.entries, self.scales, strict=True) if scale is not None]
        parameters = [entry.parameter for entry, _ in moved]
        windows = [self._windows(entry, range(members)) for entry, _ in moved]
        noise = StackedNoise.of(self._population.noise, windows, parameters)
        return parameters, [scale for _, scale in moved], noise

    def _windows(self, entry: Entry, members: range) -> list[tuple[Window, ...]]:
        """Where the noise of members of one tensor stands."""
        return self._population.windows_of(
            entry.parameter.numel(),
            step=self._step,
            members=range(self._first + members.start, self._first + members.stop),
            tensor=entry.index,
            rank=self._rank,
            paired=self._paired,
        )

    def enter(self, member: int) -> None:
        """Move the weights to a member, from the mean or from another member."""
        own = range(member, member + 1)
        self._noises = [self._noise(entry, self._windows(entry, own)[0]) for entry in self.entries]
        self._weights.enter(self.entries, self.scales, self._noises, self._gathered)

    def _noise(self, entry: Entry, windows: Sequence[Window]) -> Noise:
        if entry.shard is None:
            return Noise(self._population.noise, windows, entry.parameter)
        return Noise.of_shard(self._population.noise, windows, local_of(entry.parameter), entry.shard)

    def check_reduced(self) -> None:
        """Raise if the gradients of the members would not be reduced one by one."""
        self._gathered.check_reduced()

    def leave(self) -> None:
        """Bring the mean back."""
        self._weights.leave()

    def slope(self, probe: Probe) -> Tensor:
        """``z . g`` of the member in place."""
        return self._weights.slope(self.scales, self._noises, probe)

    def relative_sizes(self) -> Tensor:
        """``|z|^2`` and ``|w|^2`` of the member in place."""
        return self._weights.relative_sizes(self.scales, self._noises, self.probe())

    def probe(self) -> Probe:
        """What the statistics of this step look at."""
        return Probe(self._seed(self._first) / 2**63)

    def mask_seed(self, member: int) -> int:
        """A seed for what else may be random in a member: dropout masks that are not shared."""
        return self._seed(self._first + member)

    def _seed(self, stream: int) -> int:
        beyond = max((entry.index for entry in self.entries), default=-1) + 1  # a tensor that there is not
        return self._population.device_seed(step=self._step, stream=stream, tensor=beyond, rank=self._rank)
