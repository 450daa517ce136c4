"""Positions of the user's random streams, so that members which share a batch share its dropout masks."""

import contextlib
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStreams"]


class RandomStreams:
    """Where torch's, Python's and numpy's global random streams stood when this was made.

    Parameters
    ----------
    devices : iterable of torch.device
        Devices whose default generators matter, next to the CPU's.
    only_torch : bool
        Leave Python's and numpy's be, which take 60 us to look up.
    """

    def __init__(self, devices: Iterable[torch.device], *, only_torch: bool = False) -> None:
        self._streams: list[tuple[Callable[[Any], object], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
        if not only_torch:
            self._streams += [
                (random.setstate, random.getstate()),
                # The legacy stream is the one that model code uses (SpecAugment masks, for example).
                (np.random.set_state, np.random.get_state()),  # noqa: NPY002 - see above
            ]
        self._devices = sorted({str(device) for device in devices if device.type not in ("cpu", "meta")})
        for device in self._devices:
            module = getattr(torch, device.partition(":")[0])  # torch.cuda, torch.xpu, torch.mps
            setter = module.set_rng_state if device == "mps" else partial(module.set_rng_state, device=device)
            state = module.get_rng_state() if device == "mps" else module.get_rng_state(device)
            self._streams.append((setter, state))

    def start_from(self, seed: int) -> None:
        """Start these streams, and no others, afresh from `seed`: for masks that differ between members."""
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy stream, as in __init__
        for device in self._devices:
            module = getattr(torch, device.partition(":")[0])
            with contextlib.nullcontext() if device == "mps" else module.device(device):
                module.manual_seed(seed)  # that of the current device

    def rewind(self) -> None:
        """Put the streams back to where they stood."""
        for setter, state in self._streams:
            setter(state)

    def keep_moved(self, later: "RandomStreams") -> None:
        """Forget the streams that stand in `later` where they stand here: numpy's costs 80 us to rewind."""
        self._streams = [
            (setter, state)
            for (setter, state), (_, now) in zip(self._streams, later._streams, strict=True)
            if not _equal(state, now)
        ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, tuple) and a and isinstance(a[0], str):  # numpy's ("MT19937", keys, position, ...)
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
