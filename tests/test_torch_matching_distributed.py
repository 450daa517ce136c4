"""Gradient matching in two processes: averaged gradients are those of one process with the whole batch.

By hand and by DistributedDataParallel, which must not be told that the graph is static.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch_cells import perturb_by_hand, put

from gradwise import Population
from gradwise.torch import GradientMatching

N = 6  # rows 0 and 1 go to process 0, the others to process 1

WORKER = """
import sys, warnings
import torch
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from torchrun_cells import leave
from gradwise.torch import GradientMatching, PopulationGradient

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
rows = slice(0, 2) if rank == 0 else slice(2, None)
warnings.simplefilter("ignore")
for mode in ("fitted", "unfitted", "projections"):
    model, x, y, target, weight = torch.load(f"{folder}/data.pt", weights_only=False)
    matching = GradientMatching(projections=1 if mode == "projections" else None, seed=0)
    if mode != "unfitted":
        matching.fit(x, y, target)
    loss = matching(model, x[rows], target[rows], sample_weight=weight[rows])
    loss.backward()
    for parameter in model.parameters():  # as DistributedDataParallel does
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    if rank == 0:  # evaluation in one process only: no deadlock
        with torch.no_grad():
            matching(model, x[rows], target[rows])
    dist.all_reduce(loss.data)
    result = {
        "loss": loss.detach() / 2,
        "gradients": [parameter.grad for parameter in model.parameters()],
        "scale": matching.scales.jacobian_scale,
    }
    torch.save(result, f"{folder}/{mode}-{rank}.pt")

# The same by DistributedDataParallel. It waits for the last bias, on which no derivative depends but the values do.
model, x, y, target, weight = torch.load(f"{folder}/data.pt", weights_only=False)
matching = GradientMatching().fit(x, y, target)
wrapped = DistributedDataParallel(model)
predicted, loss = matching.with_values(wrapped, x[rows], target[rows], sample_weight=weight[rows])
(loss + 0 * predicted.sum()).backward()
one_step = [parameter.grad for parameter in model.parameters()]

# 200 steps, values and derivatives; then with members of the population.
def values_and_derivatives(model):
    predicted, loss = matching.with_values(model, x[rows], target[rows], sample_weight=weight[rows])
    return loss + (predicted - y[rows]).square().sum() * 2 / y.numel()  # of the whole batch, of two processes

model, x, y, target, weight = torch.load(f"{folder}/data.pt", weights_only=False)
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.003)
for step in range(200):
    optimizer.zero_grad()
    values_and_derivatives(wrapped).backward()
    optimizer.step()
trained = [parameter.detach().clone() for parameter in model.parameters()]

model, x, y, target, weight = torch.load(f"{folder}/data.pt", weights_only=False)
wrapped = DistributedDataParallel(model)
optimizer = PopulationGradient(
    torch.optim.SGD(wrapped.parameters(), lr=0.01), wrapped, sigma=0.3, seed=5, population_size=2
)

def closure():
    optimizer.zero_grad()
    loss = values_and_derivatives(wrapped)
    loss.backward()
    return loss

for step in range(3):  # members together
    optimizer.step(closure)
together = [parameter.detach().clone() for parameter in model.parameters()]
for step in range(3):  # the unchanged loop
    closure()
    optimizer.step()
population = [parameter.detach().clone() for parameter in model.parameters()]

refused = []
for how in ("module", "inside a module", "bound method", "function", "outputs", "outputs again", "module later"):
    if how != "outputs again":
        static = DistributedDataParallel(model, static_graph=True)
        matching = GradientMatching().fit(x, y, target)
    at = x[rows].clone().requires_grad_()
    calls = {
        "module": lambda: matching(static, at, target[rows]),
        "inside a module": lambda: matching(nn.Sequential(static), at, target[rows]),
        "bound method": lambda: matching(static.forward, at, target[rows]),
        "function": lambda: matching(lambda x: static(x) * 1, at, target[rows]),
        "outputs": lambda: matching.from_outputs(static(at) * 1, wrt=at, target=target[rows]),
    }
    if how == "module later":  # after the first backward pass DDP's node is in the graph no more
        static(at).sum().backward()
    try:
        calls[how.removesuffix(" again").removesuffix(" later")]()
    except ValueError as error:
        refused.append((how, str(error)))
