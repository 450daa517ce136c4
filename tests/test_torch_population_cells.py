"""Training runs against hand-written loops, bit for bit: inner optimizers by models by ways in, by sigma."""

import contextlib
from typing import Any

import pytest
import torch
from torch_cells import (
    INNERS,
    MODELS,
    assert_same,
    batches,
    loss_of,
    make,
    perturb_by_hand,
    put,
    reference_closure_step,
    reference_loop_step,
    snapshot,
)

from gradwise import Population
from gradwise.torch import PopulationGradient

SIZE = 4


def closure_for(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Any:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


def wrapped(name: str, inner: str, sigma: float, *, with_model: bool = True) -> tuple[Any, PopulationGradient]:
    model = make(name)
    parameters = list(model.parameters())
    optimizer = PopulationGradient(
        INNERS[inner](parameters), model if with_model else None, population_size=SIZE, sigma=sigma, seed=3
    )
    torch.manual_seed(11)  # the masks of the run
    return model, optimizer


def plain(name: str, inner: str) -> tuple[Any, torch.optim.Optimizer]:
    model = make(name)
    optimizer = INNERS[inner](list(model.parameters()))
    torch.manual_seed(11)
    return model, optimizer


@pytest.mark.parametrize("sigma", [0.0, 0.2])
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("name", MODELS)
def test_closure_equals_members_by_hand(name: str, inner: str, sigma: float) -> None:
    model, optimizer = wrapped(name, inner, sigma)
    losses = [optimizer.step(closure_for(model, optimizer, batch)) for batch in batches()]
    got = snapshot(model, optimizer)

    expected_model, expected = plain(name, inner)
    population = Population(size=SIZE, sigma=sigma, seed=3)
    expected_losses = [
        reference_closure_step(expected_model, expected, population, batch, step)
        for step, batch in enumerate(batches())
    ]
    assert_same(got, snapshot(expected_model, expected))
    assert [float(loss) for loss in losses] == [float(loss) for loss in expected_losses]


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("name", MODELS)
def test_closure_with_sigma_zero_equals_the_inner_optimizer(name: str, inner: str) -> None:
    # Several evaluations a step: ours see one mask, bare LBFGS a new one each time.
    frozen_masks = inner == "lbfgs" and name in ("dropout", "attention")
    model, optimizer = wrapped(name, inner, 0.0)
    for batch in batches():
        optimizer.step(closure_for(model, optimizer, batch))
    got = snapshot(model, optimizer)

    expected_model, expected = plain(name, inner)
    for batch in batches():
        closure, start = closure_for(expected_model, expected, batch), torch.get_rng_state()
        ends: list[torch.Tensor] = []

        def rewound(closure: Any = closure, start: Any = start, ends: Any = ends) -> torch.Tensor:
            torch.set_rng_state(start)
            loss = closure()
            ends.append(torch.get_rng_state())
            return loss

        expected.step(rewound if frozen_masks else closure)  # type: ignore[arg-type] - torch's stub wants a float
        if frozen_masks:
            torch.set_rng_state(ends[0])
    assert_same(got, snapshot(expected_model, expected))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("sigma", [0.0, 0.2])
@pytest.mark.parametrize(
    "inner", [name for name in INNERS if name != "lbfgs"]
)  # LBFGS needs a closure, bare or wrapped
@pytest.mark.parametrize("name", MODELS)
def test_unchanged_loop_equals_members_by_hand(name: str, inner: str, sigma: float, micro_batches: int) -> None:
    data = batches(6)
    groups = [data[i : i + micro_batches] for i in range(0, 6, micro_batches)]
    model, optimizer = wrapped(name, inner, sigma)
    for group in groups:
        for batch in group:
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    got = snapshot(model, optimizer)

    expected_model, expected = plain(name, inner)
    population = Population(size=SIZE, sigma=sigma, seed=3)
    for step, group in enumerate(groups):
        reference_loop_step(expected_model, expected, population, group, step)
    assert_same(got, snapshot(expected_model, expected))

    if sigma == 0:
        bare_model, bare = plain(name, inner)
        for group in groups:
            for batch in group:
                loss_of(bare_model, batch).backward()
            bare.step()
            bare.zero_grad()
        assert_same(got, snapshot(bare_model, bare))


@pytest.mark.parametrize("sigma", [0.0, 0.2])
@pytest.mark.parametrize("inner", [name for name in INNERS if name != "lbfgs"])
@pytest.mark.parametrize("name", MODELS)
def test_members_entered_by_hand(name: str, inner: str, sigma: float) -> None:
    model, optimizer = wrapped(name, inner, sigma, with_model=False)
    for batch in batches():
        for member in range(SIZE):
            with optimizer.member(member):
                (loss_of(model, batch) / SIZE).backward()
        optimizer.step()
        optimizer.zero_grad()
    got = snapshot(model, optimizer)

    expected_model, expected = plain(name, inner)
    parameters = list(expected_model.parameters())
    population = Population(size=SIZE, sigma=sigma, seed=3)
    for step, batch in enumerate(batches()):
        for member in range(SIZE):
            mean = perturb_by_hand(parameters, population, step=step, member=member, paired=True)
            (loss_of(expected_model, batch) / SIZE).backward()
            put(parameters, mean)
        expected.step()
        expected.zero_grad()
    assert_same(got, snapshot(expected_model, expected))


# dynamo itself asks non-leaf tensors for their .grad at a graph break, and ignores the answer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("way", ["unchanged", "closure"])
@pytest.mark.parametrize("kind", ["torch.compile(model)", "model.compile()"])
def test_compiled_model_equals_the_plain_one(kind: str, way: str) -> None:
    def run(compiled: bool) -> list[Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        called: Any = model
        if compiled and kind == "model.compile()":
            model.compile(backend="aot_eager")
        elif compiled:
            called = torch.compile(model, backend="aot_eager")
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = PopulationGradient(inner, called, population_size=SIZE, sigma=0.2, seed=3)
        for batch in batches():
            if way == "closure":
                optimizer.step(closure_for(called, optimizer, batch))
            else:
                loss_of(called, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert optimizer.statistics.members == (SIZE if way == "closure" else 1)
        return [p.detach().clone() for p in model.parameters()]

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)  # the compiled graph may order sums otherwise


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_sees_the_member_and_then_the_mean(autocast: bool) -> None:
    """Two forwards under one autocast region: its cache of cast weights must not outlive a member."""
    model, optimizer = wrapped("frozen", "sgd", 0.5)
    x = batches(1)[0][0]
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        expected_mean = model.eval()(x).detach()
        model.train()
        out = model(x)
        out.sum().backward()
        assert not torch.equal(out.detach(), expected_mean)
        optimizer.zero_grad()
        model.eval()
        assert torch.equal(model(x), expected_mean)
