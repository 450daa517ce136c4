"""The gradient-matching module: its formula, its gradient against finite differences, and everything around it."""

import copy
import math
import pickle
import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwise_torch._derivatives import value_and_jacobian
from gradwise_torch._matching import GradientMatching
from gradwise_torch._projections import draw_outputs

DOUBLE = torch.float64
N, OUTPUTS, INPUTS = 6, 3, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x)[:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def mlp(*middle: nn.Module, n_outputs: int = OUTPUTS) -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, 5), *middle, nn.Tanh(), nn.Linear(5, n_outputs))


MODELS = {
    "mlp": (mlp, (INPUTS,)),
    "layer norm": (lambda: mlp(nn.LayerNorm(5)), (INPUTS,)),
    "images": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)), (1, 3, 3)),
    "attention": (Attention, (2, 4)),
    "lstm": (Recurrent, (3, 2)),
}


def setup(name="mlp", seed=0) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return a model, inputs, values and derivative targets."""
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    model = build().to(DOUBLE)
    x = torch.randn(N, *shape, dtype=DOUBLE) * torch.linspace(0.5, 2, shape[-1], dtype=DOUBLE)
    n_outputs = model.eval()(x).shape[1]
    model.train()
    target = torch.randn(N, n_outputs, math.prod(shape), dtype=DOUBLE)
    return model, x, 2 * torch.randn(N, n_outputs, dtype=DOUBLE), target


def raw(**kwargs) -> GradientMatching:
    return GradientMatching(scale="none", **kwargs)


def fitted(x, y, target, **kwargs) -> GradientMatching:
    return GradientMatching(**kwargs).fit(x, y, target)


def grads(loss: Tensor, model: nn.Module) -> list[Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def naive(model, x, y, target, mask=None):
    """DESIGN.md's formula for scale "block", one output after the other, with numpy."""
    with torch.no_grad():
        predicted = value_and_jacobian(model, x)[1].numpy()
    known = ~np.isnan(target.numpy()) if mask is None else mask.numpy()
    sigma_x = x.flatten(1).numpy().std(axis=0)
    numerator = denominator = 0.0
    for o in range(target.shape[1]):
        squares = [(sigma_x[j] * target[i, o, j].item()) ** 2 for i, j in np.argwhere(known[:, o])]
        variance = sigma_x.size * np.mean(squares)  # mean_i sum_j, over what is known
        factor = y[:, o].numpy().var() / variance
        for i, j in np.argwhere(known[:, o]):
            numerator += factor * (sigma_x[j] * (predicted[i, o, j] - target[i, o, j].item())) ** 2
        denominator += known[:, o].sum()
    return sigma_x.size * numerator / denominator


