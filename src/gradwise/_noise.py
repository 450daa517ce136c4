"""Unit noise by key: windows of one table that is drawn once, at offsets and signs that a hash of the key decides."""

import hashlib
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Window", "key_seed", "key_windows", "noise_table"]

SIZE = 1 << 22  # numbers in the table: 16 MiB
CHUNK = 1 << 20  # the longest window; a larger tensor is made of several
GRAIN = 16  # offsets are multiples of 64 bytes: unaligned reads cost up to three times as much
_TABLE_KEY = 0x67726164  # any constant: the table is the same in every process and on every device

Window = tuple[int, int, int]
"""Offset into the table, length, and the sign (+1 or -1) that the window is used with."""


@lru_cache(maxsize=2)
def noise_table(noise: str) -> npt.NDArray[np.float32]:
    """The table of unit noise, as long as the process lives; nobody may write to it.

    Every offset class (positions that are equal modulo the grain) is standardised, so that a number read at a random
    offset has mean 0 and variance 1 exactly. The table begins again at its end, where a window needs it.

    Parameters
    ----------
    noise : {"gaussian", "rademacher"}
        Distribution of the numbers.

    Returns
    -------
    ndarray of shape (SIZE + CHUNK,)
        In float32.
    """
    generator = np.random.Generator(np.random.Philox(key=_TABLE_KEY))
    table = _aligned(SIZE + CHUNK)
    if noise == "rademacher":
        table[:SIZE] = 2 * generator.integers(0, 2, size=SIZE, dtype=np.int8) - 1
    else:
        generator.standard_normal(out=table[:SIZE], dtype=np.float32)
        classes: Any = table[:SIZE].reshape(-1, GRAIN)
        classes -= classes.mean(0, dtype=np.float64).astype(np.float32)
        classes /= np.sqrt(np.square(classes).mean(0, dtype=np.float64)).astype(np.float32)
    table[SIZE:] = table[:CHUNK]
    return table


@lru_cache(maxsize=1024)  # an antithetic pair asks twice
def key_windows(words: tuple[int, ...], size: int) -> tuple[Window, ...]:
    """Where `size` numbers of the stream with this key stand in the table.

    Distinct keys have distinct digests (a collision of BLAKE2b-512 is not going to happen), each with its own offsets
    and signs. Windows of two keys may overlap; their signs are independent, so that over keys no two numbers of
    different windows are correlated, and two numbers of one window as little as two places of the table.

    Parameters
    ----------
    words : tuple of int
        The key: integers from 0 to 2**64 - 1.
    size : int
        How many numbers.

    Returns
    -------
    tuple of Window
        In order; all but the last have the length CHUNK.
    """
    chunks = range(0, size, CHUNK)
    digests = [_digest((*words, block), size=64) for block in range(-(-len(chunks) // 8))]
    draws: Iterator[tuple[int]] = struct.iter_unpack("<Q", b"".join(digests))
    return tuple(
        ((draw >> 1) % (SIZE // GRAIN) * GRAIN, min(CHUNK, size - start), 1 - 2 * (draw & 1))
        for start, (draw,) in zip(chunks, draws, strict=False)  # the last digest may hold more than is needed
    )


def key_seed(words: tuple[int, ...]) -> int:
    """Digest of a key for generators that take one integer below 2**63.

    The words do not fit into one, so uniqueness is that of a 63-bit hash: for n keys the chance of one clash is about
    n**2 / 2**64.
    """
    return int.from_bytes(_digest(words, size=8), "little") >> 1


def _digest(words: tuple[int, ...], *, size: int) -> bytes:
    return hashlib.blake2b(struct.pack(f"<{len(words)}Q", *words), digest_size=size).digest()


def _aligned(size: int) -> npt.NDArray[np.float32]:
    raw = np.empty(4 * size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + 4 * size].view(np.float32)
