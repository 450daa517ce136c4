"""The MLP regressor's mathematics: its own gradient, the objective, L-BFGS, Adam, members."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwise import gradient_matching_loss
from gradwise_torch._mlp_activations import ACTIVATIONS
from gradwise_torch._mlp_adam import adam, one_cycle
from gradwise_torch._mlp_data import as_targets, prepare
from gradwise_torch._mlp_lbfgs import Minimum, lbfgs, minimise_all
from gradwise_torch._mlp_network import Architecture, Pass
from gradwise_torch._mlp_objective import Objective
from gradwise_torch._mlp_training import best_of, train_lbfgs

MEMBERS, ROWS, INPUTS = 2, 7, 3


def by_autograd(architecture: Architecture, theta: Any, x: Any, first: int, on_values: Any, on_jacobian: Any) -> Any:
    """Values, Jacobian, and the gradient of their sums with these factors, from double backward passes."""
    theta, x = theta.clone().requires_grad_(), x.clone().requires_grad_()
    values = architecture.values(theta, x)
    rows = [
        [torch.autograd.grad(values[m, :, o].sum(), x, create_graph=True)[0] for o in range(values.shape[2])]
        for m in range(len(theta))
    ]
    jacobian = torch.stack([torch.stack(row, dim=1) for row in rows])[:, first:]
    total = (values * on_values).sum() + (jacobian * on_jacobian).sum()
    return values, jacobian, torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    ("hidden", "n_outputs", "first"), [((5,), 1, 0), ((5, 4, 6), 2, 0), ((4, 5), 2, 3), ((), 2, 0)]
)
def test_gradient_equals_autograd(activation: str, hidden: tuple[int, ...], n_outputs: int, first: int) -> None:
    architecture = Architecture((INPUTS, *hidden, n_outputs), activation)
    theta = torch.tensor(np.stack([architecture.initial(seed) for seed in range(MEMBERS)]))
    rng = np.random.default_rng(0)
    x, on_values = (
        torch.tensor(rng.normal(size=(ROWS, INPUTS))),
        torch.tensor(rng.normal(size=(MEMBERS, ROWS, n_outputs))),
    )
    on_jacobian = torch.tensor(rng.normal(size=(MEMBERS, ROWS - first, n_outputs, INPUTS)))
    run = Pass(architecture, theta, x, first)
    values, jacobian, gradient = by_autograd(architecture, theta, x, first, on_values, on_jacobian)
    torch.testing.assert_close(run.values, values)
    torch.testing.assert_close(run.jacobian, jacobian)
    torch.testing.assert_close(run.gradient(on_values, on_jacobian), gradient)


def objective(
    *,
    shared: bool = True,
    loss: str = "mse",
    weight: Any = 0.7,
    partly: bool = True,
    alpha: float = 0.1,
    members: int = 0,
) -> tuple[Objective, Architecture]:
    rng = np.random.default_rng(1)
    n_outputs = 2
    x, y, sample_weight = rng.normal(size=(9, INPUTS)), rng.normal(size=(9, n_outputs)), rng.uniform(0.1, 2, 9)
    where = x if shared else rng.normal(size=(6, INPUTS))
    dydx = rng.normal(size=(len(where), n_outputs, INPUTS))
    if partly:
        dydx[0, 0, 0] = dydx[2] = np.nan
    derivatives = as_targets(dydx, None, where, sample_weight if shared else None, n_outputs, name="X")
    data, _ = prepare(x, y, sample_weight, derivatives, scale="block", shared=shared)
    architecture = Architecture((INPUTS, 5, 4, n_outputs), "tanh")
    folds: Any = None
    if members:
        folds = tuple(rng.integers(0, 2, (members, rows)) * 1.0 for rows in (9, len(where)))
    made = Objective(
        architecture, data, derivative_weight=weight, alpha=alpha, loss=loss, dtype=torch.float64, folds=folds
    )
    return made, architecture


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("members", [0, 2])
def test_gradient_of_the_objective_equals_central_differences(loss: str, shared: bool, members: int) -> None:
    weight = np.array([0.3, 2.0]) if members else 0.7
    made, architecture = objective(loss=loss, shared=shared, weight=weight, members=members)
    theta = torch.tensor(np.stack([architecture.initial(seed) for seed in range(2)]))
    gradient, step = made(theta)[1], 1e-6
    for index in range(0, architecture.n_parameters, 3):
        move = torch.zeros_like(theta)
        move[:, index] = step
        difference = (made(theta + move)[0] - made(theta - move)[0]) / (2 * step)
        torch.testing.assert_close(gradient[:, index], difference, rtol=1e-5, atol=1e-8)


def test_the_objective_is_what_the_docstring_says() -> None:
    """From the raw data, with the core's loss: standard deviations and the block scale written out."""
    rng = np.random.default_rng(2)
    x, y, dydx = rng.normal(size=(8, INPUTS)) * [1, 10, 100], rng.normal(size=8) * 5 + 3, rng.normal(size=(8, INPUTS))
    derivatives = as_targets(dydx, None, x, None, 1, name="X")
    data, _ = prepare(x, y[:, None], None, derivatives, scale="block", shared=True)
    architecture = Architecture((INPUTS, 5, 1), "silu")
    made = Objective(architecture, data, derivative_weight=0.7, alpha=0.3, loss="mse", dtype=torch.float64)
    theta = architecture.initial(0)
    sx, sy = x.std(axis=0), y.std()
    run = Pass(architecture, torch.tensor(theta[None]), torch.tensor((x - x.mean(axis=0)) / sx), 0)
    assert run.jacobian is not None
    prediction, slopes = run.values[0, :, 0].numpy() * sy + y.mean(), run.jacobian[0].numpy() * sy / sx
    scale = sx / np.sqrt(np.mean(np.sum((sx * dydx) ** 2, axis=1)))  # relative to sigma_y
    expected = (
        np.mean((prediction - y) ** 2) / sy**2
        + 0.7 * gradient_matching_loss(slopes, dydx[:, None], scale=scale[None], xp=np)
        + 0.3 / 8 * np.sum(theta[architecture.penalised() > 0] ** 2)
    )
    assert made(torch.tensor(theta[None]))[0].item() == pytest.approx(expected, rel=1e-12)
    weights = [weight.numel() for weight, _ in architecture.layers(torch.tensor(theta[None]))]
    assert architecture.penalised().sum() == sum(weights)


