"""Which tensors of an optimizer are perturbed, and under which names."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradwise_torch._weights import Entry

__all__ = ["Selection"]


class Selection:
    """The perturbed tensors among an optimizer's groups, looked up again when a parameter joins, freezes or thaws.

    Parameters
    ----------
    model : nn.Module or None
        Gives the names.
    perturb : callable or None
        ``perturb(name, parameter) -> bool``; the default is "at least two dimensions". Whatever it says, frozen,
        integer, sparse and quantised parameters stay as they are.
    """

    def __init__(self, model: nn.Module | None, perturb: Callable[[str, Tensor], bool] | None) -> None:
        self.model = model
        self._perturb = perturb
        self._seen: list[tuple[int, bool, bool]] | None = None
        self._entries: list[Entry] = []
        self._warned: set[str] = set()
        self._sparse: set[int] = set()

    def entries(self, optimizer: Optimizer) -> list[Entry]:
        """The entries to perturb; their index counts every parameter of every group."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen = [(id(p), bool(p.requires_grad), bool(is_lazy(p))) for p in parameters]
        if seen != self._seen:
            self._entries = self._select(optimizer)
            self._seen = seen
        return self._entries

    def exclude_sparse(self, parameters: list[Tensor]) -> None:
        """Leave out tensors whose gradients turned out to be sparse: dense noise would undo what sparsity is for."""
        found = {id(p) for p in parameters if p.grad is not None and p.grad.layout != torch.strided} - self._sparse
        if found:
            self._sparse |= found
            self._seen = None

    def _select(self, optimizer: Optimizer) -> list[Entry]:
        names = {} if self.model is None else {id(p): name for name, p in self.model.named_parameters()}
        special = self._special_embeddings()
        entries: list[Entry] = []
        foreign: list[str] = []
        index = 0
        for g, group in enumerate(optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"{g}.{i}")
                if self._wanted(name, parameter, special):
                    entries.append(Entry(index, group, parameter))
                    if self.model is not None and id(parameter) not in names:
                        foreign.append(name)
                index += 1
        if foreign:
            msg = (
                f"`model` must own the perturbed parameters; it lacks those at group.index {', '.join(foreign[:5])}. "
                "Pass the module whose forward uses them (and build the optimizer from that module's parameters), or "
                "leave them out with `perturb`"
            )
            raise ValueError(msg)
        return entries

    def _wanted(self, name: str, parameter: Tensor, special: dict[int, str]) -> bool:
        if is_lazy(parameter) or not parameter.is_floating_point() or not parameter.requires_grad:
            if parameter.is_quantized:
                self._warn(f"`{name}` is quantised")
            return False
        if not (parameter.ndim >= 2 if self._perturb is None else self._perturb(name, parameter)):
            return False
        if id(parameter) in self._sparse or parameter.layout != torch.strided:
            self._warn(f"`{name}` is sparse or has sparse gradients")
            return False
        if id(parameter) in special:
            self._warn(f"`{name}` belongs to {special[id(parameter)]}")
            return False
        return True

    def _special_embeddings(self) -> dict[int, str]:
        """Embeddings with sparse gradients, and those that write to their own weight in the forward (max_norm)."""
        found: dict[int, str] = {}
        for module in [] if self.model is None else self.model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                if module.sparse:
                    found[id(module.weight)] = "an embedding with sparse gradients"
                elif module.max_norm is not None:
                    found[id(module.weight)] = "an embedding that renormalises itself (max_norm)"
        return found

    def _warn(self, fact: str) -> None:
        if fact not in self._warned:
            self._warned.add(fact)
            warnings.warn(f"{fact} and stays unperturbed", UserWarning, stacklevel=4)
