"""Which tensors of an optimizer are perturbed, and under which names."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradwise_torch._fsdp import Gathered, refuse_flat_parameters
from gradwise_torch._member_groups import member_group, process
from gradwise_torch._shards import Shard, is_dtensor
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

    Attributes
    ----------
    rank : int
        Which member this process has among all processes: see `member_group`.
    gathered : Gathered
        What FSDP modules keep of the parameters.
    """

    def __init__(self, model: nn.Module | None, perturb: Callable[[str, Tensor], bool] | None) -> None:
        self.model = model
        self.rank = 0
        self.gathered = Gathered(None)
        self._perturb = perturb
        self._names: dict[int, str] = {}  # by id; a parameter that has left the model keeps its name
        self._seen: tuple[int, list[tuple[int, bool, bool]]] | None = None
        self._entries: list[Entry] = []
        self._strict = self._complete = True
        self._warned: set[str] = set()
        self._sparse: set[int] = set()

    def entries(self, groups: list[dict[str, Any]]) -> list[Entry]:
        """The entries to perturb; their index counts every parameter of every group."""
        of_groups = [(id(p), bool(p.requires_grad), bool(is_lazy(p))) for group in groups for p in group["params"]]
        seen = (process(), of_groups)  # a trainer may join the processes after the optimizer was made
        if seen != self._seen:
            self._entries = self._select(groups)
            self._seen = seen if self._complete else None
        return self._entries

    def forget(self) -> None:
        """Look everything up again: ids mean nothing after unpickling."""
        self._names, self._seen, self._sparse = {}, None, set()
        self.gathered = Gathered(None)

    def exclude_sparse(self, parameters: list[Tensor]) -> None:
        """Leave out tensors whose gradients turned out to be sparse: dense noise would undo what sparsity is for."""
        found = {id(p) for p in parameters if p.grad is not None and p.grad.layout != torch.strided} - self._sparse
        if found:
            self._sparse |= found
            self._seen = None

    def _select(self, groups: list[dict[str, Any]]) -> list[Entry]:
        self._look_around([parameter for group in groups for parameter in group["params"]])
        if self.model is not None:
            self._names |= {id(p): name for name, p in self.model.named_parameters()}
        special = self._special_embeddings()
        entries: list[Entry] = []
        foreign: list[str] = []
        parameters = [(g, i, p) for g, group in enumerate(groups) for i, p in enumerate(group["params"])]
        for index, (g, i, parameter) in enumerate(parameters):
            name = self._names.get(id(parameter), f"{g}.{i}")
            if not self._wanted(name, parameter, special):
                continue
            if self.model is None or id(parameter) in self._names:
                entries.append(Entry(index, g, parameter, Shard.of(name, parameter)))
            else:
                foreign.append(name)
        if foreign and self._strict:
            msg = (
                f"`model` must own the perturbed parameters; it lacks those at group.index {', '.join(foreign[:5])}. "
                "Pass the module whose forward uses them (and build the optimizer from that module's parameters), or "
                "leave them out with `perturb`"
            )
            raise ValueError(msg)
        self._strict = False  # a parameter that is foreign later may be about to join the model
        self._complete = not foreign
        return entries

    def _look_around(self, parameters: list[Tensor]) -> None:
        """See how the parameters are spread over processes."""
        refuse_flat_parameters(self.model, parameters)
        if self.model is None:
            if any(map(is_dtensor, parameters)):
                msg = (
                    "`model` must be given to PopulationGradient where parameters are DTensors: what fully_shard has "
                    "gathered of them is stale as soon as they move. Pass the outermost module"
                )
                raise ValueError(msg)
            self.rank = member_group(parameters)
            return
        self.gathered = Gathered(self.model)
        self.gathered.check_before_member()
        self.gathered.drop()  # or the model shows other tensors than the optimizer has
        self.gathered.watch(self.model, parameters)
        self.rank = member_group([*parameters, *self.model.parameters()])

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