@pytest.mark.parametrize("name", MODELS)
def test_the_formula(name):
    model, x, y, target = setup(name)
    target[0, :, 1] = math.nan
    target[2, 0] = math.nan
    loss = fitted(x, y, target)(model, x, target)
    assert loss.item() == pytest.approx(naive(model, x, y, target), rel=1e-10)
    assert fitted(x, y, target, derivative_weight=0.3)(model, x, target).item() == pytest.approx(0.3 * loss.item())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("loss_name", ["mse", "huber"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_equals_central_differences(name, loss_name, train):
    model, x, y, target = setup(name)
    model.train(train)
    target[1, 0, :2] = math.nan
    weight = torch.rand(N, dtype=DOUBLE)
    matching = fitted(x, y, target, loss=loss_name)

    def loss():
        return matching(model, x, target, sample_weight=weight)

    exact = torch.cat([gradient.reshape(-1) for gradient in grads(loss(), model)])
    generator = torch.Generator().manual_seed(0)
    parameters = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for _ in range(3):
        direction = torch.randn(len(parameters), dtype=DOUBLE, generator=generator)
        ends = []
        for step in (1e-5, -1e-5):
            torch.nn.utils.vector_to_parameters(parameters + step * direction, model.parameters())
            ends.append(loss().item())
        torch.nn.utils.vector_to_parameters(parameters.clone(), model.parameters())
        # 1e-6: rounding of a central difference with step 1e-5 in float64
        assert (exact @ direction).item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)


def test_with_values_is_one_forward_pass_and_equals_the_plain_call():
    model, x, y, target = setup()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    matching = fitted(x, y, target)
    expected = matching(model, x, target)
    passes.clear()
    values, loss = matching.with_values(model, x, target)
    assert len(passes) == 1
    torch.testing.assert_close(values, model(x))
    assert loss.item() == expected.item()
    value_loss = (values - y).square().mean()
    total = grads(value_loss + loss, model)
    for together, a, b in zip(total, grads((model(x) - y).square().mean(), model), grads(expected, model), strict=True):
        torch.testing.assert_close(together, a + b)


def test_from_outputs_equals_the_plain_call():
    model, x, y, target = setup("images")
    matching = fitted(x, y, target)
    leaf = x.clone().requires_grad_()
    loss = matching.from_outputs(model(leaf), wrt=leaf, target=target)
    torch.testing.assert_close(loss, matching(model, x, target))
    flipped = matching.from_outputs(model(leaf), wrt=leaf, target=-target, sign=-1)
    torch.testing.assert_close(flipped, loss)


def test_zero_if_and_only_if_equal():
    model, x, y, target = setup()
    own = value_and_jacobian(model, x)[1].detach()
    matching = fitted(x, y, target)
    assert matching(model, x, own).item() == 0
    own[3, 1, 2] += 1e-4
    assert matching(model, x, own).item() > 0


# Targets


def test_accepted_target_shapes_and_all_others():
    model, x, y, target = setup("images")
    loss = fitted(x, y, target)(model, x, target)
    as_images = target.reshape(N, 2, 1, 3, 3)
    torch.testing.assert_close(fitted(x, y, as_images)(model, x, as_images), loss)
    matching = fitted(x, y, target)
    for shape in [(N, 9), (1, 2, 9), (N, 1, 9), (N, 9, 2), (2, 9), (N, 2, 3, 3), (N, 1, 3, 3)]:
        with pytest.raises(
            ValueError, match=r"`target_jacobian` must have shape \(6, 2, 9\) or \(6, 2, 1, 3, 3\); got"
        ):
            matching(model, x, torch.zeros(shape, dtype=DOUBLE))
        with pytest.raises(ValueError, match="`mask` must have shape"):
            matching(model, x, target, mask=torch.ones(shape, dtype=torch.bool))
    scalar = nn.Sequential(model, nn.Linear(2, 1).double(), nn.Flatten(0))
    one = target[:, :1]
    expected = raw()(scalar, x, one)
    torch.testing.assert_close(raw()(scalar, x, one.reshape(x.shape)), expected)
    with pytest.raises(ValueError, match="`dydx` must have shape"):
        GradientMatching().fit(x, y, one)
    with pytest.raises(ValueError, match="`y` must have one row for each of the 6 rows of `X`"):
        GradientMatching().fit(x, y[:-1], target)


def test_masks_and_nan_and_weights():
    model, x, y, target = setup()
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    holes = torch.where(mask, target, math.nan)
    torch.testing.assert_close(fitted(x, y, holes)(model, x, holes).item(), naive(model, x, y, target, mask))
    matching = fitted(x, y, holes)
    loss = matching(model, x, holes)
    torch.testing.assert_close(matching(model, x, target, mask), loss)
    torch.testing.assert_close(matching(model, x, holes, mask), loss)
    for gradient in grads(loss, model):
        assert gradient.isfinite().all()
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0, 3.0], dtype=DOUBLE)
    keep = weight > 0
    torch.testing.assert_close(
        matching(model, x, holes, sample_weight=weight),
        matching(model, x[keep], holes[keep], sample_weight=weight[keep]),
    )
    nothing = matching(model, x, torch.full_like(target, math.nan))
    assert nothing.item() == 0
    assert all((gradient == 0).all() for gradient in grads(nothing, model))


