"""Layers that couple the rows of a batch: batch normalisation in training mode.

A derivative is taken for all rows at once, from the sum of the outputs over the batch. That is right only if no row
depends on another; batch normalisation with the statistics of the batch makes it 77 % wrong in a small test. With its
running statistics it is right, and the derivative is that of the model which will be used in the end.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradwise_torch._autograd_graph import graph_nodes

__all__ = ["coupled_layers", "couples_rows", "owner", "running_statistics", "submodules", "warn_once", "warn_unseen"]

_warned: WeakSet[nn.Module] = WeakSet()


def owner(model: Any) -> nn.Module | None:
    """The module behind `model`: itself or, for a bound method, the module that it belongs to."""
    candidate = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return candidate if isinstance(candidate, nn.Module) else None


def submodules(module: nn.Module) -> set[nn.Module]:
    """What ``module.modules()`` gives, without the names, which take most of its time."""
    found: set[nn.Module] = set()
    pending: list[nn.Module | None] = [module]
    while pending:
        layer = pending.pop()
        if layer is not None and layer not in found:
            found.add(layer)
            if layer._modules:
                pending.extend(layer._modules.values())
    return found


def coupled_layers(model: Any) -> list[_BatchNorm]:
    """Layers of `model` that now normalise with the statistics of the batch."""
    module = owner(model)
    # InstanceNorm is no _BatchNorm; SyncBatchNorm is. Without running statistics, eval mode uses the batch's too.
    layers = [] if module is None else [layer for layer in submodules(module) if isinstance(layer, _BatchNorm)]
    return [layer for layer in layers if layer.training or layer.running_mean is None]


@contextmanager
def running_statistics(layers: list[_BatchNorm]) -> Iterator[None]:
    """Let `layers` normalise with their running statistics, which stay as they are.

    Layers that keep none hold the statistics of each batch constant.
    """
    were_training = [layer.training for layer in layers]
    without = [layer for layer in layers if layer.running_mean is None]
    handles = [layer.register_forward_pre_hook(_hold_batch_statistics) for layer in without]
    # The attribute and not .eval(), which users override and which descends into children.
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, training in zip(layers, were_training, strict=True):
            layer.training = training
        for layer, handle in zip(without, handles, strict=True):
            handle.remove()
            layer.running_mean = layer.running_var = None


def _hold_batch_statistics(layer: nn.Module, args: tuple[Any, ...]) -> None:
    x: Tensor = args[0].detach()
    over = [axis for axis in range(x.ndim) if axis != 1]
    layer.running_mean, layer.running_var = x.mean(over), x.var(over, unbiased=False)


def warn_once(model: Any) -> None:
    """Say, once for a model, that its derivatives are taken with running statistics."""
    module = owner(model)
    if module is None or module in _warned:
        return
    _warned.add(module)
    warnings.warn(
        "`model` has batch normalisation in training mode, which makes each row's output depend on the other rows: its "
        "input derivatives are taken with the running statistics instead (for values and derivatives this is a second "
        "forward pass), or with the batch's held constant where a layer keeps none. Put these layers in eval mode, or "
        "use GroupNorm or LayerNorm, to do without",
        UserWarning,
        stacklevel=3,
    )


def warn_unseen(outputs: Tensor) -> None:
    """Warn if finished `outputs` went through batch normalisation in training mode: too late to do better."""
    if couples_rows(outputs):
        warnings.warn(
            "the outputs went through batch normalisation in training mode, which makes each row depend on the other "
            "rows: derivatives per row are wrong. Pass the model itself, `matching(model, x, ...)`, or put these "
            "layers in eval mode",
            UserWarning,
            stacklevel=3,
        )


def couples_rows(outputs: Tensor) -> bool:
    """Whether the graph of `outputs` contains batch normalisation with the statistics of the batch."""
    return any(_uses_batch_statistics(node) for node in graph_nodes(outputs))


def _uses_batch_statistics(node: Any) -> bool:
    # NativeBatchNormBackward0, CudnnBatchNormBackward0, MiopenBatchNormBackward0, SyncBatchNormBackward.
    if "BatchNorm" not in node.name() or not getattr(node, "_saved_training", True):
        return False
    # Instance normalisation is computed as batch normalisation of one row of batch * channels channels.
    saved = getattr(node, "_saved_input", None)
    return saved is None or saved.shape[0] != 1
