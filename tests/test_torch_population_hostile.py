"""Loops and models that do unusual things with weights, gradients, buffers and hooks, and must not be hurt."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch_cells import assert_same, batches, loss_of, perturb_by_hand, put, snapshot

from gradwise import Population
from gradwise.torch import PopulationGradient

X, Y = batches(1)[0]


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def sgd(model: nn.Module, lr: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


# -- gradients that somebody else stores -------------------------------------------------------------------------------


def test_gradients_in_storage_that_is_reused() -> None:
    """DDP's gradient_as_bucket_view and static gradient buffers write the next member's gradient over the last."""
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=1.0, population_size=4)
    static = {id(p): torch.zeros_like(p) for p in model.parameters()}

    def move(p: Tensor) -> None:
        if p.grad is not None:
            p.grad = static[id(p)].copy_(p.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(move)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, (X, Y))
        loss.backward()
        seen.append(model[0].weight.grad.clone())
        return loss

    for _ in range(2):
        seen.clear()
        optimizer.step(closure)
        torch.testing.assert_close(model[0].weight.grad, torch.stack(seen).mean(0))


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_a_flat_gradient_buffer_stays_the_storage(sigma: float) -> None:
    def run(wrap: bool) -> list[Tensor]:
        model = net()
        inner = sgd(model, lr=0.1)
        optimizer = PopulationGradient(inner, model, sigma=sigma, population_size=2) if wrap else inner
        flat = torch.zeros(sum(p.numel() for p in model.parameters()))
        start = 0
        for p in model.parameters():
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()

        def closure() -> Tensor:
            flat.zero_()
            loss = loss_of(model, (X, Y))
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)  # type: ignore[arg-type] - torch's stub wants a float
            torch.testing.assert_close(flat, torch.cat([p.grad.flatten() for p in model.parameters()]))
        return [p.detach() for p in model.parameters()]

    wrapped, bare = run(True), run(False)
    if sigma == 0:
        assert_same(wrapped, bare)
    else:
        assert not torch.equal(wrapped[0], bare[0])


def test_a_fault_in_a_closure_leaves_the_gradients() -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3, population_size=4)
    loss_of(model, (X, Y)).backward()
    optimizer.step()
    before = [p.grad for p in model.parameters()]
    values = [p.grad.clone() for p in model.parameters()]
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        loss = loss_of(model, (X, Y))
        loss.backward()
        if calls[0] == 3:
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert all(p.grad is old for p, old in zip(model.parameters(), before, strict=True))
    assert_same([p.grad for p in model.parameters()], values)


def test_a_member_without_a_gradient_counts_as_zero() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = PopulationGradient(torch.optim.SGD([weight], lr=0.0), sigma=0.3, population_size=4)
    calls = [0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls[0] += 1
        loss = (3 * weight).sum() if calls[0] in (2, 3) else torch.zeros((), requires_grad=True)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(weight.grad, torch.full((2, 2), 1.5))


def test_sparse_gradients_with_other_rows_in_every_member() -> None:
    """The embedding is not perturbed, but what it is looked up with depends on the member."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(6, 3, sparse=True), nn.Linear(3, 1)
    model = nn.ModuleList([embedding, head])
    with pytest.warns(UserWarning, match="unperturbed"):
        optimizer = PopulationGradient(sgd(model, lr=0.1), model, sigma=0.5, population_size=4, seed=0)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        row = int(head.weight.detach().sum().mul(100).abs()) % 6
        loss = head(embedding(torch.tensor([0, row]))).square().sum()
        loss.backward()
        assert embedding.weight.grad is not None
        seen.append(embedding.weight.grad.to_dense())
        return loss

    before = embedding.weight.detach().clone()
    optimizer.step(closure)
    assert len({tuple(g.abs().sum(1).nonzero().flatten().tolist()) for g in seen}) > 1
    torch.testing.assert_close(embedding.weight.detach(), before - 0.1 * torch.stack(seen).mean(0))


