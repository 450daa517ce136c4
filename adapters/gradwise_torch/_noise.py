"""The core's unit noise as tensors: windows of a table on each device, added to weights without a copy."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gradwise._noise import Window, noise_table

__all__ = ["Noise"]


@lru_cache(maxsize=64)
def _table(noise: str, device: torch.device) -> Tensor:
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

    def __init__(self, distribution: str, windows: Sequence[Window], like: Tensor) -> None:
        table = _table(distribution, like.device)
        self._shape = like.shape
        self._parts = [(table[offset : offset + length], sign) for offset, length, sign in windows]

    def gathered(self) -> Tensor:
        """The noise itself, in float32."""
        if len(self._parts) == 1:
            part, sign = self._parts[0]
            return (part if sign > 0 else -part).view(self._shape)
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

    def dot(self, values: Tensor, scale: Tensor) -> Tensor:
        """``sum(scale * noise * values)``, in float32 or better."""
        if scale.ndim:
            return (self.gathered() * scale * values).sum()
        dtype = torch.promote_types(values.dtype, torch.float32)
        pieces = values.flatten().split([len(part) for part, _ in self._parts])
        dots = [
            sign * torch.dot(part.to(dtype), piece.to(dtype))
            for piece, (part, sign) in zip(pieces, self._parts, strict=True)
        ]
        return scale * (dots[0] if len(dots) == 1 else torch.stack(dots).sum()) if dots else values.new_zeros(())
