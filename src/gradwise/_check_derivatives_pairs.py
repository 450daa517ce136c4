"""Statistics of `check_derivatives`: how well derivatives predict differences between near samples."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

# Bounds on the work: rows whose neighbours are looked at, neighbours of each, and rows of the kernel regression.
_CENTRES, _NEIGHBORS, _KERNEL_ROWS = 1000, 12, 400
_GROUPS = 30
_LENGTHS = (0.3, 0.6, 1.2, 2.5, 5.0)  # of the Gaussian kernel, in units of sqrt(n_inputs) standard deviations
_RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)


class Pairs(NamedTuple):
    """Pairs of near samples."""

    first: Indices
    second: Indices
    weight: Floats
    groups: tuple[Indices, Indices]
    """The jackknife group of either sample."""
    regular: bool
    """Whether most have the same distance, as in a grid, where a fast oscillation may pose as a slow one."""

    @property
    def n_groups(self) -> int:
        """How many groups there are to leave out."""
        return max(int(group.max()) for group in self.groups) + 1


def near_pairs(X: Floats) -> Pairs | None:
    """Each sample with its nearest ``min(n_inputs + 1, 12)`` others that differ from it; None if there are none.

    A pair at distance r weighs ``1 / (r**2 + median(r**2))``: between differences, which trust far pairs too much (the
    trapezoidal rule is off by the third power of the distance), and slopes, which amplify noise of near ones.
    """
    # Here, because scikit-learn takes over a second to import.
    from sklearn.neighbors import NearestNeighbors  # pyright: ignore[reportMissingTypeStubs] - ships no types

    n, n_inputs = X.shape
    if n < 2:
        return None
    count = min(n_inputs + 1, _NEIGHBORS, n - 1)
    centres = np.unique(np.linspace(0, n - 1, min(n, _CENTRES), dtype=np.intp))
    search: Any = NearestNeighbors(n_neighbors=count + 1)
    search.fit(X)
    found: Indices = search.kneighbors(X[centres], return_distance=False)
    first, second = np.repeat(centres, count + 1), found.ravel()
    pairs = np.unique(np.sort(np.column_stack([first, second]), axis=1), axis=0)
    first, second = pairs[:, 0], pairs[:, 1]
    squares = np.square(X[second] - X[first]).sum(axis=1)
    apart = squares > 0
    first, second, squares = first[apart], second[apart], squares[apart]
    if len(squares) == 0:
        return None
    groups = min(n, _GROUPS)
    distances = np.sqrt(squares)
    alike: NDArray[np.bool_] = np.abs(distances / np.median(distances) - 1) < 0.01
    regular = float(alike.mean()) > 0.6
    return Pairs(first, second, 1 / (squares + np.median(squares)), (first % groups, second % groups), regular)


class Estimate(NamedTuple):
    """A statistic and its jackknife standard error."""

    value: float
    error: float


class PairStatistics(NamedTuple):
    """What near pairs say about the derivatives of one output; everything is without unit."""

    unexplained: Estimate
    """Sum of squares of differences minus predicted differences, over that of differences: 0 is perfect, 1 is none."""
    slope: Estimate
    """Of differences against predicted ones: 1 if all is well, -1 for the wrong sign, 1 / factor for wrong units."""
    correlation: float
    """Between the two, about zero."""
    alignment: Estimate
    """Slope against the part of the prediction that depends on the row: 1, or 0 if rows are mixed up."""
    row_share: float
    """The share of that part in the predicted differences' sum of squares."""
    power: float
    """Sum of squares of predicted differences over that of differences."""
    turning: float
    """Squared change of derivatives along a pair over the squared predicted difference: beyond 1 the trapezoidal rule
    cannot be trusted."""
    regular: bool
    """As of the pairs."""
    columns: tuple[Estimate, ...]
    """The slope for each input, all inputs fitted together."""
    column_gain: Floats
    """How much of the differences' sum of squares correcting one column would explain."""
    column_unexplained: float
    """`unexplained` with all columns corrected."""
    others: dict[str, Estimate]
    """`unexplained` of other arrangements of the derivatives."""
    improvement: dict[str, Estimate]
    """By how much they explain more."""
    replicates: dict[str, Floats]
    """`others` with each group left out."""


