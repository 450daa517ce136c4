"""PopulationGradient as an Optimizer: schedulers, checkpoints, scalers, faults, bad input."""

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_cells import assert_same, batches, loss_of, make, snapshot

from gradwise import Population
from gradwise.torch import PopulationGradient
from gradwise_torch._noise import Noise

X, Y = batches(1)[0]


def setup(inner: Callable[..., torch.optim.Optimizer] | None = None, **options: Any) -> tuple[Any, PopulationGradient]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
    inner = (lambda p: torch.optim.AdamW(p, lr=0.01)) if inner is None else inner
    options = {"model": model, "population_size": 4, "sigma": 0.2, "seed": 1, **options}
    return model, PopulationGradient(inner(model.parameters()), **options)


def closure_of(model: Any, optimizer: Any, batch: Any = (X, Y)) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


def train(model: Any, optimizer: Any, data: list[Any], way: str, scheduler: Any = None) -> None:
    for batch in data:
        if way == "closure":
            optimizer.step(closure_of(model, optimizer, batch))
        else:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


# -- the surface -------------------------------------------------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("on", ["wrapper", "inner optimizer"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedulers(name: str, on: str) -> None:
    model, optimizer = setup(sigma=0.0)
    scheduler = SCHEDULERS[name](optimizer if on == "wrapper" else optimizer.inner_optimizer)
    torch.manual_seed(5)
    train(model, optimizer, batches(4), "unchanged", scheduler)

    bare_model, other = setup()
    bare = other.inner_optimizer
    del other
    bare_scheduler = SCHEDULERS[name](bare)
    torch.manual_seed(5)
    train(bare_model, bare, batches(4), "unchanged", bare_scheduler)
    assert scheduler.get_last_lr() == bare_scheduler.get_last_lr()
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in bare_model.parameters()])


def test_reduce_on_plateau_and_direct_edits_reach_the_inner_optimizer() -> None:
    _, optimizer = setup()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert optimizer.inner_optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.inner_optimizer.param_groups[0]["lr"] == 0.5
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "AdamW" in repr(optimizer)
    assert optimizer.defaults["lr"] == 0.01


def test_step_hooks_run_once_a_step_on_each_object() -> None:
    model, optimizer = setup()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("wrapper pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("wrapper post"))
    optimizer.inner_optimizer.register_step_post_hook(lambda *_: seen.append("inner post"))
    train(model, optimizer, batches(1), "unchanged")
    train(model, optimizer, batches(1), "closure")
    assert seen == ["wrapper pre", "inner post", "wrapper post"] * 2


def test_state_dict_hooks() -> None:
    _, optimizer = setup()
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load post"))
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre", "load pre", "load post"]


def test_groups_may_set_their_own_sigma() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(2, 2))
    inner = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "sigma": 0.0},
            {"params": model[1].parameters(), "sigma": lambda step: 0.5 * step},
            {"params": model[2].parameters()},
        ]
    )
    optimizer = PopulationGradient(inner, model, sigma=0.1)
    mean = [layer.weight.detach().clone() for layer in model]  # type: ignore[union-attr] - Linear

    def moved() -> list[bool]:
        model(X).sum().backward()
        result = [not torch.equal(layer.weight, m) for layer, m in zip(model, mean, strict=True)]  # type: ignore[arg-type] - Linear
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = optimizer.param_groups[2]["lr"] = 0.0
        optimizer.step()
        return result

    assert moved() == [False, False, True]
    assert moved() == [False, True, True]
    with optimizer.member(0):  # step 2: a relative sigma of 0.5 * 2 for the second layer, 0.1 for the third
        size = [(layer.weight - m).norm() / m.norm() for layer, m in zip(model, mean, strict=True)]  # type: ignore[operator] - Linear
    assert size[1].item() == pytest.approx(1.0, rel=0.6)  # 16 draws
    assert size[2].item() == pytest.approx(0.1, rel=0.95)  # 4 draws
    state = optimizer.state_dict()
    assert "sigma" not in state["param_groups"][1]  # callables do not belong into a checkpoint
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["sigma"] == 0.0
    assert callable(optimizer.param_groups[1]["sigma"])