def test_batches_average_to_the_whole() -> None:
    made, architecture = objective(partly=False, alpha=0.0)
    made.weight = made.entry_weight = None  # weights are relative to all rows, not to those of a batch
    theta = torch.tensor(architecture.initial(0)[None])
    parts = [torch.arange(0, 3), torch.arange(3, 6), torch.arange(6, 9)]
    losses = [made(theta, made.batch(part, part))[0] for part in parts]
    whole = made(theta, made.batch(slice(None), slice(None)))[0]
    torch.testing.assert_close(sum(losses) / 3, whole)


def quadratic(points: Any) -> tuple[Any, Any]:
    curvatures = np.array([1.0, 10.0, 100.0])
    return 0.5 * np.sum(curvatures * points**2, axis=1), curvatures * points


def rosenbrock(points: Any) -> tuple[Any, Any]:
    x, y = points.T
    gradient = np.stack([-400 * x * (y - x * x) - 2 * (1 - x), 200 * (y - x * x)], axis=1)
    return 100 * (y - x * x) ** 2 + (1 - x) ** 2, gradient


@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_lbfgs_finds_minima(seed: int) -> None:
    starts = np.random.default_rng(seed).normal(size=(3, 3))
    searches = [lbfgs(start, max_iter=200, tol=0.0, memory=5, report=None) for start in starts]
    for minimum in minimise_all(quadratic, searches):
        assert minimum.converged
        np.testing.assert_allclose(minimum.theta, 0, atol=1e-6)
        assert all(later <= earlier for earlier, later in zip(minimum.loss_curve, minimum.loss_curve[1:], strict=False))
    searches = [lbfgs(start[:2], max_iter=500, tol=0.0, memory=5, report=None) for start in starts]
    for minimum in minimise_all(rosenbrock, searches):
        np.testing.assert_allclose(minimum.theta, 1, atol=1e-5)


def test_lbfgs_says_whether_it_converged_and_stands_infinite_losses() -> None:
    start = np.array([-1.2, 1.0])
    (short,) = minimise_all(rosenbrock, [lbfgs(start, max_iter=3, tol=0.0, memory=5, report=None)])
    assert (short.converged, len(short.loss_curve)) == (False, 3)
    assert start.tolist() == [-1.2, 1.0]

    def barrier(points: Any) -> tuple[Any, Any]:  # minus the logarithm's domain ends at 0
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = np.where(points[:, 0] > 0, points[:, 0] - np.log(points[:, 0]), np.inf)
            return loss, np.where(points > 0, 1 - 1 / points, np.nan)

    (found,) = minimise_all(barrier, [lbfgs(np.array([1e-3]), max_iter=100, tol=0.0, memory=5, report=None)])
    assert found.theta[0] == pytest.approx(1.0, abs=1e-6)
    (still,) = minimise_all(quadratic, [lbfgs(np.zeros(3), max_iter=5, tol=0.0, memory=5, report=None)])
    assert (still.converged, still.loss) == (True, 0.0)


