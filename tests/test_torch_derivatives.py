"""Input derivatives of torch models against per-sample autograd, finite differences and closed forms."""

import contextlib
import copy
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

from gradwise_torch._batch_coupling import submodules
from gradwise_torch._derivatives import jvp, teacher_jacobian, value_and_jacobian, vjp
from gradwise_torch._double_backward import differentiable_kernels, has_cudnn_rnn

DOUBLE = torch.float64


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.LSTM | nn.GRU] = nn.LSTM):
        super().__init__()
        self.cell, self.head = cell(input_size=2, hidden_size=4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x).mean(dim=1))


def mlp(*middle: nn.Module, n_outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), *middle, nn.Tanh(), nn.Linear(6, n_outputs))


MODELS = {
    "mlp": (mlp, (3,)),
    "layer norm": (lambda: mlp(nn.LayerNorm(6)), (3,)),
    "group norm": (lambda: mlp(nn.GroupNorm(2, 6)), (3,)),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2)
        ),
        (2, 4, 4),
    ),
    "attention": (Attention, (3, 4)),
    "lstm": (Recurrent, (3, 2)),
    "in place": (lambda: nn.Sequential(nn.ELU(inplace=True), nn.Linear(3, 2), nn.SiLU(inplace=True)), (3,)),
}


def make(name, train=True, seed=0):
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    return build().to(DOUBLE).train(train), torch.randn(4, *shape, dtype=DOUBLE)


def per_sample_jacobian(model, x):
    """Row by row, so that no trick about sums over the batch is involved."""
    rows = []
    for row in x:
        leaf = row.detach().clone().requires_grad_()
        y = model(leaf.clone()[None])[0].reshape(-1)
        rows.append(torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0].reshape(-1) for value in y]))
    return torch.stack(rows)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_jacobian_equals_per_sample_autograd(name, train):
    model, x = make(name, train)
    y, jacobian = value_and_jacobian(model, x)
    assert jacobian.shape == (4, 2, x[0].numel())
    assert y.requires_grad
    assert jacobian.requires_grad
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(jacobian, per_sample_jacobian(model, x))
        torch.testing.assert_close(y, model(x.clone()))


@pytest.mark.parametrize("name", MODELS)
def test_products_with_the_jacobian(name):
    model, x = make(name)
    v, u = torch.randn_like(x), torch.randn(4, 2, dtype=DOUBLE)
    y, jacobian = value_and_jacobian(model, x)
    y_vjp, product = vjp(model, x, u)
    assert product.shape == x.shape
    torch.testing.assert_close(product.flatten(1), torch.einsum("bo,boj->bj", u, jacobian))
    torch.testing.assert_close(y_vjp, y)
    if name == "lstm":
        return  # torch has no forward mode for it
    with torch.no_grad():
        y_jvp, product = jvp(model, x, v)
    torch.testing.assert_close(product, torch.einsum("boj,bj->bo", jacobian, v.flatten(1)).detach())
    torch.testing.assert_close(y_jvp, y.detach())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mlp", "attention", "in place"])
def test_without_gradients_everything_is_detached_and_right(name, context):
    model, x = make(name)
    expected = value_and_jacobian(model, x)[1].detach()
    u, v = torch.ones(4, 2, dtype=DOUBLE), torch.ones_like(x)
    with context():
        # Inside inference mode, x may itself be an inference tensor.
        for inputs in (x, x * 1):
            y, jacobian = value_and_jacobian(model, inputs)
            results = (y, jacobian, *vjp(model, inputs, u * 1), *jvp(model, inputs, v * 1))
            assert not any(tensor.requires_grad for tensor in results)
            torch.testing.assert_close(jacobian, expected)
            torch.testing.assert_close(results[5], expected.sum(dim=2))
    made_in_inference = x * 1
    with torch.inference_mode():
        made_in_inference = x * 1
    assert value_and_jacobian(model, made_in_inference)[1].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_derivatives_also_flow_into_what_x_was_computed_from():
    model, x = make("mlp")
    shift = torch.zeros(3, dtype=DOUBLE, requires_grad=True)

    def total(shift):
        return value_and_jacobian(model, x + shift)[1].square().sum()

    (gradient,) = torch.autograd.grad(total(shift), shift)
    step = torch.tensor([0.0, 1e-5, 0.0], dtype=DOUBLE)
    assert gradient[1].item() == pytest.approx(((total(step) - total(-step)) / 2e-5).item(), rel=1e-7)


