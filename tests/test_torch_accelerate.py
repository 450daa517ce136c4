"""Hugging Face Accelerate by hand: the wrapper is an optimizer like any other. Two processes: with the Trainer's."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_cells import assert_same, batches, make, perturb_by_hand, put, reference_closure_step, snapshot

from gradwise import Population
from gradwise.torch import PopulationGradient


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    """Accelerate keeps precision and device for the life of a process, from whichever test came first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def data(rows: int = 48) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 6, generator=generator), torch.randn(rows, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)


def accelerated(sigma: float | None, *, seed: int = 3, **settings: Any) -> tuple[Accelerator, tuple[Any, ...]]:
    """An Accelerator and what it made of model, optimizer, loader and scheduler; sigma None is the bare optimizer."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    set_seed(0)
    model = make("dropout")
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = inner if sigma is None else PopulationGradient(inner, model, sigma=sigma, seed=seed)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return accelerator, accelerator.prepare(model, optimizer, data(), scheduler)


def epoch(accelerator: Accelerator, parts: tuple[Any, ...], *, skip: int = 0, stop: int = 100) -> list[Tensor]:
    """The loop of Accelerate's documentation; the first layer's weights at every forward."""
    model, optimizer, loader, scheduler = parts
    seen: list[Tensor] = []
    for index, (x, y) in enumerate(accelerator.skip_first_batches(loader, skip) if skip else loader):
        if index == stop:
            break
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            seen.append(accelerator.unwrap_model(model)[0].weight.detach().clone())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sigma_zero_equals_the_bare_optimizer(precision: str) -> None:
    results: list[Any] = []
    for sigma in (None, 0.0):
        accelerator, parts = accelerated(sigma, mixed_precision=precision)
        epoch(accelerator, parts)
        results.append([*snapshot(parts[0], parts[1].optimizer), parts[3].get_last_lr()])
    assert_same(*results)


def test_every_micro_batch_has_a_member_and_evaluation_the_mean() -> None:
    accelerator, parts = accelerated(0.2)
    model, optimizer = parts[:2]
    weight = model[0].weight
    before = weight.detach().clone()
    seen = epoch(accelerator, parts, stop=1)  # half a step: a member is in place
    assert torch.equal(weight, seen[0])
    assert not torch.equal(seen[0], before)
    saved: Any = accelerator.get_state_dict(model)
    assert torch.equal(saved["0.weight"], before)
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 6))
    assert torch.equal(weight, before)
    model.train()
    seen = epoch(accelerator, parts, stop=5)  # the second half, and two more steps
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert optimizer.optimizer.statistics.members == 2


def test_state_saved_in_the_middle_of_an_epoch_resumes_exactly(tmp_path: Path) -> None:
    accelerator, straight = accelerated(0.2)
    epoch(accelerator, straight, stop=6)
    accelerator.save_state(str(tmp_path))
    epoch(accelerator, straight, skip=6)

    accelerator, resumed = accelerated(0.2, seed=4)  # the checkpoint has the right one
    accelerator.load_state(str(tmp_path))
    epoch(accelerator, resumed, skip=6)
    assert_same(snapshot(resumed[0], resumed[1].optimizer), snapshot(straight[0], straight[1].optimizer))
    assert resumed[1].optimizer.population.seed == 3


def test_a_closure_runs_all_members() -> None:
    accelerator = Accelerator(cpu=True)
    bare = make("dropout")
    population = PopulationGradient(torch.optim.SGD(bare.parameters(), lr=0.1), population_size=4, sigma=0.3, seed=5)
    model, optimizer = accelerator.prepare(bare, population)
    losses: list[Tensor] = []

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        accelerator.backward(loss)
        losses.append(loss.detach())
        return loss

    for batch in batches():
        step: Any = partial(closure, batch)  # torch wants a float from it
        optimizer.step(step)
    assert len(losses) == 3 * 4

    twin = make("dropout")
    inner = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step, batch in enumerate(batches()):
        reference_closure_step(twin, inner, Population(size=4, sigma=0.3, seed=5), batch, step)
    for got, expected in zip(bare.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)  # sums in another order


def scaled() -> tuple[nn.Module, PopulationGradient, Any]:
    """What Accelerate makes of an optimizer with mixed_precision="fp16", for which it wants a GPU."""
    Accelerator(cpu=True)
    model = make("dropout")
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model, sigma=0.2, seed=3)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return model, optimizer, AcceleratedOptimizer(optimizer, scaler=scaler)


def test_a_closure_under_a_scaler_is_refused() -> None:
    model, _, optimizer = scaled()
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(torch.ones(2, 6)).sum()
    optimizer.scaler.scale(loss).backward()
    with pytest.raises(RuntimeError, match="`closure` must be None under a GradScaler"):
        optimizer.step(lambda: loss)
    assert_same([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("overflow", [False, True])
def test_unchanged_loop_under_a_scaler(overflow: bool) -> None:
    model, population, optimizer = scaled()
    x, y = batches(1)[0]
    masks = torch.get_rng_state()
    start = [p.detach().clone() for p in model.parameters()]
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.scaler.scale(loss * (float("inf") if overflow else 1)).backward()
    optimizer.step()
    if overflow:
        assert_same([p.detach() for p in model.parameters()], start)
        return
    twin = make("dropout")
    parameters = list(twin.parameters())
    mean = perturb_by_hand(parameters, Population(sigma=0.2, seed=3), step=0, member=0, paired=False)
    torch.set_rng_state(masks)
    nn.functional.mse_loss(twin(x), y).backward()
    put(parameters, mean)
    torch.optim.SGD(parameters, lr=0.1).step()
    for got, expected in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)  # noise by another formula
    assert population.statistics.members == 1
