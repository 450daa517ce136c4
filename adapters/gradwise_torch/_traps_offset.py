"""Whether anything fixes the offset of a model that is trained by its derivatives, which do not depend on it.

The loss of the derivatives cannot see the other terms of the user's loss. What it can see is that the parameters which
it gives no gradient (the last bias) stay without one, backward pass after backward pass, and do not move while others
do. Nothing is attached to the user's parameters for that: the hook sits on our own loss.
"""

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from gradwise_torch._traps import warn_user

if TYPE_CHECKING:
    from gradwise_torch._derivative_loss import DerivativeLoss

__all__ = ["still_watching", "watch_offset"]

_STEPS = 3  # optimizer steps without any change of the offset
_CALLS = 30  # after which nobody looks any more: there is no optimizer, or nothing is known of it


class _Watch:
    """The parameters that the loss leaves alone, as they were, and one that it trains."""

    def __init__(self, free: list[nn.Parameter], trained: Tensor) -> None:
        # Weak references: a loss must not keep a model alive.
        self.free = [(ref(parameter), parameter.detach().clone()) for parameter in free]
        self.trained = ref(trained)
        self.before = trained.detach().clone()
        self.calls = self.steps = self.alone = 0
        self.fixed = False

    def undecided(self) -> bool:
        """Whether to look again, at the beginning of a training call; warns once."""
        self.calls += 1
        trained = self.trained()
        free = [(parameter(), before) for parameter, before in self.free]
        if trained is None or self.fixed or self.calls > _CALLS:
            return False
        if any(parameter is None or not torch.equal(parameter.detach(), before) for parameter, before in free):
            return False
        if not torch.equal(trained.detach(), self.before):
            self.steps += 1
            self.before = trained.detach().clone()
        if self.steps < _STEPS or self.alone < _STEPS:
            return True
        warn_user(
            "the offset of the model is free: after several steps nothing has trained the "
            f"{len(free)} parameter(s) that the derivative loss cannot (the last bias), so that values are right up to "
            "a constant only. Add a loss of the values: `y, derivative_loss = matching.with_values(model, x, ...)`"
        )
        return False

    def look(self, loss: Tensor) -> None:
        """Look at the end of the backward passes of `loss` whether something else gave the offset a gradient."""
        loss.register_hook(self._in_backward)

    def _in_backward(self, _: Tensor) -> None:
        # What DistributedDataParallel does too: terms of one sum are differentiated in one pass, in no fixed order.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        parameters = [parameter() for parameter, _ in self.free]
        if any(parameter is not None and parameter.grad is not None for parameter in parameters):
            self.fixed = True
        else:
            self.alone += 1


# Not an attribute of the loss, which people copy, pickle and save.
_watches: "WeakKeyDictionary[DerivativeLoss, _Watch]" = WeakKeyDictionary()


def watch_offset(owner: "DerivativeLoss", loss: Tensor, trained: list[Tensor], free: list[nn.Parameter]) -> bool:
    """Begin, in the first training call of `owner`; False if there is nothing to watch."""
    if not free:
        return False
    # A small one, to compare; preferably no bias, which behind a ReLU gets a gradient of zeros.
    watch = _Watch(free, min(trained, key=lambda leaf: (leaf.ndim < 2, leaf.numel())))
    watch.look(loss)
    _watches[owner] = watch
    return True


def still_watching(owner: "DerivativeLoss", loss: Tensor) -> bool:
    """Go on in a later training call; False once it is decided, after which nothing of it is left."""
    watch = _watches.get(owner)
    if watch is not None and watch.undecided():
        watch.look(loss)
        return True
    _watches.pop(owner, None)
    return False