def test_one_output_of_shape_batch():
    x = torch.randn(5, 3, dtype=DOUBLE)
    y, jacobian = value_and_jacobian(lambda x: x.square().sum(dim=1), x)
    assert y.shape == (5,)
    torch.testing.assert_close(jacobian, 2 * x[:, None, :])
    assert value_and_jacobian(torch.sin, x[:, 0])[1].shape == (5, 1, 1)
    assert value_and_jacobian(torch.sin, x[:0])[1].shape == (0, 3, 3)


def test_an_output_that_does_not_vary_has_zeros():
    x = torch.randn(5, 3)
    _, jacobian = value_and_jacobian(lambda x: torch.stack([x[:, 0], torch.ones(5)], dim=1), x)
    assert jacobian.tolist() == [[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]] * 5


def test_models_that_do_not_depend_on_x_and_other_bad_arguments():
    model, x = make("mlp")
    constant = nn.Parameter(torch.ones(4, 1, dtype=DOUBLE))
    for independent in (lambda x: model(x.detach()), lambda x: constant * 2, lambda x: model(x.round().detach())):
        with pytest.raises(ValueError, match="must depend on its inputs `x`"):
            value_and_jacobian(independent, x)
    with pytest.raises(ValueError, match="one row for each of the 4 rows of `x`"):
        value_and_jacobian(lambda x: model(x).sum(), x)
    with pytest.raises(TypeError, match=r"`model` must return one tensor; got tuple"):
        value_and_jacobian(lambda x: (x,), x)  # type: ignore[arg-type] - wrong on purpose
    with pytest.raises(TypeError, match=r"`x` must be a floating-point tensor; got torch.int64"):
        value_and_jacobian(model, torch.ones(4, 3, dtype=torch.int64))
    for shape in [(4, 1), (2,), (1, 3), (4, 2, 1)]:
        with pytest.raises(ValueError, match="`tangents` must have the shape"):
            jvp(model, x, torch.ones(shape, dtype=DOUBLE))
        with pytest.raises(ValueError, match="`cotangents` must have the shape"):
            vjp(model, x, torch.ones(shape, dtype=DOUBLE))


# Batch normalisation


def batch_norm_model(dropout=0.0):
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(6), nn.Dropout(dropout)).to(DOUBLE)
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, dtype=DOUBLE))  # running statistics that are not those of the next batch
    return model, torch.randn(4, 3, dtype=DOUBLE)


def with_norm_in_eval(model):
    other = copy.deepcopy(model)
    other[1].eval()
    return other


def test_batch_norm_in_training_takes_running_statistics_and_warns_once():
    model, x = batch_norm_model()
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="batch normalisation in training mode"):
        y, jacobian = value_and_jacobian(model, x)
    torch.testing.assert_close(y, reference(x))  # updates the running statistics, like the first of the two passes
    torch.testing.assert_close(jacobian, per_sample_jacobian(with_norm_in_eval(reference), x))
    # One update of the statistics, as by one forward pass; flags as before.
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(reference.named_buffers())[name])
    assert model[1].training
    leaf = x.clone().requires_grad_()
    naive = torch.autograd.grad(reference(leaf)[:, 0].sum(), leaf)[0]
    assert not torch.allclose(naive, jacobian[:, 0], rtol=0.1)  # the usual trick is wrong here
    value_and_jacobian(model, x)  # no second warning, which would be an error here
    value_and_jacobian(model.forward, x)


@pytest.mark.parametrize("product", [value_and_jacobian, vjp, jvp])
def test_batch_norm_with_dropout_shares_masks_and_leaves_the_random_stream_as_one_pass_does(product):
    model, x = batch_norm_model(dropout=0.5)
    extra = {value_and_jacobian: (), vjp: (torch.ones(4, 2, dtype=DOUBLE),), jvp: (torch.ones_like(x),)}[product]
    reference = copy.deepcopy(model)
    torch.manual_seed(7)
    expected_y = reference(x)
    after_one = torch.get_rng_state()
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, derivative = product(model, x, *extra)
    assert torch.equal(torch.get_rng_state(), after_one)
    torch.testing.assert_close(y, expected_y)
    # Same masks: with the mask of the first pass fixed, the Jacobian is that of the network with running statistics.
    torch.manual_seed(7)
    evaluated = with_norm_in_eval(model)
    evaluated[1].load_state_dict(model[1].state_dict())
    _, expected = value_and_jacobian(evaluated, x)
    expected = {
        value_and_jacobian: expected,
        vjp: expected.sum(dim=1),
        jvp: expected.sum(dim=2),
    }[product]
    torch.testing.assert_close(derivative, expected)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_running_statistics_holds_those_of_the_batch_constant(training):
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    layer = nn.BatchNorm1d(6, track_running_stats=False).double()
    model = nn.Sequential(nn.Linear(3, 6).double(), layer, nn.Tanh(), nn.Linear(6, 2).double()).train(training)
    with pytest.warns(UserWarning, match="held constant where a layer keeps none"):
        y, jacobian = value_and_jacobian(model, x)
    torch.testing.assert_close(y, model(x))
    hidden = model[0](x).detach()
    mean, deviation = hidden.mean(0), (hidden.var(0, unbiased=False) + layer.eps).sqrt()

    def row(x: torch.Tensor) -> torch.Tensor:
        return model[3](torch.tanh((model[0](x) - mean) / deviation))

    expected = torch.stack([torch.autograd.functional.jacobian(row, one) for one in x])
    torch.testing.assert_close(jacobian, expected)
    assert layer.training is training
    assert layer.running_mean is None
    assert not layer._forward_pre_hooks


