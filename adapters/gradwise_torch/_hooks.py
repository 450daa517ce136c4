"""The unchanged loop: forward hooks that enter members, and state-dict hooks that show the mean.

One `MemberEvent` serves all optimizers of a model: when a new member starts, it starts for each of them.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["MemberEvent"]

_EVENTS: "weakref.WeakKeyDictionary[nn.Module, MemberEvent]" = weakref.WeakKeyDictionary()


class Participant(Protocol):
    """What a `MemberEvent` asks of an optimizer (a `MemberOptimizer`)."""

    @property
    def hooks_suspended(self) -> bool: ...
    def wants_member(self) -> bool: ...
    def start_member(self) -> None: ...
    def end_member(self) -> None: ...
    def mean_of(self, parameter: Tensor) -> Tensor | None: ...
    def perturbs(self, parameters: list[Tensor]) -> bool: ...
    def retire(self) -> None: ...


class Hook:
    """A hook that does nothing in copies and pickles of its module, which no optimizer of ours knows of."""

    def __init__(self, function: Callable[..., Any]) -> None:
        def untraced(*args: Any) -> Any:
            return function(*args)

        # `module.compile()` compiles the hooks along with the forward; this one breaks the graph instead.
        self._function = torch._disable_dynamo(untraced)  # type: ignore[reportPrivateImportUsage] - torch.compiler.disable imports dynamo

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # A function of the standard library that takes anything and returns None, so that a pickled module loads where
        # gradwise is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Graph:
    """Rides in the autograd graph of a forward and dies with it."""

    __slots__ = ("__weakref__",)


class MemberEvent:
    """Decides at every forward of one model which weights it sees. Refers weakly to the optimizers."""

    def __init__(self) -> None:
        self.suspended = 0  # in closures, member() and mean() of any of the optimizers
        self._optimizers: list[weakref.ref[Participant]] = []
        self._handles: list[Any] = []
        self._owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self._clones: tuple[Callable[[], Any], dict[int, Tensor]] = (_nothing, {})
        self._held: _Graph | None = None
        self._calls: list[tuple[Any, ...]] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "MemberEvent":
        """The event of a model; its hooks are on the object that was given (a DDP wrapper, a compiled module)."""
        event = _EVENTS.get(model)
        if event is None:
            event = _EVENTS[model] = cls()
            event._handles = [
                # prepend: pruning and weight_norm compute a weight in pre-hooks of their own, from the member's.
                model.register_forward_pre_hook(Hook(event._before_forward), with_kwargs=True, prepend=True),
                # always_call: an exception in the forward must not leave a member behind.
                model.register_forward_hook(Hook(event._after_forward), always_call=True),
            ]
        return event

    def join(self, optimizer: Participant, parameters: list[Tensor]) -> None:
        """Let an optimizer take part until it dies, in the place of an older one of the same parameters."""
        for older in self._living():
            if older.perturbs(parameters):
                older.retire()
        self._optimizers.append(weakref.ref(optimizer, self._left))

    def watch(self, model: nn.Module, parameters: list[Tensor]) -> None:
        """Make the state dicts of the modules that own `parameters` show the mean, and loading end the member."""
        wanted = {id(parameter) for parameter in parameters}
        for module in model.modules():
            if module not in self._owners and any(id(p) in wanted for p in module._parameters.values()):
                self._owners.add(module)
                self._handles += [
                    module.register_state_dict_post_hook(Hook(self._after_state_dict)),
                    module.register_load_state_dict_pre_hook(Hook(self._before_load_state_dict)),
                ]

    def forward_pending(self) -> bool:
        """Whether the graph of some forward of the current member is still alive."""
        return bool(self._graphs)

    def record_calls(self, calls: list[tuple[Any, ...]] | None) -> None:
        """Collect the inputs of the forwards to come in `calls`, or stop."""
        self._calls = calls

    @contextlib.contextmanager
    def unhooked(self, model: nn.Module) -> Iterator[None]:
        """Take the hooks off the model's forward, which torch.compile could not go through, and put them back."""
        places = (model._forward_pre_hooks, model._forward_hooks)
        kept = [dict(hooks) for hooks in places]
        try:
            for hooks in places:
                for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                    del hooks[key]
            yield
        finally:
            for hooks, before in zip(places, kept, strict=True):
                now = dict(hooks)  # without ours; the forward itself may have added or removed some
                hooks.clear()
                hooks.update({k: hook for k, hook in before.items() if k in now or isinstance(hook, Hook)})
                hooks.update(now)

    def _living(self) -> list[Participant]:
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def _left(self, reference: weakref.ref[Participant]) -> None:
        self._optimizers.remove(reference)
        if not self._optimizers:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            for model in [model for model, event in _EVENTS.items() if event is self]:
                del _EVENTS[model]

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls is not None:
            self._calls.append((args, kwargs, _autocast_as_now(args)))
        optimizers = [optimizer for optimizer in self._living() if not optimizer.hooks_suspended]
        if not module.training:
            for optimizer in optimizers:
                optimizer.end_member()
        elif _starts_members() and any(optimizer.wants_member() for optimizer in optimizers):
            self._graphs.clear()
            self._held = None
            for optimizer in optimizers:
                optimizer.start_member()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args
        if _in_backward():
            return  # a recomputation: checkpointing ends it early with an exception of its own
        if output is None and sys.exc_info()[1] is not None:
            for optimizer in self._living():
                if not optimizer.hooks_suspended:
                    optimizer.end_member()
        elif torch.is_grad_enabled():
            token = _Graph()
            self._graphs.add(token)
            nodes = [leaf.grad_fn for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn]
            for node in nodes:
                node.metadata["gradwise"] = token  # type: ignore[reportIndexIssue] - a property, typed as a method
            if not nodes:  # an output that hides its tensors: its graph counts as alive until the next member
                self._held = token

    def _after_state_dict(self, module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        del metadata
        of_state, clones = self._clones
        if of_state() is not state:  # tied weights share their clone within one state dict, and only there
            clones: dict[int, Tensor] = {}
            self._clones = (_weak(state), clones)
        for name, parameter in module._parameters.items():
            for optimizer in self._living():
                mean = None if parameter is None else optimizer.mean_of(parameter)
                if parameter is not None and mean is not None and prefix + name in state:
                    clone = clones.setdefault(id(parameter), mean.clone())
                    kept = isinstance(state[prefix + name], nn.Parameter)  # state_dict(keep_vars=True)
                    state[prefix + name] = nn.Parameter(clone, parameter.requires_grad) if kept else clone

    def _before_load_state_dict(self, *args: Any) -> None:
        del args
        for optimizer in self._living():
            if not optimizer.hooks_suspended:
                optimizer.end_member()


def _starts_members() -> bool:
    return torch.is_grad_enabled() and not _in_backward() and torch._C._functorch.peek_interpreter_stack() is None  # type: ignore[reportAttributeAccessIssue] - C extension


def _in_backward() -> bool:
    """Whether autograd is running: activation checkpointing repeats forwards there."""
    return torch._C._current_graph_task_id() != -1


def _autocast_as_now(args: tuple[Any, ...]) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device))


def _weak(state: dict[str, Any]) -> Callable[[], Any]:
    try:
        return weakref.ref(state)
    except TypeError:  # a plain dict given as `destination` has no weak references
        return _nothing


def _nothing() -> None:
    """A reference to nothing."""
