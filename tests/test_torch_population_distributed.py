"""Two processes under DistributedDataParallel: each rank is a member of its own, the replicas stay the same."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch_cells import perturb_by_hand, put

from gradwise import Population

STEPS = 20

WORKER = """
import sys
import torch
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from gradwise.torch import PopulationGradient

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
model = DistributedDataParallel(plain)
optimizer = PopulationGradient(torch.optim.AdamW(model.parameters(), lr=0.01), model, sigma=0.3, seed=5)
x, y = torch.load(f"{folder}/data.pt", weights_only=True)
members = []
for step in range(20):
    loss = nn.functional.mse_loss(model(x[step, rank]), y[step, rank])
    members.append(plain[0].weight.detach().clone())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# A member whose loss is NaN in one process is dropped in both.
wrapped = DistributedDataParallel(nn.Linear(6, 2), gradient_as_bucket_view=True)
skipping = PopulationGradient(
    torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, sigma=0.3, population_size=4, on_nonfinite="skip", seed=5
)
calls = [0]

def closure():
    calls[0] += 1
    skipping.zero_grad()
    loss = nn.functional.mse_loss(wrapped(x[0, rank]), y[0, rank])
    loss.backward()
    return loss * float("nan") if rank == 0 and calls[0] == 2 else loss

for step in range(3):
    skipping.step(closure)
skipped = {"skipped": skipping.statistics.skipped, "after_skip": wrapped.module.weight.detach()}
result = skipped | {"weights": [p.detach() for p in plain.parameters()], "members": members}
torch.save(result, f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_ranks_are_members_and_replicas_stay_identical(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 2, 12, 6, generator=generator)
    y = torch.randn(STEPS, 2, 12, 2, generator=generator)
    torch.save((x, y), tmp_path / "data.pt")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert torch.equal(first["after_skip"], second["after_skip"])
    assert first["skipped"] == second["skipped"] == 1
    assert not any(torch.equal(a, b) for a, b in zip(first["members"], second["members"], strict=True))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    parameters = list(model.parameters())
    population = Population(sigma=0.3, seed=5)
    for step in range(STEPS):
        for rank in range(2):  # the mean over ranks is what the all-reduce makes of their members
            mean = perturb_by_hand(parameters, population, step=step, member=0, paired=False, rank=rank)
            (nn.functional.mse_loss(model(x[step, rank]), y[step, rank]) / 2).backward()
            put(parameters, mean)
        inner.step()
        inner.zero_grad()
    for got, expected in zip(first["weights"], parameters, strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-6)  # DDP sums in another order
