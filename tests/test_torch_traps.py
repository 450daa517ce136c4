"""Silent traps: each is said once, with the remedy, and nothing else is."""

import copy
import gc
import io
import math
import warnings
import weakref
from functools import partial

import pytest
import torch
from test_torch_matching import DOUBLE, INPUTS, OUTPUTS, Attention, N, Recurrent, mlp
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradwise_torch._matching import GradientMatching
from gradwise_torch._population import PopulationGradient
from gradwise_torch._traps_offset import _watches

KINKS = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": nn.PReLU,
    "Hardtanh or ReLU6": nn.ReLU6,
    "threshold": lambda: nn.Threshold(0.1, 0.0),
    "Hardshrink": nn.Hardshrink,
    "Softshrink": nn.Softshrink,
}
SMOOTH = [nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.Mish, nn.Sigmoid]


def net(activation: nn.Module, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, 6), activation, nn.Linear(6, 6), *more, nn.Linear(6, OUTPUTS)).double()


def raw(**kwargs) -> GradientMatching:
    return GradientMatching(scale="none", **kwargs)


def batch(seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, INPUTS, dtype=DOUBLE, generator=generator),
        torch.randn(N, OUTPUTS, dtype=DOUBLE, generator=generator),
        torch.randn(N, OUTPUTS, INPUTS, dtype=DOUBLE, generator=generator),
    )


# Models that are linear between kinks


@pytest.mark.parametrize("name", KINKS)
def test_kinks_are_said_once_with_their_name_and_the_remedy(name):
    torch.manual_seed(0)
    x, _, target = batch()
    model = net(KINKS[name]())
    matching = raw()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=rf"linear between kinks \({name}\).*smooth activation") as caught:
        matching(model, x, target)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the caller's line
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    matching(model, x, target)


@pytest.mark.parametrize("call", ["plain", "with_values", "from_outputs", "tangents"])
def test_kinks_are_seen_by_every_call(call):
    torch.manual_seed(0)
    x, _, target = batch()
    model, matching = net(nn.ReLU()), raw()
    leaf = x.clone().requires_grad_()
    calls = {
        "plain": lambda: matching(lambda x: model(x), x, target),
        "with_values": lambda: matching.with_values(model, x, target),
        "from_outputs": lambda: matching.from_outputs(model(leaf), wrt=leaf, target=target),
        "tangents": lambda: matching(model, x, tangents=x, target_jvp=target[:, :, 0]),
    }
    with pytest.warns(UserWarning, match="linear between kinks") as caught:
        calls[call]()
    assert caught[0].filename == __file__


def test_functional_kinks_are_seen_in_the_graph():
    x, _, _ = batch()
    weight = nn.Parameter(torch.randn(INPUTS, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))
    models = {
        "abs": lambda x: (x * weight).abs().sum(1),
        "clamp": lambda x: (x * weight).clamp(-0.5, 0.5).sum(1),
        "maximum": lambda x: torch.maximum(x * weight, 0.5 * x).sum(1),
        "max pooling": lambda x: nn.functional.max_pool1d((x * weight)[:, None], 2).flatten(1).sum(1),
    }
    for name, model in models.items():
        with pytest.warns(UserWarning, match=rf"\({name}\)"):
            raw()(model, x, torch.ones_like(x))


@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_models_say_nothing(activation):
    x, _, target = batch()
    raw()(net(activation()), x, target)


def test_no_false_alarms():
    torch.manual_seed(0)
    x, _, target = batch()
    sequence = torch.randn(N, 2, 4, dtype=DOUBLE)
    raw()(nn.Linear(INPUTS, OUTPUTS).double(), x, target)  # a linear model has no kinks to move
    raw()(net(nn.ReLU(), nn.Tanh()), x, target)  # smooth somewhere: second derivatives are not zero
    raw()(net(nn.ReLU(), nn.LayerNorm(6)), x, target)
    raw()(Attention().double(), sequence, torch.zeros(N, 2, 8, dtype=DOUBLE))
    raw()(Recurrent().double(), torch.randn(N, 3, 2, dtype=DOUBLE), torch.zeros(N, 2, 6, dtype=DOUBLE))
    silent = net(nn.Tanh(), nn.ReLU())
    nn.init.zeros_(silent[-1].weight)  # type: ignore[arg-type] - derivatives are still all zero
    raw()(silent, x, target)
    with torch.no_grad():
        raw()(net(nn.ReLU()), x, target)
    raw().eval()(net(nn.ReLU()), x, target)


