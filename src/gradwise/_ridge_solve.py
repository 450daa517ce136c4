"""Penalised least squares, stably: an orthogonal factorisation where there are more rows than columns, else a dual."""

from typing import Any

import numpy as np
import scipy.linalg  # pyright: ignore[reportMissingTypeStubs] - scipy ships no types
from numpy.typing import NDArray

Array = NDArray[np.float64]

_linalg: Any = scipy.linalg
_EPS = float(np.finfo(np.float64).eps)


def least_squares(matrix: Array, targets: Array, penalty: Array, towards: Array) -> Array:
    """Minimise ``|matrix @ w - targets|**2 + sum_j penalty_j * (w_j - towards_j)**2``.

    With r rows, p columns: for r >= p by QR of the matrix and the square roots of the penalties, with columns brought
    to unit length, in O((r + p) p**2) operations; no product ``matrix.T @ matrix`` is formed, so that the condition
    number is not squared. For r < p by singular values of r rows, in O(r**2 p), no p x p array. Where the solution is
    not unique, the shortest one, as `numpy.linalg.lstsq` returns.

    Parameters
    ----------
    matrix : array of shape (r, p)
    targets : array of shape (r, k)
    penalty : array of shape (p,)
        Not negative; 0 is no penalty.
    towards : array of shape (p, k)
        Must be 0 where the penalty is.

    Returns
    -------
    array of shape (p, k)
    """
    residual = targets - matrix @ towards
    rows, columns = matrix.shape
    if rows >= columns:
        return towards + _primal(matrix, residual, penalty)
    return towards + _dual(matrix, residual, penalty)


def triangle(rows: Array) -> Array:
    """R of the QR factorisation of `rows`: at most as many rows as columns, the same sums of squares."""
    return np.asarray(np.linalg.qr(rows, mode="r"))


def _primal(matrix: Array, targets: Array, penalty: Array) -> Array:
    columns, width = matrix.shape[1], targets.shape[1]
    penalised = np.flatnonzero(penalty)
    below = np.zeros((len(penalised), columns + width))
    below[np.arange(len(penalised)), penalised] = np.sqrt(penalty[penalised])
    rows = np.vstack([np.hstack([matrix, targets]), below])
    lengths = np.sqrt(np.square(rows[:, :columns]).sum(axis=0))
    used = np.flatnonzero(lengths)  # a column of zeros (a bias, after centring) gets the coefficient 0
    factor = triangle(np.hstack([rows[:, used] / lengths[used], rows[:, columns:]]))
    upper, projected = factor[: len(used), : len(used)], factor[: len(used), len(used) :]
    result = np.zeros((columns, width))
    if len(used) == 0:
        return result
    if _reciprocal_condition(upper) > len(used) * _EPS:
        result[used] = _linalg.solve_triangular(upper, projected, check_finite=False) / lengths[used, None]
    else:
        result[used] = _singular(upper, projected, lengths[used])
    return result


def _singular(upper: Array, projected: Array, lengths: Array) -> Array:
    # The rank is decided with columns of unit length, so that the units of features do not matter. The shortest
    # solution is that in the user's units: any solution without its projection on the null space.
    left, spread, right = np.linalg.svd(upper)
    kept = spread > len(upper) * _EPS * spread[0]
    solution = right[kept].T @ ((left[:, kept].T @ projected) / spread[kept, None]) / lengths[:, None]
    null = right[~kept].T / lengths[:, None]
    null = null / np.sqrt(np.square(null).sum(axis=0))
    return solution - null @ _shortest(null, solution)


def _dual(matrix: Array, targets: Array, penalty: Array) -> Array:
    # In v_j = sqrt(penalty_j) w_j the penalised columns P have the penalty 1: with their SVD U S V', v is
    # V S (S**2 + 1)**-1 U' (targets - F w_F), and the free columns F solve least squares in the metric
    # (P P' + 1)**-1 of what is left, whose square root U also gives.
    free, penalised = np.flatnonzero(penalty == 0), np.flatnonzero(penalty)
    result = np.zeros((matrix.shape[1], targets.shape[1]))
    if len(penalised) == 0:
        return _shortest(matrix, targets)
    root = np.sqrt(penalty[penalised])
    left, spread, right = np.linalg.svd(matrix[:, penalised] / root, full_matrices=False)
    if len(free):
        shrink = (1 / np.sqrt(np.square(spread) + 1) - 1)[:, None]

        def whitened(columns: Array) -> Array:
            return columns + left @ (shrink * (left.T @ columns))

        result[free] = _shortest(whitened(matrix[:, free]), whitened(targets))
        targets = targets - matrix[:, free] @ result[free]
    filtered = (spread / (np.square(spread) + 1))[:, None] * (left.T @ targets)
    result[penalised] = right.T @ filtered / root[:, None]
    return result


def _shortest(matrix: Array, targets: Array) -> Array:
    return _linalg.lstsq(matrix, targets, cond=_EPS * max(matrix.shape), check_finite=False)[0]


def _reciprocal_condition(upper: Array) -> float:
    return float(_linalg.lapack.dtrcon(upper)[0])
