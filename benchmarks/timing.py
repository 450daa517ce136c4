"""Medians of interleaved repeats: what slows the machine for a while slows all columns alike."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

__all__ = ["Step", "Timing", "interleaved", "recorded_messages"]

Step = Callable[[], object]
FLOOR = 5e-3  # seconds: the least that one sample lasts
WARM = 50e-3  # seconds: the most that one more call before a sample may cost


@dataclass(frozen=True)
class Timing:
    """Samples of one step.

    Attributes
    ----------
    seconds : list of float
        Time of one call, one entry for each repeat.
    loops : int
        How many calls a sample is the mean of.
    messages : list of str
        Warnings: which path was not possible, for example.
    """

    seconds: list[float]
    loops: int
    messages: list[str]

    @property
    def median(self) -> float:
        """In seconds."""
        return float(np.median(self.seconds))

    def as_dict(self) -> dict[str, object]:
        """For JSON; times in seconds."""
        lower, upper = np.quantile(self.seconds, [0.25, 0.75])
        return {
            "median": self.median,
            "quartiles": [float(lower), float(upper)],
            "samples": self.seconds,
            "loops": self.loops,
            "messages": self.messages,
        }


def interleaved(
    steps: Mapping[str, Step],
    repeats: int,
    *,
    floor: float = FLOOR,
    synchronise: Callable[[], object] = lambda: None,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time of each step, in rounds over all of them; first calls (allocation, compiling) are not counted.

    Parameters
    ----------
    steps : mapping of str to callable
        What is timed.
    repeats : int
        Rounds.
    floor : float
        Seconds that a sample lasts at least: short steps are called several times for it.
    synchronise : callable
        Waits for the device, before and after a sample.
    advance : callable
        Called when a step has been warmed up and after each of its samples.
    """
    messages: dict[str, list[str]] = {}
    loops: dict[str, int] = {}
    for name, step in steps.items():
        with recorded_messages() as messages[name]:
            step()
            step()
            once = _time(step, 1, synchronise)
        loops[name] = max(1, math.ceil(floor / once))
        advance()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    last = dict.fromkeys(steps, 0.0)
    for _ in range(repeats):
        for name, step in steps.items():
            with recorded_messages() as more:
                if last[name] < WARM:
                    step()  # the others have emptied the caches
                last[name] = _time(step, loops[name], synchronise)
            messages[name] += [message for message in more if message not in messages[name]]
            seconds[name].append(last[name])
            advance()
    return {name: Timing(seconds[name], loops[name], messages[name]) for name in steps}


def _time(step: Step, loops: int, synchronise: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(loops):
        step()
    synchronise()
    return (time.perf_counter() - start) / loops


@contextmanager
def recorded_messages() -> Iterator[list[str]]:
    """The warnings within, and what torch.compile logs (that it gives up and runs eagerly, say); each once."""
    messages: list[str] = []
    handler = _Recorder(messages)
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield messages
    finally:
        logger.removeHandler(handler)
    messages += [str(warning.message) for warning in caught]
    messages[:] = dict.fromkeys(messages)


class _Recorder(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().partition("\n")[0])
