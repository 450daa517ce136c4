"""Members all at once: equal to the loop, and the loop where that cannot be."""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch_batch_cells import (
    SIZE,
    assert_close,
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

import gradwise._noise
from gradwise.torch import GradientMatching, PopulationGradient
from gradwise_torch._noise import Noise

PATHS = ["loop", "vmap"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.reshape(-1, 2, 3))[0][:, -1])


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3, sparse=True), nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x.abs() * 3).long().clamp(max=4)).flatten(1))


class Counting(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.head(x)


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.Dropout(0.3), nn.Linear(8, 2))


def item(model: Any, x: Tensor, y: Tensor) -> Tensor:
    loss = mse(model, x, y)
    return loss / loss.item()


def branching(model: Any, x: Tensor, y: Tensor) -> Tensor:
    loss = mse(model, x, y)
    return loss if loss > 1 else 2 * loss


def masked(model: Any, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return (out - y)[out > 0].square().mean()


def matched(model: Any, x: Tensor, y: Tensor) -> Tensor:
    values, loss = GradientMatching(scale="none").with_values(model, x, torch.ones(len(x), 2, 6, dtype=x.dtype))
    return nn.functional.mse_loss(values, y) + loss


def slope_penalty(model: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return nn.functional.mse_loss(out, y) + slope.square().mean()


IMPOSSIBLE: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "item": (dropout, item),
    "item after a buffer has changed": (Counting, item),
    "branch": (dropout, branching),
    "mask": (dropout, masked),
    "autograd.grad": (dropout, slope_penalty),
    "spectral norm": (spectral, mse),
    "sparse": (Looked, mse),
}
UNSURE: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {  # versions of torch differ
    "lstm": (Recurrent, mse),
    "matching": (mlp, matched),
    "norm without momentum": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 2)),
        mse,
    ),
}


