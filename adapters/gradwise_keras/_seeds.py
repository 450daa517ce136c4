"""Seeds of the noise for those who give none."""

import os
import weakref
from typing import Any

from keras.src.utils.rng_utils import get_random_seed  # no public name

__all__ = ["free_seed"]

_TAKEN: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


def free_seed(owner: Any) -> int:
    """What ``keras.utils.set_random_seed`` was given, plus one for each living owner that has that already.

    Drawn from the operating system where it was not called. No random stream is touched.
    """
    given = get_random_seed()
    seed = int.from_bytes(os.urandom(7), "little") if given is None else int(given)
    taken = set(_TAKEN.values())
    while seed in taken:
        seed += 1
    _TAKEN[owner] = seed
    return seed
