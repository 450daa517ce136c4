"""FSDP2 gathers weights and keeps them for a while: what it has gathered is stale once a member moves the shards.

Reaches into ``fully_shard`` (as `_sharded_models` does, for derivatives), whose public ``reshard()`` does nothing where
weights are kept on purpose (after an interrupted forward, or while an all-gather is under way).
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwise_torch._fsdp_state import fsdp_module_class, param_groups, state_of
from gradwise_torch._shards import is_dtensor

__all__ = ["Gathered", "refuse_flat_parameters"]


class Gathered:
    """The copies of a model's sharded weights that ``fully_shard`` has gathered.

    Parameters
    ----------
    model : nn.Module or None
        Its FSDP modules, as they are now, are those that count.
    """

    def __init__(self, model: nn.Module | None) -> None:
        kind = fsdp_module_class()
        modules = [] if model is None or kind is None else [m for m in model.modules() if isinstance(m, kind)]
        self._states = list({id(state): state for state in map(state_of, modules)}.values())
        self._owners: list[tuple[nn.Module, str, Tensor]] = []

    def watch(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        """Remember where the model keeps these of its parameters."""
        wanted = {id(parameter) for parameter in parameters if is_dtensor(parameter)}
        self._owners = [
            (module, name, parameter)
            for module in (model.modules() if wanted else ())
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in wanted
        ]

    def drop(self) -> None:
        """Show the shards in the model again, as in its state dict."""
        for group in self._groups():
            group.wait_for_unshard()  # an all-gather may be under way
            with group.use_training_state(type(group._training_state).IDLE):
                group.reshard()

    def outdate(self) -> None:
        """Forget what was gathered, because the shards have moved: also in graphs that wait for their backward."""
        self.drop()
        for group in self._groups():
            for sharded in group.fsdp_params:
                gathered = getattr(sharded, "_unsharded_param", None)
                if gathered is not None:
                    # The tensor will be filled again behind autograd's back. Now a backward of before is an error, as
                    # it is without FSDP, and not a mixture of two members.
                    torch.autograd.graph.increment_version(gathered)
        for state in self._states:
            if getattr(state._state_ctx, "post_optim_event", None) is not None:
                state._state_ctx.post_optim_event = None  # gathers would only wait for the optimizer, not for us

    def check_before_member(self) -> None:
        """Raise if a member that is entered now would not be seen by the forward."""
        if any(group.is_unsharded and group._training_state.name == "FORWARD" for group in self._groups()):
            msg = (
                "`fully_shard` must be called before PopulationGradient is made: its hook has gathered the weights of "
                "this forward before the member was there. Make a new PopulationGradient after fully_shard, with an "
                "inner optimizer over the sharded parameters"
            )
            raise RuntimeError(msg)

    def check_after_drop(self) -> None:
        """Raise if the model still shows something else than the shards."""
        for module, name, parameter in self._owners:
            if module._parameters.get(name) is not parameter:
                msg = (
                    f"`model` must contain the FSDP module that gathers its parameter `{name}`; it is gathered by one "
                    "around it. Pass the outermost module that fully_shard was applied to"
                )
                raise RuntimeError(msg)

    def check_reduced(self) -> None:
        """Raise if gradients are kept back: those of several members of one batch would be added up."""
        if not all(group.reduce_grads and group.all_reduce_grads for group in self._groups()):
            msg = (
                "gradients must be reduced in every backward when several members see one batch; they are kept back by "
                "set_requires_gradient_sync(False) or set_requires_all_reduce(False). Leave them on, or use the "
                "unchanged loop"
            )
            raise RuntimeError(msg)

    def _groups(self) -> list[Any]:
        return [group for state in self._states for group in param_groups(state)]


def refuse_flat_parameters(model: nn.Module | None, parameters: Sequence[Tensor]) -> None:
    """Raise for FullyShardedDataParallel, whose flat shards know nothing of the tensors that they are part of."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    in_model = kind is not None and model is not None and any(isinstance(module, kind) for module in model.modules())
    if in_model or any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        msg = (
            "`model` must not be a FullyShardedDataParallel (FSDP1): it flattens parameters, so that scale and noise "
            "of a tensor are not defined. Use torch.distributed.fsdp.fully_shard (FSDP2), which keeps tensors apart"
        )
        raise TypeError(msg)