def test_perturb_chooses_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    asked: list[str] = []

    def perturb(name: str, parameter: Tensor) -> bool:
        asked.append(name)
        return name == "1.bias"

    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.0), model, perturb=perturb)
    mean = [p.detach().clone() for p in model.parameters()]
    model(X)
    assert [torch.equal(p, m) for p, m in zip(model.parameters(), mean, strict=True)] == [True, True, True, False]
    assert asked == ["0.weight", "0.bias", "1.weight", "1.bias"]
    optimizer.eval()
    asked.clear()
    PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.0), perturb=perturb)
    assert asked == ["0.0", "0.1", "0.2", "0.3"]


@pytest.mark.parametrize("scale", ["rms", "filter", "absolute"])
def test_size_of_the_perturbation(scale: Any) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(16, 32, 3)
    with torch.no_grad():
        model.weight.mul_(torch.logspace(-2, 2, 32).reshape(32, 1, 1, 1))
    mean = model.weight.detach().clone()
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.0), scale=scale, sigma=0.3, seed=0)
    with optimizer.member(0):
        z = model.weight.detach() - mean
    rms = {
        "rms": mean.square().mean().sqrt().expand(32),
        "filter": mean.square().mean((1, 2, 3)).sqrt(),
        "absolute": torch.ones(32),
    }[scale]
    observed = z.square().mean((1, 2, 3)).sqrt() / rms
    assert observed.mean().item() == pytest.approx(0.3, rel=0.05)  # 4608 draws: 1% standard error
    assert torch.all((observed / 0.3 - 1).abs() < 0.3)  # 144 draws a filter: 6% standard error


def test_statistics() -> None:
    """On a quadratic the closed forms are known: loss rise tr(H Cov z) / 2, gradients H (w + z)."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
    curvature = torch.tensor([[1.0, 4.0], [2.0, 0.5]], dtype=torch.float64)
    optimizer = PopulationGradient(
        torch.optim.SGD([weight], lr=0.0), sigma=0.1, scale="absolute", population_size=2000, noise="rademacher"
    )
    losses, gradients = [], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (curvature * weight.square()).sum() / 2
        loss.backward()
        losses.append(loss.item())
        gradients.append(weight.grad.clone())  # type: ignore[union-attr] - set by backward
        return loss

    assert np.isnan(optimizer.statistics.loss_mean)
    returned = optimizer.step(closure)
    said = optimizer.statistics
    assert said.members == 2000
    assert said.loss_mean == pytest.approx(np.mean(losses))
    assert float(returned) == pytest.approx(np.mean(losses))
    assert said.loss_spread == pytest.approx(np.std(losses))
    stacked = torch.stack(gradients)
    agreement = stacked.mean(0).square().sum() / stacked.square().sum((1, 2)).mean()
    assert said.agreement == pytest.approx(agreement.item(), rel=1e-5)
    # Antithetic signs: the linear term cancels in pairs and z^2 is constant, so the rise is exact.
    rise = np.mean(losses) - (curvature * weight.detach().square()).sum().item() / 2
    assert said.sharpness == pytest.approx(rise, rel=1e-4)
    assert said.sharpness == pytest.approx(0.01 * curvature.sum().item() / 2, rel=1e-4)
    assert said.relative_sigma == pytest.approx(0.1 * 2 / weight.detach().norm().item(), rel=1e-5)


def test_unchanged_loop_statistics_know_the_noise_and_not_the_losses() -> None:
    model, optimizer = setup(sigma=0.2)
    train(model, optimizer, batches(1), "unchanged")
    said = optimizer.statistics
    assert said.relative_sigma == pytest.approx(0.2, rel=0.3)
    assert np.isnan([said.loss_mean, said.loss_spread, said.agreement, said.sharpness]).all()


# -- noise and random streams ------------------------------------------------------------------------------------------


def test_seed_defaults() -> None:
    torch.manual_seed(123)
    _, first = setup(seed=None)
    one = PopulationGradient(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))]))
    two = PopulationGradient(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))]))
    assert len({first.population.seed, one.population.seed, two.population.seed}) == 3
    seed = one.population.seed
    del one
    again = PopulationGradient(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))]))
    assert again.population.seed == seed  # a second run in the same process draws the same noise


def test_seeds_that_agree_in_32_bits_differ() -> None:
    """torch's CPU generator keeps 32 bits of a seed; ours must not."""
    noises = []
    for seed in (1, 1 + 2**32):
        weight = nn.Parameter(torch.ones(4, 4))
        optimizer = PopulationGradient(torch.optim.SGD([weight]), seed=seed)
        with optimizer.member(0):
            noises.append(weight.detach().clone())
    assert not torch.equal(*noises)


