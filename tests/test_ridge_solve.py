"""The solver: equal to least squares on the stacked matrix, on ill-conditioned and singular problems too."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import PolynomialFeatures

from gradwise import GradientEnhancedRidge
from gradwise._ridge_solve import least_squares, triangle


def stacked(matrix, targets, penalty, towards):
    """Least squares on the whole stack, shortest where not unique."""
    root = np.sqrt(penalty)
    rows = np.vstack([matrix, np.diag(root)])
    return np.linalg.lstsq(rows, np.vstack([targets, root[:, None] * towards]), rcond=1e-13)[0]


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    free=st.integers(0, 9),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
)
@settings(max_examples=80, deadline=None)
def test_equals_the_stacked_problem(rows, columns, free, seed, size):
    rng = np.random.default_rng(seed)
    matrix, targets = rng.standard_normal((rows, columns)), rng.standard_normal((rows, 2))
    penalty = size * rng.uniform(0.5, 2, columns)
    penalty[:free] = 0.0
    towards = rng.standard_normal((columns, 2)) * (penalty > 0)[:, None]
    result = least_squares(matrix, targets, penalty, towards)
    reference = stacked(matrix, targets, penalty, towards)
    if rows >= min(free, columns):  # otherwise not unique, and "shortest" is over the free columns only
        np.testing.assert_allclose(result, reference, rtol=1e-6, atol=1e-6)
    objective = [
        np.sum((matrix @ w - targets) ** 2) + np.sum(penalty[:, None] * (w - towards) ** 2) for w in (result, reference)
    ]
    assert objective[0] == pytest.approx(objective[1], rel=1e-7, abs=1e-7)


def test_shortest_of_many_solutions():
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((9, 2))
    # Wide; repeated columns; repeated in another unit, where the shortest solution is not that of unit columns.
    for matrix in (rng.standard_normal((4, 9)), np.tile(columns, 2), np.hstack([columns, 3 * columns])):
        targets = rng.standard_normal((len(matrix), 2))
        p = matrix.shape[1]
        result = least_squares(matrix, targets, np.zeros(p), np.zeros((p, 2)))
        np.testing.assert_allclose(result, np.linalg.pinv(matrix) @ targets, rtol=1e-10, atol=1e-10)


def test_columns_of_zeros_get_zero():
    matrix = np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    result = least_squares(matrix, matrix[:, 1:], np.zeros(2), np.zeros((2, 1)))
    np.testing.assert_allclose(result[:, 0], [0, 1], rtol=1e-15)
    assert not least_squares(np.zeros((3, 2)), np.ones((3, 1)), np.zeros(2), np.zeros((2, 1))).any()


def test_triangle_keeps_sums_of_squares():
    rows = np.random.default_rng(0).standard_normal((20, 4))
    factor = triangle(rows)
    assert factor.shape == (4, 4)
    np.testing.assert_allclose(factor.T @ factor, rows.T @ rows, rtol=1e-12, atol=1e-12)


# -- ill-conditioned ---------------------------------------------------------------------------------------------------


def test_hilbert_matrix_loses_no_more_than_least_squares():
    # Condition number 5e8: its square, which normal equations have, is beyond 1 / eps.
    size = 7
    matrix = scipy.linalg.hilbert(size)[np.tile(np.arange(size), 3)]
    truth = np.ones((size, 1))
    targets = matrix @ truth
    ours = least_squares(matrix, targets, np.zeros(size), np.zeros((size, 1)))
    reference = np.linalg.lstsq(matrix, targets, rcond=None)[0]
    normal = np.linalg.solve(matrix.T @ matrix, matrix.T @ targets)
    error, allowed = np.abs(ours - truth).max(), np.abs(reference - truth).max()
    assert error < 10 * allowed + 1e-9
    assert error < 1e-6
    assert np.abs(normal - truth).max() > 1e-2  # the test tells the two apart


@pytest.mark.parametrize("derivative_weight", [0.0, 1.0])
@pytest.mark.parametrize("degree", [5, 9, 12])
def test_high_degree_polynomials_in_raw_units_keep_what_least_squares_keeps(degree, derivative_weight):
    # x around 100 with a spread of 20: columns from 1e2 to 1e24, nearly parallel.
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(80, 120, (60, 1)), axis=0)
    y, dydx = np.sin(X[:, 0] / 10), np.cos(X[:, 0:1] / 10) / 10
    basis = PolynomialFeatures(degree)
    model = GradientEnhancedRidge(0.0, derivative_weight, basis=basis).fit(X, y, dydx)
    phi = basis.fit_transform(X)
    powers = np.arange(degree + 1)
    slopes = powers * X ** np.maximum(powers - 1, 0)
    factor = derivative_weight**0.5 * y.std() / np.sqrt(np.mean(dydx**2))
    rows, targets = np.vstack([phi, factor * slopes]), np.concatenate([y, factor * dydx[:, 0]])
    reference = np.linalg.lstsq(rows, targets, rcond=None)[0]
    ours = np.append(model.intercept_, model.coef_[1:])
    residuals = [np.linalg.norm(rows @ w - targets) for w in (ours, reference)]
    assert residuals[0] < 1.05 * residuals[1] + 1e-9
    fit = np.linalg.norm(model.predict(X) - y) / np.linalg.norm(y)
    assert fit < {5: 1e-1, 9: 1e-3, 12: 1e-3}[degree]
