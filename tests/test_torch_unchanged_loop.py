"""The rules of the unchanged loop, one by one."""

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_cells import batches, loss_of

from gradwise.torch import PopulationGradient

X, Y = batches(1)[0]


def setup(model: nn.Module | None = None, **options: Any) -> tuple[Any, PopulationGradient, Tensor, Tensor]:
    """A model, its optimizer, the first weight, and what that weight was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)) if model is None else model
    options = {"sigma": 0.3, "seed": 1, **options}
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, **options)
    weight = next(p for p in model.parameters() if p.ndim == 2)
    return model, optimizer, weight, weight.detach().clone()


def is_mean(weight: Tensor, mean: Tensor) -> bool:
    return torch.equal(weight.detach(), mean)


def test_a_training_forward_enters_a_member_and_step_leaves_it() -> None:
    model, optimizer, weight, mean = setup()
    loss = loss_of(model, (X, Y))
    member = weight.detach().clone()
    assert not is_mean(weight, mean)
    loss.backward()
    assert is_mean(weight, member)
    gradient = weight.grad.clone()  # type: ignore[union-attr] - set by backward
    optimizer.step()
    assert torch.equal(weight.detach(), torch.add(mean, gradient, alpha=-0.1))  # as SGD computes it


ENDINGS: dict[str, Callable[[Any, PopulationGradient], object]] = {
    "step": lambda model, optimizer: optimizer.step(),
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "zero_grad(set_to_none=False)": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "eval forward": lambda model, optimizer: model.eval()(X),
    "optimizer.state_dict": lambda model, optimizer: optimizer.state_dict(),
    "optimizer.eval": lambda model, optimizer: optimizer.eval(),
    "optimizer.load_state_dict": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "model.load_state_dict": lambda model, optimizer: model.load_state_dict(model.state_dict()),
    "submodule.load_state_dict": lambda model, optimizer: model[0].load_state_dict(model[0].state_dict()),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_ends_a_member(ending: str, backward: bool) -> None:
    model, optimizer, weight, mean = setup()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that a step leaves the mean as it was
    loss = loss_of(model, (X, Y))
    if backward:
        loss.backward()
    del loss  # a member whose backward is still to come outlives zero_grad: see the test below
    assert not is_mean(weight, mean)
    ENDINGS[ending](model, optimizer)
    assert is_mean(weight, mean)


def test_mean_context_ends_a_member_and_starts_none() -> None:
    model, optimizer, weight, mean = setup()
    model(X).sum().backward()
    with optimizer.mean():
        assert is_mean(weight, mean)
        model(X).sum().backward()
        assert is_mean(weight, mean)
    assert is_mean(weight, mean)
    model(X)
    assert not is_mean(weight, mean)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_between_forward_and_backward(set_to_none: bool) -> None:
    """The order of many tutorials: forward, zero_grad, backward, step."""
    model, optimizer, weight, mean = setup()
    members = []
    for _ in range(3):
        loss = loss_of(model, (X, Y))
        members.append(weight.detach().clone())
        optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        optimizer.step()
    assert optimizer.statistics.members == 1
    other_model, other, _, _ = setup()
    for _ in range(3):
        other.zero_grad()
        loss_of(other_model, (X, Y)).backward()
        other.step()
    assert torch.equal(weight, next(other_model.parameters()))
    assert not torch.equal(members[0], mean)


def test_an_output_that_hides_its_tensors_waits_for_its_backward_too() -> None:
    class Box:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    class Boxed(nn.Linear):
        def forward(self, input: Tensor) -> Any:  # noqa: A002 - nn.Linear's own argument name
            return Box(super().forward(input))

    model, optimizer, weight, mean = setup(Boxed(6, 2))
    loss = nn.functional.mse_loss(model(X).y, Y)
    optimizer.zero_grad()
    assert not is_mean(weight, mean)
    loss.backward()
    optimizer.step()


def test_forwards_before_one_backward_share_a_member() -> None:
    model, optimizer, weight, _ = setup()
    first = model(X)
    member = weight.detach().clone()
    second = model(-X)
    assert torch.equal(weight, member)
    (first - second).square().mean().backward()
    optimizer.step()
    assert optimizer.statistics.members == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_between_two_forwards_of_one_backward(set_to_none: bool) -> None:
    model, optimizer, weight, _ = setup()
    loss_of(model, (X, Y)).backward()
    optimizer.step()  # leaves gradients for the zero_grad below
    first = model(X)
    member = weight.detach().clone()
    optimizer.zero_grad(set_to_none=set_to_none)
    second = model(-X)
    assert torch.equal(weight, member)
    (first - second).square().mean().backward()
    optimizer.step()


def test_micro_batches_are_members_of_one_step() -> None:
    model, optimizer, weight, mean = setup()
    members = []
    for _ in range(3):
        loss_of(model, (X, Y)).backward()
        members.append(weight.detach().clone())
    assert len({m[0, 0].item() for m in members}) == 3
    optimizer.step()
    assert optimizer.statistics.members == 3
    optimizer.zero_grad()
    loss_of(model, (X, Y)).backward()
    optimizer.step()
    assert optimizer.statistics.members == 1
    assert not is_mean(weight, mean)


def test_every_step_and_every_member_draws_anew() -> None:
    model, optimizer, weight, mean = setup()
    seen = []
    for _ in range(4):
        model(X).sum().backward()
        seen.append((weight.detach() - mean)[0, 0].item())
        optimizer.zero_grad()
    assert len(set(seen)) == 4


@pytest.mark.parametrize("in_place", [False, True])
def test_forward_without_gradients_keeps_what_is_there(in_place: bool) -> None:
    model, optimizer, weight, mean = setup()
    if in_place:
        model(X).sum().backward()
    before = weight.detach().clone()
    with torch.no_grad():
        model(X)
    assert torch.equal(weight, before)
    assert is_mean(weight, mean) is not in_place
    optimizer.eval()


def test_update_bn_sees_the_mean() -> None:
    model, optimizer, _, _ = setup(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    loss_of(model, (X, Y)).backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.optim.swa_utils.update_bn([X], model)
    expected = (X @ model[0].weight.T + model[0].bias).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_with_the_same_member(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, active: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5))
            self.head = nn.Linear(8, 2)
            self.active = active

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.body, x, use_reentrant=use_reentrant) if self.active else self.body(x)
            return self.head(h)

    def run(active: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, optimizer, _, _ = setup(Checkpointed(active))
        x = X.clone().requires_grad_()  # the reentrant kind needs an input with gradients
        for _ in range(3):
            loss_of(model, (x, Y)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for active, plain in zip(run(True), run(False), strict=True):
        assert torch.equal(active, plain)


def test_whole_model_checkpointed_in_backward_starts_no_member() -> None:
    model, optimizer, weight, _ = setup()
    loss = nn.functional.mse_loss(checkpoint(model, X, use_reentrant=False), Y)
    member = weight.detach().clone()
    loss.backward()
    assert torch.equal(weight, member)
    optimizer.step()


def test_reentrant_checkpoint_of_the_whole_model_trains_at_the_mean() -> None:
    """Its forward runs without gradients and its recomputation inside the backward: neither may start a member."""
    model, optimizer, weight, mean = setup()
    loss = nn.functional.mse_loss(checkpoint(model, X.clone().requires_grad_(), use_reentrant=True), Y)
    assert is_mean(weight, mean)
    loss.backward()
    assert is_mean(weight, mean)
    with pytest.warns(UserWarning, match="saw no member"):
        optimizer.step()


def test_model_state_dict_is_the_mean_and_moves_nothing() -> None:
    model, optimizer, weight, mean = setup()
    out = loss_of(model, (X, Y))
    member = weight.detach().clone()
    state = model.state_dict()
    assert is_mean(state["0.weight"], mean)
    assert is_mean(model[0].state_dict()["weight"], mean)
    assert isinstance(model.state_dict(keep_vars=True)["0.weight"], nn.Parameter)
    assert torch.equal(weight, member)
    state["0.weight"].zero_()  # a clone: neither the kept mean nor the member is touched
    out.backward()
    optimizer.eval()
    assert is_mean(weight, mean)
    assert model.state_dict()["0.weight"].data_ptr() == weight.data_ptr()  # as ever, when no member is in place


def test_tied_weights_stay_tied_in_the_state_dict() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))[:, :2]

    model, _optimizer, _, mean = setup(Tied())
    loss_of(model, (X, Y)).backward()
    state, again = model.state_dict(), model.state_dict()
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    assert again["a.weight"].data_ptr() != state["a.weight"].data_ptr()
    assert is_mean(state["b.weight"], mean)


@pytest.mark.parametrize("write", ["copy_", "inner step"])
def test_a_foreign_write_is_an_error_and_not_silent(write: str) -> None:
    model, optimizer, weight, mean = setup()
    loss_of(model, (X, Y)).backward()
    if write == "copy_":
        with torch.no_grad():
            weight.mul_(2)
    else:
        optimizer.inner_optimizer.step()
    with pytest.raises(RuntimeError, match=r"written to while a member.*optimizer\.mean"):
        optimizer.step()
    assert is_mean(weight, mean)


def test_hooks_do_nothing_in_closures_and_by_hand() -> None:
    model, optimizer, weight, mean = setup(population_size=2)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, (X, Y))
        seen.append(weight.detach().clone())
        loss.backward()
        model.eval()(X)
        model.train()
        return loss

    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure)
    torch.testing.assert_close((seen[0] + seen[1]) / 2, mean)  # an antithetic pair, not loop members
    with optimizer.member(1):
        member = weight.detach().clone()
        model(X)
        assert torch.equal(weight, member)
        model.eval()(X)
        assert torch.equal(weight, member)
    assert is_mean(weight, mean)


def test_a_step_that_saw_no_member_warns_once() -> None:
    model, optimizer, _, _ = setup()
    model.eval()
    loss_of(model, (X, Y)).backward()
    with pytest.warns(UserWarning, match="saw no member"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_several_optimizers_share_the_member_event() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    body, head = (
        PopulationGradient(torch.optim.SGD(part.parameters(), lr=0.1), model, sigma=0.3)
        for part in (model[0], model[2])
    )
    assert body.population.seed != head.population.seed
    means = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    loss_of(model, (X, Y)).backward()
    members = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    assert not any(torch.equal(a, b) for a, b in zip(members, means, strict=True))
    body.step()  # only its own tensors go back and move on
    assert torch.equal(model[2].weight, members[1])
    loss_of(model, (X, Y)).backward()  # a new member for both
    assert not torch.equal(model[2].weight, members[1])
    body.step()
    head.step()
    assert body.statistics.members == 1
    assert head.statistics.members == 2
    body.zero_grad()
    head.zero_grad()


def test_gan_style_alternation() -> None:
    """The generator is forwarded before its zero_grad and its backward comes through the discriminator."""
    torch.manual_seed(0)
    net_g, net_d = nn.Linear(6, 4), nn.Linear(4, 1)
    opt_g = PopulationGradient(torch.optim.Adam(net_g.parameters()), net_g)
    opt_d = PopulationGradient(torch.optim.Adam(net_d.parameters()), net_d)
    for _ in range(3):
        net_d.zero_grad()
        net_d(Y.repeat(1, 2)).mean().backward()
        fake = net_g(X)
        net_d(fake.detach()).mean().neg().backward()
        opt_d.step()
        net_g.zero_grad()
        opt_g.zero_grad()
        net_d(fake).mean().backward()
        opt_g.step()
        opt_d.zero_grad()
    assert opt_g.statistics.members == 1


def test_an_optimizer_that_dies_puts_the_mean_back_and_takes_its_hooks_along() -> None:
    model, optimizer, weight, mean = setup()
    loss_of(model, (X, Y)).backward()
    assert not is_mean(weight, mean)
    del optimizer
    gc.collect()
    assert is_mean(weight, mean)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model[0]._state_dict_hooks
    model(X)
    assert is_mean(weight, mean)


def test_copies_of_the_model_are_plain() -> None:
    """An averaged model, a best-so-far copy: they must not perturb anybody."""
    model, _, weight, mean = setup()
    average = torch.optim.swa_utils.AveragedModel(model)
    copied = copy.deepcopy(model)
    for other in (average, copied):
        out = other.train()(X)
        assert is_mean(weight, mean)
        assert torch.equal(
            out, nn.functional.linear(torch.tanh(X @ mean.T + model[0].bias), model[2].weight, model[2].bias)
        )


def test_lazy_and_late_parameters_join() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.0), model, sigma=0.3)
    loss_of(model, (X, Y)).backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = model[0].weight.detach().clone()
    loss_of(model, (X, Y)).backward()
    assert not torch.equal(model[0].weight, mean)
    optimizer.step()
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": list(model[3].parameters()), "sigma": 0.0})
    late = model[3].weight.detach().clone()
    loss_of(model, (X, Y)).backward()
    assert torch.equal(model[3].weight, late)  # its group's own sigma
    optimizer.param_groups[1]["sigma"] = 0.5
    optimizer.step()
    loss_of(model, (X, Y)).backward()
    assert not torch.equal(model[3].weight, late)
    assert torch.equal(model.state_dict()["3.weight"], late)
    optimizer.eval()


def test_thawed_parameters_join() -> None:
    model, optimizer, weight, mean = setup()
    weight.requires_grad_(False)
    loss_of(model, (X, Y)).backward()
    assert is_mean(weight, mean)
    optimizer.step()
    weight.requires_grad_(True)
    loss_of(model, (X, Y)).backward()
    assert not is_mean(weight, mean)


@pytest.mark.parametrize("kind", ["sparse", "max_norm"])
def test_special_embeddings_stay_unperturbed(kind: str) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 6, sparse=True) if kind == "sparse" else nn.Embedding(5, 6, max_norm=1.0)
    model: Any = nn.Sequential(embedding, nn.Linear(6, 2))
    with pytest.warns(UserWarning, match=r"`0\.weight`.*stays unperturbed"):
        optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model, sigma=0.3)
    tokens = torch.tensor([0, 1, 1, 4])
    mean = model[1].weight.detach().clone()
    with torch.no_grad():
        model(tokens)  # max_norm renormalises here
    rows = embedding.weight.detach().clone()
    model(tokens).sum().backward()
    assert torch.equal(embedding.weight, rows)
    assert not torch.equal(model[1].weight, mean)
    optimizer.step()


def test_sparse_gradients_found_on_the_way_without_a_model() -> None:
    embedding = nn.Embedding(5, 6, sparse=True)
    optimizer = PopulationGradient(torch.optim.SGD(embedding.parameters(), lr=0.0), population_size=2, sigma=0.3)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(embedding.weight.detach().clone())
        loss = embedding(torch.tensor([1, 3])).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.warns(UserWarning, match="sparse"):
        optimizer.step(closure)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.is_sparse
