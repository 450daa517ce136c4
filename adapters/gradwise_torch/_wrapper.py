"""An optimizer around another one: groups, state and checkpoints stay the inner optimizer's own."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

__all__ = ["OptimizerWrapper"]

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# Counters ride in a copy of param_groups[0] under this prefix: distributed checkpoints keep what is in a group and drop
# other top-level keys. All are plain integers, so that `torch.load(weights_only=True)` reads them.
_PREFIX = "gradwise_"


class OptimizerWrapper(Optimizer):
    """Delegates groups, state and defaults by property: lists shared at construction come apart when a state is loaded.

    Not ``super().__init__``, which would make groups of its own. Subclasses give their integer counters by `_counters`,
    take them by `_set_counters`, and end whatever they do to the weights in `_before_state`.
    """

    inner_optimizer: Optimizer

    def _register(self) -> None:
        """Make this an Optimizer: empty hooks, and `step` under torch's profiler and hook machinery."""
        for name in _HOOKS:
            setattr(self, name, OrderedDict())
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the inner optimizer, themselves."""
        return self.inner_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # type: ignore[override] - as above
        self.inner_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The state of the inner optimizer, itself."""
        return self.inner_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:  # type: ignore[override] - as above
        self.inner_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the inner optimizer, themselves."""
        return self.inner_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner_optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its tensors join with the next member."""
        self.inner_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, with gradwise's counters in a copy of its first group. Ends the member.

        A `sigma` schedule is not in it: pass it again when the training is resumed.
        """
        self._before_state()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self.inner_optimizer.state_dict()
        groups = [
            {key: value for key, value in group.items() if not (key == "sigma" and callable(value))}
            for group in state["param_groups"]
        ]
        # int(): a seed may be numpy's, which `torch.load(weights_only=True)` would refuse.
        groups[0].update({_PREFIX + name: int(value) for name, value in self._counters().items()})
        state = {**state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state)
            state = state if result is None else result
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of the bare inner optimizer (the counters then stay as they are).

        What is given at construction (population size, sigma, scale, noise) is in no state and stays as it is.

        Raises
        ------
        ValueError
            The counters of the state are damaged, or its groups are those of another model; nothing is loaded then.
        """
        self._before_state()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        first, *rest = state_dict["param_groups"]
        counters = {key.removeprefix(_PREFIX): value for key, value in first.items() if key.startswith(_PREFIX)}
        counters = _checked(counters, self._counters())
        first = {key: value for key, value in first.items() if not key.startswith(_PREFIX)}
        sigmas = [group.get("sigma") for group in self.param_groups]
        self.inner_optimizer.load_state_dict({**state_dict, "param_groups": [first, *rest]})
        for group, sigma in zip(self.param_groups, sigmas, strict=True):
            if sigma is not None:  # the state has none where it is a schedule, or came from the bare optimizer
                group.setdefault("sigma", sigma)
        self._set_counters(counters)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _before_state(self) -> None:
        raise NotImplementedError

    def _counters(self) -> dict[str, int]:
        raise NotImplementedError

    def _set_counters(self, counters: dict[str, int]) -> None:
        raise NotImplementedError


def _checked(counters: dict[str, Any], own: Iterable[str]) -> dict[str, int]:
    """The counters of a state, which are all of one's own or none."""
    if counters and set(counters) != set(own):
        wanted, got = ([_PREFIX + name for name in sorted(names)] for names in (own, counters))
        msg = (
            f"`state_dict` must have {wanted} in its first group, or none of them; got {got}. It is damaged, or of "
            "another version of gradwise; with all of them deleted, the inner optimizer's state can still be loaded"
        )
        raise ValueError(msg)
    for name, value in counters.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            msg = (
                f"`{_PREFIX}{name}` in the first group of `state_dict` must be an integer from 0 to 2**64 - 1; got "
                f"{value!r}. The state is damaged: load another checkpoint"
            )
            raise ValueError(msg)
    return counters
