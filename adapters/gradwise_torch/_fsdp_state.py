"""Where ``fully_shard`` (FSDP2) keeps its state, for which torch has no public names."""

import sys
from typing import Any

__all__ = ["fsdp_module_class", "param_groups", "state_of"]


def fsdp_module_class() -> Any:
    """``FSDPModule``, or None in a process that has not imported it and so has no such module: it takes a second."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def state_of(module: Any) -> Any:
    """The state of an ``FSDPModule``; modules that were sharded by one call share it."""
    return module._get_fsdp_state()


def param_groups(state: Any) -> list[Any]:
    """The parameters that are gathered together, in groups."""
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.6 to 2.10 had one
    groups = [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]
