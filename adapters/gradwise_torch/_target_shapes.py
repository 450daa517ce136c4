"""Which shapes derivative targets may have: exact equality, never broadcasting."""

import math
from typing import Any

from gradwise._matching_data import accepted_text, hessian_shapes, jacobian_shapes, shape_text

__all__ = ["as_directional", "as_hessian", "as_jacobian", "as_norms", "as_tangents"]

Shape = tuple[int, ...]


def as_jacobian(name: str, array: Any, x_shape: Shape, n_outputs: int) -> Any:
    """`array` as (batch, n_outputs, n_inputs).

    Accepts exactly that, (batch, n_outputs, *shape of an input) and, for one output, the shape of x.
    """
    shapes = jacobian_shapes(x_shape, n_outputs)
    return _reshape(name, array, shapes[0], *shapes)


def as_directional(name: str, array: Any, batch: int, n_outputs: int, n_directions: int | None) -> Any:
    """`array` as (batch, n_outputs, n_directions).

    Accepts exactly that or, for tangents without an axis of directions (None), (batch, n_outputs) and, for one output,
    (batch,).
    """
    if n_directions is not None:
        full = (batch, n_outputs, n_directions)
        return _reshape(name, array, full, full)
    one = (batch,) if n_outputs == 1 else None
    return _reshape(name, array, (batch, n_outputs, 1), (batch, n_outputs), one)


def as_hessian(name: str, array: Any, x_shape: Shape, n_outputs: int, n_directions: int | None) -> Any:
    """`array` as (batch, n_outputs, n_directions * n_inputs); accepts the `hessian_shapes`."""
    shape = (x_shape[0], n_outputs, (n_directions or 1) * math.prod(x_shape[1:]))
    return _checked(name, array, hessian_shapes(x_shape, n_outputs, n_directions)).reshape(shape)


def as_norms(name: str, array: Any, batch: int, n_outputs: int) -> Any:
    """`array` as (batch, n_outputs, 1); accepts (batch, n_outputs) and, for one output, (batch,)."""
    return as_directional(name, array, batch, n_outputs, None)


def as_tangents(tangents: Any, x_shape: Shape) -> tuple[Any, int | None]:
    """`tangents` as (batch, n_directions, n_inputs), and the number of directions or None if it has no such axis."""
    batch, *inputs = x_shape
    many = tangents.ndim == len(x_shape) + 1
    n_directions = tangents.shape[1] if many else 1
    shape = (batch, n_directions, *inputs) if many else x_shape
    if tuple(tangents.shape) != shape:
        many_text = shape_text((batch, "n_directions", *inputs))
        msg = f"`tangents` must have shape {tuple(x_shape)} or {many_text}, like `x`; got {tuple(tangents.shape)}"
        raise ValueError(msg)
    return tangents.reshape(batch, n_directions, math.prod(inputs)), n_directions if many else None


def _reshape(name: str, array: Any, shape: Shape, *accepted: Shape | None) -> Any:
    if tuple(array.shape) == shape:
        return array
    return _checked(name, array, tuple(choice for choice in accepted if choice is not None)).reshape(shape)


def _checked(name: str, array: Any, choices: tuple[Shape, ...]) -> Any:
    if tuple(array.shape) not in choices:
        accepted = accepted_text(tuple(dict.fromkeys(choices)))
        msg = f"`{name}` must have shape {accepted}; got {shape_text(tuple(array.shape))}"
        raise ValueError(msg)
    return array
