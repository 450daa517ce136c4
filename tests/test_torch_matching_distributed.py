"""Gradient matching in two processes: averaged gradients are those of one process with the whole batch."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from gradwise.torch import GradientMatching

N = 6  # rows 0 and 1 go to process 0, the others to process 1

WORKER = """
import sys, warnings
import torch
from torch import distributed as dist
from gradwise.torch import GradientMatching

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
dist.barrier()
dist.destroy_process_group()
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
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(path), str(rank)], stderr=subprocess.PIPE, text=True)
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