def test_targets_whose_sum_overflows_or_is_cancelled_by_infinities():
    model, x, _, target = setup()
    model, x, target = model.float(), x.float(), target.float()
    known = torch.ones_like(target, dtype=torch.bool)
    huge = target.clone()
    huge[:, 0] = 1e38  # the sum of these is infinite in float32
    torch.testing.assert_close(raw(loss="huber")(model, x, huge), raw(loss="huber")(model, x, huge, known))
    huge[0, 0, 0] = math.nan
    known[0, 0, 0] = False
    loss = raw(loss="huber")(model, x, huge)
    torch.testing.assert_close(loss, raw(loss="huber")(model, x, huge.nan_to_num(0.0), known))
    assert not loss.isnan()
    target[0, 0, 0], target[1, 0, 0] = math.inf, -math.inf  # no unknown entries, though their sum is NaN
    assert raw()(model, x, target).item() == math.inf


def test_directional_targets_equal_the_contracted_jacobian():
    model, x, y, _ = setup("layer norm")
    tangents = torch.randn(N, 2, INPUTS, dtype=DOUBLE)
    target = torch.randn(N, OUTPUTS, 2, dtype=DOUBLE)
    target[0, 1, 0] = math.nan
    predicted = torch.einsum("boj,bdj->bod", value_and_jacobian(model, x)[1], tangents)
    known = ~target.isnan()
    expected = (predicted - target)[known].square().mean()
    loss = raw()(model, x, tangents=tangents, target_jvp=target)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(grads(loss, model), grads(expected, model), strict=True):
        torch.testing.assert_close(a, b)
    matching = GradientMatching().fit(x, y, target_jvp=target)
    factor = y.var(dim=0, correction=0) / torch.stack(
        [target[:, o][known[:, o]].square().mean() for o in range(OUTPUTS)]
    )
    scaled = (factor[:, None] * (predicted - target).square())[known].mean()
    torch.testing.assert_close(matching(model, x, tangents=tangents, target_jvp=target), scaled)
    one = raw()(model, x, tangents=tangents[:, 1], target_jvp=target[:, :, 1])
    torch.testing.assert_close(one, (predicted - target)[:, :, 1].square().mean())
    for shape in [(N, OUTPUTS), (N, OUTPUTS, 1), (N, 1, 2), (N, 2, OUTPUTS)]:
        with pytest.raises(ValueError, match=r"`target_jvp` must have shape \(6, 3, 2\)"):
            raw()(model, x, tangents=tangents, target_jvp=torch.zeros(shape, dtype=DOUBLE))
    for shape in [(N, 3), (1, 2, INPUTS), (N, INPUTS, 2)]:
        with pytest.raises(ValueError, match="`tangents` must have shape"):
            raw()(model, x, tangents=torch.zeros(shape, dtype=DOUBLE), target_jvp=target)
    with pytest.raises(ValueError, match="`tangents` must go with scale 'block' or 'none'"):
        GradientMatching(scale="per_input")(model, x, tangents=tangents, target_jvp=target)


def test_r1_and_gradient_penalty_equal_the_hand_written_ones():
    torch.manual_seed(0)
    critic = mlp(n_outputs=1).double()
    x = torch.randn(N, INPUTS, dtype=DOUBLE)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
    r1 = gradient.square().sum(dim=1).mean()
    penalty = (gradient.norm(dim=1) - 1).square().mean()
    losses = {
        "r1": (raw()(critic, x), r1),
        "wgan-gp": (raw()(critic, x, target_norm=1.0), penalty),
        "outputs": (raw().from_outputs(critic(leaf), wrt=leaf, target_norm=torch.ones(N, dtype=DOUBLE)), penalty),
    }
    for loss, expected in losses.values():
        torch.testing.assert_close(loss, expected)
        for a, b in zip(grads(loss, critic), grads(expected, critic), strict=True):
            torch.testing.assert_close(a, b)
    flat = nn.Linear(INPUTS, 1).double()
    nn.init.zeros_(flat.weight)  # norm 0, where the usual sqrt has a NaN gradient
    assert all(g.isfinite().all() for g in grads(raw()(flat, x, target_norm=1.0), flat))
    with pytest.raises(ValueError, match=r"`target_norm` must have shape \(6, 1\) or \(6,\)"):
        raw()(critic, x, target_norm=torch.ones(1, dtype=DOUBLE))
    for kwargs in ({}, {"target_norm": 1.0}):
        with pytest.raises(ValueError, match="must go with scale 'none'"):
            GradientMatching()(critic, x, **kwargs)