def test_hidden_batch_norm_is_seen():
    x = torch.randn(4, 3)
    hidden = mlp(nn.BatchNorm1d(6))
    with pytest.warns(UserWarning, match="derivatives per row are wrong"):
        value_and_jacobian(lambda x: hidden(x), x)
    hidden.eval()
    value_and_jacobian(lambda x: hidden(x), x)
    images = nn.Sequential(nn.InstanceNorm1d(2), nn.Flatten(), nn.Linear(6, 1))  # instance norm couples nothing
    value_and_jacobian(lambda x: images(x), torch.randn(4, 2, 3))


def test_products_take_the_arguments_of_torch_func():
    x, v = torch.randn(4, 3), torch.randn(4, 3)
    y, product = jvp(func=torch.sin, primals=(x,), tangents=(v,))
    torch.testing.assert_close((y, product), torch.func.jvp(torch.sin, (x,), (v,)))
    assert torch.equal(vjp(func=torch.sin, primals=(x,), cotangents=(v,))[1], vjp(torch.sin, x, v)[1])
    with pytest.raises(ValueError, match="`primals` must be one tensor"):
        jvp(torch.sin, (x, x), (v, v))  # type: ignore[arg-type] - wrong on purpose


def test_training_flag_comes_back_after_an_exception():
    model, x = batch_norm_model()

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            self.model(x)
            raise KeyError("broken")

    with pytest.warns(UserWarning, match="batch norm"), pytest.raises(KeyError, match="broken"):
        value_and_jacobian(Broken(), x)
    assert model[1].training


# Forward mode


def relative_gradient_error(model, loss):
    """Largest error, over parameters, of autograd's gradient against central differences."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    worst = 0.0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        numeric = torch.zeros_like(flat)
        for k in range(len(flat)):
            value = flat[k].item()
            ends = []
            for step in (1e-5, -1e-5):
                flat[k] = value + step
                ends.append(loss().item())
            flat[k] = value
            numeric[k] = (ends[0] - ends[1]) / 2e-5
        exact = torch.zeros_like(flat) if gradient is None else gradient.reshape(-1)
        worst = max(worst, ((exact - numeric).norm() / (numeric.norm() + 1e-6)).item())
    return worst


# torch warns of itself when its own forward mode is first called
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_through_layer_norm_is_wrong_in_torch_so_it_is_refused_in_training():
    model, x = make("layer norm")
    v = torch.randn_like(x)
    error = relative_gradient_error(model, lambda: torch.func.jvp(model, (x,), (v,))[1].square().mean())
    if error < 1e-6:
        pytest.fail("torch has mended forward mode through LayerNorm: drop the refusal")
    with pytest.raises(RuntimeError, match="Use `value_and_jacobian` or `vjp`"):
        jvp(model, x, v)
    with pytest.raises(RuntimeError, match="Use `value_and_jacobian` or `vjp`"):
        jvp(lambda x: model(x), x, v)
    with torch.no_grad():
        jvp(model, x, v)
    right, x = make("mlp")
    assert relative_gradient_error(right, lambda: jvp(right, x, v)[1].square().mean()) < 1e-6
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert not jvp(frozen, x, v)[1].requires_grad


# Compiled models, mixed precision, teachers


class Net(nn.Module):
    """No Sequential: torch does not compile that by its method."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def naive_double_backward(model, x):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", ["function", "method", "part"])
