"""Which shapes derivative targets and their weights may have: exact equality, never broadcasting.

Keras broadcasts silently: targets of shape (batch, 1, n) against predictions of shape (batch, n) would be compared row
by row with every row. Sizes may be None in a TensorFlow graph; those are left to a reshape, which fails when it runs.
"""

from typing import Any

from gradwise._matching_data import accepted_text, jacobian_shapes, shape_text
from gradwise_keras._backend import ops

__all__ = ["as_jacobian", "as_weight"]

Tensor = Any
Shape = tuple[Any, ...]


def as_jacobian(name: str, array: Tensor, x_shape: Shape, like: Tensor) -> Tensor:
    """`array` with the shape of `like`, (batch, n_outputs, n_inputs).

    Accepts exactly that, (batch, n_outputs, *shape of an input) and, for one output, `x_shape`.
    """
    accepted = jacobian_shapes(x_shape, like.shape[1])
    if not any(_equal(array.shape, shape) for shape in accepted):
        msg = f"`{name}` must have shape {accepted_text(accepted)}. Received: {name} of {_text(array)}"
        raise ValueError(msg)
    return ops.reshape(array, ops.shape(like))


def as_weight(weight: Tensor, target: Tensor, x_shape: Shape, like: Tensor) -> Tensor:
    """`weight` with shape (batch,), or the shape of `like` where it weighs entries; NaN where it is negative.

    Accepts (batch,), (batch, 1) and the shape of `target` as the user gave it.
    """
    # In a traced step nobody can look at values: a NaN at least makes the loss NaN, and cannot be overlooked.
    weight = ops.where(weight >= 0, weight, ops.zeros_like(weight) + float("nan"))
    batch = like.shape[0]
    if _equal(weight.shape, (batch,)) or _equal(weight.shape, (batch, 1)):
        return ops.reshape(weight, ops.shape(like)[:1])
    if not _equal(weight.shape, target.shape):
        shapes = accepted_text(((batch,), (batch, 1), tuple(target.shape)))
        msg = (
            f"`sample_weight` must have shape {shapes}, to weigh samples or entries of `y_true`. Received: "
            f"sample_weight of {_text(weight)}"
        )
        raise ValueError(msg)
    return as_jacobian("sample_weight", weight, x_shape, like)


def _equal(shape: Shape, other: Shape) -> bool:
    return len(shape) == len(other) and all(a is None or b is None or a == b for a, b in zip(shape, other, strict=True))


def _text(array: Tensor) -> str:
    return f"shape {shape_text(tuple(array.shape))}"