def test_forces():
    torch.manual_seed(0)
    stiffness = nn.Parameter(torch.rand(1, dtype=DOUBLE))
    positions = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True)
    structure = torch.tensor([0, 0, 1, 1, 1])  # two structures, five atoms

    def energy(positions):
        return torch.zeros(2, dtype=DOUBLE).index_add(0, structure, stiffness * positions.pow(4).sum(dim=1))

    forces = torch.zeros(5, 3, dtype=DOUBLE)
    for atom, axis in product(range(5), range(3)):
        step = torch.zeros(5, 3, dtype=DOUBLE)
        step[atom, axis] = 1e-5
        difference = (energy(positions + step) - energy(positions - step)).sum()
        forces[atom, axis] = -difference.item() / 2e-5
    matching = raw()
    y = energy(positions)
    assert matching.from_outputs(y, wrt=positions, target=forces, sign=-1).item() < 1e-15
    for outputs in (y, y[:, None], y.sum()):
        loss = matching.from_outputs(outputs, wrt=positions, target=2 * forces, sign=-1)
        assert loss.item() == pytest.approx(forces.square().sum(dim=1).mean().item(), rel=1e-6)
        assert grads(loss, nn.ParameterList([stiffness]))[0].abs() > 0
        (y.sum() + loss).backward(retain_graph=True)  # the graph of y is kept, for the values
    with pytest.raises(ValueError, match="`sign` must be 1 or -1"):
        matching.from_outputs(y, wrt=positions, target=forces, sign=2)
    with pytest.raises(ValueError, match="`wrt` must require gradients"):
        matching.from_outputs(y, wrt=positions.detach(), target=forces)
    with pytest.raises(ValueError, match="`y` must require gradients"):
        matching.from_outputs(y.detach(), wrt=positions, target=forces)
    with pytest.raises(ValueError, match="must depend on"):
        matching.from_outputs(stiffness * 2, wrt=positions, target=forces)
    with pytest.raises(ValueError, match=r"`target` must have shape \(5, 1, 3\) or \(5, 3\)"):
        matching.from_outputs(energy(positions), wrt=positions, target=forces[:2])


# Projections


@pytest.mark.parametrize("loss_name", ["mse", "huber"])
@pytest.mark.parametrize("scale", ["block", "per_input", "none"])
@pytest.mark.parametrize("n", [1, 2])
def test_projections_are_unbiased(n, scale, loss_name):
    model, x, y, target = setup()
    target[0, 1, :2] = math.nan
    target[3, 2] = math.nan
    full = fitted(x, y, target, scale=scale, loss=loss_name)
    weight = torch.rand(N, dtype=DOUBLE)
    expected = full(model, x, target, sample_weight=weight)
    matching = fitted(x, y, target, scale=scale, loss=loss_name, projections=n, seed=1)
    # Every choice of outputs for all samples at once; the loss is a sum over samples, so that their average is exact.
    choices = [c for c in product(range(OUTPUTS), repeat=n) if len(set(c)) == n]
    losses = []
    for choice in choices:
        matching._choose = lambda *_, c=choice: torch.tensor([c] * N)  # type: ignore[method-assign] - a fixed draw
        losses.append(matching(model, x, target, sample_weight=weight))
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(mean, expected)
    assert torch.stack(losses).std() > 0
    for a, b in zip(grads(mean, model), grads(expected, model), strict=True):
        torch.testing.assert_close(a, b)


