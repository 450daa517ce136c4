"""What the members of one step said, kept on the device until somebody reads it."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwise._statistics import PopulationStatistics, gradient_agreement, loss_spread, sharpness

__all__ = ["MemberRecord"]


class MemberRecord:
    """Losses, gradient norms and slopes of the members of one step, unread."""

    def __init__(self) -> None:
        self.members = 0
        self.mean_square_norm: Tensor | None = None
        self.relative_sizes: Tensor | None = None  # |z|^2 and |w|^2 of the first member
        self._sizes: list[int] = []
        self._losses: list[Any] = []
        self._square_norms: list[Tensor] = []
        self._slopes: list[Tensor] = []

    def add_member(self) -> None:
        """Take in a member of the unchanged loop, which does not know its loss and its own gradient."""
        self.members += 1

    def add_losses(self, losses: Any, square_norms: Tensor, slopes: Tensor, sizes: list[int]) -> None:
        """Take in one member or many: numbers, or tensors with an entry for each, and how much they count."""
        self.members += len(sizes)
        self._sizes += sizes
        self._losses.append(losses)
        self._square_norms.append(square_norms)
        self._slopes.append(slopes)

    def loss_values(self) -> list[float]:
        """The losses as numbers, with one device sync."""
        return _numbers(self._losses)

    def read(self, *, skipped: int) -> PopulationStatistics:
        """The statistics as numbers, with the device syncs that this takes."""
        losses = np.array(self.loss_values())
        noise, weight = [math.nan] * 2 if self.relative_sizes is None else self.relative_sizes.tolist()
        relative_sigma = math.sqrt(noise / weight) if weight else 0.0  # nothing has moved: sigma is 0
        agreement = rise = math.nan
        if self.mean_square_norm is not None and self._sizes:
            norms, sizes = np.array(_numbers(self._square_norms)), np.array(self._sizes)
            agreement = float(gradient_agreement(float(self.mean_square_norm), norms, sizes=sizes, xp=np))
            rise = sharpness(math.fsum(_numbers(self._slopes)) / len(self._sizes))
        return PopulationStatistics(
            loss_mean=float(losses.mean()) if losses.size else math.nan,
            loss_spread=float(loss_spread(losses, np.ones(losses.shape, bool), xp=np)) if losses.size else math.nan,
            agreement=agreement,
            sharpness=rise,
            relative_sigma=relative_sigma,
            members=self.members,
            skipped=skipped,
        )


def _numbers(values: list[Any]) -> list[float]:
    if not values or not isinstance(values[0], Tensor):
        return [float(value) for value in values]
    return torch.cat([torch.as_tensor(value).reshape(-1) for value in values]).tolist()
