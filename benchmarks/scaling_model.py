"""What a step costs on N processes: the arithmetic, with constants from measurements, and its tables.

Every process computes ``C`` seconds for its own batch, whatever ``N`` is. The reduction of ``B`` bytes of gradients
over ``N`` processes takes, by recursive halving and doubling (Rabenseifner),

    A(N) = 2 ceil(log2 N) latency * buckets + 2 (N - 1) / N * B / bandwidth

seconds: no exact method sends less, and a ring has more latency, so that communication counts for little here and what
members cost for much. ``t(N) = C + A(N)`` when nothing overlaps. Where DDP hides the reduction behind the backward
pass, whose share of ``C`` is ``b``, a plain step takes ``C - b + max(b, A(N))``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

__all__ = [
    "ASSUMED",
    "Link",
    "all_reduce_seconds",
    "extrapolated",
    "fitted_link",
    "median_ratio",
    "medians",
    "step_seconds",
    "texts",
]

BACKWARD = 2 / 3  # of forward and backward, by the usual count of operations


@dataclass(frozen=True)
class Link:
    """What a process is connected to the others by: bytes per second in each direction, and seconds per message."""

    name: str
    bandwidth: float
    latency: float


ASSUMED = (
    Link("Ethernet, 10 Gbit/s", 1.25e9, 30e-6),
    Link("fast interconnect, 400 Gbit/s", 50e9, 5e-6),
)


def all_reduce_seconds(ranks: int, size: float, link: Link, buckets: int = 1) -> float:
    """Seconds to sum so many bytes over all ranks, in so many pieces one after the other."""
    rounds = 2 * math.ceil(math.log2(ranks)) * buckets
    return rounds * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth


def fitted_link(name: str, sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The link that explains measured reductions between two processes: 2 latencies, and every byte once.

    Least squares of relative errors, so that small sizes count for the latency; neither constant is negative.
    """
    rows = np.array([[2.0, size] for size in sizes]) / np.array(seconds)[:, None]
    latency, per_byte = nnls(rows, np.ones(len(sizes)))[0]
    return Link(name, float(1 / per_byte) if per_byte else math.inf, float(latency))


def step_seconds(compute: float, communication: float, hidden: float = 0.0) -> float:
    """Seconds of a step in which so much of the computing can go on during the communication."""
    return compute - hidden + max(hidden, communication)


def extrapolated(
    compute: Mapping[str, float],
    plain: str,
    ways: Mapping[str, bool],
    ranks: Sequence[int],
    link: Link,
    size: float,
    buckets: int,
) -> dict[str, list[list[float]]]:
    """Ratios to a plain step, by way, for each number of ranks: without overlap, and with it wherever DDP has it.

    Parameters
    ----------
    compute : mapping of str to float
        Seconds of one process, by way; `plain` is one of them.
    plain : str
        The reference.
    ways : mapping of str to bool
        What is compared; whether its reduction can overlap with its last backward pass.
    ranks : sequence of int
        Numbers of processes.
    link, size, buckets
        See `all_reduce_seconds`.
    """
    backward = BACKWARD * compute[plain]
    table: dict[str, list[list[float]]] = {}
    for way, overlaps in ways.items():
        table[way] = []
        for count in ranks:
            reduction = all_reduce_seconds(count, size, link, buckets)
            ratios: list[float] = []
            for hidden in (0.0, backward):
                own = step_seconds(compute[way], reduction, hidden if overlaps else 0.0)
                ratios.append(own / step_seconds(compute[plain], reduction, hidden))
            table[way].append(ratios)
    return table


def texts(table: Mapping[str, Sequence[Sequence[float]]]) -> list[list[str]]:
    """Rows of a table: ``1.20 (1.24)``, without overlap (and with it)."""
    return [[way, *(f"{alone:.2f} ({over:.2f})" for alone, over in columns)] for way, columns in table.items()]


def median_ratio(cell: Mapping[str, Any], key: str, way: str, reference: str) -> float:
    """Median of the ratios of samples of the same round, which are neighbours in time."""
    return float(np.median(np.divide(cell[way][key], cell[reference][key])))


def medians(cell: Mapping[str, Any], key: str) -> dict[str, float]:
    """Median of one quantity, by way."""
    return {way: float(np.median(entry[key])) for way, entry in cell.items()}