def test_penalties_of_critics_with_kinks_say_nothing():
    """R1 and WGAN-GP ask for no derivative in particular, and leaky critics are the rule."""
    x, _, _ = batch()
    for kwargs in ({}, {"target_norm": 1.0}):
        matching, critic = raw(), net(nn.LeakyReLU())
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)
        for _ in range(8):
            optimizer.zero_grad()
            matching(critic, x, **kwargs).backward()
            optimizer.step()


# The offset


def train(matching: GradientMatching, model: nn.Module, step, calls=8, optimizer=None) -> list[str]:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            step(matching, model, optimizer)
    return [str(warning.message) for warning in caught]


def alone(matching, model, optimizer):
    x, _, target = batch()
    optimizer.zero_grad()
    matching(model, x, target).backward()
    optimizer.step()


def in_one_sum(matching, model, optimizer):
    x, y, target = batch()
    optimizer.zero_grad()
    prediction, loss = matching.with_values(model, x, target)
    (mse_loss(prediction, y) + loss).backward()
    optimizer.step()


def one_after_the_other(matching, model, optimizer):
    x, y, target = batch()
    optimizer.zero_grad()
    prediction, loss = matching.with_values(model, x, target)
    loss.backward(retain_graph=True)
    mse_loss(prediction, y).backward()
    optimizer.step()


def in_turns(matching, model, optimizer):
    alone(matching, model, optimizer)
    x, y, _ = batch()
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    optimizer.step()


def accumulated(matching, model, optimizer):
    """Four derivative-only backward passes before one of the values."""
    x, y, target = batch()
    optimizer.zero_grad()
    for _ in range(4):
        matching(model, x, target).backward()
    mse_loss(model(x), y).backward()
    optimizer.step()


def by_hand(matching, model, optimizer):
    """No `.grad` and no version counter moves."""
    x, y, target = batch()
    prediction, loss = matching.with_values(model, x, target)
    parameters = list(model.parameters())
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(mse_loss(prediction, y) + loss, parameters), strict=True
    ):
        parameter.data.sub_(gradient, alpha=0.01)


def without_optimizer(matching, model, optimizer):
    x, _, target = batch()
    matching(model, x, target).backward()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU])
def test_a_free_offset_is_said_once(activation):
    torch.manual_seed(0)
    matching, model = raw(), net(activation())
    messages = train(matching, model, alone, calls=20)
    assert len(messages) == 1
    assert "the offset of the model is free" in messages[0]
    assert "2 parameter(s)" in messages[0]
    assert "with_values" in messages[0]
    assert matching not in _watches


@pytest.mark.parametrize("step", [in_one_sum, one_after_the_other, in_turns, accumulated, by_hand, without_optimizer])
def test_a_trained_offset_is_not_free(step):
    torch.manual_seed(0)
    matching = raw()
    assert train(matching, net(nn.Tanh()), step, calls=40) == []
    assert matching not in _watches  # decided, or given up


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)]
)
def test_optimizers(optimizer):
    torch.manual_seed(0)
    model = net(nn.Tanh())
    assert len(train(raw(), model, alone, optimizer=optimizer(model.parameters()))) == 1
    model = net(nn.Tanh())
    assert train(raw(), model, in_one_sum, optimizer=optimizer(model.parameters())) == []


