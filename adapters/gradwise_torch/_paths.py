"""How the members of a batch are computed: one after the other, or at once, and when which is quicker."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gradwise_torch._shards import is_dtensor

__all__ = ["PATHS", "automatic_path", "obstacle"]

PATHS = ("auto", "loop", "vmap", "compile")

# Read off the grid of benchmarks/vectorize_rule.py. A loop pays a price for every tensor of every member, whatever its
# size; vmap pays in memory traffic, by the weight.
MOST_WEIGHTS = 100_000
MOST_WEIGHTS_PER_TENSOR = 16_000
# Where members share a batch, activations add up as well: weights times rows. Convolutions become grouped ones.
MOST_WORK = 25_000_000
MOST_WORK_OF_CONVOLUTIONS = 1_500_000


def automatic_path(model: nn.Module, of_model: Sequence[Tensor], rows: int, *, sharded: bool) -> str:
    """The path for ``vectorize="auto"``: a rule of sizes, so that the same training takes the same path again.

    Measured on CPUs only (``benchmarks/README.md``). Large models go one member after the other anywhere, since all at
    once take the memory of all.

    Parameters
    ----------
    model : nn.Module
        If it is compiled, compiling is wanted.
    of_model : sequence of Tensor
        Its parameters.
    rows : int
        Length of the batch, before it is sharded.
    sharded : bool
        Whether every member has rows of its own.

    Returns
    -------
    {"loop", "vmap", "compile"}
    """
    if _distributed(model, of_model):
        return "loop"
    trainable = [parameter.numel() for parameter in of_model if parameter.requires_grad]
    weights = sum(trainable)
    if weights > min(MOST_WEIGHTS, MOST_WEIGHTS_PER_TENSOR * len(trainable)):
        return "loop"
    if not sharded:
        # The weights of a convolution have at least three axes.
        convolutions = any(parameter.ndim > 2 for parameter in of_model)
        if weights * rows > (MOST_WORK_OF_CONVOLUTIONS if convolutions else MOST_WORK):
            return "loop"
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    return "compile" if compiled else "vmap"


def obstacle(
    model: nn.Module, parameters: Sequence[Tensor], of_model: Sequence[Tensor], *, sharded: bool
) -> str | None:
    """Why the members of this model cannot be computed at once, as far as that shows beforehand; None if it does not.

    What shows only in the attempt (operations without a batching rule, control flow that depends on data) raises there.

    Parameters
    ----------
    model : nn.Module
        What the loss function calls.
    parameters, of_model : sequence of Tensor
        Those of the optimizer and those of the model.
    sharded : bool
        Whether every member has rows of its own.
    """
    if _distributed(model, of_model):
        return "the model is distributed, and its gradients would not be reduced"
    for module in model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return "a module has a backward hook, which would not run"
        if sharded and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return "torch's vmap gives the padding row of an embedding a gradient"
    own = {id(parameter) for parameter in of_model}
    if any(id(parameter) not in own for parameter in parameters):
        return "the optimizer has parameters that the model does not have"
    if any(_hooked(parameter) for parameter in of_model):
        return "a parameter has a gradient hook, which would not run once per member"
    if any(type(parameter) not in (Tensor, nn.Parameter) for parameter in of_model):
        return "a parameter is a tensor subclass"
    if len({parameter.device for parameter in of_model}) > 1:
        return "the model is on several devices"
    return None


def _distributed(model: nn.Module, of_model: Sequence[Tensor]) -> bool:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return any(isinstance(m, wrappers) for m in model.modules()) or any(is_dtensor(p) for p in of_model)


def _hooked(parameter: Any) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
