"""One evaluation of the derivative loss: targets, Jacobian rows, scaling, reduction, and what is counted."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from gradwise._matching import (
    LOSSES,
    REDUCTIONS,
    check_choice,
    check_non_negative,
    known_weight,
    matching_numerators,
    reduce_terms,
)
from gradwise._matching_scale import SCALES
from gradwise_torch._batch_coupling import warn_unseen
from gradwise_torch._double_backward import outside_compilation
from gradwise_torch._hessian import hessian_products
from gradwise_torch._hessian_norms import refuse_wrong_third_derivatives
from gradwise_torch._linearize import Linearization, Model, count_outputs, linearize
from gradwise_torch._matching_goals import Targets
from gradwise_torch._matching_scales import MatchingScales, processes
from gradwise_torch._projections import draw_outputs
from gradwise_torch._sharded_models import refuse_flattened, sharded_modules, taking_derivatives
from gradwise_torch._static_graph import refuse_static_outputs
from gradwise_torch._traps import check_first_call
from gradwise_torch._traps_offset import still_watching, watch_offset

__all__ = ["DerivativeLoss", "nothing"]

_MANY_OUTPUTS = 10


class _Call(NamedTuple):
    """What one call of the loss does."""

    weight: float
    training: bool
    number: int


class DerivativeLoss(nn.Module):
    """Options, counters and scales of `GradientMatching`, and the evaluation that all its calls share."""

    calls: Tensor
    seed: Tensor

    def __init__(
        self,
        derivative_weight: float | Callable[[int], float] = 1.0,
        *,
        scale: str = "block",
        projections: int | None = None,
        loss: str = "mse",
        interval: int = 1,
        reduction: str = "mean",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("scale", scale, SCALES)
        check_choice("loss", loss, LOSSES)
        check_choice("reduction", reduction, REDUCTIONS)
        self.derivative_weight = (
            derivative_weight
            if callable(derivative_weight)
            else check_non_negative("derivative_weight", derivative_weight)
        )
        self.scale = scale
        self.projections = None if projections is None else _positive("projections", projections)
        self.loss = loss
        self.interval = _positive("interval", interval)
        self.reduction = reduction
        # Plain numbers rule and buffers mirror them, so that no call waits for a device to read its own counter.
        self._calls = 0
        self._seed = torch.initial_seed() if seed is None else seed
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("seed", torch.from_numpy(np.array(self._seed % 2**64, dtype=np.uint64).view(np.int64)))
        self.scales = MatchingScales(scale)
        self._checked = False  # that torch can differentiate the model twice
        self._looked = False  # whether the outputs' graph couples rows
        self._watching = False  # whether anything else trains the offset
        self._warned_outputs = False

    def extra_repr(self) -> str:
        """Arguments as given."""
        return (
            f"derivative_weight={self.derivative_weight}, scale={self.scale!r}, projections={self.projections}, "
            f"loss={self.loss!r}, interval={self.interval}, reduction={self.reduction!r}"
        )

    @outside_compilation
    def _run(self, model: Model, x: Tensor, targets: Targets, *, values: bool) -> tuple[Tensor | None, Tensor]:
        call = self._begin()
        if call.weight == 0:
            return None, self._finish(call, nothing(x, self.reduction, training=call.training))
        with linearize(
            model,
            x,
            values=values,
            create_graph=call.training,
            keep_graph=values and torch.is_grad_enabled(),
            check_callable=not self._looked,
            probe=call.training and not self._checked,
            second_order=targets.second_order,
        ) as linearization:
            self._looked = True
            n_outputs = count_outputs(linearization.outputs, x)
            loss = self._evaluate(call, linearization, targets, n_outputs, 1)
        return linearization.values, self._finish(call, loss)

    @outside_compilation
    def _run_outputs(self, y: Tensor, wrt: Tensor, targets: Targets, sign: int) -> Tensor:
        if sign not in {1, -1}:
            msg = f"`sign` must be 1 or -1; got {sign!r}"
            raise ValueError(msg)
        call = self._begin()
        if call.weight == 0:
            return self._finish(call, nothing(wrt, self.reduction, training=call.training))
        if not wrt.requires_grad or not y.requires_grad:
            name = "y" if wrt.requires_grad else "wrt"
            msg = (
                f"`{name}` must require gradients; call `wrt.requires_grad_()` before the model runs, not in `no_grad`"
            )
            raise ValueError(msg)
        if not self._looked:
            refuse_static_outputs(y)
            refuse_flattened(y)
            self._looked = True
            warn_unseen(y)
        if targets.second_order and call.training and not self._checked:
            refuse_wrong_third_derivatives(y)
        single = y.ndim <= 1 or y.numel() == y.shape[0]
        n_outputs = 1 if single else count_outputs(y, wrt)
        probes: list[Tensor] | None = [] if call.training and not self._checked else None
        sharded = sharded_modules(y)
        linearization = Linearization(
            wrt, y, y, create_graph=call.training, keep_graph=True, probes=probes, sharded=sharded
        )
        with taking_derivatives(sharded):
            return self._finish(call, self._evaluate(call, linearization, targets, n_outputs, sign))

    def _begin(self) -> _Call:
        training = self.training and torch.is_grad_enabled()
        weight = self.derivative_weight
        number = check_non_negative("derivative_weight", weight(self._calls) if callable(weight) else weight)
        if training:
            number *= 0 if self._calls % self.interval else self.interval
        return _Call(number, training, self._calls)

    def _finish(self, call: _Call, loss: Tensor) -> Tensor:
        # Last, so that a call that fails is no call.
        if call.training:
            self._calls += 1
            self.calls.fill_(self._calls)
        return loss

    def _evaluate(
        self, call: _Call, linearization: Linearization, targets: Targets, n_outputs: int, sign: int
    ) -> Tensor:
        x = linearization.primal
        batch = x.shape[0]
        rank, n_processes = processes()
        with _full_precision(x.device):
            goal = targets.goal(x, n_outputs, scale=self.scale)
            scale, threshold = self.scales.lookup(goal, x, training=call.training)
        chosen = self._choose(call, rank, batch, n_outputs, x.device)
        derivatives = (  # under the caller's autocast, like any backward pass
            linearization.rows(chosen, n_outputs)
            if goal.second is None
            else hessian_products(linearization, goal.second, chosen, n_outputs)
        )
        derivatives = derivatives if sign == 1 else -derivatives
        with _full_precision(x.device):
            predicted = goal.project(derivatives.to(goal.target.dtype))
            target, known, share = goal.target, goal.known(), 1.0
            total: Tensor | int = (
                target.numel()
                if known is None
                else known_weight(target, known, sample_weight=goal.sample_weight, xp=torch)
            )
            if chosen is not None:
                # Not gather: it wants an index for every entry, and takes three times as long for images.
                each = torch.arange(batch, device=x.device).unsqueeze(1), chosen
                target = target[each]
                known = None if known is None else known[each]
                scale = None if scale is None else scale[chosen]
                if self.loss == "huber" and isinstance(threshold, Tensor):  # "mse" has no use for it
                    threshold = threshold[chosen]
                share = n_outputs / chosen.shape[1]
            numerators = matching_numerators(
                predicted,
                target,
                known=known,
                sample_weight=goal.sample_weight,
                scale=scale,
                loss=self.loss,
                threshold=threshold,
                xp=torch,
            )
            if call.training and n_processes > 1 and self.reduction == "mean":
                total = target.new_tensor(total) if isinstance(total, int) else total
                dist.all_reduce(total)
                total = total / n_processes
            factor = call.weight * share * goal.multiplier
            loss = reduce_terms(numerators, total, factor=factor, reduction=self.reduction, xp=torch)
        if not call.training:
            return loss.detach()
        if not self._checked:
            # Hooks of distributed wrappers must see one backward pass, not two.
            if not (dist.is_available() and dist.is_initialized()):
                trained, free = check_first_call(loss, linearization, goal, derivatives, n_outputs)
                self._watching = watch_offset(self, loss, trained, free)
            self._checked = True
        elif self._watching:
            self._watching = still_watching(self, loss)
        return loss

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._calls, self._seed = int(self.calls), int(self.seed)

    def _choose(self, call: _Call, rank: int, batch: int, n_outputs: int, device: torch.device) -> Tensor | None:
        if self.projections is None:
            if n_outputs > _MANY_OUTPUTS and call.training and not self._warned_outputs:
                self._warned_outputs = True
                warnings.warn(
                    f"matching all {n_outputs} outputs takes {n_outputs} backward passes in every call; "
                    "GradientMatching(projections=1) takes one, for an unbiased estimate",
                    UserWarning,
                    stacklevel=5,
                )
            return None
        if self.projections >= n_outputs:
            return None
        step = (call.number, 0 if call.training else 1)
        return draw_outputs((self._seed % 2**64, rank), step, batch, n_outputs, self.projections).to(device)


def nothing(x: Tensor, reduction: str, *, training: bool) -> Tensor:
    """The loss of a call that is not evaluated."""
    shape = x.shape[:1] if reduction == "none" else ()
    # Requires gradients, so that `loss.backward()` also works in a loop without another term.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=training)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    # Entering torch.autocast costs as much as a few operations: only where there is something to switch off.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"`{name}` must be a positive whole number; got {value!r}"
        raise ValueError(msg)
    return value