def pair_statistics(X: Floats, y: Floats, J: Floats, others: dict[str, Floats], pairs: Pairs) -> PairStatistics | None:
    """Compare differences of `y` (n,) with those that `J` (n, n_inputs) predicts; None if nothing varies.

    The prediction is the trapezoidal rule ``(J_i + J_j) / 2 . (x_j - x_i)``, exact for quadratics. Standard errors come
    from leaving out groups of samples, with all the pairs they are in.
    """
    step = X[pairs.second] - X[pairs.first]
    difference = y[pairs.second] - y[pairs.first]

    def predicted(jacobian: Floats) -> Floats:
        return 0.5 * (jacobian[pairs.first] + jacobian[pairs.second]) * step

    terms = predicted(J)
    change = 0.5 * ((J[pairs.second] - J[pairs.first]) * step).sum(axis=1)
    table = np.column_stack(
        [difference, step @ J.mean(axis=0), change, *(predicted(other).sum(axis=1) for other in others.values()), terms]
    )
    grams = _grams(table, pairs)
    whole = grams[-1]
    n_inputs, n_others = J.shape[1], len(others)
    if whole[0, 0] <= 0 or not np.any(np.diagonal(whole)[-n_inputs:] > 0):
        return None
    cells = [_cells(gram, n_inputs, n_others) for gram in grams]
    left_out = np.array([cell[: 3 + n_inputs + n_others] for cell in cells[:-1]])
    values = cells[-1]
    errors = jackknife_error(left_out)
    estimates = [Estimate(float(v), float(e)) for v, e in zip(values, errors, strict=False)]
    slope, alignment, unexplained = estimates[:3]
    gains = left_out[:, 2:3] - left_out[:, 3 + n_inputs :]
    gain_errors = jackknife_error(gains)
    arrangements = estimates[3 + n_inputs :]
    square, mean, own, cross = (
        whole[0, 0],
        whole[1, 1],
        whole[-n_inputs:, -n_inputs:].sum(),
        whole[0, -n_inputs:].sum(),
    )
    apart = own - 2 * whole[1, -n_inputs:].sum() + mean
    columns = estimates[3 : 3 + n_inputs]
    diagonal = np.diagonal(whole)[-n_inputs:]
    return PairStatistics(
        unexplained=unexplained,
        slope=slope,
        correlation=float(cross / np.sqrt(square * own)) if own > 0 else 0.0,
        alignment=alignment,
        row_share=float(apart / own) if own > 0 else 0.0,
        power=float(own / square),
        turning=float(whole[2, 2] / own) if own > 0 else np.inf,
        regular=pairs.regular,
        columns=tuple(columns),
        column_gain=np.array([(c.value - 1) ** 2 for c in columns]) * diagonal / square,
        column_unexplained=float(values[-1]),
        others=dict(zip(others, arrangements, strict=True)),
        improvement={
            name: Estimate(unexplained.value - other.value, float(error))
            for name, other, error in zip(others, arrangements, gain_errors, strict=True)
        },
        replicates=dict(zip(others, left_out[:, 3 + n_inputs :].T, strict=True)),
    )


def jackknife_error(replicates: Floats) -> Floats:
    """Return the standard error of a statistic from its values with each group left out, along the first axis."""
    groups = len(replicates)
    return np.sqrt((groups - 1) / groups * np.square(replicates - replicates.mean(axis=0)).sum(axis=0))


def _grams(table: Floats, pairs: Pairs) -> Floats:
    """Weighted products of columns, with each group left out in turn, and last of all pairs."""
    weighted = pairs.weight[:, None] * table
    whole = table.T @ weighted
    grams = [whole]
    for group in range(pairs.n_groups):
        touched = (pairs.groups[0] == group) | (pairs.groups[1] == group)
        grams.append(whole - table[touched].T @ weighted[touched])
    return np.array([*grams[1:], whole])