def test_projections_that_are_drawn_average_to_the_full_loss_and_cost_one_pass():
    model, x, y, target = setup()
    expected = fitted(x, y, target)(model, x, target).item()
    matching = fitted(x, y, target, projections=1, seed=3)
    state = torch.get_rng_state()
    draws = [matching(model, x, target).item() for _ in range(400)]
    assert torch.equal(torch.get_rng_state(), state)  # the user's random stream is untouched
    assert abs(np.mean(draws) - expected) < 4 * np.std(draws) / 20  # four standard errors
    assert fitted(x, y, target, projections=3)(model, x, target).item() == pytest.approx(expected, rel=1e-12)
    again = fitted(x, y, target, projections=1, seed=3)
    assert [again(model, x, target).item() for _ in range(5)] == draws[:5]
    other = fitted(x, y, target, projections=1, seed=4)
    assert [other(model, x, target).item() for _ in range(5)] != draws[:5]
    directional = raw(projections=2, seed=0)
    tangents, jvp_target = torch.randn(N, INPUTS, dtype=DOUBLE), torch.randn(N, OUTPUTS, dtype=DOUBLE)
    full = raw()(model, x, tangents=tangents, target_jvp=jvp_target).item()
    draws = [directional(model, x, tangents=tangents, target_jvp=jvp_target).item() for _ in range(200)]
    assert abs(np.mean(draws) - full) < 4 * np.std(draws) / 200**0.5


def test_draws_are_without_replacement_uniform_and_keyed():
    rows = draw_outputs((1, 0), (0, 0), 3000, 4, 2)
    assert (rows[:, 0] != rows[:, 1]).all()
    assert np.bincount(rows.reshape(-1).numpy()) == pytest.approx([1500] * 4, abs=130)  # four standard deviations
    assert torch.equal(rows, draw_outputs((1, 0), (0, 0), 3000, 4, 2))
    for key, step in [((2, 0), (0, 0)), ((1, 1), (0, 0)), ((1, 0), (1, 0)), ((1, 0), (0, 1))]:
        assert not torch.equal(rows, draw_outputs(key, step, 3000, 4, 2))


def test_draws_that_are_kept_are_those_of_their_arguments():
    together = torch.cat([draw_outputs((5, 0), (call, 0), 50, 6, 2) for call in range(60)])
    assert np.bincount(together.reshape(-1).numpy()) == pytest.approx([1000] * 6, abs=110)  # four standard deviations
    for call in (0, 31, 59):  # other sizes and phases in between change nothing
        draw_outputs((5, 0), (call, 1), 50, 6, 2)
        draw_outputs((5, 0), (call, 0), 7, 6, 2)
        assert torch.equal(draw_outputs((5, 0), (call, 0), 50, 6, 2), together[50 * call :][:50])
    for n_rows in (1, 3, 6):
        rows = draw_outputs((5, 0), (3, 0), 200, 6, n_rows)
        assert all(len(set(row)) == n_rows for row in rows.tolist())
    model, x, y, target = setup()
    matching = fitted(x, y, target, projections=1, seed=8)
    with torch.inference_mode():
        matching(model, x, target)
    matching(model, x, target).backward()  # the draw made in inference mode is saved by autograd


def test_many_outputs_suggest_projections_once():
    model, x = mlp(n_outputs=11), torch.randn(N, INPUTS)
    matching = raw()
    with pytest.warns(UserWarning, match="matching all 11 outputs"):
        matching(model, x, torch.zeros(N, 11, INPUTS))
    matching(model, x, torch.zeros(N, 11, INPUTS))


# Weight, interval, evaluation, state


