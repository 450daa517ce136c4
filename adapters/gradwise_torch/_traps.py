"""Silent traps that the first training call of a derivative loss looks for, at the price of two backward passes."""

import sys
import warnings

import torch
from torch import Tensor, nn

from gradwise_torch._autograd_graph import graph_leaves, graph_nodes
from gradwise_torch._double_backward import require_double_backward
from gradwise_torch._linearize import Linearization
from gradwise_torch._matching_goals import Goal

__all__ = ["check_first_call", "is_piecewise_linear", "kinked_operations", "warn_user"]

# Operations of the autograd graph whose derivative jumps and is constant in between: the start of their nodes' names.
_KINKED = {
    "ReluBackward": "ReLU",
    "LeakyReluBackward": "LeakyReLU",
    "PreluKernelBackward": "PReLU",
    "RreluWithNoiseBackward": "RReLU",
    "HardtanhBackward": "Hardtanh or ReLU6",
    "HardsigmoidBackward": "Hardsigmoid",
    "HardshrinkBackward": "Hardshrink",
    "SoftshrinkBackward": "Softshrink",
    "ThresholdBackward": "threshold",
    "ClampBackward": "clamp",
    "ClampMinBackward": "clamp",
    "ClampMaxBackward": "clamp",
    "AbsBackward": "abs",
    "MaximumBackward": "maximum",
    "MinimumBackward": "minimum",
    "MaxPool": "max pooling",
    "AdaptiveMaxPool": "max pooling",
    "AmaxBackward": "amax",
    "AminBackward": "amin",
}


def check_first_call(
    loss: Tensor, linearization: Linearization, goal: Goal, derivatives: Tensor, n_outputs: int
) -> tuple[list[Tensor], list[nn.Parameter]]:
    """Raise or warn if training by `loss` would silently not do what is meant; leaves no trace.

    Parameters
    ----------
    loss : Tensor
        With its graph.
    linearization : Linearization
    goal : Goal
        What `derivatives` are compared with.
    derivatives : Tensor
        Rows of the Jacobian, or products of Hessians.
    n_outputs : int

    Returns
    -------
    trained : list of Tensor
        What the loss gives a gradient.
    free : list of nn.Parameter
        What the outputs depend on and the loss gives none: the offset. Empty if the loss is a mere penalty.

    Raises
    ------
    RuntimeError
        If torch cannot differentiate the derivatives again, or no parameter would receive a gradient.
    ValueError
        If second derivatives are asked of a model that is linear between kinks: they are zero whatever its weights.

    Warns
    -----
    UserWarning
        If first derivatives are asked of such a model. A derivative that is constant between kinks can be matched only
        roughly, and the loss cannot move the kinks.
    """
    second = goal.second is not None
    if second and not derivatives.any() and is_piecewise_linear(linearization, linearization.rows(None, n_outputs)):
        msg = (
            "second derivatives of `model` must not all be zero whatever its weights; got a model that is linear "
            f"between kinks ({kinked_operations(linearization.outputs)}). Use a smooth activation (tanh, softplus, "
            "GELU, SiLU)"
        )
        raise ValueError(msg)
    received = require_double_backward(loss, [linearization.primal, *(linearization.probes or [])])
    if not goal.informative:
        return received, []
    if not second and is_piecewise_linear(linearization, derivatives):
        warn_user(
            f"`model` is linear between kinks ({kinked_operations(linearization.outputs)}): its derivatives are "
            "piecewise constant, and a derivative loss cannot move the kinks, nor train most biases. Matching such "
            "derivatives helps less; use a smooth activation (tanh, softplus, GELU, SiLU)"
        )
    trained = {id(leaf) for leaf in received}
    leaves = graph_leaves(linearization.outputs)
    return received, [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and id(leaf) not in trained]


def is_piecewise_linear(linearization: Linearization, derivatives: Tensor) -> bool:
    """Whether the model has kinks and, between them, second derivatives that are exactly zero.

    One smooth operation on the way makes them differ from zero: a network with both kinds is not meant. Nor is one
    whose first derivatives are all zero, because its last layer starts at zero: that says nothing.
    """
    if not derivatives.requires_grad or not derivatives.any() or not kinked_operations(linearization.outputs):
        return False
    # A combination of the derivatives without accidental cancellation, and without a draw from the user's generator.
    pattern = torch.arange(1, derivatives.numel() + 1, device=derivatives.device, dtype=torch.float32).cos()
    (second,) = torch.autograd.grad(
        derivatives,
        linearization.primal,
        pattern.to(derivatives.dtype).reshape(derivatives.shape),
        retain_graph=True,
        allow_unused=True,
    )
    return second is None or not second.any()


def kinked_operations(outputs: Tensor) -> str:
    """Names of the operations with kinks in the graph of `outputs`; empty if there are none."""
    names = {node.name() for node in graph_nodes(outputs)}
    return ", ".join(sorted({label for start, label in _KINKED.items() if any(n.startswith(start) for n in names)}))


def warn_user(message: str) -> None:
    """Warn at the line that called us, however deep we and torch are in between."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in {"gradwise_torch", "torch"}:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
