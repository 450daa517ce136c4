"""Other populations than the library's, each tried once against it: written out, slowly, on the library's own noise.

With no option set, a step is that of `gradwise.torch.PopulationGradient` (a test holds them together).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gradwise import Population

__all__ = ["CHANGES", "MENDS", "ONLY_NORMALISED", "Change", "Members", "scale_invariant"]

MEMORY = 0.9  # correlation of the noise of consecutive steps


@dataclass(frozen=True)
class Change:
    """What a variant does otherwise.

    Attributes
    ----------
    noise : {"independent", "correlated", "mirrored"}
        Over steps: drawn anew; a stationary autoregression; every second step with the noise of the step before it,
        turned round.
    tensors : {"all", "one", "no scale-invariant ones"}
        Which ones are perturbed in a step. One, drawn anew in each step, gets the noise of all of them: its sigma is
        multiplied by the root of their number.
    scale : {"rms", "filter"}
    schedule : {"constant", "growing", "shrinking"}
        Sigma over the training: itself, or linear between 0 and twice itself.
    differentiated : bool
        The derivative of the scale is taken too: a member's gradient g gets ``w (g . z) / |w|^2`` more.
    norms_kept : bool
        After every step, scale-invariant tensors get the norm back that they had before it.
    weighted : bool
        Members count by ``softmax(-loss / s)``, with s the standard deviation of their losses.
    """

    noise: Literal["independent", "correlated", "mirrored"] = "independent"
    tensors: Literal["all", "one", "no scale-invariant ones"] = "all"
    scale: Literal["rms", "filter"] = "rms"
    schedule: Literal["constant", "growing", "shrinking"] = "constant"
    differentiated: bool = False
    norms_kept: bool = False
    weighted: bool = False


CHANGES = {
    "correlated in time": Change(noise="correlated"),
    "mirrored in time": Change(noise="mirrored"),
    "one layer per step": Change(tensors="one"),
    "filter scale": Change(scale="filter"),
    "growing sigma": Change(schedule="growing"),
    "shrinking sigma": Change(schedule="shrinking"),
    "loss-weighted members": Change(weighted=True),
    "differentiated scale": Change(differentiated=True),
    "scale-invariant tensors left out": Change(tensors="no scale-invariant ones"),
    "norms kept": Change(norms_kept=True),
}


# Without batch normalisation these are the library's population.
ONLY_NORMALISED = {"scale-invariant tensors left out", "norms kept"}
# Against the growth of weights before a batch normalisation.
MENDS = {*ONLY_NORMALISED, "differentiated scale", "shrinking sigma"}


def scale_invariant(model: nn.Module) -> list[nn.Parameter]:
    """Weights right before a batch normalisation, which undoes their scale."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for layer, after in pairwise(module):
                if isinstance(after, (nn.BatchNorm1d, nn.BatchNorm2d)) and isinstance(layer.weight, nn.Parameter):
                    found.append(layer.weight)
    return found


