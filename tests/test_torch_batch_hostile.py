"""What once went wrong in `backward`, mostly without a word: vmap must do what the loop does, or step aside."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_batch_cells import mse

from gradwise.torch import PopulationGradient
from gradwise_torch._paths import automatic_path
from gradwise_torch._probe import Probe

Y = torch.linspace(-1, 1, 24, dtype=torch.float64).view(12, 2)
X = torch.sin(torch.arange(72, dtype=torch.float64)).view(12, 6)


def wrap(model: nn.Module, **options: Any) -> PopulationGradient:
    options = {"population_size": 4, "seed": 1, **options}
    return PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def gradients(make: Callable[[], nn.Module], loss_fn: Any, *batch: Any, path: Any, **options: Any) -> list[Tensor]:
    model = make()
    wrap(model).backward(loss_fn, *batch, vectorize=path, **options)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def assert_paths_agree(
    make: Callable[[], nn.Module], loss_fn: Any, *batch: Any, refused: str | None = None, **options: Any
) -> None:
    loop = gradients(make, loss_fn, *batch, path="loop", **options)
    if refused is None:
        vmap = gradients(make, loss_fn, *batch, path="vmap", **options)
    else:
        with pytest.warns(UserWarning, match=f'vectorize="vmap" is not possible here .*{refused}'):
            vmap = gradients(make, loss_fn, *batch, path="vmap", **options)
    for got, expected in zip(vmap, loop, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_module_with_two_names_stays_whole() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        shared, norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        return nn.Sequential(shared, norm, nn.Tanh(), shared, norm, nn.Linear(6, 2)).double()

    assert_paths_agree(make, mse, X, Y)
    model = make()
    optimizer = wrap(model)
    optimizer.backward(mse, X, Y, vectorize="vmap")
    assert type(model[0].weight) is nn.Parameter
    optimizer.step()
    model(X)


def test_gradients_are_laid_out_like_their_parameters() -> None:
    """Fused optimizers walk through memory."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    weights = []
    for path in ("loop", "vmap"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[reportCallIssue] - missing in the stub
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        optimizer = PopulationGradient(inner, model, population_size=4, seed=1)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step_batch(lambda m, x: m(x).square().mean(), x, vectorize=path)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)  # float32 and Adam's division by small numbers


def test_captured_parameters_are_seen() -> None:
    model = mlp()
    captured = list(model.parameters())

    def penalised(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return mse(m, x, y) + 0.1 * sum(p.square().sum() for p in captured)

    optimizer = wrap(model)
    optimizer.backward(penalised, X, Y, vectorize="loop")
    expected = [p.grad for p in model.parameters()]
    optimizer = wrap(model)
    for path in ("vmap", "compile"):
        optimizer.zero_grad()
        optimizer._streams = 0
        with pytest.warns(UserWarning, match="captured"):
            optimizer.backward(penalised, X, Y, vectorize=path)
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_backward_hooks_of_modules_run() -> None:
    def make() -> nn.Module:
        model = mlp()
        model[1].register_full_backward_hook(lambda module, before, after: (before[0] * 0.5,))
        return model

    assert_paths_agree(make, mse, X, Y, refused="backward hook")


def test_padding_rows_get_no_gradient() -> None:
    tokens = torch.arange(24).view(12, 2) % 5

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2)).double()

    assert_paths_agree(make, mse, tokens, Y, sharded=True, refused="padding")
    assert_paths_agree(make, mse, tokens, Y)


