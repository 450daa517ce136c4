"""Layers that couple the rows of a batch, and what else must change while derivatives are taken.

A derivative is taken for all rows at once, from the sum of the outputs over the batch. That is right only if no row
depends on another; batch normalisation with the statistics of the batch makes it 77 % wrong in a small test. With its
moving statistics it is right, and the derivative is that of the model which will be used in the end.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import keras

from gradwise_keras._backend import ops, patched

__all__ = [
    "coupled_layers",
    "kept_losses",
    "moving_statistics",
    "replayed",
    "state_before",
    "unchanged",
    "warn_once",
    "without_cudnn",
]


_warned: WeakSet[keras.Model] = WeakSet()

State = list[tuple[Any, Any]]


def coupled_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Layers of `model` that normalise with the statistics of the batch in training; frozen ones do not."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]


def state_before(model: keras.Model) -> State:
    """Copies of everything that a call may update: statistics, seeds."""
    return [(variable, ops.copy(variable.value)) for variable in model.non_trainable_variables]


def replayed(model: keras.Model, before: State, layers: list[keras.layers.Layer]) -> keras.StatelessScope:
    """Scope of a second pass: with the seeds of the first one and the statistics that it left, changing neither."""
    fresh = {id(variable) for layer in layers for variable in layer.non_trainable_variables}
    # Constants, because on JAX a statistic that was updated in this step is a function of the weights.
    state = [
        (variable, ops.stop_gradient(ops.copy(variable.value) if id(variable) in fresh else value))
        for variable, value in before
    ]
    return keras.StatelessScope([*_weights(model), *state])


def unchanged(model: keras.Model) -> keras.StatelessScope:
    """Scope of a pass that changes no state."""
    return keras.StatelessScope([*_weights(model), *state_before(model)])


@contextmanager
def moving_statistics(layers: list[keras.layers.Layer]) -> Iterator[None]:
    """Let `layers`, and no others, run as in inference."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(patched(layer, call=_inference(layer.call)))
        yield


@contextmanager
def kept_losses(model: keras.Model) -> Iterator[None]:
    """Keep what `add_loss` collected: a layer that is called again on its own forgets it."""
    kept = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in model._flatten_layers()]
    try:
        yield
    finally:
        for layer, losses, ids in kept:
            layer._losses[:] = losses
            layer._loss_ids.clear()
            layer._loss_ids.update(ids)


@contextmanager
def without_cudnn(model: keras.Model) -> Iterator[None]:
    """Let recurrent layers run without cuDNN, which has no second derivative."""
    with ExitStack() as stack:
        for layer in model._flatten_layers():
            if getattr(layer, "use_cudnn", False):
                stack.enter_context(patched(layer, use_cudnn=False))
        yield


def warn_once(model: keras.Model) -> None:
    """Say, once for a model, that its derivatives are taken with moving statistics."""
    if model in _warned:
        return
    _warned.add(model)
    warnings.warn(
        "`model` has batch normalisation in training mode, which makes each row's output depend on the other rows: its "
        "input derivatives are taken with the moving statistics instead, in a second forward pass; values and "
        "statistics are those of plain training. Freeze these layers (`layer.trainable = False`), or use "
        "GroupNormalization or LayerNormalization, to do without",
        UserWarning,
        stacklevel=3,
    )


def _weights(model: keras.Model) -> State:
    # A scope does not look into the scope around it: what that one holds must be handed on.
    return [(variable, variable.value) for variable in model.trainable_variables]


def _inference(call: Callable[..., Any]) -> Callable[..., Any]:
    def in_inference(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **{**kwargs, "training": False})

    return in_inference
