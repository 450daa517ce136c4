"""The least-squares equations of values and derivatives, reduced block by block to as many rows as coefficients."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwise._basis import derivatives, features
from gradwise._ridge_data import Array, Samples, blocks, weighted_mean
from gradwise._ridge_solve import least_squares, triangle


@dataclass(frozen=True)
class Slopes:
    """Derivative equations ``factor_o * (matrix @ w_o - targets_o) = 0`` of outputs that differ by a factor only."""

    outputs: NDArray[np.intp]
    factor: Array
    """Shape (k,)."""
    matrix: Array
    """Shape (r, p) with r <= p."""
    targets: Array
    """Shape (r, k)."""


@dataclass(frozen=True)
class Equations:
    """Equations whose least-squares solution is the model at derivative weight 1; see `coefficients`.

    Attributes
    ----------
    center : array of shape (p,)
        Weighted mean of the features, or 0 without an intercept; `level`, of shape (n_outputs,), is that of y.
    matrix, targets : arrays of shape (r, p) and (r, n_outputs)
        ``matrix @ w = targets``: the centred values. At most p rows, or all samples if there are fewer.
    slopes : tuple of Slopes
        The derivatives, if there is a basis.
    pull, towards : arrays of shape (n_outputs, p)
        The derivatives if there is none: each derivative is a coefficient itself, so that all of them add up to
        ``sum_j pull_oj * (w_oj - towards_oj)**2`` and a constant.
    """

    center: Array
    level: Array
    matrix: Array
    targets: Array
    slopes: tuple[Slopes, ...] = ()
    pull: Array | None = None
    towards: Array | None = None

    def stacked(self, output: int, derivative_weight: float) -> tuple[Array, Array]:
        """Values and derivatives of one output as one matrix of shape (r, p) and targets of shape (r,)."""
        rows, targets = [self.matrix], [self.targets[:, output]]
        if self.pull is not None and self.towards is not None and derivative_weight > 0:
            root = np.sqrt(derivative_weight * self.pull[output])
            rows.append(np.diag(root))
            targets.append(root * self.towards[output])
        for slopes in self.slopes:
            for k in np.flatnonzero(slopes.outputs == output):
                root = derivative_weight**0.5 * slopes.factor[k]
                rows.append(root * slopes.matrix)
                targets.append(root * slopes.targets[:, k])
        return np.vstack(rows), np.concatenate(targets)


def equations(samples: Samples, basis: Any, scale: Array | None, *, fit_intercept: bool) -> Equations:
    """Reduce `samples` to equations; `scale` is that of the derivatives, None ignores them.

    With p features of d inputs this takes O(n (1 + d) p**2) operations (O(n p**2) without a basis) and, besides the
    samples, O(p**2) memory and one block of some megabytes.
    """
    n, n_outputs = samples.y.shape
    n_features = features(basis, samples.X[:1]).shape[1]
    center, level = np.zeros(n_features), np.zeros(n_outputs)
    if fit_intercept:
        center, level = _center(samples, basis, n_features), weighted_mean(samples.y, samples.weight)

    def values() -> Iterator[Array]:
        for rows in blocks(n, n_features + n_outputs):
            root = np.sqrt(samples.weight[rows])[:, None]
            yield np.hstack([features(basis, samples.X[rows]) - center, samples.y[rows] - level]) * root

    matrix, targets = _reduced(values(), n_features)
    if scale is None:
        return Equations(center, level, matrix, targets)
    if basis is None:
        pull, towards = _pulls(samples, scale)
        return Equations(center, level, matrix, targets, pull=pull, towards=towards)
    groups = _alike(samples, scale)
    slopes = tuple(_slopes(samples, basis, scale, outputs, n_features) for outputs in groups)
    return Equations(center, level, matrix, targets, slopes=slopes)


def coefficients(system: Equations, *, alpha: Array, derivative_weight: float) -> Array:
    """Coefficients of shape (n_outputs, p) for one `alpha` for each output."""
    n_features, n_outputs = system.matrix.shape[1], system.targets.shape[1]
    result = np.zeros((n_outputs, n_features))
    flat = np.zeros(n_features)

    def solve(outputs: Any, matrix: Array, targets: Array, penalty: Array, towards: Array) -> None:
        result[outputs] = least_squares(matrix, targets, penalty, towards).T

    if derivative_weight == 0 or (system.pull is None and not system.slopes):
        for value in np.unique(alpha):
            same = np.flatnonzero(alpha == value)
            solve(same, system.matrix, system.targets[:, same], flat + value, np.zeros((n_features, len(same))))
    elif system.pull is not None and system.towards is not None:
        for o in range(n_outputs):
            pull = derivative_weight * system.pull[o]
            penalty = alpha[o] + pull
            towards = pull * system.towards[o] / np.where(penalty > 0, penalty, 1.0)
            solve([o], system.matrix, system.targets[:, [o]], penalty, towards[:, None])
    else:
        for o in range(n_outputs):
            matrix, targets = system.stacked(o, derivative_weight)
            solve([o], matrix, targets[:, None], flat + alpha[o], np.zeros((n_features, 1)))
    return result


def _center(samples: Samples, basis: Any, n_features: int) -> Array:
    first = features(basis, samples.X[:1])[0]
    shift = np.zeros(n_features)
    for rows in blocks(len(samples.X), n_features):
        # Shifted by the first row: a constant feature is then exactly 0 after centring.
        shift += samples.weight[rows] @ (features(basis, samples.X[rows]) - first)
    return first + shift / samples.weight.sum()


def _reduced(parts: Iterable[Array], n_features: int) -> tuple[Array, Array]:
    """QR of the rows that were met so far and the next ones, again and again (TSQR): the stack is never in memory."""
    held: list[Array] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) > 2 * part.shape[1]:
            held = [triangle(np.vstack(held))]
    rows = np.vstack(held)
    if len(rows) > n_features:
        rows = triangle(rows)[:n_features]  # the rows below hold nothing but residuals of the targets
    return rows[:, :n_features], rows[:, n_features:]


def _pulls(samples: Samples, scale: Array) -> tuple[Array, Array]:
    count, total = np.zeros((2, *scale.shape))
    for rows in blocks(len(samples.X), scale.size):
        target, known = samples.derivatives(rows)
        count += np.tensordot(samples.weight[rows], known, 1)
        total += np.tensordot(samples.weight[rows], target, 1)
    return np.square(scale) * count, total / np.where(count > 0, count, 1.0)


def _alike(samples: Samples, scale: Array) -> list[NDArray[np.intp]]:
    """Groups of outputs with the same known entries and proportional scales: they share one matrix."""
    n_outputs, n_inputs = scale.shape
    digests = [hashlib.blake2b() for _ in range(n_outputs)]
    for rows in blocks(len(samples.X), n_outputs * n_inputs):
        known = samples.derivatives(rows)[1]
        for o, digest in enumerate(digests):
            digest.update(np.packbits(known[:, o]).tobytes())
    groups: list[list[int]] = []
    for o in range(n_outputs):
        for group in groups:
            first = group[0]
            parallel = np.allclose(scale[o] * scale[first].max(), scale[first] * scale[o].max(), rtol=1e-12, atol=0.0)
            if digests[o].digest() == digests[first].digest() and parallel:
                group.append(o)
                break
        else:
            groups.append([o])
    return [np.array(group, dtype=np.intp) for group in groups]


def _slopes(samples: Samples, basis: Any, scale: Array, outputs: NDArray[np.intp], n_features: int) -> Slopes:
    n, n_inputs = samples.X.shape
    first = int(outputs[0])

    def parts() -> Iterator[Array]:
        for rows in blocks(n, n_inputs * (n_features + len(outputs))):
            target, known = samples.derivatives(rows)
            slopes = np.swapaxes(derivatives(basis, samples.X[rows]), 1, 2)  # (rows, n_inputs, n_features)
            joined = np.concatenate([slopes, np.swapaxes(target[:, outputs], 1, 2)], axis=2)
            root = np.sqrt(samples.weight[rows])[:, None] * scale[first]
            yield (root[..., None] * joined)[known[:, first]]

    matrix, targets = _reduced(parts(), n_features)
    return Slopes(outputs, scale[outputs].max(axis=1) / scale[first].max(), matrix, targets)
