"""Training data of the MLP regressor: checked, standardised by the chain rule, and scaled for the derivative loss."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwise._matching_data import accepted_text, jacobian_shapes
from gradwise._matching_scale import MatchingScale, matching_scale, positive_or_one
from gradwise._scaling import DerivativeScaler

__all__ = ["Derivatives", "TrainingData", "as_targets", "prepare", "rows_first"]

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


class Derivatives(NamedTuple):
    """Known derivatives, in units of y per unit of x or standardised."""

    x: Floats
    """Where: shape (rows, n_inputs)."""
    target: Floats
    """Shape (rows, n_outputs, n_inputs), 0 where unknown."""
    known: Booleans
    """Which entries of `target` count."""
    weight: Floats
    """Of each row, shape (rows,)."""


class TrainingData(NamedTuple):
    """Standardised data of one fit."""

    x: Floats
    y: Floats
    weight: Floats
    """Of each row of x and y, with mean 1."""
    total_weight: float
    """Sum of the user's weights; the number of rows without them."""
    derivatives: Derivatives | None
    shared: bool
    """Whether the derivatives are those at the rows of x."""
    scale: Floats | None
    """Of the derivative loss, shape (n_outputs, n_inputs), in standardised units."""
    threshold: Floats | None


def rows_first(layout: str, X: Any, y: Any, dydx: Any, mask: Any, X_dydx: Any) -> tuple[Any, ...]:
    """Bring arrays with samples last (layout "jenn") to samples first; others are returned as they are."""
    if layout != "jenn":
        return X, y, dydx, mask, X_dydx
    moved: list[Any] = []
    for name, value, ndim in (("X", X, 2), ("y", y, 2), ("dydx", dydx, 3), ("mask", mask, 3), ("X_dydx", X_dydx, 2)):
        if value is not None and np.ndim(value) != ndim:
            axes = "(n_inputs, n)" if name[0] == "X" else "(n_outputs, n)" if ndim == 2 else "(n_outputs, n_inputs, n)"
            msg = f'`{name}` must have shape {axes} in layout "jenn"; got {np.shape(value)}'
            raise ValueError(msg)
        moved.append(None if value is None else np.ascontiguousarray(np.moveaxis(np.asarray(value), -1, 0)))
    return tuple(moved)


def as_targets(
    dydx: Any, mask: Any, X: Floats, weight: Floats | None, n_outputs: int, *, name: str
) -> Derivatives | None:
    """Check derivatives and bring them to the core's shape; None if none is known.

    Parameters
    ----------
    dydx, mask : array-like
        In one of the `jacobian_shapes`; NaN and False mean unknown.
    X : array of shape (rows, n_inputs)
        Where they were taken.
    weight : array of shape (rows,), optional
        Weights of the rows; rows of weight 0 know nothing.
    n_outputs : int
    name : str
        What an error of shape calls `X`.

    Raises
    ------
    ValueError
        If a shape is not exact or a value is infinite.
    TypeError
        If `mask` is not boolean.
    """
    shapes = jacobian_shapes(X.shape, n_outputs)
    target = np.asarray(dydx, dtype=np.float64)
    if target.shape not in shapes:
        msg = f"`dydx` must have shape {accepted_text(shapes)} to go with `{name}`; got {target.shape}"
        raise ValueError(msg)
    known = ~np.isnan(target)
    if not np.all(np.isfinite(target) | ~known):
        msg = "`dydx` must be finite or NaN, which means unknown; got an infinite value"
        raise ValueError(msg)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != target.shape:
            msg = f"`mask` must have the shape of `dydx`, {target.shape}; got {mask.shape}"
            raise ValueError(msg)
        if mask.dtype != np.bool_:
            msg = f"`mask` must be boolean; got {mask.dtype}. Pass `mask != 0`"
            raise TypeError(msg)
        known &= mask
    known = known.reshape(shapes[0])
    weight = np.ones(len(X)) if weight is None else weight
    known &= (weight > 0)[:, None, None]
    if not known.any():
        return None
    return Derivatives(X, np.where(known, target.reshape(shapes[0]), 0.0), known, weight)


