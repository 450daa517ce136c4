"""Normalisation that can be differentiated three times, as a loss of second derivatives needs when it is trained.

torch's own layer normalisation holds mean and variance constant in its second backward pass: second derivatives are
right, but their gradient with respect to the weights is 24 to 77 % off, silently. So is that of instance normalisation,
which torch computes as batch normalisation. Group normalisation and RMSNorm are right.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwise_torch._autograd_graph import graph_nodes

__all__ = ["refuse_wrong_third_derivatives", "thrice_differentiable_norms"]


@contextmanager
def thrice_differentiable_norms() -> Iterator[None]:
    """Compute layer and instance normalisation by their formulas, from operations that torch differentiates rightly."""
    with _Norms():
        yield


def refuse_wrong_third_derivatives(outputs: Tensor) -> None:
    """Raise RuntimeError if `outputs` were computed by a normalisation whose third derivatives are wrong."""
    if any(_is_wrong(node) for node in graph_nodes(outputs)):
        msg = (
            "second derivatives through layer, instance or batch normalisation must not be trained as torch computes "
            "them: it gets their gradient wrong, silently. Pass the model itself, `matching(model, x, ...)`, which "
            "computes these layers by their formulas"
        )
        raise RuntimeError(msg)


def _is_wrong(node: Any) -> bool:
    name = node.name()
    # Batch normalisation in eval mode is an affine map.
    return "NativeLayerNorm" in name or ("BatchNorm" in name and getattr(node, "_saved_training", True))


class _Norms(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _BY_FORMULA.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,  # noqa: A002 - torch's name, for those who pass it by keyword
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001 - torch.layer_norm has it
) -> Tensor:
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    normalised = _normalised(input, tuple(range(-len(sizes), 0)), eps)
    normalised = normalised if weight is None else normalised * weight
    return normalised if bias is None else normalised + bias


def _instance_norm(
    input: Tensor,  # noqa: A002 - torch's name, for those who pass it by keyword
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001 - torch.instance_norm has it
) -> Tensor:
    original = nn.functional.instance_norm
    if not use_input_stats:  # an affine map
        return original(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if running_mean is not None:  # updates them
        original(input.detach(), running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    normalised = _normalised(input, tuple(range(2, input.ndim)), eps)
    shape = (1, -1, *[1] * (input.ndim - 2))
    normalised = normalised if weight is None else normalised * weight.reshape(shape)
    return normalised if bias is None else normalised + bias.reshape(shape)


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    # float32 under autocast, as torch's own.
    x = x.float() if x.dtype.itemsize == 2 and torch.is_autocast_enabled(x.device.type) else x
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


_BY_FORMULA: dict[Any, Callable[..., Any]] = {
    nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    nn.functional.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
}
