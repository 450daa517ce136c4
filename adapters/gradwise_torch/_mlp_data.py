"""Training data of the MLP regressor: checked, standardised by the chain rule, and scaled for the derivative loss."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwise._matching_data import accepted_text, jacobian_shapes
from gradwise._matching_scale import matching_scale
from gradwise._scaling import DerivativeScaler

__all__ = ["Derivatives", "TrainingData", "as_targets", "prepare"]

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


def as_targets(
    dydx: Any, mask: Any, X: Floats, weight: Floats | None, n_outputs: int, *, per_sample: bool
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
    per_sample : bool
        Whether shape errors speak of `X` (else of `X_dydx`).

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
        where = "X" if per_sample else "X_dydx"
        msg = f"`dydx` must have shape {accepted_text(shapes)} to go with `{where}`; got {target.shape}"
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
    X: Floats, y: Floats, weight: Floats | None, derivatives: Derivatives | None, *, scale: str, shared: bool
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
    """
    weights = np.ones(len(X)) if weight is None else weight
    positions, position_weights = X, weights
    if derivatives is not None and not shared:
        positions = np.concatenate([X, derivatives.x])
        position_weights = np.concatenate([weights, derivatives.weight])
    scaler = DerivativeScaler().fit(X, y)
    scaler.x_mean_, sigma_x = _moments(positions, position_weights)
    scaler.y_mean_, sigma_y = _moments(y, weights)
    scaler.x_scale_ = np.where(sigma_x > 0, sigma_x, 1.0)
    # Two rows of -1 and 1 have deviation 1: what standardised inputs and outputs have, unless they are constant.
    unit_x, unit_y = (np.outer([-1.0, 1.0], sigma > 0) for sigma in (sigma_x, sigma_y))
    scaler.y_scale_ = np.where(sigma_y > 0, sigma_y, 1.0)
    scales = None
    if derivatives is not None:
        target = _weighted(derivatives, scale)
        constant = ~(sigma_y > 0)
        if constant.any():
            first_order = matching_scale(unit_x * scaler.x_scale_, None, target, scale="block", xp=np).threshold
            scaler.y_scale_ = np.where(constant, first_order * X.shape[1] ** 0.5, scaler.y_scale_)
        chain = scaler.x_scale_ / scaler.y_scale_[:, None]
        scales = matching_scale(unit_x, unit_y, target * chain, scale=scale, xp=np)
        if scale == "none":  # raw derivatives in the user's units, relative to the variance of y
            scales = scales._replace(scale=scales.scale / chain / scaler.y_scale_[:, None])
            scales = scales._replace(threshold=scales.threshold / scaler.y_scale_)
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