class Members:
    """Evaluates a closure at the members of a step and leaves the combined gradient; the optimizer steps itself.

    Parameters
    ----------
    model : nn.Module
        Without dropout: every member would have masks of its own.
    population : Population
        Its size, its sigma, and the noise.
    change : Change
    steps : int
        Of the whole training.
    """

    def __init__(self, model: nn.Module, population: Population, change: Change, steps: int) -> None:
        self.population = population
        self.change = change
        self.steps = steps
        self.step = 0
        self.parameters = list(model.parameters())
        self.buffers = list(model.buffers())
        self.invariant = scale_invariant(model)
        matrices = [index for index, parameter in enumerate(self.parameters) if parameter.ndim >= 2]
        self.key = {index: key for key, index in enumerate(matrices)}  # of a tensor's noise, as the library counts
        left_out = {id(one) for one in self.invariant if change.tensors == "no scale-invariant ones"}
        self.moved = [index for index in matrices if id(self.parameters[index]) not in left_out]
        self.memory: dict[tuple[int, int], Tensor] = {}

    def gradients(self, evaluate: Callable[[], Tensor]) -> None:
        """Call `evaluate`, which zeroes gradients, once per member; the mean gradient is in ``.grad`` afterwards."""
        means = {index: self.parameters[index].detach().clone() for index in self.moved}
        before = [buffer.clone() for buffer in self.buffers]
        sums = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in self.buffers]
        losses: list[float] = []
        gradients: list[list[Tensor]] = []
        scales = self._scales(means)
        for member in range(self.population.size):
            for buffer, value in zip(self.buffers, before, strict=True):
                buffer.copy_(value)
            displaced = {index: scales[index] * self._noise(index, member) for index in self.moved}
            self._write({index: means[index] + displaced[index] for index in self.moved})
            losses.append(float(evaluate().detach()))
            self._write(means)
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters])
            if self.change.differentiated:
                for index, z in displaced.items():
                    own = gradients[-1][index]
                    own += means[index] * (own * z).sum() / means[index].square().sum()
            for total, buffer in zip(sums, self.buffers, strict=True):
                total += buffer
        weights = self._weights(losses)
        for parameter, *own in zip(self.parameters, *gradients, strict=True):
            parameter.grad = sum((w * g for w, g in zip(weights, own, strict=True)), torch.zeros_like(parameter))
        for buffer, total in zip(self.buffers, sums, strict=True):
            buffer.copy_(total / self.population.size)

    @torch.no_grad()
    def after(self, norms: list[Tensor]) -> None:
        """When the optimizer has stepped; `norms` are those of `self.norms` before."""
        if self.change.norms_kept:
            for parameter, norm in zip(self.invariant, norms, strict=True):
                parameter *= norm / parameter.norm()
        self.step += 1

    def norms(self) -> list[Tensor]:
        """Of the scale-invariant tensors."""
        return [parameter.detach().norm() for parameter in self.invariant]

    @torch.no_grad()
    def _write(self, values: dict[int, Tensor]) -> None:
        for index, value in values.items():
            self.parameters[index].copy_(value)

    def _scales(self, means: dict[int, Tensor]) -> dict[int, Tensor]:
        sigma = self.population.sigma_at(self.step)
        done = self.step / self.steps
        sigma *= {"constant": 1.0, "growing": 2 * done, "shrinking": 2 * (1 - done)}[self.change.schedule]
        scales = {index: self.population.scale_of(mean, sigma=sigma, xp=torch) for index, mean in means.items()}
        if self.change.tensors == "one":
            chosen = int(np.random.default_rng((self.population.seed, self.step)).choice(self.moved))
            root = math.sqrt(len(self.moved))
            scales = {index: scale * (root if index == chosen else 0.0) for index, scale in scales.items()}
        return scales

    def _noise(self, index: int, member: int) -> Tensor:
        if self.change.noise == "mirrored":
            return self._unit(index, member, self.step // 2) * (-1) ** self.step
        fresh = self._unit(index, member, self.step)
        if self.change.noise == "correlated":
            last = self.memory.get((index, member))
            if last is not None:
                fresh = MEMORY * last + math.sqrt(1 - MEMORY**2) * fresh
            self.memory[index, member] = fresh
        return fresh

    def _unit(self, index: int, member: int, step: int) -> Tensor:
        shape = tuple(self.parameters[index].shape)
        unit = self.population.unit_noise(shape, step=step, member=member, tensor=self.key[index], dtype=np.float32)
        return torch.from_numpy(unit)

    def _weights(self, losses: list[float]) -> list[float]:
        if not self.change.weighted or len(losses) == 1:
            return [1 / len(losses)] * len(losses)
        values = np.asarray(losses)
        weights = np.exp(-(values - values.min()) / max(float(values.std()), 1e-12))
        return (weights / weights.sum()).tolist()
