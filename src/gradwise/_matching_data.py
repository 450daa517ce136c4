"""Training data of the gradient-matching loss: which shapes belong together, and the scale that follows from them."""

import math
from typing import Any

import numpy as np

from gradwise._matching_scale import MatchingScale, matching_scale, second_order_scale

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]


def jacobian_shapes(x_shape: Shape, n_outputs: int) -> tuple[Shape, ...]:
    """Shapes that derivatives of `n_outputs` outputs may have, for inputs of shape (batch, ...).

    First (batch, n_outputs, n_inputs), in which the core computes; then (batch, n_outputs, *shape of an input) and, for
    one output, the shape of x.
    """
    batch, *inputs = x_shape
    shapes: list[Shape] = [(batch, n_outputs, math.prod(inputs)), (batch, n_outputs, *inputs)]
    if n_outputs == 1:
        shapes.append((batch, *inputs))
    return tuple(dict.fromkeys(shapes))


def hessian_shapes(x_shape: Shape, n_outputs: int, n_directions: int | None) -> tuple[Shape, ...]:
    """Shapes that Hessian-vector products may have, for inputs of shape (batch, ...) and so many directions.

    First (batch, n_outputs, n_directions, n_inputs), in which the core computes, unless the directions have no axis
    (None): then they are gradients of another kind. Then (batch, n_outputs, n_directions, *shape of an input) and, for
    one output, (batch, n_directions, *shape of an input).
    """
    if n_directions is None:
        return jacobian_shapes(x_shape, n_outputs)
    batch, *inputs = x_shape
    shapes: list[Shape] = [(batch, n_outputs, n_directions, *row) for row in ((math.prod(inputs),), tuple(inputs))]
    if n_outputs == 1:
        shapes.append((batch, n_directions, *inputs))
    return tuple(dict.fromkeys(shapes))


def shape_text(shape: tuple[Any, ...]) -> str:
    """`shape` as Python writes a tuple, with names for unknown sizes left without quotes."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def accepted_text(shapes: tuple[Shape, ...]) -> str:
    """`shapes` for an error message."""
    return " or ".join(map(shape_text, shapes))


def check_training_data(X: Array, y: Array | None, derivatives: Array, name: str = "dydx") -> None:
    """Raise ValueError unless the arrays have the same rows and finite values; NaN may stand in `derivatives`."""
    for label, array in (("X", X), ("y", y), (name, derivatives)):
        if array is not None and array.shape[:1] != (len(X),):
            msg = f"`{label}` must have one row for each of the {len(X)} rows of `X`; got shape {array.shape}"
            raise ValueError(msg)
        if array is not None and not np.all(np.isfinite(array) | (np.isnan(array) & (label == name))):
            msg = f"`{label}` must be finite{' or NaN (unknown)' if label == name else ''}; got a value that is not"
            raise ValueError(msg)


def scale_from_data(X: Array, y: Array | None, dydx: Array, *, mask: Array | None, scale: str) -> MatchingScale:
    """Scale and Huber threshold from numpy training data, in any of the shapes that users may pass.

    Parameters
    ----------
    X : array of shape (n, ...)
        Inputs.
    y : array of shape (n,) or (n, ...), optional
        Values; see `matching_scale`.
    dydx : array of one of the `jacobian_shapes`
        Derivatives, in units of y per unit of X; NaN means unknown. Without `y`, the shape of X means one output.
    mask : boolean array of the shape of `dydx`, optional
        False means unknown.
    scale : {"block", "per_input", "none"}

    Raises
    ------
    ValueError
        If shapes do not belong together or values are not finite.
    """
    check_training_data(X, y, dydx)
    values = None if y is None else y.reshape(len(y), -1)
    if values is not None:
        n_outputs = int(values.shape[1])
    else:
        n_outputs = 1 if dydx.ndim == 1 or dydx.shape == X.shape else dydx.shape[1]
    shapes = jacobian_shapes(X.shape, n_outputs)
    for name, array in (("dydx", dydx), ("mask", mask)):
        if array is not None and array.shape not in shapes:
            msg = f"`{name}` must have shape {accepted_text(shapes)}; got {array.shape}"
            raise ValueError(msg)
    known = None if mask is None else mask.reshape(shapes[0])
    return matching_scale(X.reshape(len(X), -1), values, dydx.reshape(shapes[0]), mask=known, scale=scale, xp=np)


def second_order_scale_from_data(
    X: Array, y: Array | None, target_hvp: Array, *, mask: Array | None, scale: str
) -> MatchingScale:
    """As `scale_from_data`, for Hessian-vector products of one of the `hessian_shapes`.

    Without `y`, the shape of X means one output; otherwise the second axis is that of the outputs.
    """
    check_training_data(X, y, target_hvp, "target_hvp")
    values = None if y is None else y.reshape(len(y), -1)
    one = target_hvp.ndim == 1 or target_hvp.shape == X.shape
    n_outputs = int(values.shape[1]) if values is not None else 1 if one else int(target_hvp.shape[1])
    n_inputs = math.prod(X.shape[1:])
    n_directions = math.prod(target_hvp.shape[1:]) // max(n_outputs * n_inputs, 1)
    shapes = tuple(
        dict.fromkeys((*hessian_shapes(X.shape, n_outputs, None), *hessian_shapes(X.shape, n_outputs, n_directions)))
    )
    for name, array in (("target_hvp", target_hvp), ("mask", mask)):
        if array is not None and array.shape not in shapes:
            msg = f"`{name}` must have shape {accepted_text(shapes)}; got {array.shape}"
            raise ValueError(msg)
    full = (len(X), n_outputs, n_directions, n_inputs)
    known = None if mask is None else mask.reshape(full)
    return second_order_scale(X.reshape(len(X), -1), values, target_hvp.reshape(full), mask=known, scale=scale, xp=np)
