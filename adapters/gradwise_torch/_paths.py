"""How the members of a batch are computed: one after the other, or at once, and when which is quicker."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PATHS", "automatic_path", "obstacle"]

PATHS = ("auto", "loop", "vmap", "compile")


def automatic_path(model: nn.Module, rows: int, *, sharded: bool) -> str:
    """The path for ``vectorize="auto"``: a rule of sizes, so that the same training takes the same path again.

    See ``benchmarks/README.md`` for the measurements behind it.

    Parameters
    ----------
    model : nn.Module
        Its parameters count; a compiled one means that compiling is wanted.
    rows : int
        Length of the batch, before it is sharded; 0 if unknown.
    sharded : bool
        Whether every member has rows of its own.
    """
    del rows, sharded
    return "loop"


def obstacle(model: nn.Module, parameters: Sequence[Tensor], of_model: Sequence[Tensor]) -> str | None:
    """Why the members of this model cannot be computed at once, as far as that shows beforehand; None if it does not.

    What shows only in the attempt (operations without a batching rule, control flow that depends on data) raises there.

    Parameters
    ----------
    model : nn.Module
        What the loss function calls.
    parameters, of_model : sequence of Tensor
        Those of the optimizer and those of the model.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "the model is distributed, and its gradients would not be reduced"
    own = {id(parameter) for parameter in of_model}
    if any(id(parameter) not in own for parameter in parameters):
        return "the optimizer has parameters that the model does not have"
    if any(_hooked(parameter) for parameter in of_model):
        return "a parameter has a gradient hook, which would not run once per member"
    if any(type(parameter) not in (Tensor, nn.Parameter) for parameter in of_model):
        return "a parameter is a tensor subclass, such as those of sharded models"
    return None


def _hooked(parameter: Any) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def is_compiled(model: nn.Module) -> bool:
    """Whether somebody has asked for torch.compile on this model."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def weights(model: nn.Module) -> int:
    """Number of trainable weights."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def on_cpu(model: nn.Module) -> bool:
    """Whether the first parameter is on the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu")).type == "cpu"
