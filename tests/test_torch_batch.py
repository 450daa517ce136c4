"""`backward` and `step_batch` of PopulationGradient: what they compute, and what they leave behind."""

import random
from collections import OrderedDict, namedtuple
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch_batch_cells import (
    CELLS,
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
    sgd,
    shards_of,
    wrapped,
)
from torch_cells import assert_same, snapshot

from gradwise.torch import PopulationGradient

PATHS = ["loop", "vmap"]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# -- against members by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", PATHS)
@pytest.mark.parametrize("name", CELLS)
def test_whole_batch_equals_members_by_hand(name: str, vectorize: Any) -> None:
    make, loss_fn = CELLS[name]
    batch = data()
    model, optimizer = wrapped(make)
    loss = optimizer.backward(loss_fn, *batch, vectorize=vectorize)
    expected_loss, expected = by_hand(fresh(make), loss_fn, [batch] * SIZE, population())
    assert_close([loss, *gradients_of(model)], [expected_loss, *expected])
    assert not loss.requires_grad

    other, entering = wrapped(make)
    for member in range(SIZE):
        with entering.member(member):
            (loss_fn(other, *batch) / SIZE).backward()
    assert_close(gradients_of(model), gradients_of(other))


@pytest.mark.parametrize("vectorize", PATHS)
@pytest.mark.parametrize("name", CELLS)
def test_shards_equal_independent_members_by_hand(name: str, vectorize: Any) -> None:
    make, loss_fn = CELLS[name]
    batch = data(13)
    model, optimizer = wrapped(make)
    loss = optimizer.backward(loss_fn, *batch, sharded=True, vectorize=vectorize)
    sizes = [4, 3, 3, 3]
    expected = by_hand(
        fresh(make),
        loss_fn,
        shards_of(batch, sizes),
        population(),
        weights=[size / 13 for size in sizes],
        paired=False,
    )
    assert_close([loss, *gradients_of(model)], [expected[0], *expected[1]])
    assert optimizer.statistics.members == SIZE


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
@pytest.mark.parametrize("scale", ["rms", "filter", "absolute"])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_scales_noises_and_schedules(noise: Any, scale: Any, vectorize: Any, sharded: bool) -> None:
    def schedule(step: int) -> float:
        return 0.1 + 0.2 * step

    options = {"scale": scale, "noise": noise, "sigma": schedule}
    model, optimizer = wrapped(**options)
    first, second = data(12, seed=1), data(12, seed=2)
    optimizer.step_batch(mse, *first, sharded=sharded, vectorize=vectorize)
    expected = fresh(mlp)
    with torch.no_grad():
        for p, w in zip(expected.parameters(), model.parameters(), strict=True):
            p.copy_(w)
    optimizer.zero_grad()
    optimizer.backward(mse, *second, sharded=sharded, vectorize=vectorize)
    batches = shards_of(second, [3] * SIZE) if sharded else [second] * SIZE
    assert_close(
        gradients_of(model), by_hand(expected, mse, batches, population(**options), paired=not sharded, step=1)[1]
    )


@pytest.mark.parametrize("vectorize", PATHS)
def test_groups_with_a_sigma_of_their_own(vectorize: Any) -> None:
    model = fresh(mlp)
    groups = [
        {"params": model[0].parameters(), "sigma": 0.0},
        {"params": model[2].parameters(), "sigma": lambda step: 0.7},
    ]
    optimizer = PopulationGradient(torch.optim.SGD(groups, lr=0.1), model, population_size=SIZE, sigma=0.2, seed=3)
    optimizer.backward(mse, *data(), vectorize=vectorize)
    expected = by_hand(fresh(mlp), mse, [data()] * SIZE, population(), sigma_of=lambda index: 0.0 if index < 2 else 0.7)
    assert_close(gradients_of(model), expected[1])


