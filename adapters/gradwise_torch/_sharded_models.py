"""Models sharded by FSDP2 (`fully_shard`), which by itself cannot differentiate a derivative.

FSDP2 gathers the parameters of a block when a backward pass reaches the block's outputs, and frees them and reduces
their gradients when it reaches the block's inputs. The graph of a derivative has neither: a second backward pass finds
freed parameters there ("setStorage: ... storage of size 0"), and gradients that arrive after a block's reduction are
lost. Hence three measures, none of which outlives the pass that it is for:

* the passes that take derivatives neither reduce nor free in between (`taking_derivatives`);
* a second backward pass gathers all parameters before it enters the graph of a derivative (`gather_before`);
* it leaves that graph entirely before it enters the graph of the forward pass, where FSDP2's hooks then find every
  gradient complete (`before_forward`).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import Function

from gradwise_torch._autograd_graph import graph_leaves, graph_nodes
from gradwise_torch._fsdp_state import fsdp_module_class, param_groups, state_of

__all__ = ["before_forward", "gather_before", "refuse_flattened", "sharded_modules", "taking_derivatives"]

_FLAGS = ("reduce_grads", "all_reduce_grads", "reshard_after_backward")


def sharded_modules(outputs: Tensor) -> tuple[Any, ...]:
    """The `FSDPModule`s that `outputs` were computed by, and those of the same root; none if FSDP2 is not in use."""
    base = fsdp_module_class()  # of which `fully_shard` makes subclasses
    if base is None or not base.__subclasses__():
        return ()
    # The graph and not the modules of a model: outputs that are already computed, and functions, have only a graph.
    groups = {id(g): g for n in graph_nodes(outputs) if (g := getattr(n, "param_group", None)) is not None}
    states = [state for group in groups.values() for state in state_of(group.modules[0])._state_ctx.all_states]
    return tuple({id(module): module for state in states for module in state._modules}.values())


def refuse_flattened(outputs: Tensor) -> None:
    """Raise TypeError if `outputs` were computed by FSDP1, whose hooks know nothing of derivatives.

    Sharded, a second backward pass fails; unsharded (NO_SHARD), it gives wrong gradients, silently.
    """
    in_use = "torch.distributed.fsdp" in sys.modules and dist.is_initialized()
    if in_use and any(getattr(leaf, "_is_flat_param", False) for leaf in graph_leaves(outputs)):
        msg = (
            "`model` must not be a FullyShardedDataParallel (FSDP1): derivatives by the inputs need parameters that it "
            "has freed. Use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
        raise TypeError(msg)


@contextmanager
def taking_derivatives(modules: Sequence[Any]) -> Iterator[None]:
    """Let backward passes within reduce no gradients, and free parameters only at the end.

    Gradients that earlier micro-batches have left to be reduced stay as they are.
    """
    # There are public setters but no getters, and what the user has set (accumulation) must come back.
    groups = [group for module in modules for group in _groups(module)]
    before = [[getattr(group, flag) for flag in _FLAGS] for group in groups]
    for group in groups:
        for flag in _FLAGS:
            setattr(group, flag, False)
    try:
        yield
    finally:
        for group, values in zip(groups, before, strict=True):
            for flag, value in zip(_FLAGS, values, strict=True):
                setattr(group, flag, value)
        # As a backward pass would have left them. An optimizer that steps without any further backward pass would
        # otherwise be ignored: gathered parameters are not gathered again.
        for module in modules:
            if all(group.reshard_after_backward for group in _groups(module)):
                module.reshard()


def before_forward(modules: Sequence[Any], cotangents: Tensor, *results: Tensor) -> Tensor:
    """`cotangents` that a backward pass must have gone through before it goes through `results`.

    The engine's own order would do where all graphs are made by one thread; those of derivatives on other devices are
    not. Nor would FSDP2's hooks at the outputs be called in a backward pass that does not need them otherwise.
    """
    return _Before.apply(cotangents, *results) if modules else cotangents


def gather_before(modules: Sequence[Any], derivatives: Tensor) -> None:
    """Gather all parameters when a backward pass reaches `derivatives`."""
    if modules and derivatives.requires_grad:

        def gather(_: Tensor) -> None:
            with torch.no_grad():
                for module in modules:
                    module.unshard()

        derivatives.register_hook(gather)


class _Before(Function):
    """Identity, which depends on `results` without giving them a gradient."""

    @staticmethod
    def forward(ctx: Any, cotangents: Tensor, *results: Tensor) -> Tensor:
        ctx.n_results = len(results)
        ctx.set_materialize_grads(False)
        return cotangents.view_as(cotangents)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # None and not zeros: 0 * inf in the backward pass of `results` would be NaN, and zeros take time.
        return *gradients, *[None] * ctx.n_results


def _groups(module: Any) -> list[Any]:
    return param_groups(state_of(module))