def recorded(call: Callable[[], Any]) -> tuple[Any, list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [w for w in caught if "performance drop" not in str(w.message)]


# -- where it cannot go ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*stays unperturbed:UserWarning")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_vmap_cannot_do_is_done_by_the_loop(name: str, sharded: bool) -> None:
    make, loss_fn = IMPOSSIBLE[name]
    (model, optimizer), (other, looping) = wrapped(make), wrapped(make)
    for call in range(2):
        ends = []
        ways: tuple[Any, ...] = ((model, optimizer, "vmap"), (other, looping, "loop"))
        for m, o, vectorize in ways:
            torch.manual_seed(call)
            loss, caught = recorded(
                lambda o=o, vectorize=vectorize: o.backward(loss_fn, *data(13), sharded=sharded, vectorize=vectorize)
            )
            ends.append([loss, *[g.to_dense() for g in gradients_of(m) if g is not None], *snapshot(m, o)])
            assert len(caught) == (vectorize == "vmap" and call == 0)
            for warning in caught:
                assert warning.category is UserWarning
                assert 'vectorize="vmap" is not possible here (' in str(warning.message)
                assert warning.filename == __file__
        assert_same(*ends)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", UNSURE)
def test_what_some_versions_of_torch_cannot_do(name: str, sharded: bool) -> None:
    make, loss_fn = UNSURE[name]
    (model, optimizer), (other, looping) = wrapped(make), wrapped(make)
    loss, caught = recorded(lambda: optimizer.backward(loss_fn, *data(13), sharded=sharded, vectorize="vmap"))
    expected = looping.backward(loss_fn, *data(13), sharded=sharded, vectorize="loop")
    assert len(caught) <= 1
    assert_close([loss, *gradients_of(model)], [expected, *gradients_of(other)])
    assert_close(list(model.buffers()), list(other.buffers()))


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_run_once_per_member(hook: str) -> None:
    model, optimizer = wrapped()
    calls: list[int] = []
    getattr(model[0].weight, hook)(lambda _: calls.append(1))
    with pytest.warns(UserWarning, match="gradient hook"):
        optimizer.backward(mse, *data(), vectorize="vmap")
    assert len(calls) == SIZE


def test_parameters_that_the_model_lacks() -> None:
    model, temperature = fresh(mlp), nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = PopulationGradient(
        torch.optim.SGD([*model.parameters(), temperature], lr=0.1), model, population_size=SIZE, sigma=0.2, seed=3
    )

    def loss_fn(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return mse(model, x, y) * temperature

    with pytest.warns(UserWarning, match="parameters that the model does not have"):
        loss = optimizer.backward(loss_fn, *data(), vectorize="vmap")
    torch.testing.assert_close(temperature.grad, loss)  # the loss is linear in it


def test_a_distributed_model_loops(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        expected = by_hand(fresh(mlp), mse, [data()] * SIZE, population())[1]
        model = nn.parallel.DistributedDataParallel(fresh(mlp))
        optimizer = PopulationGradient(sgd(model), model, population_size=SIZE, sigma=0.2, seed=3)
        with pytest.warns(UserWarning, match="distributed"):
            optimizer.backward(mse, *data(), vectorize="vmap")
        assert_close(gradients_of(model), expected)
    finally:
        torch.distributed.destroy_process_group()


# dynamo itself asks non-leaf tensors for their .grad at a graph break, and ignores the answer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("vectorize", PATHS)
def test_a_model_that_is_compiled(vectorize: Any) -> None:
    model = fresh(mlp)
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = PopulationGradient(sgd(model), compiled, population_size=SIZE, sigma=0.2, seed=3)
    optimizer.backward(mse, *data(), vectorize=vectorize)
    assert_close(gradients_of(model), by_hand(fresh(mlp), mse, [data()] * SIZE, population())[1])
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


# -- losses that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("vectorize", PATHS)
def test_a_member_whose_loss_is_not_finite(vectorize: Any, sharded: bool) -> None:
    batch = data(13)
    batches = shards_of(batch, [4, 3, 3, 3]) if sharded else [batch] * SIZE
    shares = [4 / 13, 3 / 13, 3 / 13, 3 / 13] if sharded else [1 / SIZE] * SIZE
    losses: list[float] = []

    def noted(model: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = mse(model, x, y)
        losses.append(loss.item())
        return loss

    by_hand(fresh(mlp), noted, batches, population(), paired=not sharded)
    worst, bound = losses.index(max(losses)), sorted(losses)[-2]

    def loss_fn(model: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = mse(model, x, y)
        return torch.where(loss > bound * (1 + 1e-9), math.nan, loss)

    model, optimizer = wrapped()
    optimizer.backward(mse, *batch, sharded=sharded, vectorize=vectorize)
    before = [g.clone() for g in gradients_of(model) if g is not None]
    optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": counted_from_zero(optimizer)})
    with pytest.raises(ValueError, match=rf"`loss_fn` must return a finite loss; member {worst} returned nan"):
        optimizer.backward(loss_fn, *batch, sharded=sharded, vectorize=vectorize)
    assert_same(gradients_of(model), before)

    model, optimizer = wrapped(on_nonfinite="skip")
    loss = optimizer.backward(loss_fn, *batch, sharded=sharded, vectorize=vectorize)
    weights = [0 if member == worst else share / (1 - shares[worst]) for member, share in enumerate(shares)]
    expected = by_hand(fresh(mlp), mse, batches, population(), weights=weights, paired=not sharded)
    assert_close([loss, *gradients_of(model)], [expected[0], *expected[1]])
    assert optimizer.statistics.members == SIZE - 1
    assert optimizer.statistics.skipped == 1


def counted_from_zero(optimizer: PopulationGradient) -> list[dict[str, Any]]:
    """Groups of a state whose next members are the first of the step."""
    first, *rest = optimizer.state_dict()["param_groups"]
    return [{**first, "gradwise_member": 0}, *rest]


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of several windows, without the millions of numbers that this takes otherwise."""
    monkeypatch.setattr(gradwise._noise, "CHUNK", 48)
    gradwise._noise.key_words.cache_clear()
    yield
    gradwise._noise.key_words.cache_clear()


class Weight(nn.Module):
    """The gradient of its loss is the weight itself, to the bit."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype))

    def forward(self) -> Tensor:
        return self.weight.square().sum() / 2


def assert_members_are_the_same(dtype: torch.dtype, scale: Any) -> None:
    ways: Any = PATHS
    for rows, columns in ((1, 1), (3, 5), (7, 16), (13, 33)):
        members = []
        for vectorize in ways:
            model = Weight(rows, columns, dtype)
            optimizer = PopulationGradient(
                torch.optim.SGD(model.parameters(), lr=0.0),
                model,
                population_size=1,
                antithetic=False,
                sigma=0.3,
                scale=scale,
                seed=5,
            )
            for _ in range(6):  # windows come with either sign
                optimizer.zero_grad()
                optimizer.backward(lambda model: model(), vectorize=vectorize)
                members.append(model.weight.grad)
        assert_same(members[:6], members[6:])


@pytest.mark.parametrize("scale", ["rms", "filter", "absolute"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stacked_members_are_those_of_the_loop(dtype: torch.dtype, scale: Any) -> None:
    assert_members_are_the_same(dtype, scale)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("scale", ["rms", "filter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stacked_members_of_several_windows(dtype: torch.dtype, scale: Any) -> None:
    assert_members_are_the_same(dtype, scale)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("span", [slice(0, 40), slice(16, 40), slice(0, 300), slice(64, 250)])
def test_dot_of_noise(span: slice) -> None:
    size = 40 if span.stop == 40 else 300  # of one window, and of seven
    like = torch.randn(size, generator=torch.Generator().manual_seed(1))
    (windows,) = population().windows_of(size, step=0, members=[1], tensor=0)
    noise = torch.from_numpy(population().unit_noise((size,), step=0, member=1, tensor=0))
    for values in (like, like.double(), like.bfloat16()):
        dot, sign = Noise("gaussian", windows, values).dot(values, span)
        expected = (noise[span] * values.double()[span]).sum()
        assert dot.dtype == (torch.float64 if values.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(sign * dot.double(), expected, rtol=1e-5, atol=1e-5)  # sums in float32


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # where there is no compiler, a warning and another way
@pytest.mark.parametrize("sharded", [False, True])
def test_compiled_members_equal_the_loop(sharded: bool) -> None:
    make: Callable[[], nn.Module] = (lambda: nn.Linear(6, 2)) if sharded else mlp
    (model, optimizer), (other, looping) = wrapped(make), wrapped(make)
    for step in range(2):
        batch = data(13, seed=step)
        loss = optimizer.step_batch(mse, *batch, sharded=sharded, vectorize="compile")
        expected = looping.step_batch(mse, *batch, sharded=sharded, vectorize="loop")
        assert_close([loss, *gradients_of(model)], [expected, *gradients_of(other)])
    assert_close(list(model.parameters()), list(other.parameters()))
    for name in ("loss_mean", "loss_spread", "agreement", "sharpness", "relative_sigma", "members"):
        got, wanted = (getattr(o.statistics, name) for o in (optimizer, looping))
        assert got == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.filterwarnings("ignore")  # as above
def test_compiled_norms_and_masks() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

    model, optimizer = wrapped(make, sigma=0.0)
    expected = fresh(make)
    expected(data()[0])
    optimizer.backward(mse, *data(), vectorize="compile")
    assert_close(list(model.buffers()), list(expected.buffers()))  # the norm is before the dropout
    assert optimizer.statistics.loss_spread == pytest.approx(0, abs=1e-12)