class Keeps(nn.Module):
    """Leaves an intermediate result in a buffer or an attribute."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where = nn.Linear(6, 2), where
        self.register_buffer("ema", torch.zeros(2))
        self.kept: Any = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.where == "buffer":
            self.ema = 0.9 * self.ema + 0.1 * h.mean(0).detach()
        elif self.where == "attribute":
            self.last = h
        else:
            self.kept = [h.detach()]
        return h


@pytest.mark.parametrize("where", ["buffer", "attribute", "list"])
def test_nothing_of_vmap_stays_behind(where: str) -> None:
    torch.manual_seed(0)
    model, twin = (Keeps(where).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    wrap(twin).backward(mse, X, Y, vectorize="loop")
    with pytest.warns(UserWarning, match="keeps an intermediate result"):
        wrap(model).backward(mse, X, Y, vectorize="vmap")
    torch.testing.assert_close(model.ema, twin.ema)
    torch.testing.assert_close(model.layer.weight.grad, twin.layer.weight.grad)
    kept = {"buffer": model.ema, "attribute": getattr(model, "last", None), "list": [*model.kept, None][0]}[where]
    assert isinstance(kept, Tensor)
    kept.sum().item()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.use_second = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.third(h) + (self.second(h) if self.use_second else 0)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced runs as it is: generating and compiling C++ takes seconds for every program."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at those that have none
def test_compiled_gradients_follow_what_is_used() -> None:
    """Unused parameters keep ``None``; frozen and thawed ones, and those used later, are noticed."""
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = wrap(model)
    optimizer.backward(mse, X, Y, vectorize="compile")
    assert model.second.weight.grad is None
    optimizer.zero_grad()
    model.first.requires_grad_(False)
    optimizer.backward(mse, X, Y, vectorize="compile")
    assert model.third.weight.grad is not None
    assert model.second.weight.grad is None
    optimizer.zero_grad()
    model.use_second = True
    optimizer.backward(mse, X, Y, vectorize="compile")
    assert model.second.weight.grad is not None


@pytest.mark.parametrize("name", ["backward", "member", "mean", "step", "step with closure"])
@pytest.mark.parametrize("inside", ["loss_fn", "closure"])
def test_members_do_not_nest(name: str, inside: str) -> None:
    model = mlp()
    optimizer = wrap(model)

    def nested() -> None:
        if name == "backward":
            optimizer.backward(mse, X, Y)
        elif name.startswith("step"):
            optimizer.step(None if name == "step" else lambda: 0.0)
        else:
            with optimizer.member(0) if name == "member" else optimizer.mean():
                pass

    def loss_fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        nested()
        return mse(m, x, y)

    before = [p.detach().clone() for p in model.parameters()]
    outer = {
        "loss_fn": lambda: optimizer.backward(loss_fn, X, Y),
        "closure": lambda: optimizer.step(lambda: loss_fn(model, X, Y)),
    }
    with pytest.raises(RuntimeError, match="while another member"):
        outer[inside]()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.backward(mse, X, Y)  # and all is as it was


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("path", ["loop", "vmap", "compile"])
def test_other_leaves_get_the_gradient_of_the_mean_loss(path: Any, sharded: bool) -> None:
    """A criterion with weights, and the inputs; at sigma 0 the mean loss is the plain one."""
    model, log_variance, x = mlp(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), X.clone().requires_grad_()

    def loss_fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return ((m(x) - y).square() * (-log_variance).exp() + log_variance).mean()

    loss_fn(model, x, Y).backward()
    expected = log_variance.grad, x.grad
    log_variance.grad = x.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(model, sigma=0.0, population_size=8).backward(loss_fn, x, Y, sharded=sharded, vectorize=path)
    for got, plain in zip((log_variance.grad, x.grad), expected, strict=True):
        torch.testing.assert_close(got, plain)


def test_what_cannot_be_split_is_refused() -> None:
    optimizer = wrap(mlp())
    for opaque in ([f"text {i}" for i in range(12)], SimpleNamespace(x=X), type("Data", (), {"__call__": len})()):
        with pytest.raises(TypeError, match="`batch`"):
            optimizer.backward(lambda m, x, other: m(x).sum(), X, opaque, sharded=True)
    optimizer.backward(lambda m, x, names: m(x).mean(), X, ["two", "names"], sharded=True)


def test_numpy_batches_take_the_loop() -> None:
    def from_numpy(m: nn.Module, x: Any, y: Any) -> Tensor:
        return mse(m, torch.as_tensor(x), torch.as_tensor(y))

    assert_paths_agree(mlp, from_numpy, X.numpy(), Y.numpy(), sharded=True, refused="numpy")


@pytest.mark.parametrize("path", ["loop", "vmap"])
def test_autocast_around_the_call(path: Any) -> None:
    model = mlp().float()
    with torch.autocast("cpu", torch.bfloat16):
        wrap(model).backward(mse, X[:11].float(), Y[:11].float(), sharded=True, vectorize=path)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("path", ["loop", "vmap"])
def test_gradients_survive_a_failure_of_the_clean_forward(path: Any) -> None:
    model = mlp()
    optimizer = wrap(model, norm_statistics="recalibrate")
    optimizer.backward(mse, X, Y, vectorize=path)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def fails_at_the_mean(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise OSError("at the mean")
        return mse(m, x, y)

    with pytest.raises(OSError, match="at the mean"):
        optimizer.backward(fails_at_the_mean, X, Y, vectorize=path)
    for p, gradient in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        assert gradient is not None
        assert torch.equal(p.grad, gradient)


def test_a_loss_that_turns_infinite_leaves_no_second_trace() -> None:
    """On a path that has worked before."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.dropout(self.layer(x), 0.5)

    counts = []
    for path in ("loop", "vmap"):
        torch.manual_seed(0)
        model = Counts().double()
        optimizer = wrap(model, on_nonfinite="skip")
        optimizer.backward(mse, X, Y, vectorize=path)
        with pytest.raises(ValueError, match="finite"):
            optimizer.backward(mse, X / 0, Y, vectorize=path)
        counts.append(float(model.calls))
    assert counts == [1.0, 1.0]


def test_a_float_is_not_a_loss() -> None:
    with pytest.raises(TypeError, match="as a tensor; got float"):
        wrap(mlp()).backward(lambda m, x: m(x).sum().item(), X)


def test_probes_see_every_weight_equally_often() -> None:
    size = 3 * (1 << 18) + 5
    seen = torch.zeros(size)
    for block in range(8):
        seen[Probe((block + 0.5) / 8).span(size)] += 1
    assert torch.equal(seen, torch.ones(size))
    assert Probe(0.99).span(100) == slice(0, 100)
    assert Probe().factor(size) == 8
    assert Probe().factor(3 << 16) == 3


