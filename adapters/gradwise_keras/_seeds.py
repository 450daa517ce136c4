"""The seed of the noise for those who give none."""

import os

from keras.src.utils.rng_utils import get_random_seed  # no public name

__all__ = ["default_seed"]


def default_seed() -> int:
    """What ``keras.utils.set_random_seed`` was given; drawn from the operating system where it was not called.

    No random stream is touched, and the same program gives the same seed however often it runs in a process.
    """
    given = get_random_seed()
    return int.from_bytes(os.urandom(7), "little") if given is None else int(given)
