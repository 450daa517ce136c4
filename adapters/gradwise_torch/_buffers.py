"""Buffers of a model whose forward runs once per member but should count once: BatchNorm statistics and the like."""

from typing import Any

import torch
from torch import Tensor, nn

from gradwise._statistics import running_mean

__all__ = ["MemberBuffers"]

AVERAGED = ("running_mean", "running_var")  # by name, so that custom and synchronised norms are found too

Values = list[Tensor | None]


class MemberBuffers:
    """Gives every member the same buffers to start from and combines what the members made of them.

    Running statistics become the mean over the members, which is one momentum update with the mean of the members'
    batch statistics; every other buffer (counters, power iterations, recurrent states) is left as the first member
    left it. A forward may also replace a buffer, change its shape, or fill one that was None.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules: Any = [] if model is None else model.modules()
        self._places = [(module, name) for module in modules for name in module._buffers]
        self._objects = self._current()
        self._start = _clones(self._objects)
        self._result: Values = []

    @torch.no_grad()
    def collect(self, fraction: float) -> None:
        """Take in what a member made of the buffers, as a fraction of all members so far."""
        if fraction == 1:
            self._result = _clones(self._current())
            return
        for i, ((_, name), value) in enumerate(zip(self._places, self._current(), strict=True)):
            mean = self._result[i]
            if name in AVERAGED and value is not None and mean is not None and value.is_floating_point():
                self._result[i] = running_mean(mean, value, fraction)

    def rewind(self) -> None:
        """Put the buffers back to where the members start."""
        self._write(self._start)

    def finish(self) -> None:
        """Leave the combined buffers in the model."""
        self._write(self._result)

    def _current(self) -> Values:
        return [module._buffers[name] for module, name in self._places]

    @torch.no_grad()
    def _write(self, values: Values) -> None:
        """Into the tensors that were there, which others may refer to, wherever the value still fits."""
        for (module, name), old, value in zip(self._places, self._objects, values, strict=True):
            if old is not None and value is not None and old.shape == value.shape and old.dtype == value.dtype:
                module._buffers[name] = old.copy_(value)
            else:
                module._buffers[name] = None if value is None else value.clone()


def _clones(buffers: Values) -> Values:
    return [None if buffer is None else buffer.detach().clone() for buffer in buffers]
