"""Training data of a regression on values and derivatives: what is known, how much it counts, in which units."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwise._matching_data import accepted_text, jacobian_shapes
from gradwise._matching_scale import matching_scale

Array = NDArray[np.float64]

# Floats in the largest temporary array: 32 MiB.
_BLOCK = 2**22


@dataclass(frozen=True)
class Samples:
    """Values and derivatives at the same points.

    Attributes
    ----------
    X : array of shape (n, n_inputs)
    y : array of shape (n, n_outputs)
    weight : array of shape (n,)
        Positive weights.
    dydx : array of shape (n, n_outputs, n_inputs) or None
        In units of y per unit of x; NaN means unknown.
    mask : boolean array of the same shape or None
        False means unknown.
    kept : array of shape (n,) or None
        Which of the user's rows these are; None is all.
    """

    X: Array
    y: Array
    weight: Array
    dydx: Array | None = None
    mask: NDArray[np.bool_] | None = None
    kept: NDArray[np.intp] | None = None

    def take(self, rows: Any) -> "Samples":
        """Some of the samples."""
        return Samples(
            self.X[rows],
            self.y[rows],
            self.weight[rows],
            None if self.dydx is None else self.dydx[rows],
            None if self.mask is None else self.mask[rows],
            np.arange(len(self.X))[rows] if self.kept is None else self.kept[rows],
        )

    def derivatives(self, rows: slice) -> tuple[Array, NDArray[np.bool_]]:
        """Known derivatives of some samples, 0 where unknown, and which are known."""
        assert self.dydx is not None
        part = self.dydx[rows]
        known = ~np.isnan(part)
        if self.mask is not None:
            known &= self.mask[rows]
        return np.where(known, part, 0.0), known


def training_samples(
    X: Array, y: Array, dydx: ArrayLike | None, *, mask: ArrayLike | None, sample_weight: Array | None
) -> Samples:
    """Check derivatives against checked `X` and `y`, and leave samples of weight zero away.

    Raises
    ------
    ValueError
        If a shape is wrong (one that merely broadcasts is), a derivative is infinite, or a weight is negative.
    TypeError
        If `mask` is not boolean, or there is a mask and nothing to mask.
    """
    values = y.reshape(len(X), -1)
    shapes = jacobian_shapes(X.shape, values.shape[1])
    derivatives = known = None
    if dydx is not None:
        derivatives = np.asarray(dydx, dtype=np.float64)
        if derivatives.shape not in shapes:
            msg = f"`dydx` must have shape {accepted_text(shapes)}; got {derivatives.shape}"
            raise ValueError(msg)
        if np.isinf(derivatives).any():
            msg = "`dydx` must be finite or NaN (unknown); got infinity"
            raise ValueError(msg)
        derivatives = derivatives.reshape(shapes[0])
    if mask is not None:
        known = np.asarray(mask)
        if known.dtype != np.bool_ or dydx is None:
            reason = "there is no `dydx`" if dydx is None else f"{known.dtype}. Pass `mask != 0`"
            msg = f"`mask` must be boolean and say which entries of `dydx` are known; got {reason}"
            raise TypeError(msg)
        if known.shape not in shapes:
            msg = f"`mask` must have shape {accepted_text(shapes)}; got {known.shape}"
            raise ValueError(msg)
        known = known.reshape(shapes[0])
    weight = np.ones(len(X)) if sample_weight is None else sample_weight
    if (weight < 0).any() or not (weight > 0).any():
        msg = "`sample_weight` must not be negative, and not all zero"
        raise ValueError(msg)
    samples = Samples(X, values, weight, derivatives, known)
    return samples if (weight > 0).all() else samples.take(weight > 0)


def estimated(samples: Samples, estimate: Callable[[Array, Array], ArrayLike], y_shape: tuple[int, ...]) -> Samples:
    """`samples` with the derivatives that `estimate` makes of their own inputs and values, and of no others."""
    found = estimate(samples.X, samples.y.reshape(-1, *y_shape))
    with_estimates = training_samples(samples.X, samples.y, found, mask=None, sample_weight=samples.weight)
    return replace(with_estimates, kept=samples.kept)


def blocks(n: int, floats_per_row: int) -> Iterator[slice]:
    """Slices of n rows, so that an array with so many floats in each row has at most some megabytes."""
    size = max(1, _BLOCK // max(floats_per_row, 1))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def weighted_mean(columns: Array, weight: Array) -> Array:
    """Mean of each column, exactly the constant of a constant one."""
    # Shifted by the first row, so that a constant column becomes exactly zero when its mean is taken away.
    shift = np.zeros(columns.shape[1])
    for rows in blocks(len(columns), columns.shape[1]):
        shift += weight[rows] @ (columns[rows] - columns[0])
    return columns[0] + shift / weight.sum()


def derivative_scale(samples: Samples) -> Array:
    """Scale of `gradwise.GradientMatching` ("block"), of the weighted samples, shape (n_outputs, n_inputs).

    An input that is constant in the samples (scale 0 there: no step along it ever happens) gets a scale here wherever
    its derivative is known, as a user who hands in that derivative expects the coefficient to follow: times its
    derivatives the scale then has the root mean square ``sigma_y / sqrt(n_inputs)``, an average share of the variance
    of y; 1 if those derivatives are zero.
    """
    sigma_x, sigma_y = _deviations(samples.X, samples.weight), _deviations(samples.y, samples.weight)
    n_outputs, n_inputs = samples.y.shape[1], samples.X.shape[1]
    squares, count = np.zeros((2, n_outputs, n_inputs))
    for rows in blocks(len(samples.X), n_outputs * n_inputs):
        target, known = samples.derivatives(rows)
        squares += np.tensordot(samples.weight[rows], np.square(target), 1)
        count += np.tensordot(samples.weight[rows], known, 1)
    # The formula lives in `matching_scale`, which knows no sample weights; it takes these pseudo-samples with the same
    # standard deviations and the same weighted mean square of all known derivatives of an output.
    total = count.sum(axis=1, keepdims=True)
    typical = np.sqrt(n_inputs * squares / np.where(total > 0, total, 1.0))
    result = matching_scale(np.stack([-sigma_x, sigma_x]), np.stack([-sigma_y, sigma_y]), typical[None], xp=np)
    constant = (sigma_x == 0) & (count > 0) & bool(sigma_x.any())
    rms = np.sqrt(squares / np.where(count > 0, count, 1.0))
    own = np.where(rms > 0, result.threshold[:, None] / np.where(rms > 0, rms, 1.0), 1.0)
    return np.where(constant, own, result.scale)


def _deviations(columns: Array, weight: Array) -> Array:
    mean, variance = weighted_mean(columns, weight), np.zeros(columns.shape[1])
    for rows in blocks(len(columns), columns.shape[1]):
        variance += weight[rows] @ np.square(columns[rows] - mean)
    return np.sqrt(variance / weight.sum())
