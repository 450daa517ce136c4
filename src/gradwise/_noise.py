"""Unit noise by key: windows of one table that is drawn once, at offsets and signs that a hash of the key decides."""

import hashlib
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Window", "key_seed", "key_windows", "key_words", "noise_table", "window_draw", "window_of"]

SIZE = 1 << 22  # numbers in the table: 16 MiB
CHUNK = 1 << 20  # the longest window; a larger tensor is made of several
GRAIN = 16  # offsets are multiples of 64 bytes: unaligned reads cost up to three times as much
_DRAWS = 1 << 32
_WORD = _DRAWS - 1
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


@lru_cache(maxsize=1 << 16)  # every tensor of every stream, for all steps
def key_words(words: tuple[int, ...], size: int) -> tuple[tuple[int, int], ...]:
    """Two random 32-bit words for each of the windows that `size` numbers of the stream with this key need.

    Distinct keys have distinct digests: a collision of BLAKE2b-512 is not going to happen.

    Parameters
    ----------
    words : tuple of int
        The key: integers from 0 to 2**64 - 1.
    size : int
        How many numbers.

    Returns
    -------
    tuple of (int, int)
        For `window_draw`.
    """
    windows = len(range(0, size, CHUNK))
    digests = [_digest((*words, block), size=64) for block in range(-(-windows // 8))]
    return tuple(struct.iter_unpack("<II", b"".join(digests)))[:windows]  # the last digest may hold more than is needed


def window_draw(first: Any, second: Any, step: Any, *, word: Any = _WORD) -> Any:
    """What decides on a window at a step: 32 bits, whose highest 18 are the place and whose lowest is the sign.

    Computes ``mix(first ^ mix(second + step))`` with a bijection `mix` of the 32-bit words: over 2**32 steps each key
    draws every number once. Made of operations that Python's integers and every array library share, so that compiled
    training steps compute the same in the graph.

    Parameters
    ----------
    first, second : int or integer array
        From `key_words`.
    step : int or integer array
        Below 2**32, of the same type.
    word : int or integer scalar
        2**32 - 1, in a type that goes with the others. They need 64 bits, unless they are unsigned with 32.

    Returns
    -------
    int or integer array
        See `window_of`.
    """
    return _mix(first ^ _mix((second + step) & word, word), word)


def window_of(draw: Any) -> tuple[Any, Any]:
    """Offset into the table and sign (0 for +1, 1 for -1) of a draw; integers or integer arrays."""
    return draw // (_DRAWS // (SIZE // GRAIN)) * GRAIN, draw & 1


def key_windows(words: tuple[int, ...], size: int, step: int) -> tuple[Window, ...]:
    """Where `size` numbers of the stream with this key stand in the table at a step.

    Windows of two keys, or of two steps, may overlap; their signs are independent, so that over keys and steps no two
    numbers of different windows are correlated, and two numbers of one window as little as two places of the table.

    Parameters
    ----------
    words : tuple of int
        The key: integers from 0 to 2**64 - 1.
    size : int
        How many numbers.
    step : int
        Below 2**32.

    Returns
    -------
    tuple of Window
        In order; all but the last have the length CHUNK.
    """
    result: list[Window] = []
    for start, (first, second) in zip(range(0, size, CHUNK), key_words(words, size), strict=True):
        offset, negative = window_of(window_draw(first, second, step))
        result.append((offset, min(CHUNK, size - start), 1 - 2 * negative))
    return tuple(result)


def _mix(x: Any, word: Any) -> Any:
    """A bijection of 32-bit words in which every bit depends on all: multiplications and xor-shifts, as in lowbias32.

    Constants from a public search by C. Wellons, https://github.com/skeeto/hash-prospector.
    """
    # Not >>, which TensorFlow's tensors lack.
    x = (x ^ x // 65536) * 0x21F0AAAD & word
    x = (x ^ x // 32768) * 0x735A2D97 & word
    return x ^ x // 32768


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
