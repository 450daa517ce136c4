"""Closures that a trainer hands to every optimizer, whether or not the user's loop has one."""

from functools import partial
from typing import Any

__all__ = ["is_loop_body"]


def is_loop_body(closure: Any) -> bool:
    """Whether `closure` is the body of an unchanged loop: Lightning's, and not one the user wrote.

    Lightning's precision plugins wrap what they hand on: ``partial(plugin._wrap_closure, module, optimizer, closure)``.
    In automatic optimization that closure is the Trainer's own, which runs `training_step` and backward; in manual
    optimization it is the user's or, for ``optimizer.step()`` without one, a function that does nothing. Under a
    GradScaler there is none, so that only this reading makes training the same in all precisions.
    """
    if not (isinstance(closure, partial) and _from_lightning(type(getattr(closure.func, "__self__", None)))):
        return False
    module, body = closure.args[0], closure.args[-1]
    return bool(getattr(module, "automatic_optimization", False)) or _from_lightning(body)


def _from_lightning(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith(("lightning.", "pytorch_lightning."))
