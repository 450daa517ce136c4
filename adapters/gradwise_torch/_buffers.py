"""Buffers of a model whose forward runs once per member but should count once: BatchNorm statistics and the like."""

import torch
from torch import Tensor, nn

from gradwise._statistics import running_mean

__all__ = ["MemberBuffers"]

AVERAGED = ("running_mean", "running_var")  # by name, so that custom and synchronised norms are found too


class MemberBuffers:
    """Gives every member the same buffers to start from and combines what the members made of them.

    Running statistics become the mean over the members, which is one momentum update with the mean of the members'
    batch statistics; every other buffer (counters, power iterations) is left as the first member left it.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module | None) -> None:
        self._places = [
            (module, name)
            for module in ([] if model is None else model.modules())
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._start = [buffer.clone() for buffer in self._current()]
        self._result: list[Tensor] = []

    @torch.no_grad()
    def collect(self, count: int) -> None:
        """Take in what the `count`-th member made of the buffers."""
        if count == 1:
            self._result = [buffer.clone() for buffer in self._current()]
            return
        for i, ((_, name), buffer) in enumerate(zip(self._places, self._current(), strict=True)):
            if name in AVERAGED and buffer.is_floating_point():
                self._result[i] = running_mean(self._result[i], buffer, count)

    def rewind(self) -> None:
        """Put the buffers back to where the members start."""
        self._write(self._start)

    def finish(self) -> None:
        """Leave the combined buffers in the model."""
        self._write(self._result)

    def _current(self) -> list[Tensor]:
        return [module._buffers[name] for module, name in self._places]  # type: ignore[misc] - None is filtered above

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._current(), values, strict=True):
            buffer.copy_(value)
