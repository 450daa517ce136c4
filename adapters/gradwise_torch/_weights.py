"""The perturbed tensors of one optimizer: the copy of their mean, the way out and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwise._population import Population, check_sigma
from gradwise_torch._noise import unit_noise

__all__ = ["Entry", "Weights"]

_MOVED: set[int] = set()  # ids of all tensors that hold a member at the moment, whoever put it there


@dataclass(frozen=True)
class Entry:
    """One perturbed tensor: its index over all groups (its noise key), its group's index and itself."""

    index: int
    group: int  # not the dict, which load_state_dict replaces
    parameter: Tensor


class Weights:
    """Moves tensors to a member in place and back by copying, never by subtracting.

    Knows nothing of the optimizer that owns it, so that a finalizer can put the weights back when that one is gone.
    """

    def __init__(self) -> None:
        self.in_place = False
        self._parameters: list[Tensor] = []
        self._mean: list[Tensor] = []
        self._marks: list[tuple[Any, ...]] = []

    def scales(
        self, entries: Sequence[Entry], groups: Sequence[dict[str, Any]], population: Population, step: int
    ) -> list[Any]:
        """Standard deviation of the perturbation of every entry, at the weights as they are now."""
        sigmas = [_sigma_of(group, population, step) for group in groups]
        # 0 is 0 whatever the weights: 0 * sqrt(mean(w^2)) is NaN for weights that are not finite.
        return [
            population.scale_of(_at_least_float32(entry.parameter.detach()), sigma=sigmas[entry.group], xp=torch)
            if sigmas[entry.group]
            else 0.0
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
        if not _MOVED.isdisjoint(id(entry.parameter) for entry in entries):
            msg = (
                "a parameter is moved by another PopulationGradient already, whose member is still in place. Step or "
                "zero_grad that one first, or wrap shared parameters once"
            )
            raise RuntimeError(msg)
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
        foreign = any(_written(*pair) for pair in zip(self._parameters, self._marks, strict=True))
        self._restore()
        if foreign:
            msg = (
                "A parameter was written to while a member of the population was in place; the mean weights are back "
                "and that write is lost. Change weights inside `with optimizer.mean():`, step with the "
                "PopulationGradient instead of its `inner_optimizer`, and exclude tensors that the model itself writes "
                "to with `perturb`"
            )
            raise RuntimeError(msg)

    def abandon(self) -> None:
        """Copy the mean back because the owner is gone."""
        if self.in_place:
            self._restore()

    def refresh(self) -> None:
        """Take the tensors as they are now as the member (after entering, after unpickling)."""
        self._marks = [_mark_of(parameter) for parameter in self._parameters]
        if self.in_place:
            _MOVED.update(map(id, self._parameters))
        torch.clear_autocast_cache()  # autocast keeps half-precision copies of the weights

    def mean_of(self, tensor: Tensor) -> Tensor | None:
        """The kept mean of `tensor`, or None if it is not perturbed at the moment."""
        if self.in_place:
            for parameter, mean in zip(self._parameters, self._mean, strict=True):
                if parameter is tensor:
                    return mean
        return None

    @torch.no_grad()
    def moments(self) -> Tensor:
        """``z . g``, ``|z|^2`` and ``|w|^2`` over all entries, for the member in place; no device sync."""
        rows: list[Tensor] = []
        for parameter, mean in zip(self._parameters, self._mean, strict=True):
            z = (_at_least_float32(parameter) - mean).flatten()
            w, g = _at_least_float32(mean).flatten(), parameter.grad
            slope = z.new_zeros(()) if g is None or g.layout != torch.strided else torch.dot(z, g.flatten().to(z.dtype))
            row = torch.stack([slope, torch.dot(z, z), torch.dot(w, w)])
            rows.append(row.to(device=self._parameters[0].device, dtype=torch.float32))
        return torch.stack(rows).sum(0) if rows else torch.zeros(3)

    def _keep(self, parameters: list[Tensor]) -> None:
        same = len(parameters) == len(self._mean) and all(
            p.shape == m.shape and p.dtype == m.dtype and p.device == m.device
            for p, m in zip(parameters, self._mean, strict=True)
        )
        self._parameters = parameters
        if not same:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
                self._mean = [parameter.detach().clone() for parameter in parameters]
        else:
            for mean, parameter in zip(self._mean, parameters, strict=True):
                mean.copy_(parameter)

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, mean in zip(self._parameters, self._mean, strict=True):
            parameter.copy_(mean)
        self.in_place = False
        _MOVED.difference_update(map(id, self._parameters))
        torch.clear_autocast_cache()


def _mark_of(parameter: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return parameter._version, parameter.data_ptr(), parameter.dtype, parameter.device


def _written(parameter: Tensor, mark: tuple[int, int, torch.dtype, torch.device]) -> bool:
    """Whether somebody wrote to a tensor: in place, or to its .data, unless that was a change of dtype or device."""
    version, address, *kind = mark
    converted = [parameter.dtype, parameter.device] != kind
    return parameter._version != version or (parameter.data_ptr() != address and not converted)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sigma_of(group: dict[str, Any], population: Population, step: int) -> float:
    """The group's own sigma, a number or a schedule, or else the population's."""
    sigma = group.get("sigma")
    if sigma is None:
        return population.sigma_at(step)
    return check_sigma(sigma(step) if callable(sigma) else sigma)