@pytest.mark.parametrize("share_masks", [True, False])
def test_random_streams_end_where_a_plain_step_leaves_them(share_masks: bool) -> None:
    def draws(optimizer: Any, size: int) -> tuple[list[Any], list[Any]]:
        seen = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            seen.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002 - the stream under test
            loss = weight.square().sum()
            loss.backward()
            return loss

        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the stream under test
        optimizer.step(closure)
        assert len(seen) == size
        return seen, [torch.rand(1).item(), random.random(), np.random.rand()]  # noqa: NPY002 - the stream under test

    weight = nn.Parameter(torch.ones(2, 2))
    _, plain = draws(torch.optim.SGD([weight], lr=0.1), 1)
    optimizer = PopulationGradient(torch.optim.SGD([weight], lr=0.1), population_size=4, share_masks=share_masks)
    seen, after = draws(optimizer, 4)
    assert after == plain
    assert len(set(seen)) == (1 if share_masks else 4)


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


def test_norm_statistics_recalibrate_is_one_clean_forward() -> None:
    model, optimizer = setup(norm_statistics="recalibrate")
    expected = copy.deepcopy(model)
    torch.manual_seed(3)
    expected(X)
    torch.manual_seed(3)
    optimizer.step(closure_of(model, optimizer))
    assert_same(list(model.buffers()), list(expected.buffers()))
    torch.manual_seed(3)
    expected(X)
    end = torch.get_rng_state()
    torch.manual_seed(3)
    optimizer.step(closure_of(model, optimizer))
    assert torch.equal(torch.get_rng_state(), end)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["closure", "unchanged"])
@pytest.mark.parametrize("after_backward", [False, True])
def test_resume_in_the_middle_is_bit_exact(way: str, after_backward: bool) -> None:
    data = batches(6)

    def save(model: Any, optimizer: Any) -> io.BytesIO:
        if after_backward:  # a member is in place, and micro-batches have been counted
            loss_of(model, (X, Y)).backward()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        optimizer.zero_grad()
        return file

    model, optimizer = setup()
    train(model, optimizer, data[:3], way)
    file = save(model, optimizer)
    streams = torch.get_rng_state()
    train(model, optimizer, data[3:], way)
    expected = snapshot(model, optimizer)

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed_model, resumed = setup(seed=99)  # another seed: the checkpoint's wins
    train(resumed_model, resumed, data[:1], way)
    resumed_model.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(streams)
    train(resumed_model, resumed, data[3:], way)
    assert_same(snapshot(resumed_model, resumed)[:-1], expected[:-1])


def test_states_of_wrapped_and_bare_optimizers_are_interchangeable() -> None:
    model, optimizer = setup()
    train(model, optimizer, batches(2), "closure")
    bare = torch.optim.AdamW(model.parameters())
    bare.load_state_dict(optimizer.state_dict())
    assert_same(list(bare.state_dict()["state"][0].values()), list(optimizer.state_dict()["state"][0].values()))
    assert not any(key.startswith("gradwise") for key in optimizer.inner_optimizer.param_groups[0])
    assert not any("gradwise" in str(key) for state in optimizer.state.values() for key in state)

    other_model, other = setup()
    other.load_state_dict(torch.optim.AdamW(other_model.parameters(), lr=0.5).state_dict())
    assert other.param_groups[0]["lr"] == 0.5
    train(other_model, other, batches(1), "closure")


def test_distributed_checkpoint_keeps_the_counters() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = setup()
    train(model, optimizer, batches(3), "closure")
    state = get_optimizer_state_dict(model, optimizer)
    resumed_model, resumed = setup(seed=7)
    train(resumed_model, resumed, batches(1), "closure")
    set_optimizer_state_dict(resumed_model, resumed, state)
    groups = [o.state_dict()["param_groups"][0] for o in (optimizer, resumed)]
    assert groups[0] == groups[1]
    assert groups[1]["gradwise_step"] == 3
    assert groups[1]["gradwise_seed"] == 1


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("moment", ["between steps", "member in place"])
def test_copies_continue_alike(how: str, moment: str) -> None:
    model, optimizer = setup()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, batches(2), "unchanged", scheduler)
    if moment == "member in place":
        loss_of(model, (X, Y)).backward()
    pair = (model, optimizer)
    copied_model, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.model is copied_model
    results = []
    for m, o in ((model, optimizer), (copied_model, copied)):
        o.zero_grad()
        torch.manual_seed(4)
        train(m, o, batches(3), "unchanged")
        train(m, o, batches(3), "closure")
        results.append(snapshot(m, o))
    assert_same(*results)