def test_compiled_models(backend, way):
    inner, x = make("mlp")
    model = nn.Sequential(Net(inner), nn.Tanh()) if way == "part" else Net(inner)
    expected = value_and_jacobian(model, x)[1]
    compiled = model
    if way == "function":
        compiled = torch.compile(model, backend=backend)
    elif way == "method":
        model.compile(backend=backend)
    else:
        model[0].compile(backend=backend)  # type: ignore[index] - a Sequential
    if backend == "aot_eager" and way != "part":  # it is compiled, then
        with pytest.raises(RuntimeError, match="double backward"):
            naive_double_backward(compiled, x)
    for _ in range(2):
        y, jacobian = value_and_jacobian(compiled, x)
        torch.testing.assert_close(jacobian, expected)
        (y.sum() + jacobian.square().sum()).backward()
    assert torch.compiler.is_compiling() is False
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it where it breaks a graph
def test_inside_a_compiled_function():
    model, x = make("mlp")

    @torch.compile(backend="aot_eager")
    def loss(x):
        return value_and_jacobian(model, 2 * x)[1].square().sum() + 1

    torch.testing.assert_close(loss(x), value_and_jacobian(model, 2 * x)[1].square().sum() + 1)
    torch._dynamo.reset()


def test_autocast_gives_float32_derivatives():
    model, x = make("mlp")
    model, x = model.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, jacobian = value_and_jacobian(model, x)
        half_inputs = value_and_jacobian(model, x.bfloat16())[1]
    assert (y.dtype, jacobian.dtype, half_inputs.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(jacobian, value_and_jacobian(model, x)[1], rtol=0.05, atol=0.01)  # bfloat16: 8 bits


def test_teacher_jacobian_is_that_of_eval_mode_and_leaves_flags_alone():
    model, x = batch_norm_model(dropout=0.5)
    model[2].eval()
    flags = [layer.training for layer in model.modules()]
    targets = teacher_jacobian(model, x)
    assert not targets.requires_grad
    assert [layer.training for layer in model.modules()] == flags
    torch.testing.assert_close(targets, per_sample_jacobian(copy.deepcopy(model).eval(), x))
    with pytest.raises(ValueError, match="depend"):
        teacher_jacobian(nn.Sequential(model, nn.Flatten(), Detach()), x)
    assert [layer.training for layer in model.modules()] == flags


class Detach(nn.Module):
    def forward(self, x):
        return x.detach()


def test_recurrent_layers_on_cudnn_are_recognised():
    model = Recurrent(nn.GRU)
    assert has_cudnn_rnn(model, twice=True, on_gpu=lambda weight: True)
    assert has_cudnn_rnn(model.forward, twice=True, on_gpu=lambda weight: True)
    assert not has_cudnn_rnn(model, twice=False, on_gpu=lambda weight: True)
    assert has_cudnn_rnn(model.eval(), twice=False, on_gpu=lambda weight: True)
    assert not has_cudnn_rnn(model, twice=True)  # weights on the CPU
    assert not has_cudnn_rnn(mlp(), twice=True, on_gpu=lambda weight: True)


def test_importing_does_not_load_the_compiler():
    script = (
        "import sys, gradwise_torch._derivatives, gradwise_torch._matching as m, torch\n"
        "m.GradientMatching(scale='none')(torch.nn.Linear(2, 1), torch.ones(3, 2), torch.zeros(3, 1, 2)).backward()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_attention_kernels_are_switched_as_torch_does_it_and_switched_back():
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

    for before in ([SDPBackend.FLASH_ATTENTION, SDPBackend.OVERRIDEABLE], list(SDPBackend.__members__.values())[1:]):
        inside = []
        with sdpa_kernel(before):
            outside = _cur_sdpa_kernel_backends()
            with sdpa_kernel(SDPBackend.MATH):
                expected = _cur_sdpa_kernel_backends()
            with contextlib.suppress(KeyError), differentiable_kernels():
                inside = _cur_sdpa_kernel_backends()
                raise KeyError
            assert inside == expected
            assert _cur_sdpa_kernel_backends() == outside


def test_submodules_are_those_of_torch():
    shared = nn.Linear(1, 1)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.LSTM(1, 1)), nn.TransformerEncoderLayer(4, 2))
    model.register_module("nothing", None)
    assert submodules(model) == set(model.modules())


def test_a_jacobian_of_one_row_is_the_callers_own():
    model = nn.Linear(2, 1)
    _, jacobian = value_and_jacobian(lambda x: x.sum(dim=1), torch.zeros(3, 2))
    jacobian[0] = 5.0  # autograd's own answer is an expanded scalar
    assert jacobian.flatten().tolist() == [5.0, 5.0, 1.0, 1.0, 1.0, 1.0]
    with torch.no_grad():
        _, jacobian = value_and_jacobian(model, torch.zeros(1, 2))
        jacobian += 1.0
    torch.testing.assert_close(jacobian[0], model.weight + 1.0)


def test_directions_are_not_kept_alive():
    x, direction, cotangent = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2)
    model = mlp()
    jvp(model, x, direction)
    vjp(model, x, cotangent)
    left = [weakref.ref(tensor) for tensor in (x, direction, cotangent)]
    del x, direction, cotangent
    assert [reference() for reference in left] == [None] * 3
