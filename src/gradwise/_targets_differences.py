"""Derivative targets from a function that can be called: finite differences."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Numbers in one call of the function, unless the user says otherwise.
_CALL = 2**22


def finite_difference_jacobian(
    f: Callable[[Floats], Any],
    X: ArrayLike,
    *,
    step: ArrayLike | None = None,
    scheme: str = "central",
    batch_size: int | None = None,
) -> Floats:
    """Derivatives of a function that can be called, by differences of its values.

    Computes ``(f(x + h_j e_j) - f(x - h_j e_j)) / (2 h_j)`` for every row x and input j; the error is O(h_j**2), nil
    for quadratics. All points are stacked, so that `f` is called once, or a few times for much data, with
    ``2 * n_inputs * n`` rows in all. Not for noisy functions (the noise is divided by the step: give a large `step`, or
    use `estimate_gradients`) and not across kinks and jumps. Where an adjoint or automatic differentiation
    exists it is exact and costs about as much as one more value.

    Parameters
    ----------
    f : callable
        Takes an array of shape (m, n_inputs), returns one of shape (m,) or (m, n_outputs). Rows must not depend on
        each other.
    X : array of shape (n, n_inputs)
        Where to differentiate. All points ``x +- h_j e_j`` must be in the domain of `f`.
    step : float or array of shape (n_inputs,), optional
        The steps h_j, in units of the inputs. Default ``eps**(1/3) * s_j`` ("central") or ``eps**(1/2) * s_j``
        ("forward"), where s_j is the standard deviation of column j of X (of a constant column its absolute value, of
        zeros 1) and eps the rounding error of the results of `f`: half the digits and more are right in float64, only
        two to four in float32.
    scheme : {"central", "forward"}, default "central"
        "forward" computes ``(f(x + h_j e_j) - f(x)) / h_j`` from ``(n_inputs + 1) * n`` rows, with an error O(h_j).
    batch_size : int, optional
        Most rows in one call of `f`. Default: as many as make about 4 million numbers.

    Returns
    -------
    array of shape (n, n_outputs, n_inputs)
        Derivatives, in units of f per unit of x; NaN, which means unknown, where `f` was not finite.

    Raises
    ------
    ValueError
        If a shape is not one of the above, X is not finite, or a step is not positive and large enough to move X.
    TypeError
        If `f` returns something else than real numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise import finite_difference_jacobian
    >>> finite_difference_jacobian(lambda x: x[:, 0] * x[:, 1], [[2.0, 3.0], [0.0, 1.0]]).round(6)
    array([[[3., 2.]],
           [[1., 0.]]])
    """
    points = np.asarray(X, dtype=np.float64)
    if points.ndim != 2 or 0 in points.shape or not np.isfinite(points).all():
        msg = f"`X` must be finite, of shape (n, n_inputs) with at least one row and column; got shape {points.shape}"
        raise ValueError(msg)
    if scheme not in {"central", "forward"}:
        msg = f"`scheme` must be 'central' or 'forward'; got {scheme!r}"
        raise ValueError(msg)
    n_inputs = points.shape[1]
    rows = max(1, _CALL // n_inputs) if batch_size is None else batch_size
    if rows < 1:
        msg = f"`batch_size` must be positive; got {batch_size}"
        raise ValueError(msg)
    # One block of n rows for each of these: which column is moved, and which way.
    columns = np.arange(n_inputs, dtype=np.intp)
    signs = np.ones(n_inputs)
    if scheme == "central":
        columns, signs = np.concatenate([columns, columns]), np.concatenate([signs, -signs])
    else:
        columns, signs = np.append(columns, 0), np.append(signs, 0.0)  # the last block is X itself
    steps = _default_steps(points, np.dtype(np.float64), scheme) if step is None else _given_steps(points, step)
    values, dtype = _values(f, points, columns, signs * steps[columns], rows)
    if step is None and dtype.itemsize < 8:
        # A step made for float64 finds nothing but rounding in what a float32 network computes.
        steps = _default_steps(points, dtype, scheme)
        values, _ = _values(f, points, columns, signs * steps[columns], rows)
    behind = values[n_inputs:] if scheme == "central" else values[-1:]
    # What was really stepped: x + h is rounded, and x may be much larger than h.
    width = (points + steps) - (points - steps if scheme == "central" else points)
    with np.errstate(invalid="ignore"):  # inf - inf
        slopes = (values[:n_inputs] - behind) / width.T[:, :, None]  # (n_inputs, n, n_outputs)
    return np.where(np.isfinite(slopes), slopes, np.nan).transpose(1, 2, 0)


def _default_steps(points: Floats, dtype: np.dtype[Any], scheme: str) -> Floats:
    """Where truncation and rounding are about equal, for a function that varies over the spread of the points."""
    spread, size = points.std(axis=0), np.abs(points).max(axis=0)
    # Rounding alone gives a constant column of 0.1 a spread of 1e-17.
    scale = np.where(spread > 1e-12 * size, spread, np.where(size > 0, size, 1.0))
    eps = float(np.finfo(dtype).eps)
    # A column such as 1e6 +- 1 needs steps that move it by many of its own rounding errors.
    return np.maximum(scale * eps ** (1 / 3 if scheme == "central" else 1 / 2), size * eps * 1e3)


def _given_steps(points: Floats, step: ArrayLike) -> Floats:
    steps = np.asarray(step, dtype=np.float64)
    n_inputs = points.shape[1]
    if steps.shape not in {(), (n_inputs,)}:
        msg = f"`step` must be a number or have shape ({n_inputs},), one entry per input; got {steps.shape}"
        raise ValueError(msg)
    steps = np.broadcast_to(steps, (n_inputs,))
    if not (np.isfinite(steps) & (steps > 0)).all() or np.any(points + steps == points):
        msg = f"`step` must be positive and large enough to move every row of `X` in float64; got {step}"
        raise ValueError(msg)
    return steps


def _values(
    f: Callable[[Floats], Any], points: Floats, columns: NDArray[np.intp], moves: Floats, rows: int
) -> tuple[Floats, np.dtype[Any]]:
    """Values of shape (n_moves, n, n_outputs) where one column at a time is moved, and the type `f` computes in."""
    n = len(points)
    results: list[NDArray[Any]] = []
    for start in range(0, len(moves) * n, rows):
        move, row = np.divmod(np.arange(start, min(start + rows, len(moves) * n)), n)
        moved = points[row]
        moved[np.arange(len(row)), columns[move]] += moves[move]
        results.append(_checked(np.asarray(f(moved)), len(row)))
        if results[-1].shape[1] != results[0].shape[1]:
            msg = f"`f` must always return as many outputs; got {results[0].shape[1]} and {results[-1].shape[1]}"
            raise ValueError(msg)
    dtype = min((result.dtype for result in results), key=lambda dtype: dtype.itemsize)
    return np.concatenate(results, dtype=np.float64).reshape(len(moves), n, -1), dtype


def _checked(values: NDArray[Any], rows: int) -> NDArray[Any]:
    if values.ndim not in {1, 2} or len(values) != rows or values.size == 0:
        msg = f"`f` must return shape ({rows},) or ({rows}, n_outputs) for {rows} rows; got {values.shape}"
        raise ValueError(msg)
    if not np.issubdtype(values.dtype, np.floating):
        if not np.issubdtype(values.dtype, np.integer):
            msg = f"`f` must return real numbers; got {values.dtype}"
            raise TypeError(msg)
        values = values.astype(np.float64)
    return values.reshape(rows, -1)