# -- GradScaler --------------------------------------------------------------------------------------------------------


def scaled_run(make_inner: Callable[..., Any], *, wrap: bool, unscale: bool, overflow_at: int = -1) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    inner = make_inner(model.parameters())
    optimizer = PopulationGradient(inner, model, sigma=0.0) if wrap else inner
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    trace = []
    for step, batch in enumerate(batches(5)):
        loss = loss_of(model, batch)
        scaler.scale(loss * (float("inf") if step == overflow_at else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        trace += [p.detach().clone() for p in model.parameters()] + [scaler.get_scale()]
    return trace


@pytest.mark.parametrize("overflow_at", [-1, 2])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_equals_the_bare_optimizer(fused: bool, unscale: bool, overflow_at: int) -> None:
    def make_inner(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=0.01, fused=fused)

    wrapped = scaled_run(make_inner, wrap=True, unscale=unscale, overflow_at=overflow_at)
    bare = scaled_run(make_inner, wrap=False, unscale=unscale, overflow_at=overflow_at)
    assert_same(wrapped, bare)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_the_mean(fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    inner = torch.optim.AdamW(model.parameters(), fused=fused)
    optimizer = PopulationGradient(inner, model, sigma=0.5)
    scaler = torch.amp.GradScaler("cpu")
    mean = model.weight.detach().clone()
    scaler.scale(loss_of(model, (X, Y)) * float("inf")).backward()
    assert not torch.equal(model.weight, mean)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, mean)
    assert not hasattr(inner, "found_inf")


def test_a_closure_under_a_scaler_is_refused() -> None:
    model, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu")

    def closure() -> Tensor:
        loss = loss_of(model, (X, Y))
        scaler.scale(loss).backward()
        return loss

    scaler.scale(loss_of(model, (X, Y))).backward()
    before = [p.detach().clone() for p in make_mean(model, optimizer)]
    with pytest.raises(RuntimeError, match=r"`closure` must be None under a GradScaler.*unchanged loop"):
        scaler.step(optimizer, closure)
    assert_same([p.detach() for p in model.parameters()], before)
    train(model, optimizer, batches(1), "closure")  # and a later step without a scaler is not mistaken for a scaled one


def make_mean(model: Any, optimizer: PopulationGradient) -> list[Tensor]:
    with optimizer.mean():
        return [p.detach().clone() for p in model.parameters()]


# -- closures ----------------------------------------------------------------------------------------------------------


def test_a_closure_that_does_not_zero_accumulates() -> None:
    weight = nn.Parameter(torch.full((2, 2), 2.0))
    optimizer = PopulationGradient(torch.optim.SGD([weight], lr=0.0), sigma=0.3, population_size=4)
    weight.grad = torch.full((2, 2), 100.0)
    kept = weight.grad

    def closure() -> Tensor:
        loss = (3 * weight).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(weight.grad, torch.full((2, 2), 103.0))
    assert weight.grad is kept  # as autograd accumulates in place


@pytest.mark.parametrize("zero", ["optimizer", "inner", "set_to_none=False", "module"])
def test_every_way_of_zeroing_in_a_closure(zero: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.0), sigma=0.3, population_size=4)
    model.weight.grad = torch.full((2, 2), 100.0)

    def closure() -> Tensor:
        if zero == "optimizer":
            optimizer.zero_grad()
        elif zero == "inner":
            optimizer.inner_optimizer.zero_grad()
        elif zero == "module":
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=False)
        loss = (3 * model.weight).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        assert torch.equal(model.weight.grad, torch.full((2, 2), 3.0))


def test_a_closure_that_does_nothing_is_a_plain_step() -> None:
    """Lightning's manual optimization hands one over."""
    model, optimizer = setup(sigma=0.2)
    loss_of(model, (X, Y)).backward()
    with optimizer.mean():
        expected_model = copy.deepcopy(model)
    expected = torch.optim.AdamW(expected_model.parameters(), lr=0.01)
    for p, q in zip(expected_model.parameters(), model.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    expected.step()
    assert optimizer.step(lambda: None) is None
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in expected_model.parameters()])