def test_closures():
    """L-BFGS writes to every parameter, also to those that have no gradient; so does a population."""

    def by_closure(values: bool):
        def step(matching, model, optimizer):
            x, y, target = batch()

            def closure():
                optimizer.zero_grad()
                prediction, loss = matching.with_values(model, x, target)
                loss = loss + mse_loss(prediction, y) if values else loss
                loss.backward()
                return loss

            optimizer.step(closure)

        return step

    for make in (
        lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
        lambda p: PopulationGradient(torch.optim.SGD(p, 0.01), population_size=4, seed=0),
    ):
        torch.manual_seed(0)
        model = net(nn.Tanh())
        assert len(train(raw(), model, by_closure(values=False), optimizer=make(list(model.parameters())))) == 1
        model = net(nn.Tanh())
        assert train(raw(), model, by_closure(values=True), optimizer=make(list(model.parameters()))) == []


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it where it breaks a graph
def test_inside_a_compiled_function():
    def compiled(matching, model, optimizer, values):
        x, y, target = batch()

        @torch.compile(backend="aot_eager")
        def loss_of(x):
            prediction, loss = matching.with_values(model, x, target)
            return loss + (mse_loss(prediction, y) if values else 0.0)

        optimizer.zero_grad()
        loss_of(x).backward()
        optimizer.step()

    for values in (True, False):
        torch.manual_seed(0)
        messages = train(raw(), net(nn.Tanh()), partial(compiled, values=values), calls=5)
        assert sum("offset" in message for message in messages) == (0 if values else 1)
    torch._dynamo.reset()


def test_nothing_to_say_without_an_offset_or_with_a_frozen_one():
    torch.manual_seed(0)
    unbiased = nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, OUTPUTS, bias=False)).double()
    assert train(raw(), unbiased, alone) == []
    frozen = mlp().double()
    frozen[-1].bias.requires_grad_(False)
    assert train(raw(), frozen, alone) == []


def test_watching_leaves_nothing_behind_and_keeps_nothing_alive():
    torch.manual_seed(0)
    matching, model = raw(), net(nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    alone(matching, model, optimizer)
    assert matching in _watches
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    restored = copy.deepcopy(matching)
    file = io.BytesIO()
    torch.save(matching, file)
    assert len(train(restored, model, in_one_sum, calls=3)) == 0  # a copy does not watch
    gone = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, optimizer
    gc.collect()
    assert all(reference() is None for reference in gone)
    other = net(nn.Tanh())
    assert train(matching, other, alone) == []  # its own model is no more, so nothing is known
    reference = weakref.ref(matching)
    del matching
    gc.collect()
    assert reference() is None


def test_after_the_decision_a_step_costs_nothing_more():
    torch.manual_seed(0)
    matching, model = raw(), net(nn.Tanh())
    train(matching, model, in_one_sum, calls=2)
    x, _, target = batch()
    assert not matching(model, x, target)._backward_hooks
    assert not matching._watching


# What is older than these checks, by every kind of target


@pytest.mark.parametrize("kind", ["target_jacobian", "target_jvp", "target_hvp", "target_curvature"])
def test_no_gradient_path_is_an_error(kind):
    x, _, target = batch()
    shapes = {"target_jacobian": target, "target_hvp": target, "target_jvp": target[:, :, 0]}
    arguments = {kind: shapes.get(kind, target[:, :, 0])}
    if kind != "target_jacobian":
        arguments["tangents"] = x
    frozen = mlp().double().requires_grad_(False)
    with pytest.raises(RuntimeError, match="must reach a parameter, and reaches none"):
        raw()(frozen, x, **arguments)
    model = mlp().double()
    with pytest.raises(ValueError, match="must depend on its inputs"):
        raw()(lambda x: model(x.detach()), x, **arguments)


@pytest.mark.parametrize("kind", ["target_jacobian", "target_jvp", "target_hvp", "target_curvature"])
def test_operations_without_double_backward_are_errors(kind):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):  # type: ignore[override] - the decorator hides the names
            return grad * ctx.saved_tensors[0].cos()

    x, _, target = batch()
    shapes = {"target_jacobian": target, "target_hvp": target}
    arguments = {kind: shapes.get(kind, target[:, :, 0])}
    if kind != "target_jacobian":
        arguments["tangents"] = x
    layer = nn.Linear(INPUTS, OUTPUTS).double()
    with pytest.raises(RuntimeError, match="must be differentiable twice"):
        raw()(lambda x: Once.apply(layer(x)), x, **arguments)


def test_a_sum_of_weights_that_is_not_finite_is_no_trap():
    """The checks look at whether derivatives are zero: NaN is not."""
    x, _, target = batch()
    model = net(nn.Tanh())
    with torch.no_grad():
        model[0].bias.fill_(math.nan)  # type: ignore[union-attr] - a linear layer
    assert raw()(model, x, target).isnan()
