"""The perturbed tensors of one optimizer: the copy of their mean, the way out and the way back."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwise._population import Population, check_sigma
from gradwise_torch._fsdp import Gathered
from gradwise_torch._noise import Noise
from gradwise_torch._probe import Probe
from gradwise_torch._shards import Shard, dtensor_of, local_of, shards_of, version_of, whole_scales

__all__ = ["Entry", "Weights", "at_least_float32", "total_square"]

_LIVING: "weakref.WeakSet[Weights]" = weakref.WeakSet()


@dataclass(frozen=True)
class Entry:
    """One perturbed tensor: its index over all groups (its noise key), its group's index, itself, its part here."""

    index: int
    group: int  # not the dict, which load_state_dict replaces
    parameter: Tensor
    shard: Shard | None = None  # of a DTensor


class Weights:
    """Moves tensors to a member in place and back by copying, never by subtracting.

    Knows nothing of the optimizer that owns it, so that a finalizer can put the weights back when that one is gone.

    A Ctrl-C may come between any two statements. `in_place` is therefore the only thing that says whether the tensors
    are moved: set before the first of them moves, unset after the last is back. Meanwhile there are no marks, and
    whoever comes next copies the mean back from the start.
    """

    def __init__(self) -> None:
        self.in_place = False
        self._parameters: list[Tensor] = []
        self._mean: list[Tensor] = []
        self._gathered = Gathered(None)
        self._marks: list[tuple[Any, ...]] | None = None  # None while they move

    def scales(
        self, entries: Sequence[Entry], groups: Sequence[dict[str, Any]], population: Population, step: int
    ) -> list[Tensor | None]:
        """Standard deviation of the perturbation of every entry, at the weights as they are now; None for sigma 0."""
        sigmas = [_sigma_of(group, population, step) for group in groups]
        scales: list[Tensor | None] = []
        for entry in entries:
            scale: Any = None
            if sigmas[entry.group]:  # 0 is 0 whatever the weights: 0 * sqrt(mean(w^2)) is NaN for weights not finite
                weights = at_least_float32(local_of(entry.parameter).detach())
                scale = population.scale_of(weights, sigma=sigmas[entry.group], xp=torch)
                scale = scale if isinstance(scale, Tensor) else weights.new_tensor(scale)
            scales.append(scale)
        shards = [entry.shard for entry in entries]
        return whole_scales(scales, shards, population) if any(shards) else scales

    @torch.no_grad()
    def enter(
        self,
        entries: Sequence[Entry],
        scales: Sequence[Tensor | None],
        noises: Sequence[Noise],
        gathered: Gathered,
    ) -> None:
        """Move every entry to ``mean + scale * noise``, having kept a copy of the mean; from one member to the next."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            msg = (
                "a member must not begin while a CUDA graph is captured: every replay would be the same member. "
                "Capture the model (torch.cuda.make_graphed_callables, torch.compile), not the training step"
            )
            raise RuntimeError(msg)
        gathered.check_before_member()
        if self.in_place:
            self._check_untouched()
        else:
            self._begin(entries)
        try:
            self._gathered = gathered
            self._marks = None
            for parameter, mean, scale, noise in zip(self._parameters, self._mean, scales, noises, strict=True):
                if scale is not None:
                    # A write that autograd's version counters see, unlike those to .data.
                    noise.move(local_of(parameter), mean, scale)
            self.refresh()
            gathered.outdate()
            gathered.check_after_drop()
        except BaseException:
            self._restore()
            raise

    def _begin(self, entries: Sequence[Entry]) -> None:
        moved = {id(parameter) for others in _LIVING if others.in_place for parameter in others._parameters}
        if not moved.isdisjoint(id(entry.parameter) for entry in entries):
            msg = (
                "a parameter is moved by another PopulationGradient already, whose member is still in place. Step or "
                "zero_grad that one first, or wrap shared parameters once"
            )
            raise RuntimeError(msg)
        self._keep([entry.parameter for entry in entries])
        self._marks = None
        self.in_place = True

    def leave(self) -> None:
        """Copy the mean back; an error, after that, if anybody else wrote to a tensor meanwhile."""
        if self.in_place:
            try:
                self._check_untouched()
            finally:
                self._restore()

    def _check_untouched(self) -> None:
        if self._marks is None:
            return
        if any(_written(*pair) for pair in zip(self._parameters, self._marks, strict=True)):
            self._restore()
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
        _LIVING.add(self)
        self._marks = [_mark_of(parameter) for parameter in self._parameters]
        torch.clear_autocast_cache()  # autocast keeps half-precision copies of the weights

    def mean_of(self, tensor: Tensor) -> Tensor | None:
        """The kept mean of `tensor`, a DTensor if that is one, or None if it is not perturbed at the moment."""
        if self.in_place:
            for parameter, mean in zip(self._parameters, self._mean, strict=True):
                if parameter is tensor:
                    return dtensor_of(mean, tensor)
        return None

    def slope(self, scales: Sequence[Tensor | None], noises: Sequence[Noise], probe: Probe) -> Tensor:
        """``z . g`` over all entries, for the member in place and the gradients as they are; no device sync."""
        dots: list[Tensor] = []
        sizes: list[Tensor] = []
        factors: list[float] = []
        for parameter, scale, noise in zip(self._parameters, scales, noises, strict=True):
            if scale is None or parameter.grad is None or parameter.grad.layout != torch.strided:
                continue
            gradient = local_of(parameter.grad)
            span = probe.span(gradient.numel())
            dot, sign = noise.dot(gradient if scale.ndim == 0 else gradient * scale, span)
            dots.append(dot)
            sizes.append(scale if scale.ndim == 0 else scale.new_ones(()))
            factors.append(sign * probe.factor(gradient.numel()) * shards_of(parameter))
        return weighted_total(dots, factors, sizes)

    @torch.no_grad()
    def relative_sizes(self, scales: Sequence[Tensor | None], noises: Sequence[Noise], probe: Probe) -> Tensor:
        """``|z|^2`` and ``|w|^2`` over the entries that have moved, for the member in place; no device sync."""
        norms: list[Tensor] = []
        sizes: list[Tensor] = []
        factors: list[float] = []
        for whole, mean, scale, noise in zip(self._parameters, self._mean, scales, noises, strict=True):
            if scale is None:
                continue
            parameter = local_of(whole)
            part = at_least_float32(probe.part(mean))
            if scale.ndim or parameter.element_size() < 4:  # as stored: rounding may swallow a perturbation
                norms.append(torch.dist(at_least_float32(probe.part(parameter.detach())), part))
            else:
                norms.append(noise.norm(probe.span(mean.numel())) * scale)
            sizes.append(torch.linalg.vector_norm(part))
            factors.append(probe.factor(mean.numel()) * shards_of(whole))
        return torch.stack([total_square(group, factors).float() for group in (norms, sizes)])

    def _keep(self, parameters: list[Tensor]) -> None:
        here = [local_of(parameter) for parameter in parameters]
        same = len(here) == len(self._mean) and all(
            p.shape == m.shape and p.dtype == m.dtype and p.device == m.device
            for p, m in zip(here, self._mean, strict=True)
        )
        self._parameters = parameters
        if not same:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
                self._mean = [tensor.detach().clone() for tensor in here]
        else:
            for mean, tensor in zip(self._mean, here, strict=True):
                mean.copy_(tensor)

    @torch.no_grad()
    def _restore(self) -> None:
        if self.in_place:
            self._marks = None
            for parameter, mean in zip(self._parameters, self._mean, strict=True):
                local_of(parameter).copy_(mean)
            torch.clear_autocast_cache()
            self._gathered.outdate()
            self.in_place = False


def _mark_of(parameter: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    here = local_of(parameter)
    return _version_of(parameter, here), here.data_ptr(), here.dtype, here.device


def _written(parameter: Tensor, mark: tuple[int, int, torch.dtype, torch.device]) -> bool:
    """Whether somebody wrote to a tensor: in place, or to its .data, unless that was a change of dtype or device."""
    here = local_of(parameter)
    version, address, *kind = mark
    converted = [here.dtype, here.device] != kind
    return _version_of(parameter, here) != version or (here.data_ptr() != address and not converted)


def _version_of(parameter: Tensor, here: Tensor) -> int:
    return version_of(parameter) if here.numel() else parameter._version  # FSDP2 exchanges empty shards


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself in double precision and float32, a float32 copy of what is narrower."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def weighted_total(scalars: Sequence[Tensor], factors: Sequence[float], others: Sequence[Tensor] = ()) -> Tensor:
    """Sum of ``scalar * factor`` (``* other``) over scalars that may live on several devices; at least in float32."""
    if not scalars:
        return torch.zeros(())
    terms = _stack(scalars)
    if others:
        terms = terms * _stack(others)
    return terms.sum() if all(f == 1 for f in factors) else torch.dot(terms, terms.new_tensor(factors))


def total_square(norms: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Sum of ``norm^2 * factor``."""
    return weighted_total(norms, factors, norms)


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    device = scalars[0].device
    if any(scalar.device != device for scalar in scalars):
        scalars = [scalar.to(device) for scalar in scalars]
    stacked = torch.stack(list(scalars))
    return stacked if stacked.dtype == torch.float64 else stacked.float()


def _sigma_of(group: dict[str, Any], population: Population, step: int) -> float:
    """The group's own sigma, a number or a schedule, or else the population's."""
    sigma = group.get("sigma")
    if sigma is None:
        return population.sigma_at(step)
    return check_sigma(sigma(step) if callable(sigma) else sigma)