def test_loss_may_be_a_float() -> None:
    model, optimizer = setup()

    def closure() -> float:
        return closure_of(model, optimizer)().item()

    assert isinstance(optimizer.step(closure), float)


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (None, TypeError, "`closure` must return the loss"),
        (torch.ones(3), TypeError, r"`closure` must return one number.*\(3,\)"),
        ("loss", TypeError, "`closure` must return one number.*str"),
        (float("nan"), ValueError, 'finite loss; member 0 returned nan.*on_nonfinite="skip"'),
        (torch.tensor(float("inf")), ValueError, "finite loss; member 0 returned inf"),
    ],
)
def test_bad_returns_of_a_closure(returned: Any, error: type[Exception], match: str) -> None:
    model, optimizer = setup()
    before = snapshot(model, optimizer)

    def closure() -> Any:
        optimizer.zero_grad()
        loss_of(model, (X, Y)).backward()
        return returned

    with pytest.raises(error, match=match):
        optimizer.step(closure)
    assert_same(snapshot(model, optimizer)[:-2], before[:-2])  # all but the random streams


def test_nonfinite_members_can_be_skipped() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = PopulationGradient(
        torch.optim.SGD([weight], lr=0.0), sigma=0.3, population_size=4, on_nonfinite="skip", seed=0
    )
    gradients, calls = [], [0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls[0] += 1
        loss = weight.square().sum()
        loss.backward()
        if calls[0] == 2:
            return loss * float("nan")
        gradients.append(weight.grad.clone())  # type: ignore[union-attr] - set by backward
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(weight.grad, torch.stack(gradients).mean(0))
    assert optimizer.statistics.skipped == 1
    assert optimizer.statistics.members == 3
    assert optimizer.state_dict()["param_groups"][0]["gradwise_skipped"] == 1

    def hopeless() -> float:
        weight.square().sum().backward()
        return float("nan")

    with pytest.raises(ValueError, match="at least one member; all 4"):
        optimizer.step(hopeless)


# -- faults ------------------------------------------------------------------------------------------------------------


class Fault(Exception):
    pass


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("where", ["before the loss", "in the forward", "in the backward", "after the backward"])
def test_faults_in_a_closure_leave_the_mean(where: str, call: int) -> None:
    model, optimizer = setup()
    train(model, optimizer, batches(1), "closure")
    before = snapshot(model, optimizer)
    calls = [0]

    def fail(*_: Any) -> None:
        if calls[0] == call + 1:
            raise Fault

    handle = model[0].register_forward_hook(fail) if where == "in the forward" else None

    def closure() -> Tensor:
        calls[0] += 1
        optimizer.zero_grad()
        if where == "before the loss":
            fail()
        loss = loss_of(model, (X, Y))
        if where == "in the backward":
            loss.register_hook(fail)
        loss.backward()
        if where == "after the backward":
            fail()
        return loss

    with pytest.raises(Fault):
        optimizer.step(closure)
    assert_same(snapshot(model, optimizer)[:-2], before[:-2])
    if handle is not None:
        handle.remove()
    train(model, optimizer, batches(1), "closure")
    train(model, optimizer, batches(1), "unchanged")


@pytest.mark.parametrize("where", ["noise", "noise of the second tensor", "scale", "inner step", "sigma", "forward"])
@pytest.mark.parametrize("way", ["closure", "unchanged", "member"])
def test_faults_of_our_own_leave_the_mean(where: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sigma(step: int) -> float:
        if step == 1 and where == "sigma":
            raise Fault
        return 0.2

    model, optimizer = setup(sigma=sigma)
    train(model, optimizer, batches(1), "unchanged")
    before = snapshot(model, optimizer)
    count = [0]

    def fail(*_: Any, **__: Any) -> Any:
        raise Fault

    move = Noise.move

    def fail_second(self: Noise, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise Fault
        return move(self, *args, **kwargs)

    if where == "noise":
        monkeypatch.setattr(Population, "windows_of", fail)
    elif where.startswith("noise"):
        monkeypatch.setattr(Noise, "move", fail_second)
    elif where == "scale":
        monkeypatch.setattr(Population, "scale_of", fail)
    elif where == "inner step":
        optimizer.inner_optimizer.register_step_pre_hook(fail)
    elif where == "forward":
        model[0].register_forward_pre_hook(fail)

    def go() -> None:
        if way == "member":
            with optimizer.member(0):
                loss_of(model, (X, Y)).backward()
            optimizer.step()
        else:
            train(model, optimizer, batches(1), way)

    with pytest.raises(Fault):
        go()
    if where == "inner step" and way != "closure":
        buffers = len(list(model.parameters()))  # the forwards had happened: their statistics count, as in a plain loop
        assert_same(snapshot(model, optimizer)[:buffers], before[:buffers])
    else:
        assert_same(snapshot(model, optimizer)[:-2], before[:-2])


def test_a_raising_body_leaves_the_mean() -> None:
    model, optimizer = setup()
    mean = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(Fault), optimizer.member(2):
        raise Fault
    assert_same([p.detach() for p in model.parameters()], mean)
    with pytest.raises(Fault), optimizer.mean():
        raise Fault
    assert not optimizer.hooks_suspended


# -- bad input ---------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "odd size": ({"population_size": 5}, ValueError, "`population_size`.*even.*antithetic=False"),
    "size 0": ({"population_size": 0}, ValueError, "`population_size`.*positive"),
    "size 2.0": ({"population_size": 2.0}, ValueError, "`population_size`"),
    "negative sigma": ({"sigma": -0.1}, ValueError, "`sigma` must be finite and not negative; got -0.1"),
    "nan sigma": ({"sigma": float("nan")}, ValueError, "`sigma`"),
    "string sigma": ({"sigma": "big"}, TypeError, "`sigma`"),
    "scale": ({"scale": "layer"}, ValueError, "`scale` must be one of.*'layer'"),
    "noise": ({"noise": "cauchy"}, ValueError, "`noise` must be one of.*'cauchy'"),
    "seed": ({"seed": -1}, ValueError, "`seed`.*-1"),
    "norm_statistics": ({"norm_statistics": "last"}, ValueError, "`norm_statistics`.*'last'"),
    "on_nonfinite": ({"on_nonfinite": "ignore"}, ValueError, "`on_nonfinite`.*'ignore'"),
    "perturb": ({"perturb": "weight"}, TypeError, "`perturb`.*'weight'"),
    "model": ({"model": "net"}, TypeError, "`model`.*str"),
    "foreign model": ({"model": nn.Linear(6, 8)}, ValueError, "`model` must own.*`perturb`"),
    "recalibrate without model": ({"model": None, "norm_statistics": "recalibrate"}, ValueError, "needs `model`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    options, error, match = BAD[case]
    with pytest.raises(error, match=match):
        setup(**options)


def test_bad_inner_optimizers() -> None:
    parameters = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(TypeError, match=r"`inner_optimizer` must be an instance.*SGD"):
        PopulationGradient(torch.optim.SGD)  # type: ignore[arg-type] - wrong on purpose
    with pytest.raises(TypeError, match=r"`inner_optimizer`.*PopulationGradient"):
        PopulationGradient(PopulationGradient(torch.optim.SGD(parameters)))
    with pytest.raises(ValueError, match="`inner_optimizer` must have parameters"):
        PopulationGradient(torch.optim.SGD([{"params": []}]))


def test_bad_use() -> None:
    model, optimizer = setup(sigma=lambda step: -1.0)
    with pytest.raises(ValueError, match="`sigma` must be finite and not negative"):
        model(X)
    model, optimizer = setup()
    for index in (-1, 4, 1.5, True):
        with pytest.raises(ValueError, match="`index`"), optimizer.member(index):  # type: ignore[arg-type] - on purpose
            pass
    with optimizer.member(0):
        with pytest.raises(RuntimeError, match="`step`"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="`member`"), optimizer.member(1):
            pass
        with pytest.raises(RuntimeError, match="`mean`"), optimizer.mean():
            pass


def test_quantised_and_integer_tensors_stay_unperturbed() -> None:
    model = make("tied")
    codes = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    optimizer = PopulationGradient(torch.optim.SGD([*model.parameters(), codes]), sigma=0.5)
    with optimizer.member(0):
        assert torch.equal(codes, torch.ones(3, 3, dtype=torch.int8))