# -- weights that somebody else writes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["p.data = ...", "vector_to_parameters"])
def test_replaced_storage_is_an_error_and_not_silent(how: str) -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3)
    mean = model[0].weight.detach().clone()
    loss_of(model, (X, Y)).backward()
    if how == "vector_to_parameters":
        vector_to_parameters(torch.zeros_like(parameters_to_vector(model.parameters())), model.parameters())
    else:
        model[0].weight.data = torch.zeros(8, 6)
    with pytest.raises(RuntimeError, match="written to while a member"):
        optimizer.step()
    assert torch.equal(model[0].weight, mean)


def test_a_change_of_dtype_is_not_a_write() -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3)
    mean = model[0].weight.detach().double()
    loss_of(model, (X, Y)).backward()
    model.double()
    optimizer.zero_grad()
    assert torch.equal(model[0].weight, mean)
    loss_of(model, (X.double(), Y.double())).backward()
    optimizer.step()


def test_the_newest_wrapper_of_the_same_parameters_takes_over() -> None:
    """A notebook cell that is run again while a scheduler keeps the old wrapper alive."""
    model = net()
    old = PopulationGradient(sgd(model), model, sigma=0.5)
    mean = model[0].weight.detach().clone()
    loss_of(model, (X, Y)).backward()
    new = PopulationGradient(sgd(model), model, sigma=0.5)
    assert torch.equal(model[0].weight, mean)
    loss_of(model, (X, Y)).backward()
    assert torch.equal(model.state_dict()["0.weight"], mean)
    new.step()
    assert torch.equal(model[0].weight, mean)
    assert new.statistics.members == 1
    with pytest.warns(UserWarning, match="a newer PopulationGradient"):
        old.step()


def test_two_models_may_share_an_encoder_in_turns_but_not_at_once() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(6, 4)
    models = [nn.Sequential(encoder, nn.Linear(4, 2)) for _ in range(2)]
    one, two = (PopulationGradient(sgd(model), model, sigma=0.3) for model in models)
    mean = encoder.weight.detach().clone()
    for model, optimizer in zip(models, (one, two), strict=True):
        loss_of(model, (X, Y)).backward()
        optimizer.step()
        assert torch.equal(encoder.weight, mean)
    first = loss_of(models[0], (X, Y))
    with pytest.raises(RuntimeError, match="moved by another PopulationGradient"):
        models[1](X)
    first.backward()
    one.step()
    assert torch.equal(encoder.weight, mean)
    loss_of(models[1], (X, Y)).backward()
    two.step()
    assert torch.equal(encoder.weight, mean)


def test_loaded_groups_rule() -> None:
    """load_state_dict makes new group dicts: their sigma counts, and later edits of it."""
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3)
    state = optimizer.state_dict()
    state["param_groups"][0]["sigma"] = 0.0
    optimizer.load_state_dict(state)
    mean = model[0].weight.detach().clone()
    model(X)
    assert torch.equal(model[0].weight, mean)
    optimizer.eval()
    optimizer.param_groups[0]["sigma"] = 0.2
    model(X)
    assert not torch.equal(model[0].weight, mean)


def test_sigma_zero_leaves_weights_that_are_not_finite() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -torch.inf], [torch.nan, 3.0]]))
    optimizer = PopulationGradient(torch.optim.SGD([weight]), sigma=0.0)
    before = weight.detach().clone()
    with optimizer.member(1):
        assert torch.equal(weight.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_scalar_parameters_can_be_perturbed(noise: Any) -> None:
    scale = nn.Parameter(torch.tensor(2.0))
    optimizer = PopulationGradient(torch.optim.SGD([scale]), perturb=lambda *_: True, sigma=0.1, noise=noise)
    seen = []
    for member in range(2):
        with optimizer.member(member):
            seen.append(scale.item())
    assert np.mean(seen) == pytest.approx(2.0, abs=1e-6)
    assert seen[0] != seen[1]


def test_first_use_in_inference_mode() -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3)
    with torch.inference_mode(), optimizer.member(0):
        model(X)
    loss_of(model, (X, Y)).backward()
    optimizer.step()


# -- models that change ------------------------------------------------------------------------------------------------


