"""Derivative targets from data and from functions: local linear fits, finite differences, a teacher's Jacobian."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn

from gradwise import estimate_gradients, finite_difference_jacobian
from gradwise.torch import teacher_jacobian

RNG = np.random.default_rng


def polynomial(seed: int, n_inputs: int, n_outputs: int):
    """A quadratic with several outputs, and its Jacobian."""
    linear = RNG(seed).standard_normal((n_outputs, n_inputs))
    hessian = RNG(seed + 1).standard_normal((n_outputs, n_inputs, n_inputs))
    hessian += hessian.swapaxes(1, 2)

    def f(x):
        return x @ linear.T + np.einsum("oij,ni,nj->no", hessian, x, x) / 2

    return f, lambda x: linear + np.einsum("oij,nj->noi", hessian, x)


# -- local linear fits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_inputs", [1, 2, 5, 20])
@pytest.mark.parametrize("n_neighbors", [None, "fewest", "all"])
def test_exact_on_a_plane_in_any_dimension(n_inputs, n_neighbors):
    n = 4 * n_inputs + 10
    X = RNG(0).standard_normal((n, n_inputs)) * np.geomspace(1e-3, 1e4, n_inputs) + 7
    slopes = RNG(1).standard_normal((3, n_inputs)) / np.geomspace(1e-3, 1e4, n_inputs)
    count = {"fewest": n_inputs + 2, "all": n}.get(n_neighbors, n_neighbors)
    gradients, error = estimate_gradients(X, X @ slopes.T - 5, n_neighbors=count, return_std=True)
    assert gradients.shape == error.shape == (n, 3, n_inputs)
    scale = X.std(0)
    # n_inputs + 2 neighbours may lie almost in a plane, which amplifies rounding.
    assert_allclose(gradients * scale, np.broadcast_to(slopes * scale, gradients.shape), atol=1e-8)
    assert_allclose(error * scale, 0, atol=1e-8)


def test_one_output_with_and_without_an_axis_of_its_own():
    X = RNG(0).uniform(size=(40, 2))
    y = np.sin(3 * X[:, 0]) * X[:, 1]
    flat = estimate_gradients(X, y, return_std=True)
    column = estimate_gradients(X, y[:, None], return_std=True)
    assert flat[0].shape == (40, 2)
    assert column[0].shape == (40, 1, 2)
    for one, other in zip(flat, column, strict=True):
        assert_allclose(one, other[:, 0], rtol=1e-12)


def test_equals_a_naive_weighted_regression_and_its_sandwich_variance():
    X, y = RNG(0).standard_normal((30, 3)) * [1, 10, 0.1], RNG(1).standard_normal(30)
    count = 12
    gradients, error = estimate_gradients(X, y, n_neighbors=count, return_std=True)
    standard = X / X.std(0)
    for i in (0, 7, 29):
        distance = np.linalg.norm(standard - standard[i], axis=1)
        near = np.argsort(distance)[:count]
        w = np.diag(np.exp(-2 * (distance[near] / distance[near].max()) ** 2))
        design = np.column_stack([np.ones(count), X[near]])
        operator = np.linalg.solve(design.T @ w @ design, design.T @ w)
        assert_allclose(gradients[i], (operator @ y[near])[1:], rtol=1e-9)
        maker = np.eye(count) - design @ operator  # residual = maker @ y
        residual = maker @ y[near]
        variance = residual @ w @ residual / np.trace(maker.T @ w @ maker)
        assert_allclose(error[i], np.sqrt(variance * np.square(operator).sum(1))[1:], rtol=1e-9)


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=2),
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2),
    st.floats(1e-6, 1e6),
    st.integers(0, 5),
)
@settings(max_examples=25)
def test_units_offsets_and_the_order_of_rows_do_not_matter(units, offset, unit_of_y, seed):
    X = RNG(0).uniform(size=(25, 2))
    y = np.exp(X[:, 0]) * np.cos(2 * X[:, 1])
    expected = estimate_gradients(X, y, return_std=True)
    order = RNG(seed).permutation(25)
    moved = (X * units + np.array(offset) * units)[order]
    for values, reference in zip(
        estimate_gradients(moved, unit_of_y * y[order], return_std=True), expected, strict=True
    ):
        # 1e-6: offsets a thousand times the spread cost three digits, local fits some more.
        assert_allclose(values * units / unit_of_y, reference[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n_inputs", [1, 2])
def test_converges_on_smooth_data(n_inputs):
    def error(n):
        X = RNG(n).uniform(-1, 1, (n, n_inputs))
        y = np.sin(3 * X).prod(1)
        slopes = np.stack(
            [3 * np.cos(3 * X[:, j]) * np.delete(np.sin(3 * X), j, 1).prod(1) for j in range(n_inputs)], 1
        )
        return np.sqrt(np.mean(np.square(estimate_gradients(X, y) - slopes)) / np.mean(np.square(slopes)))

    coarse, fine = error(100), error(1600)
    # To first order in the distance, n**(-1 / n_inputs); twice that for slack at the edges.
    assert fine < 2 * coarse * 16 ** (-1 / n_inputs)
    assert fine < 0.1


def test_more_neighbors_are_taken_where_there_is_noise():
    X = np.linspace(0, 1, 200)[:, None]
    slopes = 6 * np.cos(6 * X)

    def error(n_neighbors):
        noisy = [np.sin(6 * X[:, 0]) + 0.3 * RNG(seed).standard_normal(200) for seed in range(4)]
        return np.mean([np.square(estimate_gradients(X, y, n_neighbors=n_neighbors) - slopes) for y in noisy])

    assert error(None) < 0.05 * error(6)
    # Counts that predict values best are somewhat small for slopes.
    assert error(None) < 2 * np.mean([error(count) for count in (20, 40, 80)])


@pytest.mark.parametrize(("n_inputs", "n_neighbors"), [(1, 12), (3, 30), (8, 60)])
def test_standard_error_covers_noise_on_a_plane(n_inputs, n_neighbors):
    """About 95 % within two standard errors: each estimate's own degrees of freedom are 5 and more."""
    slopes = np.arange(1.0, n_inputs + 1)
    inside = []
    scores = []
    for seed in range(40):
        X = RNG(seed).uniform(size=(100, n_inputs))
        y = X @ slopes + 0.2 * RNG(1000 + seed).standard_normal(100)
        gradients, error = estimate_gradients(X, y, n_neighbors=n_neighbors, return_std=True)
        inside.append(np.abs(gradients - slopes) < 2 * error)
        scores.append(np.square(gradients - slopes) / np.square(error))
    assert 0.90 < np.mean(inside) < 0.97
    # The ratio of variances, whose mean is that of F: freedom / (freedom - 2) for a chi square denominator.
    assert 0.9 < np.median(scores) / 0.455 < 1.3  # 0.455: median of a chi square with one degree of freedom


