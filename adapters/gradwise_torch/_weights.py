"""The perturbed tensors of one optimizer: the copy of their mean, the way out and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwise._population import Population, check_sigma
from gradwise_torch._noise import unit_noise

__all__ = ["Entry", "Weights"]


@dataclass(frozen=True)
class Entry:
    """One perturbed tensor: its index over all groups (its noise key), its group and itself."""

    index: int
    group: dict[str, Any]
    parameter: Tensor


class Weights:
    """Moves tensors to a member in place and back by copying, never by subtracting.

    Knows nothing of the optimizer that owns it, so that a finalizer can put the weights back when that one is gone.
    """

    def __init__(self) -> None:
        self.in_place = False
        self._parameters: list[Tensor] = []
        self._mean: list[Tensor] = []
        self._versions: list[int] = []

    def scales(self, entries: Sequence[Entry], population: Population, step: int) -> list[Any]:
        """Standard deviation of the perturbation of every entry, at the weights as they are now."""
        return [
            population.scale_of(
                _at_least_float32(entry.parameter.detach()), step=step, sigma=_group_sigma(entry.group, step), xp=torch
            )
            for entry in entries
        ]

    @torch.no_grad()
    def enter(
        self,
        entries: Sequence[Entry],
        scales: Sequence[Any],
        population: Population,
        *,
        step: int,
        member: int,
        rank: int,
        paired: bool,
    ) -> None:
        """Keep a copy of the mean and move every entry to ``mean + scale * noise``."""
        self._keep([entry.parameter for entry in entries])
        self.in_place = True
        try:
            for entry, scale in zip(entries, scales, strict=True):
                parameter = entry.parameter
                if isinstance(scale, float) and scale == 0:
                    continue
                noise = unit_noise(
                    population, parameter, step=step, member=member, tensor=entry.index, rank=rank, paired=paired
                ).mul_(scale)
                # Half precision: the sum is rounded once. copy_ and add_ are seen by autograd, writes to .data are not.
                if noise.dtype == parameter.dtype:
                    parameter.add_(noise)
                else:
                    parameter.copy_(noise.add_(parameter))
        except BaseException:
            self._restore()
            raise
        self.refresh()

    def leave(self) -> None:
        """Copy the mean back; an error, after that, if anybody else wrote to a tensor meanwhile."""
        if not self.in_place:
            return
        foreign = any(
            parameter._version != version for parameter, version in zip(self._parameters, self._versions, strict=True)
        )
        self._restore()
        if foreign:
            msg = (
                "A parameter was written to while a member of the population was in place; the mean weights are back "
                "and that write is lost. Change weights inside `with optimizer.mean():`, step with the "
                "PopulationGradient instead of its `inner_optimizer`, and wrap each parameter once"
            )
            raise RuntimeError(msg)

    def abandon(self) -> None:
        """Copy the mean back because the owner is gone."""
        if self.in_place:
            self._restore()

    def refresh(self) -> None:
        """Take the tensors as they are now as the member (after entering, after unpickling)."""
        self._versions = [parameter._version for parameter in self._parameters]
        torch.clear_autocast_cache()  # autocast keeps half-precision copies of the weights

    def mean_of(self, tensor: Tensor) -> Tensor | None:
        """The kept mean of `tensor`, or None if it is not perturbed at the moment."""
        if self.in_place:
            for parameter, mean in zip(self._parameters, self._mean, strict=True):
                if parameter is tensor:
                    return mean
        return None

    @torch.no_grad()
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``z . g``, ``|z|^2`` and ``|w|^2`` over all entries, for the member in place; no device sync."""
        rows: list[Tensor] = []
        for parameter, mean in zip(self._parameters, self._mean, strict=True):
            z = (_at_least_float32(parameter) - mean).flatten()
            w, g = _at_least_float32(mean).flatten(), parameter.grad
            slope = z.new_zeros(()) if g is None or g.layout != torch.strided else torch.dot(z, g.flatten().to(z.dtype))
            row = torch.stack([slope, torch.dot(z, z), torch.dot(w, w)])
            rows.append(row.to(device=self._parameters[0].device, dtype=torch.float32))
        projection, noise, weight = (torch.stack(rows).sum(0) if rows else torch.zeros(3)).unbind()
        return projection, noise, weight

    def _keep(self, parameters: list[Tensor]) -> None:
        same = len(parameters) == len(self._mean) and all(
            p.shape == m.shape and p.dtype == m.dtype and p.device == m.device
            for p, m in zip(parameters, self._mean, strict=True)
        )
        self._parameters = parameters
        if not same:
            self._mean = [parameter.detach().clone() for parameter in parameters]
        else:
            for mean, parameter in zip(self._mean, parameters, strict=True):
                mean.copy_(parameter)

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, mean in zip(self._parameters, self._mean, strict=True):
            parameter.copy_(mean)
        self.in_place = False
        torch.clear_autocast_cache()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _group_sigma(group: dict[str, Any], step: int) -> float | None:
    sigma = group.get("sigma")
    if callable(sigma):
        return check_sigma(sigma(step))
    return None if sigma is None else check_sigma(sigma)