def test_lbfgs_has_converged_at_max_iter_if_the_last_gains_were_negligible() -> None:
    def flat(
        points: Any,
    ) -> tuple[Any, Any]:  # no relative gain is ever small
        return np.sum(points**4, axis=1), 4 * points**3

    def after(max_iter: int) -> Minimum:
        start = np.array([3.0, -2.0])
        return minimise_all(flat, [lbfgs(start, max_iter=max_iter, tol=1e-3, memory=5, report=None)])[0]

    assert [(len(found.loss_curve), found.converged) for found in (after(11), after(30))] == [(11, False), (30, True)]
    assert after(30).loss_curve[-11] - after(30).loss <= 1e-5 < after(11).loss_curve[0] - after(11).loss


def test_members_together_are_members_alone() -> None:
    made, architecture = objective()
    starts = np.stack([architecture.initial(seed) for seed in range(3)])
    together = train_lbfgs(made, starts, max_iter=20, tol=0.0)
    for start, member in zip(starts, together, strict=True):
        (alone,) = train_lbfgs(made, start[None], max_iter=20, tol=0.0)
        # 1e-6: rounding of batched products, grown over 20 iterations.
        np.testing.assert_allclose(member.theta, alone.theta, rtol=1e-6, atol=1e-6)
    how: dict[str, Any] = {
        "n_epochs": 5,
        "batch_size": 4,
        "learning_rate": 0.01,
        "seed": 0,
        "patience": 9,
        "tol": 0.0,
    }
    together = adam(made, starts, validation=None, report=None, **how)
    for start, member in zip(starts, together, strict=True):
        (alone,) = adam(made, start[None], validation=None, report=None, **how)
        np.testing.assert_allclose(member.theta, alone.theta, rtol=1e-9, atol=1e-12)


def test_adam_takes_the_steps_of_torch() -> None:
    made, architecture = objective(partly=False)
    start = architecture.initial(0)
    (ours,) = adam(
        made, start[None], n_epochs=5, batch_size=99, learning_rate=0.01, seed=0, validation=None, patience=1, tol=0.0,
        report=None,
    )  # fmt: skip
    theta = torch.tensor(start[None])
    optimizer = torch.optim.Adam([theta], lr=0.01)
    for step in range(5):
        theta.grad = made(theta)[1]
        optimizer.param_groups[0]["lr"] = one_cycle(step, 5, 0.01)
        optimizer.step()
    # 1e-8: rows are summed in another order, and early steps of Adam hardly see the size of a gradient.
    np.testing.assert_allclose(ours.theta, theta[0].numpy(), rtol=1e-8, atol=1e-10)


def test_one_cycle_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = np.array([one_cycle(step, 1000, 0.1) for step in range(1000)])
    assert np.argmax(rates) in {99, 100}
    assert rates.max() == pytest.approx(0.1, rel=0.01)
    assert rates[0] < 0.001
    assert rates[-1] < 1e-6


def test_best_of_takes_the_least_finite_loss() -> None:
    minima = [Minimum(np.zeros(1), loss, [], True) for loss in (3.0, 1.0, float("nan"), 2.0)]
    assert [minimum.loss for minimum in best_of(minima, 2)] == [1.0, 2.0]
    assert [minimum.loss for minimum in best_of(minima, 4)] == [1.0]


def test_adam_gives_every_member_its_best_epoch_and_stops_when_all_have_waited() -> None:
    made, architecture = objective()
    starts = np.stack([architecture.initial(seed) for seed in range(2)])
    script = torch.tensor([[3.0, 2.0], [1.0, 5.0], [2.0, 1.0], [4.0, 4.0], [4.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def validation(theta: torch.Tensor) -> torch.Tensor:
        seen.append(theta.clone())
        return script[len(seen) - 1]

    minima = adam(
        made, starts, n_epochs=6, batch_size=4, learning_rate=0.1, seed=0, validation=validation, patience=2, tol=0.0,
        report=None,
    )  # fmt: skip
    assert len(seen) == 5  # the last gain was in the third epoch
    np.testing.assert_array_equal(minima[0].theta, seen[1][0].numpy())
    np.testing.assert_array_equal(minima[1].theta, seen[2][1].numpy())
    assert minima[0].loss == pytest.approx(made(seen[1])[0][0].item())
