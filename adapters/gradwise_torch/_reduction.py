"""One reduction for all members of a step, where the model is in DistributedDataParallel.

DDP averages over the processes whatever a backward pass leaves in ``.grad``, if a forward of its own came before. With
members that would be once per member. So they all run in ``no_sync``, in this process alone, and when their mean is
known it goes through one more forward and backward of DDP, whose graph is nothing but the parameters. What DDP averages
is then exactly what one plain backward pass would have left: the mean of the members, added to what was in ``.grad``.

Why not let the last member's own backward reduce, with gradient hooks that make its gradient the mean? It would have to
be known as the last beforehand (a member whose loss is not finite may be dropped), and a parameter that it does not use
(a branch not taken) has no hook that runs. The price is that this reduction does not overlap with a backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwise_torch._gradients import add_gradients

__all__ = ["Reduction"]

# Ids of parameters in the order in which their gradients arrived in the first backward pass. DDP fills its buckets in
# the order in which gradients first arrive, and how a sum over three or more processes is rounded depends on that.
_ORDERS: WeakKeyDictionary[DistributedDataParallel, dict[int, int]] = WeakKeyDictionary()


class Reduction:
    """What the DDP wrappers in a model do for one evaluation of all members; nothing where there is none.

    Whether they reduce in the end is theirs to say: inside of the user's own ``no_sync`` they do not.

    Parameters
    ----------
    model : nn.Module or None
        What the members' forwards go through.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules: Any = () if model is None else model.modules()
        self._wrappers = [m for m in modules if isinstance(m, DistributedDataParallel) and _knows_its_graph(m)]

    @torch.no_grad()
    def begin(self) -> None:
        """Broadcast the buffers, where DDP would at its next forward: all members then start from the same ones."""
        with self.apart():  # what else DDP says to other processes at a forward (`Join`) is that none is to reduce yet
            for wrapper in self._wrappers:
                _forward(wrapper, tuple)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Forwards and backwards concern this process alone."""
        with ExitStack() as stack:
            for wrapper in self._wrappers:
                stack.enter_context(wrapper.no_sync())
                if not _ORDERS.get(wrapper):
                    _watch_order(wrapper, stack)
            yield

    def accumulate(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add to ``.grad`` as one backward pass does, which DDP follows by averaging all of ``.grad``; outside `apart`.

        Parameters
        ----------
        parameters : sequence of Tensor
        gradients : sequence of Tensor or None
            One for each; None where no member had any. The tensors may become those in ``.grad``.
        """
        left = {id(p): (p, gradient) for p, gradient in zip(parameters, gradients, strict=True)}
        for wrapper in self._wrappers:
            order = _ORDERS.get(wrapper, {})
            latest_first = sorted(wrapper.parameters(), key=lambda p: -order.get(id(p), 0))
            pairs = [left.pop(id(p), (p, _nothing_new(p))) for p in latest_first if p.requires_grad]
            present = [(p, gradient) for p, gradient in pairs if gradient is not None]
            if present:
                _backward(wrapper, *map(list, zip(*present, strict=True)))
        add_gradients(*map(list, zip(*left.values(), strict=True)) if left else ([], []))


def _knows_its_graph(wrapper: DistributedDataParallel) -> bool:
    """Whether DDP can go without a reduction: with ``static_graph``, it studies the graph in the first one it does."""
    return not wrapper.static_graph or getattr(wrapper, "_static_graph_delay_allreduce_enqueued", True)


def _watch_order(wrapper: DistributedDataParallel, stack: ExitStack) -> None:
    order = _ORDERS[wrapper] = {}

    def note(name: int, gradient: Tensor) -> None:
        del gradient
        order.setdefault(name, len(order))

    for parameter in wrapper.parameters():
        if parameter.requires_grad:
            stack.callback(parameter.register_hook(partial(note, id(parameter))).remove)


def _nothing_new(parameter: Tensor) -> Tensor | None:
    """For a parameter of somebody else's, whose ``.grad`` the members have added to: DDP waits for all of them."""
    return None if parameter.grad is None else parameter.new_zeros(()).expand_as(parameter)


def _backward(wrapper: DistributedDataParallel, parameters: list[Tensor], gradients: list[Tensor]) -> None:
    with torch.enable_grad(), _without_hooks(wrapper, parameters):
        # Later nodes run first.
        outputs = _forward(wrapper, lambda: [parameter.expand_as(parameter) for parameter in parameters])
        torch.autograd.backward(outputs, gradients)


def _forward(wrapper: DistributedDataParallel, function: Callable[[], Any]) -> Any:
    """DDP's forward around something else than its module.

    In the two halves that torch's own `replicate` calls too; an `nn.Module` put in the place of ``wrapper.module`` for
    a moment would do with the public half, and be seen by whoever saves a checkpoint meanwhile.
    """
    wrapper._pre_forward()
    return wrapper._post_forward(function())


@contextmanager
def _without_hooks(wrapper: DistributedDataParallel, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradient hooks of the user's (masks, factors) have run for every member; once more would be once too often."""
    own = {handle.id for handle in getattr(wrapper, "_accum_grad_hooks", ())}  # by which DDP's "python_reducer" reduces
    after: Any = [getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters]
    dictionaries: list[Any] = [hooks for hooks in (*(p._backward_hooks for p in parameters), *after) if hooks]
    kept = [dict(hooks) for hooks in dictionaries]
    try:
        for hooks in dictionaries:
            for key in hooks.keys() - own:
                del hooks[key]
        yield
    finally:
        for hooks, before in zip(dictionaries, kept, strict=True):
            hooks.clear()
            hooks.update(before)