def test_a_replaced_head() -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3)
    model[2] = nn.Linear(8, 2)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    mean = model[2].weight.detach().clone()
    loss_of(model, (X, Y)).backward()
    assert not torch.equal(model[2].weight, mean)
    optimizer.step()


def test_a_parameter_added_before_its_module_joins_with_it() -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3)
    late = nn.Linear(2, 2)
    mean = late.weight.detach().clone()
    optimizer.add_param_group({"params": list(late.parameters())})
    loss_of(model, (X, Y)).backward()
    assert torch.equal(late.weight, mean)
    optimizer.step()
    model.append(late)
    loss_of(model, (X, Y)).backward()
    assert not torch.equal(late.weight, mean)
    optimizer.step()


def test_functional_transforms_start_no_member() -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3)
    mean = model[0].weight.detach().clone()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    torch.func.grad(loss)(dict(model.named_parameters()), X)
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), X)
    assert torch.equal(model[0].weight, mean)
    model[0].weight.requires_grad_(False)  # makes the wrapper look its tensors up again, in the middle of a call
    head = model[2].weight.detach().clone()
    torch.func.functional_call(model, {name: p * 1.0 for name, p in model.named_parameters()}, (X,)).sum().backward()
    assert not torch.equal(model[2].weight, head)  # still known as the model's, though the call hides it
    optimizer.step()


@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
def test_hooks_that_compute_a_weight_see_the_member(how: str) -> None:
    def run(sigma: float) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        if how == "prune":
            prune.l1_unstructured(model, "weight", 0.5)
        else:
            getattr(nn.utils, how)(model)
        optimizer = PopulationGradient(sgd(model), model, sigma=sigma, seed=0)
        out = model(X)
        out.sum().backward()
        optimizer.step()
        return out.detach()

    assert not torch.equal(run(0.0), run(0.5))


@pytest.mark.parametrize("way", ["closure", "bare"])
def test_buffers_that_change_shape_or_begin_as_none(way: str) -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(6, 6)
            self.register_buffer("state", None)
            self.register_buffer("last", torch.zeros(1, 6))
            self.state: Tensor | None
            self.last: Tensor

        def forward(self, x: Tensor) -> Tensor:
            y = self.cell(x)
            self.state = y.detach().mean(0) * 0.1 + (0 if self.state is None else self.state)
            self.last = y.detach()
            return y

    def run(wrap: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Stateful()
        inner = sgd(model, lr=0.1)
        optimizer = PopulationGradient(inner, model, sigma=0.0, population_size=4) if wrap else inner
        for rows in (12, 5):

            def closure(rows: int = rows) -> Tensor:
                optimizer.zero_grad()
                loss = model(X[:rows]).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type] - torch's stub wants a float
        assert model.state is not None
        return [model.state, model.last, model.cell.weight.detach()]

    assert_same(run(way == "closure"), run(False))


# -- hooks, statistics, scalers ----------------------------------------------------------------------------------------


def test_a_saved_module_loads_without_gradwise() -> None:
    model = net()
    PopulationGradient(sgd(model), model)
    optimizer = PopulationGradient(sgd(model), model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"gradwise" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), model.eval()(X))
    optimizer.eval()


def test_a_closure_of_one_optimizer_suspends_the_others_of_the_model() -> None:
    model = net()
    body = PopulationGradient(sgd(model[0]), model, sigma=0.3, population_size=4)
    head = PopulationGradient(sgd(model[2]), model, sigma=0.3)
    mean = model[2].weight.detach().clone()

    def closure() -> Tensor:
        body.zero_grad()
        loss = loss_of(model, (X, Y))
        assert torch.equal(model[2].weight, mean)
        loss.backward()
        return loss

    body.step(closure)
    assert torch.equal(model[2].weight, mean)
    assert head.statistics.members == 0


def test_statistics_do_not_outlive_their_step() -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3, population_size=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, (X, Y))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.statistics.loss_mean > 0
    for member in range(2):
        with optimizer.member(member):
            loss_of(model, (X, Y)).backward()
    said = optimizer.statistics
    assert said.members == 2
    assert np.isnan(said.loss_mean)
    assert said.relative_sigma == pytest.approx(0.3, rel=0.3)


