"""Which outputs a sample is matched at, when not all of them are."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["draw_outputs"]


def draw_outputs(key: tuple[int, int], step: tuple[int, int], batch: int, n_outputs: int, n_rows: int) -> Tensor:
    """Distinct outputs for each sample, uniformly and without replacement, int64 of shape (batch, n_rows).

    Counter-based: the same (seed, rank) and (call, phase) give the same draw, and torch's random stream is untouched.
    """
    call, phase = step
    # The two high words: each call owns 2**128 numbers, so that streams never overlap.
    stream = np.random.Philox(
        key=np.array(key, dtype=np.uint64), counter=np.array([0, 0, phase, call], dtype=np.uint64)
    )
    order = np.random.Generator(stream).random((batch, n_outputs)).argsort(axis=1)
    return torch.from_numpy(order[:, :n_rows].copy())