def test_unknown_derivatives_are_nan_and_the_others_are_right():
    X = RNG(0).uniform(size=(60, 4))
    X[:, 1] = 0.1  # constant
    X[:, 3] = 2 * X[:, 2]  # not to be told from another
    y = np.column_stack([3 * X[:, 0] + X[:, 2], X[:, 2]])
    gradients, error = estimate_gradients(X, y, return_std=True)
    assert_allclose(gradients[:, :, 0], np.broadcast_to([3.0, 0.0], (60, 2)), atol=1e-9)
    assert np.isnan(gradients[:, :, 1:]).all()
    assert np.isnan(error[:, :, 1:]).all()


def test_duplicated_rows_and_constant_values():
    X = np.repeat(RNG(0).uniform(size=(15, 2)), 3, axis=0)
    assert_allclose(estimate_gradients(X, X @ [1.0, -2.0]), np.tile([1.0, -2.0], (45, 1)), atol=1e-9)
    assert_allclose(estimate_gradients(X, np.ones(45)), 0, atol=1e-12)
    assert np.isnan(estimate_gradients(np.zeros((20, 2)), np.zeros(20))).all()


def test_pieces_that_bound_the_memory_change_nothing(monkeypatch):
    X, y = RNG(0).uniform(size=(50, 3)), RNG(1).standard_normal((50, 2))
    whole = estimate_gradients(X, y, return_std=True)
    monkeypatch.setattr("gradwise._targets._CHUNK", 100)
    for one, other in zip(whole, estimate_gradients(X, y, return_std=True), strict=True):
        assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize(
    ("X", "y", "n_neighbors", "message"),
    [
        (np.zeros(5), np.zeros(5), None, "`X` must have shape"),
        (np.zeros((5, 0)), np.zeros(5), None, "`X` must have shape"),
        (np.zeros((5, 2)), np.zeros(4), None, "`y` must have shape"),
        (np.zeros((5, 2)), np.zeros((5, 1, 1)), None, "`y` must have shape"),
        (np.full((5, 2), np.nan), np.zeros(5), None, "`X` must be finite"),
        (np.zeros((5, 2)), np.full(5, np.inf), None, "`y` must be finite"),
        (np.zeros((5, 4)), np.zeros(5), None, "at least n_inputs"),
        (np.zeros((5, 2)), np.zeros(5), 3, "`n_neighbors` must be from"),
        (np.zeros((5, 2)), np.zeros(5), 6, "`n_neighbors` must be from"),
    ],
)
def test_unfit_data_is_refused(X, y, n_neighbors, message):
    with pytest.raises(ValueError, match=message):
        estimate_gradients(X, y, n_neighbors=n_neighbors)


