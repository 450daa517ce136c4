"""Derivative targets from data alone: local linear fits."""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# The Gaussian kernel's standard deviation as a share of the distance to the farthest neighbour, which so has the weight
# exp(-2). A compact kernel that vanishes there leaves nothing but the centre where distances are alike (10 inputs).
_BANDWIDTH = 0.5
# Directions in which the neighbours' spread is below this share of the largest spread are not fitted.
_RANK_TOLERANCE = 1e-10
# Floats in the largest temporary array.
_CHUNK = 2**21
# The choice of the number of neighbours: the largest candidate, and how many rows it is made on.
_MOST_NEIGHBORS, _JUDGED_ROWS = 1000, 300


@overload
def estimate_gradients(
    X: ArrayLike, y: ArrayLike, *, n_neighbors: int | None = None, return_std: Literal[False] = False
) -> Floats: ...
@overload
def estimate_gradients(
    X: ArrayLike, y: ArrayLike, *, n_neighbors: int | None = None, return_std: Literal[True]
) -> tuple[Floats, Floats]: ...
@overload
def estimate_gradients(
    X: ArrayLike, y: ArrayLike, *, n_neighbors: int | None = None, return_std: bool
) -> Floats | tuple[Floats, Floats]: ...
def estimate_gradients(
    X: ArrayLike, y: ArrayLike, *, n_neighbors: int | None = None, return_std: bool = False
) -> Floats | tuple[Floats, Floats]:
    """Derivatives at each sample, estimated from the samples around it by local linear regression.

    Computes the slopes b_i of ``min_{a, b} sum_k w_ik (y_k - a - b . (x_k - x_i))**2`` over the `n_neighbors` samples
    nearest to sample i, itself included, with distances ``r_ik`` between inputs divided by their standard deviations
    and weights ``w_ik = exp(-2 r_ik**2 / max_k r_ik**2)`` (Cleveland 1979, with a Gaussian kernel). Exact for data on
    a plane; otherwise the error is of the order of the distance to the neighbours times the curvature, plus noise.

    The fit is by singular values. Where the neighbours do not vary in some direction (a constant column, a category
    that all neighbours share), that direction is left out, which is the limit of a small ridge penalty, and the
    derivatives with a share in it are NaN: unknown to everything in this package.

    Not a way to gain information: the estimates hold nothing that the values do not. They can help a model that would
    use the values less well, and they mislead where neighbours are far, which is the rule beyond five inputs or so;
    see `docs/further_training.md` for what was measured. If the function can be called, see
    `finite_difference_jacobian`.

    Parameters
    ----------
    X : array of shape (n, n_inputs)
        Inputs, in any units.
    y : array of shape (n,) or (n, n_outputs)
        Values.
    n_neighbors : int, optional
        From ``n_inputs + 2`` to n. Fewer follow curvature, more average noise. Default: the one among
        ``2 (n_inputs + 2)`` times powers of 1.5, up to n and 1,000, whose fits predict left-out values best (mean
        square over up to 300 samples, outputs in units of their standard deviation).
    return_std : bool, default False
        Whether to return standard errors as well.

    Returns
    -------
    gradients : array of shape (n, n_inputs), or (n, n_outputs, n_inputs) if `y` has two dimensions
        Estimates, in units of y per unit of x; NaN where the data cannot tell.
    standard_error : array of the same shape, only if `return_std`
        Standard deviation of the estimate under independent noise of one variance among the neighbours, which is
        estimated from the residuals of the local fit. It covers noise and not the bias by curvature, and as it rests
        on about ``n_neighbors - n_inputs - 1`` degrees of freedom it is itself uncertain. NaN where the estimate is.

    Raises
    ------
    ValueError
        If shapes do not belong together, a value is not finite, there are fewer than ``n_inputs + 2`` samples, or
        `n_neighbors` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise import estimate_gradients
    >>> X = np.random.default_rng(0).uniform(size=(50, 2))
    >>> y = 3 * X[:, 0] - 2 * X[:, 1]
    >>> estimate_gradients(X, y)[:2].round(6)
    array([[ 3., -2.],
           [ 3., -2.]])
    >>> noise = 0.1 * np.random.default_rng(1).standard_normal(50)
    >>> gradients, standard_error = estimate_gradients(X, y + noise, n_neighbors=40, return_std=True)
    >>> bool(np.mean(np.abs(gradients - [3, -2]) < 2 * standard_error) > 0.8)
    True
    """
    inputs, outputs = training_data(X, y)
    n, n_inputs = inputs.shape
    if n < n_inputs + 2:
        msg = f"`X` must have at least n_inputs + 2 = {n_inputs + 2} rows for local linear fits; got {n}"
        raise ValueError(msg)
    if n_neighbors is not None and not n_inputs + 2 <= n_neighbors <= n:
        msg = f"`n_neighbors` must be from n_inputs + 2 = {n_inputs + 2} to the number of rows, {n}; got {n_neighbors}"
        raise ValueError(msg)
    scale = _positive(inputs.std(axis=0))
    standard = (inputs - inputs.mean(axis=0)) / scale
    columns = outputs.reshape(n, -1)
    data = _Neighborhoods(standard, columns)
    count = data.best_count() if n_neighbors is None else n_neighbors
    fits = list(data.fits(np.arange(n, dtype=np.intp), count))
    shape = (n, n_inputs) if outputs.ndim == 1 else (n, columns.shape[1], n_inputs)
    gradients = (np.concatenate([fit.slopes for fit in fits]) / scale).reshape(shape)
    if not return_std:
        return gradients
    return gradients, (np.concatenate([fit.errors for fit in fits]) / scale).reshape(shape)