@given(rows=st.integers(1, 14), size=st.integers(1, 6))
def test_shards_of_any_size_are_the_full_batch_at_sigma_zero(rows: int, size: int) -> None:
    batch = data(rows)
    plain = fresh(mlp)
    plain_loss = mse(plain, *batch)
    plain_loss.backward()
    for vectorize in ("loop", "vmap"):
        seen: list[int] = []

        def loss_fn(model: Any, x: Tensor, y: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(x.shape[0])
            return mse(model, x, y)

        model, optimizer = wrapped(population_size=size, antithetic=False, sigma=0.0)
        loss = optimizer.backward(loss_fn, *batch, sharded=True, vectorize=vectorize)
        assert_close([loss, *gradients_of(model)], [plain_loss.detach(), *gradients_of(plain)])
        assert optimizer.statistics.members == min(rows, size)
        assert max(seen) - min(seen) <= 1
        if vectorize == "loop":
            assert sum(seen) == rows


# -- batches -----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["left", "right"])


class Registered:
    def __init__(self, x: Tensor) -> None:
        self.x = x


pytree.register_pytree_node(Registered, lambda node: ([node.x], None), lambda leaves, _: Registered(*leaves))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
def test_batches_are_pytrees(vectorize: Any, sharded: bool) -> None:
    x, y = data(13)
    labels = torch.arange(13) % 2

    def loss_fn(model: Any, tree: Any, *, more: Any, factor: float, nothing: None, power: Tensor) -> Tensor:
        assert isinstance(tree["inputs"], list)
        assert isinstance(tree["pair"], Pair)
        assert isinstance(more, OrderedDict)
        assert isinstance(more["node"], Registered)
        assert nothing is None
        assert power.ndim == 0
        assert isinstance(factor, float)
        out = model(tree["inputs"][0]) * factor
        chosen = out.gather(1, tree["pair"].right[:, None])[:, 0]
        return (chosen - tree["pair"].left[:, 0]).abs().pow(power).mean() + more["node"].x.mean()

    tree = {"inputs": [x, (y,)], "pair": Pair(y, labels)}
    named = {
        "more": OrderedDict(node=Registered(y)),
        "factor": 2.0,
        "nothing": None,
        "power": torch.tensor(2.0, dtype=torch.float64),
    }
    model, optimizer = wrapped()
    loss = optimizer.backward(loss_fn, tree, sharded=sharded, vectorize=vectorize, **named)

    def flat(model: Any, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        return (2 * model(x).gather(1, labels[:, None])[:, 0] - y[:, 0]).square().mean() + y.mean()

    sizes = [4, 3, 3, 3]
    batches = shards_of((x, y, labels), sizes) if sharded else [(x, y, labels)] * SIZE
    weights = [size / 13 for size in sizes] if sharded else None
    expected = by_hand(fresh(mlp), flat, batches, population(), weights=weights, paired=not sharded)
    assert_close([loss, *gradients_of(model)], [expected[0], *expected[1]])


def test_numpy_leaves_are_rows_in_a_loop() -> None:
    x, y = data(13)

    def loss_fn(model: Any, x: Any, y: Tensor) -> Tensor:
        assert isinstance(x, np.ndarray)
        return mse(model, torch.from_numpy(x), y)

    for sharded in (False, True):
        (model, optimizer), (other, same) = wrapped(), wrapped()
        optimizer.backward(loss_fn, x.numpy(), y, sharded=sharded, vectorize="loop")
        same.backward(mse, x, y, sharded=sharded, vectorize="loop")
        assert_same(gradients_of(model), gradients_of(other))


def test_batches_that_cannot_be_sharded() -> None:
    model, optimizer = wrapped()
    x, y = data()

    class Opaque:
        rows = y

    with pytest.raises(ValueError, match=r"same first axis.*\(12, 6\), \(11, 2\).*functools.partial"):
        optimizer.backward(mse, x, y[1:], sharded=True)
    with pytest.raises(TypeError, match=r"consist of tensors to be sharded; got a Opaque"):
        optimizer.backward(mse, x, Opaque(), sharded=True)
    for nothing in ((), (1.0, None), (torch.tensor(1.0),)):
        with pytest.raises(ValueError, match="at least one tensor with rows"):
            optimizer.backward(lambda model, *rest: model(x).mean(), *nothing, sharded=True)
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(lambda model, x, rest: mse(model, x, rest.rows), x, Opaque())  # whole batches may be anything
    assert all(p.grad is not None for p in model.parameters())


# -- what is left in .grad ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", PATHS)
def test_backward_accumulates_over_members_that_differ(vectorize: Any) -> None:
    model, optimizer = wrapped()
    one, two, three = data(12, seed=1), data(13, seed=2), data(12, seed=3)
    before = weights_of(model)
    optimizer.backward(mse, *one, vectorize=vectorize)
    storage = [p.grad.data_ptr() for p in model.parameters()]
    optimizer.backward(mse, *two, sharded=True, vectorize=vectorize)
    optimizer.backward(mse, *three, vectorize=vectorize)
    assert [p.grad.data_ptr() for p in model.parameters()] == storage
    assert_same(weights_of(model), before)

    expected_model = fresh(mlp)
    parts = [
        by_hand(expected_model, mse, [one] * SIZE, population())[1],  # streams 0 and 1, in pairs
        by_hand(
            expected_model,
            mse,
            shards_of(two, [4, 3, 3, 3]),
            population(),
            weights=[4 / 13, 3 / 13, 3 / 13, 3 / 13],
            paired=False,
            first=2,  # streams 2 to 5
        )[1],
        by_hand(expected_model, mse, [three] * SIZE, population(), first=2 * 6)[1],  # streams 6 and 7: members 12 to 15
    ]
    expected = [a + b + c for a, b, c in zip(*parts, strict=True) if a is not None and b is not None and c is not None]
    assert_close(gradients_of(model), expected)

    optimizer.step()  # after which the streams begin again, with another step's key
    optimizer.zero_grad()
    optimizer.backward(mse, *one, vectorize=vectorize)
    with torch.no_grad():
        for p, w in zip(expected_model.parameters(), model.parameters(), strict=True):
            p.copy_(w)
    assert_close(gradients_of(model), by_hand(expected_model, mse, [one] * SIZE, population(), step=1)[1])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
def test_step_batch_is_backward_and_step(vectorize: Any, sharded: bool) -> None:
    (model, optimizer), (other, same) = wrapped(), wrapped()
    batch = data(13)
    for _ in range(2):
        loss = optimizer.step_batch(mse, *batch, sharded=sharded, vectorize=vectorize)
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        expected = same.backward(mse, *batch, sharded=sharded, vectorize=vectorize)
        same.step()
        same.zero_grad()
        assert torch.equal(loss, expected)
    assert_same(snapshot(model, optimizer), snapshot(other, same))


@pytest.mark.parametrize("vectorize", PATHS)
def test_clipping_sees_the_mean_gradient(vectorize: Any) -> None:
    model, optimizer = wrapped()
    optimizer.backward(mse, *data(), vectorize=vectorize)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm > 0.01
    before = weights_of(model)
    optimizer.step()
    moved = torch.cat([(p - w).flatten() for p, w in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(
        0.1 * 0.01, rel=1e-4
    )  # lr times the bound, which has an epsilon of 1e-6


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
def test_an_exception_leaves_everything_as_it_was(vectorize: Any, filled: bool) -> None:
    model, optimizer = wrapped(batchnorm)
    if filled:
        optimizer.backward(mse, *data(), vectorize=vectorize)
    given = [p.grad for p in model.parameters()]
    before = [
        *weights_of(model),
        *[b.clone() for b in model.buffers()],
        *[None if g is None else g.clone() for g in given],
    ]
    calls = [0]

    def loss_fn(model: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = mse(model, x, y)
        calls[0] += 1
        if vectorize != "loop" or calls[0] == 3:
            raise KeyError("mine")
        return loss

    for error in (KeyError, KeyError):  # the same the second time, and no warning about paths
        calls[0] = 0
        with pytest.raises(error, match="mine"):
            optimizer.backward(loss_fn, *data(), vectorize=vectorize)
        after = [*weights_of(model), *[b.clone() for b in model.buffers()], *gradients_of(model)]
        for a, b in zip(after, before, strict=True):
            assert_same(a, b)
        assert all(p.grad is g for p, g in zip(model.parameters(), given, strict=True))
    optimizer.step_batch(mse, *data(), vectorize=vectorize)


# -- BatchNorm and dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, [3, 3, 3, 3], [4, 3, 3, 3]])
@pytest.mark.parametrize("vectorize", PATHS)
def test_norm_statistics_are_the_mean_of_the_members_updates(vectorize: Any, sizes: list[int] | None) -> None:
    batch = data(12 if sizes is None else sum(sizes))
    model, optimizer = wrapped(batchnorm)
    optimizer.backward(mse, *batch, sharded=sizes is not None, vectorize=vectorize)

    shards = [batch] * SIZE if sizes is None else shards_of(batch, sizes)
    shares = [size / sum(sizes) for size in sizes] if sizes else [1 / SIZE] * SIZE
    start = fresh(batchnorm)[1]
    statistics: list[Tensor] = []

    def observed(model: Any, x: Tensor, y: Tensor) -> Tensor:
        model[1].load_state_dict(start.state_dict() | dict(model[1].named_parameters()))
        loss = mse(model, x, y)
        statistics.append(torch.stack([model[1].running_mean, model[1].running_var]).clone())
        return loss

    expected = by_hand(fresh(batchnorm), observed, shards, population(), weights=shares, paired=sizes is None)
    assert_close(gradients_of(model), expected[1])
    mean = sum(share * each for share, each in zip(shares, statistics, strict=True))
    assert_close([torch.stack([model[1].running_mean, model[1].running_var])], [mean])
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
def test_recalibrated_statistics_are_those_of_one_clean_forward(vectorize: Any, sharded: bool) -> None:
    """With the masks of the first forward; the random streams end as they do without it."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.4), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    batch = data(13)
    expected = fresh(make)
    ends = []
    for norm_statistics in ("mean", "recalibrate"):
        model, optimizer = wrapped(make, norm_statistics=norm_statistics)
        start = torch.get_rng_state()
        optimizer.backward(mse, *batch, sharded=sharded, vectorize=vectorize)
        ends.append(torch.get_rng_state())
        torch.set_rng_state(start)
    assert_same(*ends)
    mse(expected, *batch)
    if sharded and vectorize == "loop":  # shards use the streams up: the clean forward has the masks that come then
        torch.set_rng_state(ends[0])
        expected = fresh(make)
        torch.set_rng_state(ends[0])
        mse(expected, *batch)
    assert_same(list(model.buffers()), list(expected.buffers()))


@pytest.mark.parametrize("vectorize", PATHS)
def test_norms_in_eval_mode_stay_as_they_are(vectorize: Any) -> None:
    model, optimizer = wrapped(batchnorm)
    model.eval()
    before = [b.clone() for b in model.buffers()]
    optimizer.backward(mse, *data(), vectorize=vectorize)
    assert_same(list(model.buffers()), before)
    assert_close(gradients_of(model), by_hand(fresh(batchnorm).eval(), mse, [data()] * SIZE, population())[1])


@pytest.mark.parametrize("vectorize", PATHS)
def test_members_of_a_whole_batch_share_their_masks(vectorize: Any) -> None:
    """Without noise, equal masks mean equal losses; shards and fresh masks have masks of their own."""
    spread = {}
    for name, options, sharded in (("shared", {}, False), ("fresh", {"share_masks": False}, False), ("own", {}, True)):
        _, optimizer = wrapped(dropout, sigma=0.0, **options)
        x, y = (leaf[:1].expand(16, -1) for leaf in data())  # equal rows, so that only masks tell shards apart
        optimizer.backward(mse, x, y, sharded=sharded, vectorize=vectorize)
        spread[name] = optimizer.statistics.loss_spread
    assert spread["shared"] == pytest.approx(0, abs=1e-15)
    assert spread["fresh"] > 1e-3
    assert spread["own"] > 1e-3


@pytest.mark.parametrize("share_masks", [True, False])
def test_a_loop_leaves_the_random_streams_where_a_plain_step_does(share_masks: bool) -> None:
    def loss_fn(model: Any, x: Tensor, y: Tensor) -> Tensor:
        factor = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002 - the stream under test
        return factor * mse(model, x, y)

    def ends(work: Any) -> list[float]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the stream under test
        work()
        return [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002 - the stream under test

    model, optimizer = wrapped(dropout, share_masks=share_masks)
    plain = ends(lambda: loss_fn(model, *data()).backward())
    optimizer.zero_grad()
    assert ends(lambda: optimizer.backward(loss_fn, *data(), vectorize="loop")) == plain


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    model, optimizer = wrapped()
    bare = PopulationGradient(sgd(model), seed=0)
    calls: dict[str, Any] = {
        r"ValueError: `model` must be given": lambda: bare.backward(mse, *data()),
        r"TypeError: `loss_fn` must be a callable .* got Tensor": lambda: optimizer.backward(torch.ones(()), *data()),  # type: ignore[arg-type] - the error under test
        r"ValueError: `vectorize` must be one of .* got 'pmap'": lambda: optimizer.backward(
            mse,
            *data(),
            vectorize="pmap",  # type: ignore[arg-type] - the error under test
        ),
        r"TypeError: `loss_fn` must return one number.*\(12, 2\)": lambda: optimizer.backward(
            lambda m, x: m(x), data()[0]
        ),
        r"TypeError: `loss_fn` must return one number.*NoneType": lambda: optimizer.backward(
            lambda m, x: None,  # type: ignore[arg-type,return-value] - the error under test
            data()[0],
        ),
    }
    for message, call in calls.items():
        kind, _, pattern = message.partition(": ")
        with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[kind], match=pattern):
            call()
    with optimizer.member(0), pytest.raises(RuntimeError, match=r"`backward` must not be called while"):
        optimizer.backward(mse, *data())
    assert all(p.grad is None for p in model.parameters())


def test_names_of_the_batch_are_free() -> None:
    """Only `sharded` and `vectorize` are taken."""
    model, optimizer = wrapped()
    x, y = data()

    def loss_fn(model: Any, **batch: Tensor) -> Tensor:
        return mse(model, batch["self"], batch["loss_fn"])

    optimizer.backward(loss_fn, vectorize="loop", self=x, loss_fn=y)
    assert_close(gradients_of(model), by_hand(fresh(mlp), mse, [(x, y)] * SIZE, population())[1])


@pytest.mark.parametrize("vectorize", PATHS)
def test_gradients_do_not_depend_on_the_surroundings(vectorize: Any) -> None:
    """no_grad around the call, a partial as the loss, a member of the unchanged loop still in place."""
    x, y = data()
    expected = by_hand(fresh(mlp), mse, [(x, y)] * SIZE, population())[1]
    model, optimizer = wrapped()
    with torch.no_grad():
        optimizer.backward(partial(mse, y=y), x, vectorize=vectorize)
    assert_close(gradients_of(model), expected)

    model, optimizer = wrapped()
    mean = weights_of(model)
    model(x)
    assert not torch.equal(model[0].weight, mean[0])
    optimizer.backward(mse, x, y, vectorize=vectorize)
    assert_same(weights_of(model), mean)
    later = by_hand(fresh(mlp), mse, [(x, y)] * SIZE, population(), first=2)[1]  # stream 0 is that member's
    assert_close(gradients_of(model), later)


@pytest.mark.parametrize("vectorize", PATHS)
def test_two_optimizers_over_one_model(vectorize: Any) -> None:
    """Each moves its own tensors; gradients arrive at all, as from any backward."""
    model = fresh(mlp)
    options: Any = {"population_size": SIZE, "sigma": 0.2}
    one = PopulationGradient(torch.optim.SGD(model[0].parameters(), lr=0.1), model, seed=3, **options)
    two = PopulationGradient(torch.optim.SGD(model[2].parameters(), lr=0.1), model, seed=4, **options)
    one.backward(mse, *data(), vectorize=vectorize)
    expected = by_hand(fresh(mlp), mse, [data()] * SIZE, population(), sigma_of=lambda index: 0.2 if index < 2 else 0.0)
    assert_close(gradients_of(model), expected[1])
    assert two.statistics.members == 0
