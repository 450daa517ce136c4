"""`backward` of PopulationGradient: its statistics, mixed precision, and checkpoints between two batches."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_batch_cells import (
    SIZE,
    assert_close,
    batchnorm,
    by_hand,
    data,
    dropout,
    fresh,
    gradients_of,
    mlp,
    mse,
    population,
    shards_of,
    wrapped,
)
from torch_cells import assert_same, snapshot

from gradwise.torch import PopulationGradient

PATHS = ["loop", "vmap"]


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
def test_statistics_equal_those_of_members_by_hand(vectorize: Any, sharded: bool) -> None:
    batch = data(12)
    batches = shards_of(batch, [3] * SIZE) if sharded else [batch] * SIZE
    expected = fresh(mlp)
    mean = [p.detach().clone() for p in expected.parameters()]
    losses, norms, slopes, sums, relative = [], [], [], [], []

    def loss_fn(model: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = mse(model, x, y)
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]
        )
        z = torch.cat([(p.detach() - w).flatten() for p, w in zip(model.parameters(), mean, strict=True)])
        losses.append(loss.detach())
        norms.append(gradient.square().sum())
        slopes.append(z @ gradient)
        sums.append(gradient)
        relative.append(z.norm() / torch.cat([w.flatten() for w in mean if w.ndim == 2]).norm())
        return loss

    by_hand(expected, loss_fn, batches, population(), paired=not sharded)
    _, optimizer = wrapped()
    optimizer.backward(mse, *batch, sharded=sharded, vectorize=vectorize)
    said = optimizer.statistics
    stacked = torch.stack(losses)
    assert said.loss_mean == pytest.approx(stacked.mean().item())
    assert said.loss_spread == pytest.approx(stacked.std(correction=0).item())
    assert said.sharpness == pytest.approx(torch.stack(slopes).mean().item() / 2, rel=1e-5)
    agreement = torch.stack(sums).mean(0).square().sum() / torch.stack(norms).mean()
    assert said.agreement == pytest.approx(agreement.item(), rel=1e-5)
    assert said.relative_sigma == pytest.approx(relative[0].item(), rel=1e-5)
    assert said.members == SIZE


class Quadratic(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(rows, 1024, generator=generator))
        self.curvature = torch.rand(rows, 1024, generator=generator)

    def forward(self) -> Tensor:
        return (self.curvature * self.weight.square()).sum() / 2


@pytest.mark.parametrize("rows", [64, 1024])
def test_statistics_of_large_tensors(rows: int) -> None:
    """Exact up to 65536 numbers; above, from an eighth of them, without bias for curvature that is alike everywhere."""
    model = Quadratic(rows)
    optimizer = PopulationGradient(
        torch.optim.SGD(model.parameters(), lr=0.0),
        model,
        population_size=2,
        sigma=0.1,
        scale="absolute",
        noise="rademacher",  # z^2 is 1 and the linear term cancels within the pair, so that only the sample varies
        seed=0,
    )
    expected = 0.01 * model.curvature.sum().item() / 2
    seen = []
    for _ in range(10):
        optimizer.backward(lambda model: model(), vectorize="loop")
        assert 1 / 2 <= optimizer.statistics.agreement <= 1
        seen.append(optimizer.statistics.sharpness / expected)
        optimizer.step()
    # The mean of 131072 curvatures has a standard error of 0.2%; rounding of the float32 sums is below 1%.
    assert max(abs(ratio - 1) for ratio in seen) < 0.01
    # Another of eight blocks in other steps: some draws of ten coincide, and equal blocks are equal to a rounding only.
    assert (len({round(ratio, 5) for ratio in seen}) > 3) == (rows == 1024)


# -- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
def test_autocast_inside_the_loss(vectorize: Any, sharded: bool) -> None:
    seen: list[torch.dtype] = []

    def loss_fn(model: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        seen.append(out.dtype)
        return nn.functional.mse_loss(out.float(), y)

    batch = [leaf.float() for leaf in data(12)]
    (model, optimizer), (other, plain) = ((m.float(), o) for m, o in (wrapped(), wrapped()))
    optimizer.backward(loss_fn, *batch, sharded=sharded, vectorize=vectorize)
    plain.backward(mse, *batch, sharded=sharded, vectorize="loop")
    assert vectorize != "loop" or set(seen) == {torch.bfloat16}  # under vmap, torch leaves layers with a bias alone
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.01)  # bfloat16 has 8 bits


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
def test_grad_scaler(vectorize: Any, overflow: bool) -> None:
    (model, optimizer), (other, plain) = wrapped(), wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        lost = overflow and step == 1

        def loss_fn(model: Any, x: Tensor, y: Tensor, lost: bool = lost) -> Tensor:
            loss = mse(model, x, y)
            if lost:  # infinite in the gradient only, as float16 makes it
                loss = loss + (model[0].weight * math.inf).sum().nan_to_num(0.0, 0.0, 0.0)
            return scaler.scale(loss)

        batch = data(12, seed=step)
        loss = optimizer.backward(loss_fn, *batch, vectorize=vectorize)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not lost:
            expected = plain.backward(mse, *batch, vectorize=vectorize)
            plain.step()
            assert (loss / scaler.get_scale()).item() == pytest.approx(expected.item())
            plain.zero_grad()
        else:
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.load_state_dict(optimizer.state_dict())
            assert_same([p.detach() for p in model.parameters()], before)
            plain.load_state_dict({**plain.state_dict(), "param_groups": one_step_later(plain)})
    assert scaler.get_scale() == (512.0 if overflow else 1024.0)
    assert_close(list(model.parameters()), list(other.parameters()))


def one_step_later(optimizer: PopulationGradient) -> list[dict[str, Any]]:
    first, *rest = optimizer.state_dict()["param_groups"]
    return [{**first, "gradwise_step": first["gradwise_step"] + 1}, *rest]


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", PATHS)
def test_resume_in_the_middle_of_an_accumulation(vectorize: Any) -> None:
    model, optimizer = wrapped(dropout)
    optimizer.step_batch(mse, *data(12, seed=1), vectorize=vectorize)
    optimizer.zero_grad()
    optimizer.backward(mse, *data(12, seed=2), vectorize=vectorize)
    file = io.BytesIO()
    gradients = [g.clone() for g in gradients_of(model) if g is not None]
    torch.save([model.state_dict(), optimizer.state_dict(), gradients, torch.get_rng_state()], file)
    optimizer.backward(mse, *data(13, seed=3), sharded=True, vectorize=vectorize)
    optimizer.step()
    expected = snapshot(model, optimizer)

    file.seek(0)
    weights, state, gradients, streams = torch.load(file, weights_only=True)
    resumed, other = wrapped(dropout, seed=99)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    for p, gradient in zip(resumed.parameters(), gradients, strict=True):
        p.grad = gradient
    torch.set_rng_state(streams)
    other.backward(mse, *data(13, seed=3), sharded=True, vectorize=vectorize)
    other.step()
    assert_same(snapshot(resumed, other), expected)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_continue_alike(how: str) -> None:
    model, optimizer = wrapped(batchnorm)
    optimizer.step_batch(mse, *data(12, seed=1), vectorize="vmap")
    pair = (model, optimizer)
    pairs = [pair, copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))]
    for m, o in pairs:
        assert o.model is m
        o.zero_grad()
        o.step_batch(mse, *data(12, seed=2), vectorize="vmap")
    assert_same(*[snapshot(m, o) for m, o in pairs])