def test_interval_and_schedule_and_weight_zero():
    model, x, y, target = setup()
    full = fitted(x, y, target)(model, x, target).item()
    matching = fitted(x, y, target, interval=3)
    losses = [matching(model, x, target) for _ in range(7)]
    assert [loss.item() for loss in losses] == pytest.approx([3 * full, 0, 0, 3 * full, 0, 0, 3 * full])
    losses[1].backward()  # nothing to do, but no error in a loop without another term
    assert all(parameter.grad is None for parameter in model.parameters())
    assert matching.calls.item() == 7
    schedule = fitted(x, y, target, derivative_weight=lambda call: 0.5**call)
    assert [schedule(model, x, target).item() for _ in range(3)] == pytest.approx([full, full / 2, full / 4])
    off = GradientMatching(0.0)
    calls: list[int] = []

    def counting(x):
        calls.append(1)
        return model(x)

    assert off(counting, x).item() == 0
    assert calls == []
    values, loss = off.with_values(counting, x)
    assert len(calls) == 1
    assert loss.item() == 0
    torch.testing.assert_close(values, model(x))
    assert off.from_outputs(y, wrt=x).item() == 0
    assert GradientMatching(0.0, reduction="none")(model, x).shape == (N,)
    negative = GradientMatching(lambda call: -1.0)
    with pytest.raises(ValueError, match="`derivative_weight` must be finite and not negative"):
        negative(model, x, target)


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_builds_no_graph_and_counts_nothing(how):
    model, x, y, target = setup("attention")
    expected = fitted(x, y, target)(model, x, target).item()
    matching = fitted(x, y, target, interval=4)
    context: Any = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    matching.train(how != "eval")
    for _ in range(3):
        with context():
            inputs, goal = x * 1, target * 1  # inference tensors in inference mode
            weight = torch.ones(N, dtype=DOUBLE)
            loss = matching(model, inputs, goal)
            values, again = matching.with_values(model, inputs, goal, sample_weight=weight)
        assert loss.item() == pytest.approx(expected)
        assert again.item() == pytest.approx(expected)
        assert not loss.requires_grad
        assert values.requires_grad == (how == "eval")
    assert matching.calls.item() == 0
    leaf = x.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = model(leaf)
    with context():
        loss = matching.from_outputs(outputs, wrt=leaf, target=target)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected)


