"""What PopulationGradient refuses when it is made."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradwise_torch._wrapper import OptimizerWrapper

__all__ = ["check_arguments"]


def check_arguments(inner_optimizer: Any, model: Any, perturb: Any, norm_statistics: Any, on_nonfinite: Any) -> None:
    """Raise TypeError or ValueError, by name, for those that `Population` does not check."""
    if not isinstance(inner_optimizer, Optimizer) or isinstance(inner_optimizer, OptimizerWrapper):
        got = inner_optimizer.__name__ if isinstance(inner_optimizer, type) else type(inner_optimizer).__name__
        msg = (
            "`inner_optimizer` must be an instance of a torch optimizer, such as "
            f"torch.optim.AdamW(model.parameters()); got {got}"
        )
        raise TypeError(msg)
    if not any(group["params"] for group in inner_optimizer.param_groups):
        msg = "`inner_optimizer` must have parameters; its groups are empty. Build it from model.parameters()"
        raise ValueError(msg)
    if model is not None and not isinstance(model, nn.Module):
        msg = f"`model` must be a torch.nn.Module or None; got {type(model).__name__}"
        raise TypeError(msg)
    if perturb is not None and not callable(perturb):
        msg = f"`perturb` must be a callable perturb(name, parameter) -> bool, or None; got {perturb!r}"
        raise TypeError(msg)
    if norm_statistics not in ("mean", "recalibrate"):
        msg = f'`norm_statistics` must be "mean" or "recalibrate"; got {norm_statistics!r}'
        raise ValueError(msg)
    if norm_statistics == "recalibrate" and model is None:
        msg = '`norm_statistics="recalibrate"` needs `model`, whose forward it repeats at the mean weights'
        raise ValueError(msg)
    if on_nonfinite not in ("raise", "skip"):
        msg = f'`on_nonfinite` must be "raise" or "skip"; got {on_nonfinite!r}'
        raise ValueError(msg)
