"""Conditions under which torch can differentiate a derivative, and clear errors where it cannot."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.backends import cuda as attention

from gradwise_torch._autograd_graph import graph_leaves
from gradwise_torch._batch_coupling import owner, submodules

__all__ = [
    "differentiable_kernels",
    "has_cudnn_rnn",
    "not_differentiable",
    "outside_compilation",
    "plain_attention",
    "refuse_cudnn_rnn",
    "require_double_backward",
]

P = ParamSpec("P")
R = TypeVar("R")

# Is it on, and its switch, for each kind of attention that has no second derivative. Despite their place in torch, the
# switches rule all devices.
_FUSED_ATTENTION: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (attention.flash_sdp_enabled, attention.enable_flash_sdp),
    (attention.mem_efficient_sdp_enabled, attention.enable_mem_efficient_sdp),
    (attention.cudnn_sdp_enabled, attention.enable_cudnn_sdp),
]
if hasattr(torch._C, "_set_sdp_use_overrideable"):  # of other devices; has no public switch
    _FUSED_ATTENTION.append((torch._C._get_overrideable_sdp_enabled, torch._C._set_sdp_use_overrideable))


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Run models with kernels that can be differentiated twice: plain attention, and no compiled code."""
    # Compiled models, or compiled parts of models, have no second derivative. Looked up in sys.modules because merely
    # asking torch would import its compiler: seconds, for people who compile nothing.
    with (
        torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
        plain_attention(),
    ):
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """What sdpa_kernel(SDPBackend.MATH) does, in a tenth of its time, which would show in a small model's step."""
    switches = [switch for is_on, switch in _FUSED_ATTENTION if is_on()]
    math_was_on = attention.math_sdp_enabled()
    try:
        for switch in switches:
            switch(False)
        attention.enable_math_sdp(True)
        yield
    finally:
        for switch in switches:
            switch(True)
        attention.enable_math_sdp(math_was_on)


def outside_compilation(function: Callable[P, R]) -> Callable[P, R]:
    """Make a caller's torch.compile break its graph around `function` instead of tracing into it."""
    eager: Callable[P, R] | None = None

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal eager
        # Not `disable` as a decorator: it imports torch's compiler. And not torch.compiler.is_compiling(): that is
        # False in Python code that runs between the parts of a broken graph.
        if "torch._dynamo" in sys.modules:
            if eager is None:
                eager = cast("Callable[P, R]", cast("Any", torch.compiler).disable(function))
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def has_cudnn_rnn(model: Any, *, twice: bool, on_gpu: Callable[[Tensor], bool] = lambda weight: weight.is_cuda) -> bool:
    """Whether `model` has a recurrent layer whose cuDNN kernels cannot do what is asked of them.

    They have no second derivative (`twice`), and in eval mode not even a first one. `on_gpu` says of a weight whether
    it makes its layer use them.
    """
    module = owner(model)
    return module is not None and any(
        on_gpu(weight)
        for layer in submodules(module)
        if isinstance(layer, nn.RNNBase) and (twice or not layer.training)
        for weight in layer.parameters()
    )


def refuse_cudnn_rnn(model: Any, *, twice: bool) -> None:
    """Raise NotImplementedError if a derivative of `model`, or a second one, needs what cuDNN's kernels lack."""
    cudnn = torch.backends.cudnn
    if cudnn.is_available() and cudnn.enabled and has_cudnn_rnn(model, twice=twice):
        msg = (
            "`model` must not run recurrent layers on cuDNN, which cannot differentiate them twice, nor in eval mode. "
            "Wrap the call in `with torch.backends.cudnn.flags(enabled=False):`"
        )
        raise NotImplementedError(msg)


def require_double_backward(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Try the backward pass of a gradient-matching loss once; leaves no `.grad` behind.

    Parameters
    ----------
    loss : Tensor
        The loss, of any shape. Its graph stays usable.
    inputs : list of Tensor
        What the derivatives were taken with respect to, and cotangents: gradients for these alone train nothing.

    Returns
    -------
    list of Tensor
        What receives a gradient.

    Raises
    ------
    RuntimeError
        If torch cannot differentiate the derivatives again, or no parameter would receive a gradient.
    """
    ignored = {id(tensor) for tensor in inputs if not isinstance(tensor, nn.Parameter)}
    leaves = [leaf for leaf in graph_leaves(loss) if id(leaf) not in ignored]
    received: tuple[Tensor | None, ...] = ()
    if leaves:
        try:
            received = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, retain_graph=True)
        except (RuntimeError, NotImplementedError) as error:  # the latter is one, but torch need not keep it so
            raise not_differentiable(error) from error
    if all(gradient is None for gradient in received):
        msg = (
            "the derivative loss must reach a parameter, and reaches none: it would change nothing, silently. Check "
            "that parameters require gradients, that the model does not detach, and that outputs were not computed "
            "under no_grad; to evaluate only, use `matching.eval()` or `torch.no_grad()`"
        )
        raise RuntimeError(msg)
    return [leaf for leaf, gradient in zip(leaves, received, strict=True) if gradient is not None]


def not_differentiable(error: Exception, *, times: str = "twice") -> RuntimeError:
    """What to raise where torch raised `error` in a backward pass."""
    return RuntimeError(
        f"`model` must be differentiable {times}; torch says: {error}. Run attention in "
        "`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, compute outputs with the model that torch.compile "
        "was given instead of the compiled one, and avoid in-place changes and once_differentiable functions"
    )
