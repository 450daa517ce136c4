"""The core's unit noise as tensors: windows of a table on each device, added to weights without a copy."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gradwise._noise import GRAIN, Window, noise_table
from gradwise_torch._shards import Shard

__all__ = ["Noise", "StackedNoise"]


@lru_cache(maxsize=64)
def noise_on(noise: str, device: torch.device) -> Tensor:
    """The table on a device, for as long as the process lives."""
    with torch.inference_mode(False):  # else it could not be used outside of inference mode
        return torch.from_numpy(noise_table(noise)).to(device)


class Noise:
    """The unit noise of one tensor of one member, not yet gathered.

    Parameters
    ----------
    distribution : str
        ``Population.noise``.
    windows : sequence of Window
        ``Population.windows_of`` for this tensor.
    like : Tensor
        Gives shape and device.
    """

    __slots__ = ("_parts", "_shape")

    def __init__(self, distribution: str, windows: Sequence[Window], like: Tensor) -> None:
        table = noise_on(distribution, like.device)
        self._shape = like.shape
        self._parts = [(table[offset : offset + length], sign) for offset, length, sign in windows]

    @classmethod
    def of_shard(cls, distribution: str, windows: Sequence[Window], like: Tensor, shard: Shard) -> "Noise":
        """The part for `like`, a shard, of the noise of the whole tensor, to which the windows belong.

        Parts that are in one piece in the whole are windows again. Others are gathered, with the whole for a moment.
        """
        if shard.span is not None:
            return cls(distribution, _cut(windows, *shard.span), like)
        noise = cls(distribution, windows, like)
        noise._shape = torch.Size(shard.shape)
        one = len(noise._parts) == 1
        whole, sign = (noise._parts[0][0].view(shard.shape), noise._parts[0][1]) if one else (noise.gathered(), 1)
        noise._shape = like.shape
        noise._parts = [(shard.cut(whole).reshape(-1), sign)]
        return noise

    def gathered(self) -> Tensor:
        """The noise itself, in float32."""
        return torch.cat([part * sign for part, sign in self._parts] or [torch.zeros(0)]).view(self._shape)

    def move(self, out: Tensor, mean: Tensor, scale: Tensor) -> None:
        """``out = mean + scale * noise``; in half precision the sum is rounded once."""
        if len(self._parts) == 1:
            part, sign = self._parts[0]
            torch.addcmul(mean, part.view(self._shape), scale, value=sign, out=out)
        elif scale.ndim == 0 and out.is_contiguous() and mean.is_contiguous():
            lengths = [len(part) for part, _ in self._parts]
            pieces = zip(out.view(-1).split(lengths), mean.view(-1).split(lengths), self._parts, strict=True)
            for to, source, (part, sign) in pieces:
                torch.addcmul(source, part, scale, value=sign, out=to)
        else:
            torch.addcmul(mean, self.gathered(), scale, out=out)

    def norm(self, span: slice) -> Tensor:
        """Root of the sum of squares over a span of the numbers."""
        flat = self._parts[0][0] if len(self._parts) == 1 else self.gathered().view(-1)
        return torch.linalg.vector_norm(flat[span])

    def dot(self, values: Tensor, span: slice) -> tuple[Tensor, int]:
        """``sum(noise * values)`` over a span of their numbers, in float32 or better: without its sign, and that."""
        flat = values.view(-1) if values.is_contiguous() else values.flatten()
        if len(self._parts) == 1:
            part, sign = self._parts[0]
            if len(part) > span.stop - span.start:
                part, flat = part[span], flat[span]
            return torch.dot(part, flat) if flat.dtype == torch.float32 else _wide_dot(part, flat), sign
        whole = self.gathered().view(-1)
        return _wide_dot(whole[span], flat[span]), 1


def _cut(windows: Sequence[Window], start: int, stop: int) -> list[Window]:
    """The windows of the numbers from `start` to `stop`."""
    parts: list[Window] = []
    begin = 0
    for offset, length, sign in windows:
        first, last = max(start, begin), min(stop, begin + length)
        if first < last:
            parts.append((offset + first - begin, last - first, sign))
        begin += length
    return parts


class StackedNoise(NamedTuple):
    """The noise of all members of several tensors on one device, not yet gathered: what a compiled program can take.

    Attributes
    ----------
    table : Tensor
        That of the device.
    places : Tensor of shape (tensors, members)
        Where the window of each begins, in units of the grain.
    signs : Tensor of shape (tensors, members)
    gathered : list of Tensor or None
        The noise itself, for tensors of more than one window, with its signs; those in `signs` are then 1.
    """

    table: Tensor
    places: Tensor
    signs: Tensor
    gathered: list[Tensor | None]

    @classmethod
    def of(
        cls, distribution: str, windows: Sequence[Sequence[Sequence[Window]]], likes: Sequence[Tensor]
    ) -> "StackedNoise":
        """The noise of tensors like `likes`, from the windows of every member of each."""
        device = likes[0].device if likes else torch.device("cpu")
        single = [all(len(own) == 1 for own in members) for members in windows]
        places = [[own[0][0] // GRAIN if one else 0 for own in of] for of, one in zip(windows, single, strict=True)]
        signs = [[own[0][2] if one else 1 for own in of] for of, one in zip(windows, single, strict=True)]
        gathered = [
            None if one else torch.stack([Noise(distribution, own, like).gathered() for own in members])
            for members, like, one in zip(windows, likes, single, strict=True)
        ]
        return cls(
            noise_on(distribution, device),
            torch.tensor(places, device=device),
            torch.tensor(signs, device=device),
            gathered,
        )

    def members(self, tensor: int, mean: Tensor, scale: Tensor) -> Tensor:
        """``mean + scale * noise`` for all members, along a new first axis: what `Noise.move` makes, bit for bit."""
        noise = self.gathered[tensor]
        if noise is None:
            noise = self.table.unfold(0, mean.numel(), GRAIN)[self.places[tensor]].view(-1, *mean.shape)
        signs = self.signs[tensor].to(scale.dtype).view(-1, *[1] * mean.ndim)
        return torch.addcmul(mean, noise, scale * signs).to(mean.dtype)


def _wide_dot(noise: Tensor, values: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    return torch.dot(noise.to(dtype), values.to(dtype))
