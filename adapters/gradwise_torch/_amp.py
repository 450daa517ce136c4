"""The half of torch's GradScaler protocol that an optimizer with `_step_supports_amp_scaling` has to do itself."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwise_torch._shards import local_of

__all__ = ["loss_scaling", "scaled_step"]

_ATTRIBUTES = ("grad_scale", "found_inf")


def loss_scaling(optimizer: Optimizer) -> bool:
    """Whether a GradScaler is stepping `optimizer` right now."""
    return "found_inf" in optimizer.__dict__


def forget_scaling(optimizer: Optimizer) -> None:
    """Take off what the scaler left, as it does itself after a step without an exception."""
    for name in _ATTRIBUTES:
        optimizer.__dict__.pop(name, None)


def scaled_step(optimizer: Optimizer, inner: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Step `inner` as the scaler would: unscaled, or not at all where a gradient is infinite."""
    if not loss_scaling(optimizer):
        inner.step()
        return
    scale: Tensor | None = optimizer.__dict__.get("grad_scale")  # None: unscale_() was called before
    found_inf: Tensor = optimizer.__dict__["found_inf"]
    if getattr(inner, "_step_supports_amp_scaling", False):  # a fused optimizer unscales and skips on the device
        inner.__dict__.update(grad_scale=scale, found_inf=found_inf)
        try:
            inner.step()
        finally:
            forget_scaling(inner)
    elif not found_inf.item():
        if scale is not None:
            _unscale(scale, parameters)
        inner.step()


@torch.no_grad()
def _unscale(scale: Tensor, parameters: Iterable[Tensor]) -> None:
    inverse = scale.double().reciprocal().float()  # the reciprocal as in GradScaler.unscale_, to the bit
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.dtype == torch.float16:
            msg = (
                "Attempting to unscale FP16 gradients: a GradScaler needs float32 parameters, with autocast around them"
            )
            raise ValueError(msg)
        gradient = local_of(parameter.grad)
        gradient.mul_(inverse.to(gradient.device))