# -- finite differences ------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 3), st.floats(0.01, 3.0), st.integers(0, 100))
def test_central_differences_are_exact_for_quadratics_at_any_step(n_inputs, n_outputs, step, seed):
    f, jacobian = polynomial(seed, n_inputs, n_outputs)
    X = RNG(seed).standard_normal((7, n_inputs))
    result = finite_difference_jacobian(f, X, step=step)
    assert_allclose(result, jacobian(X), atol=1e-10)  # rounding of values of size 30 over steps of 0.01


def test_accuracy_at_the_default_step_and_any_scale():
    scale = np.array([1e-6, 1.0, 1e6])
    X = scale * RNG(0).standard_normal((50, 3))

    def f(x):
        u = x / scale
        return np.column_stack([np.sin(u).sum(1), np.exp(u[:, 0] * u[:, 1]) + u[:, 2]])

    u = X / scale
    product = np.exp(u[:, 0] * u[:, 1])
    expected = np.stack([np.cos(u), np.column_stack([u[:, 1] * product, u[:, 0] * product, np.ones(50)])], 1)
    # eps**(2/3) is 4e-11; third derivatives are up to 200 here.
    assert_allclose(finite_difference_jacobian(f, X) * scale, expected, rtol=1e-7, atol=1e-8)
    assert_allclose(finite_difference_jacobian(f, X, scheme="forward") * scale, expected, rtol=1e-5, atol=1e-5)


def test_errors_fall_with_the_square_of_the_step_or_with_the_step():
    X = RNG(0).uniform(size=(20, 1))
    truth = np.exp(X)[:, :, None]

    def error(step, scheme):
        return np.abs(finite_difference_jacobian(lambda x: np.exp(x[:, 0]), X, step=step, scheme=scheme) - truth).max()

    assert error(0.02, "central") / error(0.01, "central") == pytest.approx(4, rel=0.01)
    assert error(0.02, "forward") / error(0.01, "forward") == pytest.approx(2, rel=0.02)


def test_large_offsets_constant_columns_and_single_rows():
    X = np.column_stack([1e6 + RNG(0).uniform(size=10), np.full(10, 0.1), np.zeros(10)])
    result = finite_difference_jacobian(lambda x: (x - [1e6, 0, 0]) @ [2.0, 3.0, 4.0], X)
    assert_allclose(result[:, 0], np.tile([2.0, 3.0, 4.0], (10, 1)), rtol=1e-8)
    assert_allclose(finite_difference_jacobian(np.square, [[3.0]]), [[[6.0]]], rtol=1e-9)


def test_few_calls_with_many_rows():
    sizes: list[int] = []

    def f(x):
        sizes.append(len(x))
        return x.sum(1)

    X = RNG(0).uniform(size=(10, 3))
    whole = finite_difference_jacobian(f, X)
    assert whole.shape == (10, 1, 3)
    assert sizes == [60]
    finite_difference_jacobian(f, X, scheme="forward")
    assert sizes == [60, 40]
    sizes.clear()
    assert_allclose(finite_difference_jacobian(f, X, batch_size=7), whole, rtol=1e-12)
    assert sizes == [7] * 8 + [4]


