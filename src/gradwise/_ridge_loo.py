"""Predictions of each sample by the fit without it, in closed form: a sample is its value and all its derivatives."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gradwise._basis import derivatives, features
from gradwise._ridge_data import Array, Samples, blocks
from gradwise._ridge_equations import Equations

# A sample with 1 - leverage below this decides its own prediction: without it the fit is not determined.
_LEAST = 1e-11


def leave_one_out(
    samples: Samples,
    basis: Any,
    scale: Array | None,
    system: Equations,
    *,
    alphas: Sequence[float],
    derivative_weight: float,
    fit_intercept: bool,
) -> Array:
    """Predicted values of left-out samples, shape (n_alphas, n, n_outputs).

    With the rows ``A_i`` of sample i (its value and its known derivatives, each times the root of its weight), the
    residuals ``e_i = c_i - A_i w`` of the fit to all samples and ``H_i = A_i (A.T A + alpha)**-1 A_i.T``, the residuals
    of the fit without sample i are ``(1 - H_i)**-1 e_i``: exact for least squares, by the Woodbury identity. The first
    of them is that of the value. Centre and level are refitted (the intercept adds ``weight_i / sum(weight)`` to the
    leverage of the value); basis and scale are not.

    NaN where the other samples do not determine the fit. Per derivative weight O((n (1 + d) + p) p**2) operations, for
    each alpha O(n (1 + d)**2 p) more.
    """
    n, n_outputs = samples.y.shape
    result = np.empty((len(alphas), n, n_outputs))
    root_alphas = np.asarray(alphas, dtype=np.float64)[:, None]
    for o in range(n_outputs):
        matrix, targets = system.stacked(o, derivative_weight)
        left, spread, right = np.linalg.svd(matrix, full_matrices=False)
        kept = spread > np.finfo(np.float64).eps * max(matrix.shape) * spread.max(initial=0.0)
        left, spread, right = left[:, kept], spread[kept], right[kept]
        inverse = 1 / (np.square(spread) + root_alphas)  # (n_alphas, rank)
        weights = inverse * (spread * (left.T @ targets))
        for rows, design, known_targets in _rows(samples, basis, scale, system, o, derivative_weight):
            projected = design @ right.T  # (rows, 1 + n_inputs, rank)
            root = np.sqrt(samples.weight[rows])
            for a in range(len(alphas)):
                residual = known_targets - projected @ weights[a]
                complement = np.eye(design.shape[1]) - (projected * inverse[a]) @ np.swapaxes(projected, 1, 2)
                if fit_intercept:
                    complement[:, 0, 0] -= samples.weight[rows] / samples.weight.sum()
                result[a, rows, o] = samples.y[rows, o] - _held_out(complement, residual) / root
    return result


def _held_out(complement: Array, residual: Array) -> Array:
    """Return the first entry of each ``complement**-1 residual``, NaN if there is none."""
    size = residual.shape[1]
    sides = np.stack([residual, np.broadcast_to(np.eye(size)[0], residual.shape)], axis=2)
    try:
        solved = np.linalg.solve(complement, sides)[:, 0]
    except np.linalg.LinAlgError:  # one exactly singular sample is enough to rule this fit out
        return np.full(len(residual), np.nan)
    estimable = (solved[:, 1] > 0) & (solved[:, 1] < 1 / _LEAST)  # 1 / (1 - leverage)
    return np.where(estimable, solved[:, 0], np.nan)


def _rows(
    samples: Samples, basis: Any, scale: Array | None, system: Equations, output: int, derivative_weight: float
) -> Iterator[tuple[slice, Array, Array]]:
    """Blocks of rows of (slice, (rows, 1 + n_inputs, p), (rows, 1 + n_inputs)); the value comes first."""
    n, n_inputs = samples.X.shape
    n_features = len(system.center)
    with_slopes = scale is not None and derivative_weight > 0
    for rows in blocks(n, (1 + n_inputs * with_slopes) * n_features):
        root = np.sqrt(samples.weight[rows])[:, None]
        values = (features(basis, samples.X[rows]) - system.center) * root
        targets = (samples.y[rows, output] - system.level[output])[:, None] * root
        design = values[:, None]
        if with_slopes and scale is not None:
            target, known = samples.derivatives(rows)
            # Unknown derivatives are rows of zeros: residual and leverage 0.
            factor = np.where(known[:, output], derivative_weight**0.5 * root * scale[output], 0.0)
            slopes = np.swapaxes(derivatives(basis, samples.X[rows]), 1, 2)
            design = np.concatenate([design, factor[..., None] * slopes], axis=1)
            targets = np.hstack([targets, factor * target[:, output]])
        yield rows, design, targets