def test_agreement_is_unknown_where_gradients_accumulate() -> None:
    model = net()
    optimizer = PopulationGradient(sgd(model), model, sigma=0.3, population_size=4)
    loss_of(model, (X, Y)).backward()

    def closure() -> Tensor:
        loss = loss_of(model, (X, Y))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert np.isnan(optimizer.statistics.agreement)
    assert np.isnan(optimizer.statistics.sharpness)
    assert optimizer.statistics.loss_mean > 0


def test_skipped_members_add_up_over_steps() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = PopulationGradient(torch.optim.SGD([weight]), population_size=4, on_nonfinite="skip")
    calls = [0]

    def closure() -> float:
        calls[0] += 1
        weight.square().sum().backward()
        return float("nan") if calls[0] % 4 == 1 else 1.0

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.statistics.skipped == 3


def test_recalibration_repeats_the_forward_under_its_autocast() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = PopulationGradient(sgd(model), model, sigma=0.5, population_size=2, norm_statistics="recalibrate")
    expected = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected(X)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, (X, Y))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_same(list(model.buffers()), list(expected.buffers()))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_noise_equals_members_by_hand(fused: bool) -> None:
    def inner_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)

    model, expected = net(), net()
    optimizer = PopulationGradient(inner_of(model), model, sigma=0.3, seed=3)
    bare = inner_of(expected)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    population = Population(sigma=0.3, seed=3)
    parameters = list(expected.parameters())
    for step, batch in enumerate(batches(4)):
        overflow = float("inf") if step == 2 else 1.0
        scalers[0].scale(loss_of(model, batch) * overflow).backward()
        scalers[0].step(optimizer)
        scalers[0].update()
        optimizer.zero_grad()
        mean = perturb_by_hand(parameters, population, step=step, member=0, paired=False)
        scalers[1].scale(loss_of(expected, batch) * overflow).backward()
        put(parameters, mean)
        scalers[1].step(bare)
        scalers[1].update()
        bare.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(expected, bare))


def test_resetting_the_state_is_the_inner_optimizers() -> None:
    model = net()
    optimizer = PopulationGradient(torch.optim.Adam(model.parameters()), model)
    loss_of(model, (X, Y)).backward()
    optimizer.step()
    optimizer.state = type(optimizer.state)(dict)
    assert not optimizer.inner_optimizer.state
    optimizer.param_groups = optimizer.param_groups[:]
    optimizer.defaults = dict(optimizer.defaults)


@pytest.mark.filterwarnings("ignore:.*stays unperturbed:UserWarning")
def test_sparse_gradients_at_sigma_zero_equal_the_inner_optimizer() -> None:
    def run(wrap: bool) -> list[Tensor]:
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 3, sparse=True)
        inner = torch.optim.SparseAdam(list(embedding.parameters()), lr=0.1)
        optimizer = PopulationGradient(inner, sigma=0.0, population_size=8) if wrap else inner
        for tokens in ([0, 1, 1, 4], [2, 2, 2], [5, 0]):

            def closure(tokens: list[int] = tokens) -> Tensor:
                optimizer.zero_grad()
                loss = embedding(torch.tensor(tokens)).exp().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        return [embedding.weight.detach(), *inner.state[embedding.weight].values()]

    assert_same(run(True), run(False))


def test_a_training_step_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = model.weight.detach().clone()
    with monkeypatch.context() as capturing:
        for name in ("is_initialized", "is_current_stream_capturing"):
            capturing.setattr(torch.cuda, name, lambda: True)  # what a GPU would say
        with pytest.raises(RuntimeError, match="every replay would be the same member"):
            model(torch.ones(1, 3))
        with pytest.raises(RuntimeError, match="every replay"), optimizer.member(0):
            pass
    assert torch.equal(model.weight, before)
    model(torch.ones(1, 3))
    assert not torch.equal(model.weight, before)
