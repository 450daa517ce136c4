"""What the members of one step said, kept on the device until somebody reads it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradwise._statistics import PopulationStatistics, gradient_agreement, sharpness, spread

__all__ = ["MemberRecord"]


@dataclass
class MemberRecord:
    """Losses, gradient norms and perturbation moments of the members that counted, unread."""

    losses: list[Any] = field(default_factory=list)
    square_norms: list[Tensor] = field(default_factory=list)
    moments: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    mean_square_norm: Tensor | None = None
    members: int = 0
    skipped: int = 0

    def add(
        self, loss: Tensor | float, gradients: Sequence[Tensor | None], moments: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Take in one member."""
        self.losses.append(loss)
        self.square_norms.append(_square_norm(gradients))
        self.moments.append(moments)
        self.members += 1

    def close(self, mean_gradients: Sequence[Tensor | None]) -> None:
        """Take in the mean of the members' gradients."""
        self.mean_square_norm = _square_norm(mean_gradients)

    def loss_values(self) -> list[float]:
        """The losses as numbers, with one device sync."""
        if not self.losses or not isinstance(self.losses[0], Tensor):
            return [float(loss) for loss in self.losses]
        return torch.stack([torch.as_tensor(loss) for loss in self.losses]).tolist()

    def read(self, *, skipped: int) -> PopulationStatistics:
        """The statistics as numbers, with the device syncs that this takes."""
        losses = self.loss_values()
        moments = torch.stack([torch.stack(row) for row in self.moments]).tolist() if self.moments else []
        return PopulationStatistics(
            loss_mean=math.fsum(losses) / len(losses) if losses else math.nan,
            loss_spread=spread(losses),
            agreement=math.nan
            if self.mean_square_norm is None
            else gradient_agreement(float(self.mean_square_norm), torch.stack(self.square_norms).tolist()),
            sharpness=sharpness([row[0] for row in moments]) if losses else math.nan,
            relative_sigma=_relative_sigma(moments),
            members=self.members,
            skipped=skipped,
        )


def _relative_sigma(moments: list[list[float]]) -> float:
    noise = math.fsum(row[1] for row in moments)
    weight = math.fsum(row[2] for row in moments)
    return math.sqrt(noise / weight) if weight else math.nan


def _square_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    present = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    if not present:
        return torch.zeros(())
    device = present[0].device
    norms = [torch.linalg.vector_norm(g.detach(), dtype=torch.promote_types(g.dtype, torch.float32)) for g in present]
    return torch.stack([norm.square().to(device=device, dtype=torch.float32) for norm in norms]).sum()