def _cells(gram: Floats, n_inputs: int, n_others: int) -> Floats:
    """Slope, alignment, unexplained share, column slopes, other arrangements' unexplained shares, and the columns'."""
    square, mean = gram[0, 0], gram[1, 1]
    block = gram[-n_inputs:, -n_inputs:]
    with_y, with_mean = gram[0, -n_inputs:], gram[1, -n_inputs:]
    own, cross, shared = block.sum(), with_y.sum(), with_mean.sum()
    square = max(square, np.finfo(float).tiny)
    unexplained = max(0.0, 1 + (own - 2 * cross) / square)  # rounding of a perfect prediction is negative
    slope = cross / own if own > 0 else 0.0
    # Regression on the prediction from the mean derivative and on the rest, which depends on the row.
    pair = np.array([[mean, shared - mean], [shared - mean, own - 2 * shared + mean]])
    alignment = _solve(pair, np.array([gram[0, 1], cross - gram[0, 1]]))[1]
    columns = _solve(block, with_y)
    corrected = max(0.0, 1 - (2 * columns @ with_y - columns @ block @ columns) / square)
    index = np.arange(3, 3 + n_others)
    others = np.maximum(0, 1 + (gram[index, index] - 2 * gram[0, index]) / square)
    return np.concatenate([[slope, alignment, unexplained], columns, others, [corrected]])


def _solve(gram: Floats, right: Floats) -> Floats:
    """Least squares from normal equations, columns scaled alike; nothing for directions that do not vary."""
    scale = np.sqrt(np.maximum(np.diagonal(gram), 0))
    scale = np.where(scale > 1e-12 * scale.max(initial=0), scale, np.inf)
    if not np.isfinite(scale).any():
        return np.zeros(len(right))
    scaled = np.where(np.isfinite(np.outer(scale, scale)), gram / np.outer(scale, scale), 0.0)
    return np.linalg.pinv(scaled, rcond=1e-9, hermitian=True) @ (right / scale) / scale


class Prediction(NamedTuple):
    """How well columns are predicted from other samples."""

    predictable: Floats
    """Share of each column's variance, at most 1."""
    residuals: Floats
    """Shape of the columns, in their units."""


def leave_one_out(X: Floats, columns: Floats) -> Prediction:
    """Predict samples that are left out by kernel ridge regression on `X`.

    Of Gaussian kernels with and without a linear one, and penalties, the best for each column, by the closed form of
    the leave-one-out residual. Where little is predictable, samples are too far apart (or too noisy) to tell how the
    function goes between them.
    """
    if len(X) > _KERNEL_ROWS:
        rows = np.linspace(0, len(X) - 1, _KERNEL_ROWS, dtype=np.intp)
        return leave_one_out(X[rows], columns[rows])
    n_inputs = X.shape[1]
    deviation = columns.std(axis=0)
    standard = (columns - columns.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    linear = X @ X.T
    sizes = np.diagonal(linear)
    squares = np.maximum(sizes[:, None] + sizes - 2 * linear, 0)
    residuals, least = standard.copy(), np.square(standard).mean(axis=0)
    for length in _LENGTHS:
        gaussian = np.exp(-squares / (2 * n_inputs * length**2))
        for share in (0.0, 1 / n_inputs):
            values, vectors = np.linalg.eigh(gaussian + share * linear + 1.0)
            projected, rotations = vectors.T @ standard, np.square(vectors)
            for ridge in _RIDGES:
                inverse = 1 / (np.maximum(values, 0) + ridge)
                residual = vectors @ (inverse[:, None] * projected) / (rotations @ inverse)[:, None]
                error = np.square(residual).mean(axis=0)
                better = error < least
                residuals[:, better], least = residual[:, better], np.minimum(error, least)
    return Prediction(1 - least, residuals * deviation)


def typical_noise(residuals: Floats, power: float) -> float:
    """Relative size of derivatives' residuals in the median sample, shape (n, n_inputs), to a mean square of `power`.

    The median, because a function that is steep in a few places leaves large residuals there, and noise everywhere.
    """
    variances = np.square(residuals).mean(axis=0)
    total = variances.sum()
    if total <= 0:
        return 0.0
    # Median of a chi square over its mean (Wilson and Hilferty), with the degrees of freedom of unequal variances.
    freedom = total**2 / np.square(variances).sum()
    median = np.median(np.square(residuals).sum(axis=1)) / (1 - 2 / (9 * freedom)) ** 3
    return float(np.sqrt(median / power))
