"""What the members of one step said, kept on the device until somebody reads it."""

import math
from typing import Any

import torch
from torch import Tensor

from gradwise._statistics import PopulationStatistics, gradient_agreement, sharpness, spread

__all__ = ["MemberRecord"]


class MemberRecord:
    """Losses, gradient norms and perturbation moments of the members of one step, unread."""

    def __init__(self) -> None:
        self.members = 0
        self.mean_square_norm: Tensor | None = None
        self._losses: list[Any] = []
        self._square_norms: list[Tensor] = []
        self._moments: Tensor | None = None  # sums of z . g, |z|^2 and |w|^2: bounded, however many members

    def add_member(self, moments: Tensor, *, loss: Any = None, square_norm: Tensor | None = None) -> None:
        """Take in one member; only a closure knows its loss and its own gradient."""
        self.members += 1
        self._moments = moments if self._moments is None else self._moments + moments
        if square_norm is not None:
            self._losses.append(loss)
            self._square_norms.append(square_norm)

    def loss_values(self) -> list[float]:
        """The losses as numbers, with one device sync."""
        if not self._losses or not isinstance(self._losses[0], Tensor):
            return [float(loss) for loss in self._losses]
        return torch.stack([torch.as_tensor(loss) for loss in self._losses]).tolist()

    def read(self, *, skipped: int) -> PopulationStatistics:
        """The statistics as numbers, with the device syncs that this takes."""
        losses = self.loss_values()
        projection, noise, weight = [math.nan] * 3 if self._moments is None else self._moments.tolist()
        agreement = rise = math.nan
        if self.mean_square_norm is not None:
            agreement = gradient_agreement(float(self.mean_square_norm), torch.stack(self._square_norms).tolist())
            rise = sharpness(projection / self.members)
        return PopulationStatistics(
            loss_mean=math.fsum(losses) / len(losses) if losses else math.nan,
            loss_spread=spread(losses),
            agreement=agreement,
            sharpness=rise,
            relative_sigma=math.sqrt(noise / weight) if weight else math.nan,
            members=self.members,
            skipped=skipped,
        )
