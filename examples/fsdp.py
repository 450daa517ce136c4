"""The population gradient of a model that is sharded over processes (FSDP2), with a distributed checkpoint.

On one machine, with as many processes as it has GPUs (or any number without GPUs)::

    torchrun --standalone --nproc-per-node 2 examples/fsdp.py
    REPLICAS=2 torchrun --standalone --nproc-per-node 4 examples/fsdp.py    # HSDP: two members at a time

All processes together are one member of the population: each holds its part of the noise, and the members follow each
other from step to step. For several members at a time, give `fully_shard` a mesh of replicas (HSDP): each replica is
then a member of its own, and the all-reduce between replicas, which HSDP does anyway, averages them.

The training is stopped half-way, resumed from the checkpoint by a model and an optimizer that know nothing, and ends
with the same weights, bit for bit.
"""

import os
import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gradwise.torch import PopulationGradient

STEPS = 60
device = "cuda" if torch.cuda.is_available() else "cpu"


def make(mesh, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh)
    # After fully_shard, so that the inner optimizer has the sharded parameters; the model whose forward is called.
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, PopulationGradient(inner, model, sigma=0.1, seed=seed)


def train(model, optimizer, steps):
    """The loop itself is unchanged. Returns this process's last loss."""
    loss = torch.zeros(())
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())  # every process has rows of its own
        x = torch.randn(32, 8, generator=generator).to(device)
        loss = nn.functional.mse_loss(model(x), torch.sin(x.sum(1, keepdim=True)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main():
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    replicas = int(os.environ.get("REPLICAS", "1"))
    shape = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if replicas > 1 else mesh["shard"]
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)  # one folder for all

    model, optimizer = make(mesh, seed=0)
    train(model, optimizer, range(STEPS // 2))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder[0])  # type: ignore[reportPrivateImportUsage]
    loss = train(model, optimizer, range(STEPS // 2, STEPS))

    resumed, its_optimizer = make(mesh, seed=1)  # other weights, other noise
    model_state, optimizer_state = get_state_dict(resumed, its_optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder[0])  # type: ignore[reportPrivateImportUsage]
    set_state_dict(resumed, its_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(resumed, its_optimizer, range(STEPS // 2, STEPS))

    pairs = zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    same = all(torch.equal(one.full_tensor(), other.full_tensor()) for one, other in pairs)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {replicas} member(s) at a time: last loss {loss:.3f}")
        print(f"resumed from the checkpoint: {'the same weights, bit for bit' if same else 'OTHER WEIGHTS'}")
        shutil.rmtree(folder[0])
    dist.barrier()
    dist.destroy_process_group()
    assert same


if __name__ == "__main__":
    main()