def test_state_round_trips_in_the_middle_of_training(tmp_path):
    def train(matching: Any, model: nn.Module, steps: int) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            matching(model, x, target).backward()
            optimizer.step()
        return torch.nn.utils.parameters_to_vector(model.parameters())

    model, x, y, target = setup()
    torch.manual_seed(11)  # seed=None takes torch.initial_seed()
    matching = fitted(x, y, target, projections=1, interval=2)
    train(matching, model, 3)
    path = tmp_path / "state.pt"
    torch.save({"matching": matching.state_dict(), "model": model.state_dict()}, path)
    clones = copy.deepcopy(matching), pickle.loads(pickle.dumps(matching))
    expected = train(matching, copy.deepcopy(model), 4)
    torch.manual_seed(12)
    loaded = torch.load(path, weights_only=True)
    resumed = GradientMatching(projections=1, interval=2)  # unfitted, with another seed
    resumed.load_state_dict(loaded["matching"])
    for other in (resumed, *clones):
        assert torch.equal(train(other, copy.deepcopy(model), 4), expected)
    assert resumed.state_dict().keys() == matching.state_dict().keys()
    assert all(torch.equal(value, matching.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_unfitted_the_first_training_batch_sets_the_scale_once_and_warns_once():
    model, x, _, target = setup()
    matching = GradientMatching()
    other = 100 * torch.randn(N, INPUTS, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="GradientMatching is not fitted"), torch.no_grad():
        matching(model, other, target)  # evaluation decides nothing
    assert matching.scales.jacobian_scale.numel() == 0
    loss = matching(model, x, target)
    jacobian = value_and_jacobian(model, x)[1]
    sigma_x = x.std(dim=0, correction=0)
    torch.testing.assert_close(loss, (sigma_x * (jacobian - target)).square().sum(dim=2).mean())  # sigma_y**2 = D
    scale: Tensor = matching.scales.jacobian_scale.clone()
    matching(model, other, target)
    assert torch.equal(matching.scales.jacobian_scale, scale)
    with pytest.raises(ValueError, match="that were fitted"):
        matching(nn.Linear(INPUTS, 2).double(), x, target[:, :2])
    empty = GradientMatching()
    with pytest.warns(UserWarning, match="not fitted"):
        assert empty(model, x, torch.full_like(target, math.nan)).item() == 0
    assert empty.scales.jacobian_scale.numel() == 0  # such a batch says nothing


def test_reductions():
    model, x, y, target = setup()
    target[1] = math.nan
    target[2, 0, 0] = math.nan
    weight = torch.rand(N, dtype=DOUBLE)
    mean, total, each = (
        fitted(x, y, target, reduction=reduction)(model, x, target, sample_weight=weight)
        for reduction in ("mean", "sum", "none")
    )
    assert each.shape == (N,)
    assert each[1] == 0
    torch.testing.assert_close(each.mean(), mean)
    torch.testing.assert_close(each.sum(), total)


def test_fit_takes_arrays_and_images_and_saves_units():
    model, x, y, target = setup("images")
    matching = fitted(x, y, target)
    arrays = GradientMatching().fit(x.numpy(), y.numpy(), target.numpy())
    assert arrays.scales.jacobian_scale.dtype == torch.float32
    assert matching.scales.jacobian_scale.dtype == DOUBLE
    torch.testing.assert_close(arrays(model, x, target), matching(model, x, target), rtol=1e-6, atol=0)
    # Other units: x in thousandths, y in tens.
    other = fitted(1000 * x, y / 10, target / 1e4)
    rescaled = nn.Sequential(Scale(1e-3), model, Scale(0.1))
    torch.testing.assert_close(other(rescaled, 1000 * x, target / 1e4), matching(model, x, target) / 100)
    with pytest.raises(ValueError, match="exactly one of `dydx`, `target_jvp`"):
        GradientMatching().fit(x, y)
    with pytest.raises(ValueError, match="`X` must be finite"):
        GradientMatching().fit(x * math.inf, y, target)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


# Models


def test_batch_norm_uses_running_statistics_without_a_second_update():
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(5)).double()
    x, target = torch.randn(N, INPUTS, dtype=DOUBLE), torch.randn(N, OUTPUTS, INPUTS, dtype=DOUBLE)
    evaluated = copy.deepcopy(model).eval()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    with pytest.warns(UserWarning, match="batch normalisation in training mode"):
        loss = raw()(model, x, target)
    torch.testing.assert_close(loss, raw()(evaluated, x, target))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    with pytest.warns(UserWarning, match="derivatives per row are wrong"):
        raw().from_outputs(y, wrt=leaf, target=target)
    raw().from_outputs(evaluated(leaf), wrt=leaf, target=target)


class Net(nn.Module):
    """No Sequential: torch does not compile that by its method."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("way", ["function", "method"])
def test_compiled_models_train(way):
    _, x, y, target = setup()
    model = Net().double()
    matching = fitted(x, y, target)
    expected = grads(matching(model, x, target), model)
    compiled = model
    if way == "function":
        compiled = torch.compile(model, backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
    compiled(x)
    loss = matching(compiled, x, target)
    for a, b in zip(grads(loss, model), expected, strict=True):
        torch.testing.assert_close(a, b)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"must be differentiable twice|must reach a parameter"):
        fitted(x, y, target).from_outputs(compiled(leaf), wrt=leaf, target=target)
    torch._dynamo.reset()


def test_autocast_gives_a_float32_loss():
    model, x, y, target = setup()
    model, x, y, target = model.float(), x.float(), y.float(), target.float()
    expected = fitted(x, y, target)(model, x, target)
    matching = fitted(x, y, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, loss = matching.with_values(model, x, target)
    assert (values.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)  # bfloat16: 8 bits
    loss.backward()
    # Without matrix products in the model, nothing may be rounded to bfloat16, directional derivatives included.
    factor = nn.Parameter(torch.rand(INPUTS))
    tangents, jvp_target = torch.randn(N, INPUTS), torch.randn(N, INPUTS)

    def directional():
        return raw()(lambda x: factor * x.pow(3), x, tangents=tangents, target_jvp=jvp_target)

    exact = directional()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(directional(), exact, rtol=1e-6, atol=0)
    half = fitted(x, y, target)(copy.deepcopy(model).bfloat16(), x.bfloat16(), target)
    assert half.dtype == torch.float32


def test_a_loss_that_trains_nothing_is_an_error():
    model, x, y, target = setup()
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(RuntimeError, match="reaches none"):
        fitted(x, y, target)(frozen, x, target)
    shift = nn.Parameter(torch.zeros(INPUTS, dtype=DOUBLE))
    with pytest.raises(RuntimeError, match="reaches none"):
        raw()(lambda x: x + shift, x, torch.zeros(N, INPUTS, INPUTS, dtype=DOUBLE))
    with torch.no_grad():
        fitted(x, y, target)(frozen, x, target)
    fitted(x, y, target).eval()(frozen, x, target)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight).sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # type: ignore[override] - the decorator hides the names
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        return grad * (x * weight).cos() * weight, (grad * (x * weight).cos() * x).sum(0)


def test_a_model_without_second_derivative_is_an_error_with_a_remedy():
    weight = nn.Parameter(torch.rand(INPUTS, dtype=DOUBLE))
    x = torch.randn(N, INPUTS, dtype=DOUBLE)
    linear = nn.Linear(INPUTS, INPUTS).double()  # its own weights do receive a gradient: half of the true one
    leaf = x.clone().requires_grad_()
    for model in (lambda x: OnceOnly.apply(x, weight), lambda x: OnceOnly.apply(linear(x), weight)):
        with pytest.raises(RuntimeError, match=r"must be differentiable twice; torch says: .*once_differentiable"):
            raw()(model, x)
        with pytest.raises(RuntimeError, match=r"must be differentiable twice; torch says: .*once_differentiable"):
            raw().from_outputs(model(leaf), wrt=leaf)
    assert weight.grad is None


def test_recurrent_layers_on_cudnn_are_refused_before_they_run(monkeypatch):
    import gradwise_torch._double_backward as double_backward

    model, x, y, target = setup("lstm")
    monkeypatch.setattr(double_backward, "has_cudnn_rnn", lambda model, twice: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with pytest.raises(NotImplementedError, match=r"torch.backends.cudnn.flags\(enabled=False\)"):
        fitted(x, y, target)(model, x, target)
    with torch.backends.cudnn.flags(enabled=False):
        fitted(x, y, target)(model, x, target)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": "blocks"}, "`scale` must be one of"),
        ({"loss": "mae"}, "`loss` must be one of"),
        ({"reduction": "avg"}, "`reduction` must be one of"),
        ({"projections": 0}, "`projections` must be a positive whole number; got 0"),
        ({"interval": 1.5}, "`interval` must be a positive"),
        ({"derivative_weight": -1.0}, "`derivative_weight` must be finite and not negative"),
        ({"derivative_weight": math.nan}, "`derivative_weight` must be finite"),
    ],
)
def test_bad_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GradientMatching(**kwargs)


def test_bad_calls():
    model, x, _, target = setup()
    matching = raw()
    tangents, jvp_target = torch.ones_like(x), torch.ones(N, OUTPUTS, dtype=DOUBLE)
    for kwargs in (
        {"target_jacobian": target, "target_norm": 1.0},
        {"target_jacobian": target, "tangents": tangents, "target_jvp": jvp_target},
        {"tangents": tangents},
        {"target_jvp": jvp_target},
    ):
        with pytest.raises(ValueError, match="targets must be one of"):
            matching(model, x, **kwargs)
    with pytest.raises(TypeError, match="`mask` must be boolean"):
        matching(model, x, target, mask=torch.ones_like(target))
    with pytest.raises(ValueError, match=r"`sample_weight` must have shape \(6,\)"):
        matching(model, x, target, sample_weight=torch.ones(N, 1))
    with pytest.raises(ValueError, match="`sample_weight` must not be negative"):
        matching(model, x, target, sample_weight=torch.tensor([1.0, 1, 1, 1, 1, -1]))
    assert matching.calls.item() == 0  # a call that fails is no call


def test_learning_derivatives_beats_values_alone():
    def test_error(derivative_weight):
        torch.manual_seed(0)
        x = torch.rand(16, 2) * 4 - 2
        y = (x[:, 0].sin() * x[:, 1])[:, None]
        dydx = torch.stack([x[:, 0].cos() * x[:, 1], x[:, 0].sin()], dim=1)
        matching = GradientMatching(derivative_weight).fit(x, y, dydx)
        model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(300):
            prediction, loss = matching.with_values(model, x, dydx)
            optimizer.zero_grad()
            ((prediction - y).square().mean() + loss).backward()
            optimizer.step()
        with torch.no_grad():
            grid = torch.rand(500, 2) * 4 - 2
            return (model(grid)[:, 0] - grid[:, 0].sin() * grid[:, 1]).square().mean().sqrt().item()

    with warnings.catch_warnings():
        assert test_error(1.0) < 0.6 * test_error(0.0)