@pytest.mark.parametrize("path", ["loop", "vmap"])
def test_agreement_of_unequal_shards_is_at_most_one(path: Any) -> None:
    optimizer = wrap(mlp(), sigma=0.0)
    x, y = X[:1].expand(7, 6), Y[:1].expand(7, 2)  # equal rows: equal gradients
    optimizer.backward(mse, x, y, sharded=True, vectorize=path)
    assert optimizer.statistics.agreement == pytest.approx(1.0)
    assert optimizer.statistics.relative_sigma == 0
    optimizer.backward(mse, X[:7], Y[:7], sharded=True, vectorize=path)
    assert optimizer.statistics.agreement <= 1


def test_a_member_of_the_loop_after_a_backward_leaves_its_sharpness() -> None:
    model = mlp()
    optimizer = wrap(model)
    optimizer.backward(mse, X, Y)
    before = optimizer.statistics.sharpness
    mse(model, X, Y).backward()
    assert optimizer.statistics.sharpness == before


def test_partials_are_known_by_their_function() -> None:
    from functools import partial

    def item(m: nn.Module, x: Tensor, y: Tensor, weight: float) -> Tensor:
        return mse(m, x, y) * (1.0 if m(x).sum().item() > 0 else weight)

    optimizer = wrap(mlp())
    with pytest.warns(UserWarning, match="not possible"):
        optimizer.backward(partial(item, weight=0.5), X, Y, vectorize="vmap")
    optimizer.backward(partial(item, weight=0.6), X, Y, vectorize="vmap")  # a second warning would be an error
    assert len(optimizer._ways) == 1


def test_an_error_of_the_users_does_not_settle_the_path() -> None:
    optimizer = wrap(mlp())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        optimizer.backward(mse, X[:, :5], Y, vectorize="vmap")
    optimizer.backward(mse, X, Y, vectorize="vmap")
    assert not any(way.refused for way in optimizer._ways.values())


def test_hooks_that_a_forward_registers_stay() -> None:
    model = mlp()

    def loss_fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not handles:
            handles.append(m.register_forward_hook(lambda *_: None))
        return mse(m, x, y)

    handles: list[Any] = []
    optimizer = wrap(model)
    count = len(model._forward_hooks)
    optimizer.backward(loss_fn, X, Y, vectorize="vmap")
    assert len(model._forward_hooks) == count + 1
    handles[0].remove()
    assert len(model._forward_hooks) == count
    mse(model, X, Y).backward()  # ours still start members
    assert optimizer._in_loop


def test_complex_parameters_pass_through_the_loop() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) * self.phase).abs()

    torch.manual_seed(0)
    optimizer = wrap(Phase().double(), sigma=0.0)
    optimizer.backward(mse, X, Y, vectorize="loop")  # a cast that drops the imaginary part would warn
    assert optimizer.statistics.agreement == pytest.approx(1.0)


WORKER = """
import sys, torch
from torch import nn
sys.path.insert(0, sys.argv[1])
from gradwise.torch import PopulationGradient
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
x, y = torch.randn(12, 6), torch.randn(12, 2)
loss_fn = lambda m, x, y: nn.functional.mse_loss(m(x), y)
results = []
for wrapped in (False, True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    module = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if wrapped else model
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), module, population_size=4, seed=1)
    for _ in range(2):
        for _ in range(2):
            optimizer.backward(loss_fn, x, y, vectorize="loop")
        optimizer.step()
        optimizer.zero_grad()
    results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
torch.testing.assert_close(*results)
nested = nn.Sequential(nn.parallel.DistributedDataParallel(model))
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = PopulationGradient(torch.optim.SGD(nested.parameters(), lr=0.1), nested, population_size=4, seed=1)
    optimizer.backward(loss_fn, x, y, vectorize="vmap")
assert "distributed" in str(caught[0].message), caught
"""


def test_gradients_in_the_buckets_of_ddp(tmp_path: Any) -> None:
    """Where every member's backward writes to the same storage."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER, "", str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ["loop", "vmap"])
def test_torchs_stream_is_left_alone(path: Any) -> None:
    model = mlp()
    before = torch.get_rng_state()
    wrap(model).backward(mse, X, Y, vectorize=path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", ["returned", "in place"])
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at those that have none
def test_auto_compiles_for_a_compiled_model(how: str) -> None:
    """Also where torch.compile has wrapped the model, which cannot be compiled twice."""
    net = mlp()
    model: Any = torch.compile(net, backend="eager") if how == "returned" else net
    if how == "in place":
        net.compile(backend="eager")
    assert automatic_path(model, list(net.parameters()), 12, sharded=False) == "compile"
    optimizer = PopulationGradient(torch.optim.SGD(net.parameters(), lr=0.1), model, population_size=4, seed=1)
    results = []
    for path in ("auto", "loop"):
        optimizer.zero_grad()
        optimizer._streams = 0
        optimizer.backward(mse, X, Y, vectorize=path)
        results.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
