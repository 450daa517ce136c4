"""What an autograd graph contains: its operations and its leaves."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["graph_leaves", "graph_nodes"]


def graph_nodes(tensor: Tensor) -> Iterator[Any]:
    """Every node that `tensor` was computed by, once each."""
    seen: set[Any] = set()
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(parent for parent, _ in node.next_functions)


def graph_leaves(tensor: Tensor) -> list[Tensor]:
    """Every tensor whose `.grad` a backward pass from `tensor` fills."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    return [node.variable for node in graph_nodes(tensor) if node.name().endswith("AccumulateGrad")]
