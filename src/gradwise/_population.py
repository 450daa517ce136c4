"""What a member of the population is: its noise, its scale, and the keys that make both reproducible."""

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gradwise._noise import Window, key_seed, key_windows, key_words, noise_table

__all__ = ["Population"]

SCALES = ("rms", "filter", "absolute")
NOISES = ("gaussian", "rademacher")
_WORD = 1 << 64


@dataclass(frozen=True)
class Population:
    r"""Perturbed copies of the weights: how many, how far apart, and drawn from which random streams.

    "Population" as in evolution strategies, not as in "population risk": member :math:`i` of a tensor of mean
    weights :math:`\theta` is

    .. math:: \theta_i = \theta + \sigma \, s(\theta) \, \pm\varepsilon_i

    with unit noise :math:`\varepsilon` and the scale :math:`s` named by `scale`. The mean of the members' gradients
    estimates the gradient of the loss smoothed over that neighbourhood. The scale is held constant when gradients
    are taken: :math:`\partial s / \partial\theta` is left out, on purpose (see ``benchmarks/relative_noise.py``).

    The idea is that of Sakai, Kormilitzin, Liu and Nevado-Holgado (arXiv 2010.12260), of which only the abstract
    was available: no default below is taken from the paper.

    Parameters
    ----------
    size : int
        Members per step. Even when `antithetic`.
    sigma : float or callable of int
        Size of the noise, in units of `scale` (relative for ``"rms"`` and ``"filter"``, weight units for
        ``"absolute"``); a callable receives the step and returns the size for that step.
    scale : {"rms", "filter", "absolute"}
        Standard deviation of the perturbation of a tensor, divided by sigma: the root mean square of the tensor, of
        each of its output filters, or 1. A tensor of zeros is not perturbed by the first two.
    noise : {"gaussian", "rademacher"}
        Distribution of the unit noise: standard normal, or -1 and +1 with equal probability. It is read from a table of
        2**22 numbers, at offsets and with signs that a hash of the key decides, for the price of reading memory.
    antithetic : bool
        Members come in pairs with opposite noise, where members share a batch: the odd-order terms of the noise cancel.
    seed : int
        The first word of every key, from 0 to 2**64 - 1.

    Raises
    ------
    ValueError
        A value is out of its range, or `size` is odd while `antithetic`.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise import Population
    >>> population = Population(size=4, sigma=0.5)
    >>> weights = np.array([[3.0, -4.0]])
    >>> float(population.scale_of(weights, step=0, xp=np))  # 0.5 * sqrt((9 + 16) / 2)
    1.7677669529663687
    >>> up, down = (population.unit_noise((2,), member=i, step=0, tensor=0) for i in (0, 1))
    >>> bool(np.all(up == -down))
    True
    """

    size: int = 8
    sigma: float | Callable[[int], float] = 0.1
    scale: Literal["rms", "filter", "absolute"] = "rms"
    noise: Literal["gaussian", "rademacher"] = "gaussian"
    antithetic: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, numbers.Integral) or self.size < 1:
            msg = f"`population_size` (`Population.size`) must be a positive integer; got {self.size!r}"
            raise ValueError(msg)
        if self.antithetic and self.size % 2:
            msg = (
                "`population_size` (`Population.size`) must be even when `antithetic` is true (members come in "
                f"pairs); got {self.size}. Use an even size or pass antithetic=False"
            )
            raise ValueError(msg)
        if self.scale not in SCALES:
            msg = f"`scale` must be one of {SCALES}; got {self.scale!r}"
            raise ValueError(msg)
        if self.noise not in NOISES:
            msg = f"`noise` must be one of {NOISES}; got {self.noise!r}"
            raise ValueError(msg)
        _check_word("seed", self.seed)
        if not callable(self.sigma):
            check_sigma(self.sigma)

    def sigma_at(self, step: int) -> float:
        """Size of the noise at `step`, in units of `scale`: `sigma`, or what the schedule returns."""
        return check_sigma(self.sigma(step) if callable(self.sigma) else self.sigma)

    def scale_of(
        self, weights: Any, *, step: int = 0, sigma: float | None = None, filter_axis: int = 0, xp: ModuleType
    ) -> Any:
        """Standard deviation of the perturbation of one tensor: ``sigma * s(weights)``.

        Parameters
        ----------
        weights : array of any shape
            Mean weights. In half precision, hand over a float32 copy: squares overflow.
        step : int
            What a `sigma` schedule is evaluated at.
        sigma : float, optional
            Takes the place of the population's own `sigma`.
        filter_axis : int
            Axis of the output filters, for ``scale="filter"``: 0 in torch, -1 in Keras.
        xp : module
            Array namespace of `weights`.

        Returns
        -------
        float or array that broadcasts to the shape of `weights`
            In the units of the weights.
        """
        size = self.sigma_at(step) if sigma is None else sigma
        if self.scale == "absolute":
            return size
        ndim = len(weights.shape)
        if self.scale == "rms" or ndim == 0:
            flat = xp.reshape(weights, (-1,))  # keras.ops' norm on TensorFlow knows two axes at most
            return size * (xp.linalg.norm(flat) / math.sqrt(max(1, math.prod(weights.shape))))
        axes = self.averaged_axes(ndim, filter_axis=filter_axis)
        if not axes:  # one weight per filter; an empty tuple of axes means "all of them" to torch
            return size * xp.abs(weights)
        return size * xp.sqrt(xp.mean(xp.square(weights), axis=axes, keepdims=True))

    def averaged_axes(self, ndim: int, *, filter_axis: int = 0) -> tuple[int, ...]:
        """Axes of a tensor over which its scale is an average: the square of the scale is a mean of squares over them.

        So a part of a tensor that has all of these axes as a whole has the scale of the tensor; where they are divided
        between parts, the square of the whole's scale is the mean of the squares of the parts' scales, each counting
        as much as it has of the numbers along these axes.

        Parameters
        ----------
        ndim : int
            How many axes the tensor has.
        filter_axis : int
            See `scale_of`.

        Returns
        -------
        tuple of int
            None of them for ``scale="absolute"``.
        """
        if self.scale == "absolute":
            return ()
        return tuple(axis for axis in range(ndim) if self.scale == "rms" or axis != filter_axis % ndim)

    def stream_of(self, member: int, *, paired: bool = True) -> tuple[int, int]:
        """Noise stream of a member and the sign it is used with.

        Parameters
        ----------
        member : int
            Index of the member.
        paired : bool
            Whether the members share a batch. Where they do not, an antithetic partner would cancel nothing, and
            every member is an independent draw.

        Returns
        -------
        tuple of int
            The stream and +1 or -1.
        """
        if self.antithetic and paired:
            return member // 2, 1 - 2 * (member % 2)
        return member, 1

    def streams(self, members: int, *, paired: bool = True) -> int:
        """How many noise streams so many members use: see `stream_of`."""
        return 1 + self.stream_of(members - 1, paired=paired)[0]

    def windows_of(
        self, size: int, *, step: int, members: Iterable[int], tensor: int, rank: int = 0, paired: bool = True
    ) -> list[tuple[Window, ...]]:
        """Where the unit noise of one tensor stands in the noise table, for every one of `members`.

        The same key always gives the same noise, on every machine and device; no random state is touched. Each of the
        windows counts with its sign, which includes that of the member within its antithetic pair.

        Parameters
        ----------
        size : int
            Number of elements of the tensor.
        step, tensor, rank : int
            The key, together with `seed` and the member. `tensor` is the tensor's index, `rank` that of the process.
        members : iterable of int
            Indices of members.
        paired : bool
            See `stream_of`.

        Returns
        -------
        list of tuple of (offset, length, sign)
            Into ``noise_table(self.noise)``.
        """
        result: list[tuple[Window, ...]] = []
        for stream, sign in [self.stream_of(member, paired=paired) for member in members]:
            seed, _, _, _, _ = self._words(step=step, stream=stream, tensor=tensor, rank=rank)
            high, low = divmod(step, 1 << 32)
            windows = key_windows((seed, rank, high, stream, tensor), size, low)
            result.append(windows if sign > 0 else tuple([(offset, length, -own) for offset, length, own in windows]))
        return result

    def words_of(self, size: int, *, stream: int, tensor: int, rank: int = 0) -> tuple[tuple[int, int], ...]:
        """What a compiled training step needs to find the windows of `windows_of` by itself, at steps below 2**32.

        Parameters
        ----------
        size : int
            Number of elements of the tensor.
        stream, tensor, rank : int
            The key without its step. See `stream_of` for the stream of a member, and the sign that goes with it.

        Returns
        -------
        tuple of (int, int)
            Two 32-bit words for each window, for ``gradwise._noise.window_draw``.
        """
        return key_words(self._words(step=0, stream=stream, tensor=tensor, rank=rank), size)

    def unit_noise(
        self,
        shape: tuple[int, ...],
        *,
        step: int,
        member: int,
        tensor: int,
        rank: int = 0,
        paired: bool = True,
        dtype: npt.DTypeLike = np.float64,
    ) -> npt.NDArray[np.floating[Any]]:
        """Unit noise of one tensor of one member, as an array of its own: the numbers that `windows_of` points to.

        Parameters
        ----------
        shape : tuple of int
            Shape of the tensor.
        step, member, tensor, rank, paired
            See `windows_of`.
        dtype : numpy dtype
            The numbers have the precision of float32 whatever this is.

        Returns
        -------
        ndarray of shape `shape`
            Mean 0, standard deviation 1, no unit.
        """
        table = noise_table(self.noise)
        (windows,) = self.windows_of(
            math.prod(shape), step=step, members=[member], tensor=tensor, rank=rank, paired=paired
        )
        parts = [sign * table[offset : offset + length] for offset, length, sign in windows]
        return np.concatenate([*parts, table[:0]]).astype(dtype, copy=False).reshape(shape)

    def device_seed(self, *, step: int, stream: int, tensor: int, rank: int = 0) -> int:
        """Seed below 2**63 for generators that are not ours (dropout masks of a member), from a key."""
        return key_seed(self._words(step=step, stream=stream, tensor=tensor, rank=rank))

    def _words(self, *, step: int, stream: int, tensor: int, rank: int) -> tuple[int, ...]:
        if not (
            type(step) is type(stream) is type(tensor) is type(rank) is int
            and 0 <= step | stream | tensor | rank < _WORD
        ):
            for name, value in (("step", step), ("member", stream), ("tensor", tensor), ("rank", rank)):
                _check_word(name, value)
        return self.seed, rank, step, stream, tensor


def check_sigma(sigma: Any) -> float:
    """Return `sigma` as a float, or raise if it is not a finite, non-negative number."""
    if isinstance(sigma, bool) or not isinstance(sigma, numbers.Real):
        msg = f"`sigma` must be a number, or a callable that returns one; got {sigma!r}"
        raise TypeError(msg)
    value = float(sigma)
    if not math.isfinite(value) or value < 0:
        msg = f"`sigma` must be finite and not negative; got {value}. Use 0 for the plain gradient"
        raise ValueError(msg)
    return value


def _check_word(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < _WORD:
        msg = f"`{name}` must be an integer from 0 to 2**64 - 1; got {value!r}"
        raise ValueError(msg)