def prepare(
    X: Floats,
    y: Floats,
    weight: Floats | None,
    derivatives: Derivatives | None,
    *,
    scale: str,
    shared: bool,
    scaler: DerivativeScaler | None = None,
) -> tuple[TrainingData, DerivativeScaler]:
    """Standardise, and find the scales of the derivative loss.

    Statistics are weighted, so that a weight of 2 is a sample given twice. Those of x are taken over all rows used,
    those of y over the values; an output with one value only is scaled by its derivatives, to first order in x.

    Parameters
    ----------
    X : array of shape (n, n_inputs)
    y : array of shape (n, n_outputs)
    weight : array of shape (n,), optional
    derivatives : Derivatives, optional
    scale : {"block", "per_input", "none"}
    shared : bool
        Whether `derivatives.x` is `X`.
    scaler : DerivativeScaler, optional
        A fitted one, whose units are kept.
    """
    weights = np.ones(len(X)) if weight is None else weight
    positions, position_weights = X, weights
    if derivatives is not None and not shared:
        positions = np.concatenate([X, derivatives.x])
        position_weights = np.concatenate([weights, derivatives.weight])
    x_mean, sigma_x = _moments(positions, position_weights)
    y_mean, sigma_y = _moments(y, weights)
    target = None if derivatives is None else _weighted(derivatives, scale)
    if scaler is None:
        scaler = DerivativeScaler().fit(X, y)
        scaler.x_mean_, scaler.y_mean_ = x_mean, y_mean
        scaler.x_scale_, scaler.y_scale_ = positive_or_one(sigma_x, np), positive_or_one(sigma_y, np)
        if target is not None and not np.all(sigma_y > 0):
            # Two rows of -1 and 1 have deviation 1: that is how `matching_scale` is told of deviations.
            first_order = matching_scale(np.outer([-1.0, 1.0], sigma_x), None, target, scale="block", xp=np).threshold
            scaler.y_scale_ = np.where(sigma_y > 0, sigma_y, first_order * X.shape[1] ** 0.5)
    scales = None
    if derivatives is not None and target is not None:
        chain = scaler.x_scale_ / scaler.y_scale_[:, None]
        unit_x, unit_y = (
            np.outer([-1.0, 1.0], part) for part in (sigma_x / scaler.x_scale_, sigma_y / scaler.y_scale_)
        )
        scales = matching_scale(unit_x, unit_y, target * chain, scale=scale, xp=np)
        if scale == "none":  # raw derivatives, relative to the deviation of y
            scales = MatchingScale(np.ones_like(chain) / scaler.x_scale_, scales.threshold / scaler.y_scale_)
        derivatives = derivatives._replace(
            x=(derivatives.x - scaler.x_mean_) / scaler.x_scale_, target=derivatives.target * chain
        )
    data = TrainingData(
        x=(X - scaler.x_mean_) / scaler.x_scale_,
        y=(y - scaler.y_mean_) / scaler.y_scale_,
        weight=weights / weights.mean(),
        total_weight=float(weights.sum()),
        derivatives=derivatives,
        shared=shared,
        scale=None if scales is None else scales.scale,
        threshold=None if scales is None else scales.threshold,
    )
    return data, scaler


def _moments(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weighted mean and standard deviation of each column; a constant column has exactly 0."""
    shifted = values - values[np.argmax(weights > 0)]
    mean = np.average(shifted, axis=0, weights=weights)
    deviation = np.sqrt(np.average(np.square(shifted - mean), axis=0, weights=weights))
    return values[np.argmax(weights > 0)] + mean, deviation


def _weighted(derivatives: Derivatives, scale: str) -> Floats:
    """Targets whose plain mean squares are the weighted ones, NaN where unknown."""
    over = (0,) if scale == "per_input" else (0, 2)
    count = derivatives.known.sum(axis=over, keepdims=True)
    weight = (derivatives.known * derivatives.weight[:, None, None]).sum(axis=over, keepdims=True)
    factor = np.sqrt(derivatives.weight[:, None, None] * count / np.where(weight > 0, weight, 1.0))
    return np.where(derivatives.known, derivatives.target * factor, np.nan)
