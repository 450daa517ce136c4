"""Which outputs a sample is matched at, when not all of them are."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["draw_outputs"]

Integers = np.ndarray[Any, np.dtype[np.int64]]

_CALLS = 32
_KEPT = 16384  # numbers: 128 KiB


def draw_outputs(key: tuple[int, int], step: tuple[int, int], batch: int, n_outputs: int, n_rows: int) -> Tensor:
    """Distinct outputs for each sample, uniformly and without replacement, int64 of shape (batch, n_rows); read-only.

    Counter-based: the same (seed, rank) and (call, phase) give the same draw, and torch's random stream is untouched.
    """
    call, phase = step
    # Small draws are made for several calls at once and kept: alone, one would take a tenth of a small model's step.
    calls = min(_CALLS, _KEPT // max(batch * n_rows, 1))
    if calls <= 1:
        return torch.from_numpy(_draw(key, (call, phase), batch, n_outputs, n_rows))
    block, position = divmod(call, calls)
    drawn = _kept_draw(key, (block, phase), calls * batch, n_outputs, n_rows)
    return torch.from_numpy(drawn[position * batch : (position + 1) * batch])


def _draw(key: tuple[int, int], step: tuple[int, int], batch: int, n_outputs: int, n_rows: int) -> Integers:
    """Floyd's algorithm: it costs `n_rows` random numbers for each sample, however many outputs there are."""
    call, phase = step
    # The two high words: each call owns 2**128 numbers, so that streams never overlap.
    stream = np.random.Philox(
        key=np.array(key, dtype=np.uint64), counter=np.array([0, 0, phase, call], dtype=np.uint64)
    )
    generator = np.random.Generator(stream)
    rows = np.empty((batch, n_rows), dtype=np.int64)
    for k in range(n_rows):
        newest = n_outputs - n_rows + k  # the only output that no earlier round could draw
        drawn = generator.integers(newest + 1, size=batch)
        if k > 0:
            drawn = np.where((rows[:, :k] == drawn[:, None]).any(axis=1), newest, drawn)
        rows[:, k] = drawn
    return rows


# A function of its arguments alone, so that what is kept is never wrong. numpy's arrays and not tensors: one that is
# made in inference mode could not be used in training.
_kept_draw = lru_cache(maxsize=8)(_draw)