def test_float32_functions_get_larger_steps():
    X = RNG(0).uniform(-1, 1, (50, 2))
    result = finite_difference_jacobian(lambda x: np.sin(x.astype(np.float32)), X)
    assert_allclose(result, np.cos(X)[:, :, None] * np.eye(2), atol=2e-3)


def test_values_that_are_not_finite_make_unknown_derivatives():
    X = np.array([[1.0], [4.0], [-1.0]])
    with np.errstate(invalid="ignore"):
        result = finite_difference_jacobian(lambda x: np.sqrt(x[:, 0]), X)
    assert_allclose(result[:2, 0, 0], [0.5, 0.25], rtol=1e-8)
    assert np.isnan(result[2, 0, 0])
    overflowing = finite_difference_jacobian(lambda x: np.where(x > 1, np.inf, x), [[1.0], [0.0]], step=0.1)
    assert np.isnan(overflowing[0, 0, 0])
    assert overflowing[1, 0, 0] == pytest.approx(1)


def test_the_callers_points_are_left_alone_even_if_the_function_writes_into_its_own():
    X = RNG(0).uniform(size=(5, 2))
    before = X.copy()

    def f(x):
        x *= 2
        return x

    assert_allclose(finite_difference_jacobian(f, X), np.tile(2 * np.eye(2), (5, 1, 1)), atol=1e-9)
    assert_allclose(X, before, rtol=0)


@pytest.mark.parametrize(
    ("f", "keywords", "error", "message"),
    [
        (lambda x: x[:1], {}, ValueError, "`f` must return shape"),
        (lambda x: x.sum(), {}, ValueError, "`f` must return shape"),
        (lambda x: x[:, :, None], {}, ValueError, "`f` must return shape"),
        (lambda x: x[:, :0], {}, ValueError, "`f` must return shape"),
        (lambda x: x > 0, {}, TypeError, "real numbers"),
        (lambda x: x * 1j, {}, TypeError, "real numbers"),
        (lambda x: x[:, : 1 + (len(x) > 2)], {"batch_size": 3}, ValueError, "as many outputs"),
        (np.sin, {"step": [1.0]}, ValueError, "`step` must be a number or have shape"),
        (np.sin, {"step": 0.0}, ValueError, "`step` must be positive"),
        (np.sin, {"step": -1.0}, ValueError, "`step` must be positive"),
        (np.sin, {"step": 1e-30}, ValueError, "`step` must be positive and large enough"),
        (np.sin, {"scheme": "backward"}, ValueError, "`scheme`"),
        (np.sin, {"batch_size": 0}, ValueError, "`batch_size`"),
    ],
)
def test_unfit_functions_and_settings_are_refused(f, keywords, error, message):
    with pytest.raises(error, match=message):
        finite_difference_jacobian(f, np.ones((4, 2)), **keywords)


@pytest.mark.parametrize("X", [np.ones(3), np.ones((0, 2)), [[np.nan]]])
def test_unfit_points_are_refused(X):
    with pytest.raises(ValueError, match="`X` must be finite, of shape"):
        finite_difference_jacobian(np.sin, X)


# -- a teacher ---------------------------------------------------------------------------------------------------------


def test_teacher_jacobian_equals_finite_differences():
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.LayerNorm(16), nn.Linear(16, 2)
    ).double()
    teacher(torch.randn(64, 3).double())  # running statistics
    X = RNG(0).standard_normal((20, 3))
    targets = teacher_jacobian(teacher, torch.from_numpy(X))

    def f(x):
        with torch.no_grad():
            return teacher.eval()(torch.from_numpy(x)).numpy()

    assert_allclose(targets.numpy(), finite_difference_jacobian(f, X), rtol=1e-6, atol=1e-8)


def test_teacher_jacobian_of_a_fitted_function_approaches_its_derivative():
    """The whole way: values only, a teacher, its derivatives."""
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None]
    teacher = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = torch.optim.LBFGS(teacher.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(teacher(x), torch.sin(2 * x))
        loss.backward()
        return loss

    optimizer.step(closure)
    error = teacher_jacobian(teacher, x[5:-5])[:, 0] - 2 * torch.cos(2 * x[5:-5])
    assert error.abs().max() < 0.1
