"""What differs on a GPU: scaled and autocast training, captured and compiled models, streams, cuDNN.

Every test also runs on the CPU, with that device's own means, so that it has been executed where there is no GPU.
The references are loops by hand on the CPU, in double precision or with a tolerance that says why.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_cells import batches, loss_of, perturb_by_hand, put

from gradwise import Population
from gradwise.torch import GradientMatching, PopulationGradient, value_and_jacobian

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
SIGMA, SEED, SIZE = 0.3, 5, 4
on_each_device = pytest.mark.parametrize("device", DEVICES)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def rows(count: int, device: str, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(device, dtype), y.to(device, dtype)) for x, y in batches(count)]


def by_hand(steps: int, make_inner: Callable[[Any], torch.optim.Optimizer], *, members: int = 1, skip: int = -1) -> Any:
    """The weights after some steps in double precision on the CPU, each with its member(s); step `skip` is left out."""
    model = network()
    parameters = list(model.parameters())
    inner = make_inner(parameters)
    population = Population(size=members, sigma=SIGMA, seed=SEED, antithetic=False)
    for step, batch in enumerate(rows(steps, "cpu")):
        for member in range(members):
            mean = perturb_by_hand(parameters, population, step=step, member=member, paired=False)
            (loss_of(model, batch) / members).backward()
            put(parameters, mean)
        if step != skip:
            inner.step()
        inner.zero_grad()
    return [parameter.detach() for parameter in parameters]


def assert_near(got: Any, expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.detach().cpu().double(), b, rtol=tolerance, atol=tolerance)


WAYS = ["unchanged", "closure", "backward"]


def train(model: Any, optimizer: PopulationGradient, data: list[tuple[Tensor, Tensor]], way: str) -> None:
    """The unchanged loop, or K members on every batch."""
    for batch in data:

        def backward(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        if way == "closure":
            optimizer.step(backward)
        elif way == "backward":
            optimizer.zero_grad()
            optimizer.backward(loss_of, batch, vectorize="loop")
            optimizer.step()
        else:
            backward()
            optimizer.step()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def population(model: Any, plain: nn.Module) -> PopulationGradient:
    inner = sgd(plain.parameters())
    return PopulationGradient(inner, model, population_size=SIZE, sigma=SIGMA, antithetic=False, seed=SEED)


@on_each_device
@pytest.mark.parametrize("fused", [False, True])
def test_float16_with_a_scaler_skips_an_overflow_and_keeps_the_mean(device: str, fused: bool) -> None:
    model = network(torch.float32).to(device)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    optimizer = PopulationGradient(inner, model, sigma=SIGMA, seed=SEED)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for step, (x, y) in enumerate(rows(4, device, torch.float32)):
        mean = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.autocast(device, torch.float16):
            loss = nn.functional.mse_loss(model(x), y)
        assert not torch.equal(next(model.parameters()), mean[0])  # a member
        scaler.scale(loss * float("inf") if step == 2 else loss).backward()
        if not fused:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 2:
            assert all(torch.equal(p, before) for p, before in zip(model.parameters(), mean, strict=True))
            assert scaler.get_scale() == 512.0
    expected = by_hand(4, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), skip=2)
    assert_near(model.parameters(), expected, 2e-3)  # float16 has 11 bits


@on_each_device
def test_bfloat16_autocast_casts_the_weights_of_every_member(device: str) -> None:
    """One autocast region around everything: its cache of cast weights must not outlive a member."""
    model = network(torch.float32).to(device)
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model, sigma=SIGMA, seed=SEED)
    with torch.autocast(device, torch.bfloat16):
        for x, y in rows(3, device, torch.float32):
            nn.functional.mse_loss(model(x).float(), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = by_hand(3, sgd)
    assert_near(model.parameters(), expected, 1e-2)  # bfloat16 has 8 bits


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: "Captured", x: Tensor, *parameters: Tensor) -> Tensor:
        del parameters
        ctx.captured = captured
        with torch.enable_grad():
            captured.graph = torch.func.functional_call(captured.model, captured.memory, (x,))
            captured.output.copy_(captured.graph.detach())
        return captured.output.detach()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        captured: Captured = ctx.captured
        gradients = torch.autograd.grad(captured.graph, list(captured.memory.values()), outer)
        for buffer, gradient in zip(captured.gradients, gradients, strict=True):
            buffer.copy_(gradient)
        return None, None, *[buffer.detach() for buffer in captured.gradients]


class Captured(nn.Module):
    """What `torch.cuda.make_graphed_callables` makes of a model: weights, output and gradients keep their memory."""

    graph: Tensor

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model = model
        self.memory = {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}
        self.output = model(x).detach()
        self.gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        return _Replay.apply(self, x, *self.model.parameters())


@on_each_device
@pytest.mark.parametrize("way", WAYS)
def test_a_captured_model_sees_every_member(device: str, way: str) -> None:
    """A CUDA graph reads the weights where they are, and members move them there; the hooks run around the graph."""
    model = network().to(device)
    data = rows(3, device)
    example = data[0][0].clone()
    called: Any = torch.cuda.make_graphed_callables(model, (example,)) if device == "cuda" else Captured(model, example)
    train(called, population(called, model), data, way)
    assert_near(model.parameters(), by_hand(3, sgd, members=1 if way == "unchanged" else SIZE), 1e-9)


# dynamo itself asks non-leaf tensors for their .grad at a graph break, and ignores the answer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@on_each_device
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_sees_every_member(device: str, way: str) -> None:
    """On a GPU in the mode that captures CUDA graphs by itself."""
    plain = network().to(device)
    how: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    model: Any = torch.compile(plain, **how)
    train(model, population(model, plain), rows(4, device), way)
    assert_near(plain.parameters(), by_hand(4, sgd, members=1 if way == "unchanged" else SIZE), 1e-9)


@on_each_device
@pytest.mark.parametrize("way", WAYS)
def test_all_work_is_on_the_current_stream(device: str, way: str) -> None:
    model = network().to(device)
    data = rows(4, device)
    context: AbstractContextManager[Any] = nullcontext()
    if device == "cuda":
        torch.cuda.synchronize()
        context = torch.cuda.stream(torch.cuda.Stream())
        # Whatever were put on the default stream by mistake would be late.
        torch.cuda._sleep(100_000_000)
    with context:
        train(model, population(model, model), data, way)
        result = [parameter.detach().cpu() for parameter in model.parameters()]
    assert_near(result, by_hand(4, sgd, members=1 if way == "unchanged" else SIZE), 1e-9)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (2, 3)))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.into, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.into(x.unflatten(1, (2, 3)))).mean(1))


def slope_by_hand(model: nn.Module, x: Tensor, target: Tensor, along: list[Tensor]) -> float:
    """Derivative of ``mean_i sum_j (J_ij - T_ij)^2``, averaged over outputs, by central differences, twice."""

    def loss(move: float) -> float:
        with torch.no_grad():
            for parameter, v in zip(model.parameters(), along, strict=True):
                parameter.add_(v, alpha=move)
            columns = [(model(x + 1e-4 * e) - model(x - 1e-4 * e)) / 2e-4 for e in torch.eye(x.shape[1], dtype=x.dtype)]
            for parameter, v in zip(model.parameters(), along, strict=True):
                parameter.sub_(v, alpha=move)
        return (torch.stack(columns, 2) - target).square().sum(2).mean().item()

    return (loss(1e-4) - loss(-1e-4)) / 2e-4


def matching_case(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = make().double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64)
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    return model, x, target, along


def slope(model: nn.Module, loss: Tensor, along: list[Tensor]) -> float:
    model.zero_grad()
    loss.backward()
    pairs = [(p.grad.cpu().double(), v) for p, v in zip(model.parameters(), along, strict=True) if p.grad is not None]
    return sum((gradient * v).sum().item() for gradient, v in pairs)


@on_each_device
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 2e-3), (True, 5e-2)])
def test_matching_trains_attention_and_normalisation(device: str, autocast: bool, tolerance: float) -> None:
    """In float32, for which GPUs have fused attention, without a second derivative; and under bfloat16 autocast."""
    model, x, target, along = matching_case(Attention)
    expected = slope_by_hand(model, x, target, along)
    model = model.float().to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = GradientMatching(scale="none")(model, x.float().to(device), target.float().to(device))
    assert slope(model, loss, along) == pytest.approx(expected, rel=tolerance)


@on_each_device
def test_cudnn_recurrent_layers_are_refused_and_others_right(device: str) -> None:
    model, x, target, along = matching_case(Recurrent)
    expected = slope_by_hand(model, x, target, along)
    model, x, target = model.to(device), x.to(device), target.to(device)
    matching = GradientMatching(scale="none")
    if device == "cuda":
        with pytest.raises(NotImplementedError, match=r"torch\.backends\.cudnn\.flags\(enabled=False\)"):
            matching(model, x, target)
        with pytest.raises(NotImplementedError, match=r"torch\.backends\.cudnn\.flags\(enabled=False\)"):
            value_and_jacobian(model.eval(), x)
        model.train()
    with torch.backends.cudnn.flags(enabled=False):
        loss = matching(model, x, target)
    assert slope(model, loss, along) == pytest.approx(expected, rel=1e-5)