class _Neighborhoods:
    """Data without units, and linear fits around some of its rows."""

    def __init__(self, X: Floats, y: Floats) -> None:
        # Here, because scikit-learn takes over a second to import.
        from sklearn.neighbors import NearestNeighbors  # pyright: ignore[reportMissingTypeStubs] - ships no types

        self.X, self.y = X, y
        self.search: Any = NearestNeighbors()
        self.search.fit(X)

    def fits(self, rows: NDArray[np.intp], count: int) -> Iterator["_Fit"]:
        """Fits around these rows, in pieces that bound the memory."""
        size = max(1, _CHUNK // (count * max(self.X.shape[1], self.y.shape[1])))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            distances, neighbors = self.search.kneighbors(self.X[part], count)
            yield _local_fit(self.X, self.y, part, distances, neighbors)

    def best_count(self) -> int:
        """Return the number of neighbours whose fits predict left-out values best."""
        n, n_inputs = self.X.shape
        candidates = [min(n, 2 * (n_inputs + 2))]
        while candidates[-1] < min(n, _MOST_NEIGHBORS):
            candidates.append(min(n, _MOST_NEIGHBORS, math.ceil(1.5 * candidates[-1])))
        rows = np.unique(np.linspace(0, n - 1, min(n, _JUDGED_ROWS), dtype=np.intp))
        variance = _positive(self.y.var(axis=0))

        def error(count: int) -> float:
            left_out = np.concatenate([fit.left_out for fit in self.fits(rows, count)])
            return float(np.mean(np.square(left_out) / variance))

        # Rounded, so that for values on a plane, which every count fits, the choice is not one of rounding errors.
        return min(candidates, key=lambda count: (round(error(count), 12), count))


class _Fit(NamedTuple):
    slopes: Floats  # (rows, n_outputs, n_inputs)
    errors: Floats
    left_out: Floats  # (rows, n_outputs): the value minus what the fit without it predicts there


def _local_fit(X: Floats, y: Floats, rows: NDArray[np.intp], distances: Floats, neighbors: NDArray[np.intp]) -> _Fit:
    """Weighted linear fits around several samples at once; `distances` and `neighbors` are (rows, count)."""
    ratio = distances / _positive(distances.max(axis=1, keepdims=True))
    weight = np.exp(-0.5 * (ratio / _BANDWIDTH) ** 2)[..., None]  # (rows, count, 1)
    total = weight.sum(axis=1, keepdims=True)
    root = np.sqrt(weight)
    x, z = X[neighbors], y[neighbors]
    x = root * (x - (weight * x).sum(axis=1, keepdims=True) / total)
    z = root * (z - (weight * z).sum(axis=1, keepdims=True) / total)
    left, spread, right = np.linalg.svd(x, full_matrices=False)  # x = left * spread @ right
    fitted = spread > _RANK_TOLERANCE * spread[:, :1]
    left = np.where(fitted[:, None], left, 0.0)
    inverse = np.where(fitted, 1 / np.where(fitted, spread, 1.0), 0.0)
    projected = np.swapaxes(left, 1, 2) @ z  # (rows, rank, n_outputs)
    slopes = np.swapaxes(projected * inverse[..., None], 1, 2) @ right
    # The slopes are linear in the values, slopes = operator @ y, so that noise of variance s**2 in y gives them the
    # variance s**2 * sum(operator**2). The weights are no inverse variances: they enter twice.
    operator = np.swapaxes(right, 1, 2) * inverse[:, None] @ np.swapaxes(left * root, 1, 2)
    # E[sum w r**2] = s**2 tr((I - H) W), H the projection on the weighted constant and the left singular vectors.
    freedom = total - (weight**2).sum(axis=1, keepdims=True) / total
    freedom = (freedom - (weight * left**2).sum(axis=(1, 2), keepdims=True))[:, 0]  # (rows, 1)
    variance = np.square(z - left @ projected).sum(axis=1) / np.maximum(freedom, 1e-9)
    errors = np.sqrt(variance[..., None] * np.square(operator).sum(axis=2)[:, None])
    # An input is unknown if a unit change of it has a part, beyond rounding, in a direction that was not fitted.
    known = (1 - (np.square(right) * fitted[..., None]).sum(axis=1) < 1e-6)[:, None]
    residual = z - left @ projected
    # A weighted fit's residual grows by 1 / (1 - leverage) when its own sample is left out. Duplicates of a sample may
    # stand before it among its neighbours, or instead of it: then the nearest is as good.
    own = np.arange(len(rows)), np.argmax(neighbors == rows[:, None], axis=1)
    leverage = weight[own] / total[:, 0] + np.square(left[own]).sum(axis=1, keepdims=True)
    left_out = residual[own] / (root[own] * np.maximum(1 - leverage, 1e-9))
    return _Fit(np.where(known, slopes, np.nan), np.where(known, errors, np.nan), left_out)


def _positive(values: Floats) -> Floats:
    return np.where(values > 0, values, 1.0)


def training_data(X: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """Return `X` and `y` as float64 arrays, or raise ValueError if shapes or values are unfit."""
    inputs, outputs = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if inputs.ndim != 2 or 0 in inputs.shape:
        msg = f"`X` must have shape (n, n_inputs) with at least one row and column; got {inputs.shape}"
        raise ValueError(msg)
    if outputs.ndim not in {1, 2} or len(outputs) != len(inputs) or outputs.size == 0:
        msg = f"`y` must have shape ({len(inputs)},) or ({len(inputs)}, n_outputs) like `X`; got {outputs.shape}"
        raise ValueError(msg)
    for name, array in (("X", inputs), ("y", outputs)):
        if not np.isfinite(array).all():
            msg = f"`{name}` must be finite; got a value that is not"
            raise ValueError(msg)
    return inputs, outputs
