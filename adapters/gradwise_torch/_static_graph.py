"""DistributedDataParallel with ``static_graph=True``, which a derivative desynchronises, in silence.

Such a wrapper learns in its first backward pass which parameters there are to wait for. A derivative by the inputs is a
backward pass that reaches no parameter: from then on DDP waits for none, and each process keeps its own gradients.
(After a first pass without derivatives all is well, but then the graph is not static, which DDP has been told it is.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradwise_torch._autograd_graph import graph_nodes
from gradwise_torch._batch_coupling import owner, submodules

__all__ = ["refuse_static_graph", "refuse_static_outputs"]


def refuse_static_graph(model: Any) -> None:
    """ValueError if `model` is, or holds, a DDP wrapper with a static graph."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    module = owner(model)
    wrappers = () if module is None else (m for m in submodules(module) if isinstance(m, DistributedDataParallel))
    _refuse(any(wrapper.static_graph for wrapper in wrappers))


def refuse_static_outputs(outputs: Tensor) -> None:
    """The same for finished outputs, which until the wrapper's first backward pass have gone through a node of its."""
    wrappers = (node.ddp_weakref() for node in graph_nodes(outputs) if hasattr(node, "ddp_weakref"))
    _refuse(any(getattr(wrapper, "static_graph", False) for wrapper in wrappers))


def _refuse(static: bool) -> None:
    if static:
        msg = (
            "`model` must not be in DistributedDataParallel(..., static_graph=True) for derivatives by its inputs, "
            "which are backward passes of their own: replicas would drift apart. Use static_graph=False; for "
            "evaluation alone, pass `model.module`"
        )
        raise ValueError(msg)
