"""Population gradient in several processes: DistributedDataParallel on scikit-learn's handwritten digits.

Every process is another member of the population; the all-reduce that DDP does anyway averages over them. On one
machine, with as many processes as it has GPUs (or any number without GPUs)::

    torchrun --standalone --nproc-per-node 2 examples/ddp.py
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --members 4     # four members in each process
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --resume        # continue from the last checkpoint

A run that was killed and resumed ends with the same weights, to the bit, as one that was not. The checkpoint must be a
file that all processes can read; the first one writes it after every epoch.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gradwise.torch import PopulationGradient

SEED = 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1, help="members per process and step; each costs one pass")
    parser.add_argument("--sigma", type=float, default=0.1, help="size of the noise relative to the weights")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/ddp.pt"))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint, if there is one")
    return parser.parse_args()


def data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images as rows of 64 pixels from 0 to 1, with their labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=SEED)
    train_x, test_x, train_y, test_y = (torch.tensor(part) for part in parts)
    return TensorDataset(train_x.float() / 16, train_y), TensorDataset(test_x.float() / 16, test_y)


def save(state: dict[str, Any], path: Path) -> None:
    """All of it or nothing: a run that is killed meanwhile, or a full disk, leaves the last checkpoint as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


@torch.no_grad()
def accuracy(network: nn.Module, dataset: TensorDataset, device: torch.device) -> float:
    x, y = (tensor.to(device) for tensor in dataset.tensors)
    network.eval()
    return 100 * (network(x).argmax(1) == y).double().mean().item()


def replicas_agree(network: nn.Module) -> bool:
    """Whether all processes hold the same weights, bit for bit."""
    weights = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    largest, smallest = weights.clone(), weights.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return torch.equal(largest, smallest)


def train(options: argparse.Namespace, rank: int, device: torch.device) -> None:
    torch.manual_seed(SEED)
    train_set, test_set = data()
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)).to(device)
    model = DistributedDataParallel(network)
    optimizer = PopulationGradient(  # around the optimizer, with the module that the loop calls
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        model,
        sigma=options.sigma,
        population_size=options.members,
        antithetic=options.members % 2 == 0,
        seed=SEED,  # the same in all processes, which make different members of it by their rank
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    sampler: DistributedSampler[Any] = DistributedSampler(train_set, seed=SEED)
    loader = DataLoader(train_set, batch_size=32, sampler=sampler)

    begin = 0
    if options.resume and options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        begin = state["epochs"]
        if rank == 0:
            print(f"resumed after epoch {begin}", flush=True)

    for epoch in range(begin, options.epochs):
        sampler.set_epoch(epoch)
        # Dropout that depends on the epoch and the process only: a resumed run needs no saved random streams.
        torch.manual_seed(SEED + 1000 * epoch + rank)
        model.train()
        total = torch.zeros((), device=device)
        for batch in loader:
            x, y = (tensor.to(device) for tensor in batch)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if options.members > 1:
                loss = optimizer.step(closure)  # one reduction, after the last member
            else:
                loss = closure()  # the usual loop
                optimizer.step()
            total += loss.detach()
        schedule.step()
        if rank == 0:
            state = {
                "epochs": epoch + 1,
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            save(state, options.checkpoint)
            mean, right = total.item() / len(loader), accuracy(network, test_set, device)
            print(f"epoch {epoch + 1:3d}   training loss {mean:.4f}   test accuracy {right:.2f} %", flush=True)
        dist.barrier()

    agree, right = replicas_agree(network), accuracy(network, test_set, device)
    if rank == 0:
        print(f"test accuracy {right:.2f} %   the {dist.get_world_size()} replicas agree to the bit: {agree}")
    dist.barrier()  # nobody leaves while others still have something to say


def main() -> None:
    options = arguments()
    local = int(os.environ["LOCAL_RANK"])  # set by torchrun
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    try:
        train(options, dist.get_rank(), device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
