"""Values of a Keras model and rows of its Jacobian with respect to the inputs, exact and trainable."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import keras

from gradwise_keras._backend import ops
from gradwise_keras._batch_coupling import (
    coupled_layers,
    kept_losses,
    moving_statistics,
    replayed,
    state_before,
    unchanged,
    warn_once,
    without_cudnn,
)
from gradwise_keras._vjp import Pullback, call_with_pullback, random_streams

__all__ = ["Linearization", "count_outputs", "linearize"]

Tensor = Any

_checked: WeakSet[keras.Model] = WeakSet()


class Linearization(NamedTuple):
    """A model at one batch, ready for products with its Jacobian."""

    x: Tensor
    values: Tensor
    """What the model returned, shape (batch,) or (batch, n_outputs)."""
    outputs: Tensor
    """What is differentiated: `values`, unless derivatives needed a second pass."""
    pull_back: Callable[[Tensor], Tensor | None]
    n_outputs: int
    losses: list[Tensor]
    """What `add_loss` collected and is not with its layer, see `Pullback`."""

    def rows(self, chosen: Tensor | None = None) -> Tensor:
        """Rows of each sample's Jacobian, float32 or wider, shape (batch, n_rows, *shape of an input).

        Parameters
        ----------
        chosen : integer Tensor of shape (batch, n_rows), optional
            Which outputs, for each sample; all by default.
        """
        n_rows = self.n_outputs if chosen is None else chosen.shape[1]
        # A plain loop: on CPU it beats vectorised maps, and it needs nothing from the model's operations.
        return ops.stack([self._row(k, chosen) for k in range(n_rows)], axis=1)

    def _row(self, k: int, chosen: Tensor | None) -> Tensor:
        outputs = self.outputs
        if self.n_outputs == 1:
            cotangents = ops.ones_like(outputs)
        elif chosen is None:
            cotangents = ops.zeros_like(outputs) + ops.one_hot(k, self.n_outputs, dtype=outputs.dtype)
        else:
            cotangents = ops.one_hot(chosen[:, k], self.n_outputs, dtype=outputs.dtype)
        product = self.pull_back(cotangents)
        if product is None:
            msg = (
                "the outputs of `model` must depend on its inputs `x`. Received: a model whose outputs do not (check "
                "for stop_gradient, rounding or argmax inside it)"
            )
            raise ValueError(msg)
        return ops.cast(product, self.x.dtype)


def linearize(
    model: keras.Model,
    x: Tensor,
    *,
    training: bool,
    call: Callable[[Tensor], Tensor] | None = None,
    commit: bool = True,
) -> Linearization:
    """Run `model` once and keep what its derivatives need.

    Batch normalisation in training mode takes a second pass, with moving statistics and the same dropout masks.

    Parameters
    ----------
    model : keras.Model
        Treats the rows of a batch independently.
    x : Tensor of shape (batch, ...)
        Floating-point inputs.
    training : bool
    call : callable, optional
        What to run in place of ``model(x)``.
    commit : bool
        Whether updates of state and `add_loss` count, as in one plain call. If not, only derivatives are wanted.
    """
    x = check_input(x)
    run = call or (lambda x: model(x, training=training) if model._call_has_training_arg else model(x))
    layers = coupled_layers(model) if training else []
    check = model not in _checked
    two_passes = bool(layers) or not commit
    streams = random_streams(x) if two_passes else None
    with without_cudnn(model):
        if layers:
            warn_once(model)
            before = state_before(model)
            values = check_output(run(x), x) if commit else None
            after = streams and random_streams(x)
            if streams:
                streams.rewind()
            with kept_losses(model), replayed(model, before, layers), moving_statistics(layers):
                pullback = call_with_pullback(run, x, model, collect_losses=False, check=check)
            pullback, streams = Pullback(pullback.outputs, pullback.pull_back, []), after
        elif commit:
            pullback, values = call_with_pullback(run, x, model, collect_losses=True, check=check), None
        else:
            with kept_losses(model), unchanged(model):
                pullback, values = call_with_pullback(run, x, model, collect_losses=False, check=check), None
    if streams:  # where one pass leaves them, or none
        streams.rewind()
    outputs = check_output(pullback.outputs, x)
    _checked.add(model)
    return Linearization(
        x, outputs if values is None else values, outputs, pullback.pull_back, count_outputs(outputs), pullback.losses
    )


def count_outputs(values: Tensor) -> int:
    """Number of outputs of a row, for values of shape (batch,) or (batch, n_outputs)."""
    return math.prod(values.shape[1:])


def check_input(x: Any) -> Tensor:
    """`x` as a tensor of float32 at least, or ValueError."""
    if isinstance(x, (dict, list, tuple)):
        msg = (
            "`x` must be one tensor: derivatives with respect to several inputs are not supported. Received: "
            f"x of type {type(x).__name__}. Concatenate the inputs, and split them inside the model"
        )
        raise ValueError(msg)
    x = ops.convert_to_tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if "float" not in dtype:
        msg = f"`x` must be floating-point to have derivatives. Received: x of dtype {dtype}"
        raise ValueError(msg)
    return ops.cast(x, "float32") if dtype in {"float16", "bfloat16"} else x


def check_output(y: Any, x: Tensor) -> Tensor:
    """`y`, or ValueError unless it has shape (batch,) or (batch, n_outputs)."""
    if isinstance(y, (dict, list, tuple)):
        msg = f"`model` must return one tensor. Received: a model that returns a {type(y).__name__}"
        raise ValueError(msg)
    rows = {y.shape[0], x.shape[0]} - {None} if len(y.shape) else set()
    if len(y.shape) not in {1, 2} or len(rows) > 1 or None in y.shape[1:]:
        msg = (
            "`model` must return values of shape (batch,) or (batch, n_outputs). Received: a model that returns shape "
            f"{tuple(y.shape)} for x of shape {tuple(x.shape)}"
        )
        raise ValueError(msg)
    return y