result = {"one step": one_step, "trained": trained, "together": together, "population": population, "refused": refused}
torch.save(result, f"{folder}/ddp-{rank}.pt")
leave()
"""


def data() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    target = torch.randn(N, 2, 3, dtype=torch.float64)
    target[0] = torch.nan  # unequal numbers of known entries, next to unequal numbers of rows
    target[4, 1, 2] = torch.nan
    return model, x, y, target, torch.rand(N, dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    torch.save(data(), path / "data.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return path


@pytest.mark.parametrize("mode", ["fitted", "unfitted", "projections"])
def test_two_processes_equal_one(folder, mode):
    model, x, y, target, weight = data()
    first, second = (torch.load(folder / f"{mode}-{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["scale"], second["scale"])
    matching = GradientMatching()
    if mode == "unfitted":  # the first process's batch decides
        with pytest.warns(UserWarning, match="not fitted"):
            matching(model, x[:2], target[:2])
        torch.testing.assert_close(first["scale"], matching.scales.jacobian_scale)
    else:
        matching.fit(x, y, target)
    loss = matching(model, x, target, sample_weight=weight)
    if mode == "projections":  # both draw; the sum over processes is still one unbiased estimate, not the full loss
        assert 0 < first["loss"] != loss
        return
    torch.testing.assert_close(first["loss"], loss.detach())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for got, expected in zip(first["gradients"], gradients, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)


def part_of_the_loss(model: nn.Module, rows: slice) -> Tensor:
    """What some rows contribute to the mean losses, of values and of derivatives, over the whole batch."""
    _, x, y, target, weight = data()
    matching = GradientMatching().fit(x, y, target)
    known = target.isfinite().flatten(1).sum(1) * weight
    derivatives = matching(model, x[rows], target[rows], sample_weight=weight[rows]) * known[rows].sum() / known.sum()
    return derivatives + (model(x[rows]) - y[rows]).square().sum() / y.numel()


def test_ddp_gradients_are_those_of_one_process(folder):
    model, x, y, target, weight = data()
    loss = GradientMatching().fit(x, y, target)(model, x, target, sample_weight=weight)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    first, second = (torch.load(folder / f"ddp-{rank}.pt", weights_only=True)["one step"] for rank in range(2))
    for a, b, expected in zip(first, second, gradients, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, torch.zeros_like(a) if expected is None else expected)


def test_ddp_replicas_stay_bit_identical_for_200_steps(folder):
    model, x, y, target, weight = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    matching = GradientMatching().fit(x, y, target)
    for _ in range(200):
        optimizer.zero_grad()
        predicted, loss = matching.with_values(model, x, target, sample_weight=weight)
        (loss + nn.functional.mse_loss(predicted, y)).backward()
        optimizer.step()
    first, second = (torch.load(folder / f"ddp-{rank}.pt", weights_only=True)["trained"] for rank in range(2))
    for a, b, expected in zip(first, second, model.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected.detach(), rtol=1e-6, atol=1e-8)  # float64, 200 steps of AdamW


def test_ddp_with_members_of_a_population(folder):
    model, *_ = data()
    parameters = list(model.parameters())
    population = Population(size=2, sigma=0.3, seed=5)
    first, second = (torch.load(folder / f"ddp-{rank}.pt", weights_only=True) for rank in range(2))
    for step in range(6):
        together = step < 3
        members = 2 if together else 1
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for rank in range(2):
            for member in range(members):
                mean = perturb_by_hand(parameters, population, step=step, member=member, paired=together, rank=rank)
                # DDP's mean over processes is over all rows once, each at its own process's members.
                loss = part_of_the_loss(model, slice(0, 2) if rank == 0 else slice(2, None)) / members
                total = [t + g for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
                put(parameters, mean)
        put(parameters, [p - 0.01 * g for p, g in zip(parameters, total, strict=True)])
        if step == 2:
            for got, expected in zip(first["together"], parameters, strict=True):
                torch.testing.assert_close(got, expected.detach())
    for a, b, expected in zip(first["population"], second["population"], parameters, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected.detach())


def test_a_static_graph_is_refused(folder):
    for rank in range(2):
        refused = torch.load(folder / f"ddp-{rank}.pt", weights_only=True)["refused"]
        assert [how for how, _ in refused] == [
            "module",
            "inside a module",
            "bound method",
            "function",
            "outputs",
            "outputs again",
            "module later",
        ]
        assert all("Use static_graph=False" in message for _, message in refused)
