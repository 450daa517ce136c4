"""Seeds of several processes: one for all that hold a model together, whatever torch was seeded with in each."""

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = """
import sys
import torch
from torch import distributed as dist, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchrun_cells import leave
from gradwise.torch import PopulationGradient

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
early = nn.Linear(4, 4)
torch.nn.init.constant_(early.weight, 1.0)
made_early = PopulationGradient(torch.optim.SGD(early.parameters(), lr=0.1), early, sigma=0.1, seed=0)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.manual_seed(2**63 + 10 - rank)  # the second process has the lower one
alone = nn.Linear(4, 4)
replica = DistributedDataParallel(nn.Linear(4, 4))
shards = nn.Linear(4, 4)
torch.nn.init.constant_(shards.weight, 1.0)
fully_shard(shards)

def wrap(model, **options):
    return PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model, sigma=0.1, **options)

early(torch.ones(2, 4))
found = {"early": early.weight.detach()}
found |= {"alone": (kept := wrap(alone)).population.seed, "replica": (other := wrap(replica)).population.seed}
sharded = wrap(shards)
found["sharded"] = sharded.population.seed
shards(torch.ones(2, 4))
whole = sharded.param_groups[0]["params"][0].full_tensor().detach()  # both halves of one member
found["member"] = whole
found["given"] = wrap(DistributedDataParallel(nn.Linear(4, 4)), seed=rank).population.seed  # replicas may differ
try:
    wrap(fully_shard(nn.Linear(4, 4)), seed=rank)
except ValueError as error:
    found["refused"] = str(error)
found["largest"] = wrap(fully_shard(nn.Linear(4, 4)), seed=2**64 - 1).population.seed
torch.save(found, f"{folder}/{rank}.pt")
leave()
"""


def test_processes_that_share_a_model_share_the_seed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not torch.equal(first["early"], second["early"])  # members of the processes that there are by now
    assert (first["alone"], second["alone"]) == (10, 9)
    # One more than its own in the second process, whose seed is taken by the wrapper of `alone`.
    assert first["replica"] == second["replica"] == 10
    assert first["sharded"] == second["sharded"] == 11
    assert torch.equal(first["member"], second["member"])
    assert first["member"].unique().numel() == 16
    assert (first["given"], second["given"]) == (0, 1)
    assert first["refused"] == second["refused"]
    assert "`seed` must be the same" in first["refused"]
    assert "[0, 1]" in first["refused"]
    assert first["largest"] == 2**64 - 1
