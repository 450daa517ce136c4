"""Hugging Face's Trainer, and Accelerate by hand, in two processes: members of their own, one reduction per step."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_cells import assert_same, perturb_by_hand, put
from transformers_cells import gpt2, momentum, token_loss, tokens_of, weights_of

from gradwise import Population

RANKS, STEPS, MICRO_BATCHES = 2, 4, 2
SIGMA, SEED = 0.2, 3

WORKER = """
import sys
from typing import Any
import torch
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torchrun_cells import leave
from transformers_cells import RecordingTrainer, Witness, arguments, gpt2, momentum, texts, weights_of
from gradwise.torch import PopulationGradient
from gradwise.torch.transformers import PopulationTrainerMixin

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])


class CountingTrainer(RecordingTrainer):
    reductions = -1

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.reductions < 0:
            self.reductions = 0
            model.register_comm_hook(None, self.reduce)
        return super().training_step(model, inputs, num_items_in_batch)

    def reduce(self, state, bucket):
        self.reductions += 1
        return allreduce_hook(state, bucket)


class PopulationTrainer(PopulationTrainerMixin, CountingTrainer):
    pass


def train(kind: str, seed: int, *, resume: bool = False) -> dict[str, Any]:
    model = gpt2()
    witness = Witness(model)
    inner = momentum(model)
    args = arguments(
        f"{folder}/{kind}",
        gradient_accumulation_steps=2,
        max_steps=4,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=2 if not resume else 100,
        ddp_backend="gloo",
    )
    if kind == "unchanged":
        optimizer = PopulationGradient(inner, model, sigma=0.2, seed=seed)
        trainer = CountingTrainer(model, args, train_dataset=texts(64), optimizers=(optimizer, None))
    else:
        settings = {"population_size": 4, "sigma": 0.2, "seed": seed}
        trainer = PopulationTrainer(model, args, train_dataset=texts(64), optimizers=(inner, None), **settings)
    assert trainer.args.parallel_mode.value == "distributed"
    trainer.train(resume_from_checkpoint=f"{folder}/{kind}/checkpoint-2" if resume else None)
    return {
        "weights": weights_of(model),
        "batches": trainer.batches,
        "seen": [weights[0] for weights in witness.seen],
        "reductions": trainer.reductions,
    }


def accelerated() -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = PopulationGradient(torch.optim.AdamW(plain.parameters(), lr=0.01), plain, sigma=0.2, seed=3)
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 6, generator=generator), torch.randn(32, 2, generator=generator)
    )
    model, optimizer, loader = accelerator.prepare(plain, optimizer, torch.utils.data.DataLoader(data, batch_size=4))
    assert model is not plain  # DDP has come around it after the optimizer had been made
    batches, seen = [], []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(x), y)
            seen.append(plain[0].weight.detach().clone())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
        batches.append((x, y))
    return {"weights": weights_of(plain), "seen": seen, "batches": batches}


result = {
    "unchanged": train("unchanged", 3),
    "members": train("members", 3),
    "resumed": train("members", 4, resume=True),
    "accelerated": accelerated(),
}
torch.save(result, f"{folder}/{rank}.pt")
leave()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each process saved."""
    folder = tmp_path_factory.mktemp("trainer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(rank)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * RANKS, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("kind", ["unchanged", "members", "resumed", "accelerated"])
def test_replicas_are_equal_and_their_members_are_not(kind: str, results: list[dict[str, dict[str, Any]]]) -> None:
    first, second = (result[kind] for result in results)
    assert_same(first["weights"], second["weights"])
    assert not any(torch.equal(a, b) for a, b in zip(first["seen"], second["seen"], strict=True))


@pytest.mark.parametrize("kind", ["unchanged", "members"])
def test_gradients_are_reduced_once_per_step(kind: str, results: list[dict[str, dict[str, Any]]]) -> None:
    assert [result[kind]["reductions"] for result in results] == [STEPS, STEPS]


def test_resuming_is_exact(results: list[dict[str, dict[str, Any]]]) -> None:
    for result in results:
        assert_same(result["resumed"]["weights"], result["members"]["weights"])
        assert len(result["resumed"]["batches"]) == len(result["members"]["batches"]) // 2


@pytest.mark.parametrize(("kind", "size"), [("unchanged", 0), ("members", 4)])
def test_training_is_that_of_one_process_by_hand(
    kind: str, size: int, results: list[dict[str, dict[str, Any]]]
) -> None:
    model = gpt2()
    parameters = list(model.parameters())
    inner = momentum(model)
    population = Population(size=size or 8, sigma=SIGMA, seed=SEED)
    for step in range(STEPS):
        rows = [
            result[kind]["batches"][:: size or 1][step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]
            for result in results
        ]
        tokens = sum(tokens_of(batches) for batches in rows)
        for rank, batches in enumerate(rows):
            for index, batch in enumerate(batches):
                for member in range(index * size, (index + 1) * size) if size else [index]:
                    mean = perturb_by_hand(parameters, population, step=step, member=member, paired=size > 0, rank=rank)
                    (token_loss(model, batch, tokens) / (size or 1)).backward()
                    put(parameters, mean)
        nn.utils.clip_grad_norm_(parameters, 0.5)
        inner.step()
        inner.zero_grad()
    for got, expected in zip(results[0][kind]["weights"], weights_of(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)  # sums in another order


def test_accelerate_is_one_process_by_hand(results: list[dict[str, dict[str, Any]]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    parameters: list[Tensor] = list(model.parameters())
    inner = torch.optim.AdamW(parameters, lr=0.01)
    population = Population(sigma=SIGMA, seed=SEED)
    batches = [result["accelerated"]["batches"] for result in results]
    assert len(batches[0]) == 4
    for step in range(2):
        for rank in range(RANKS):
            for index in range(MICRO_BATCHES):
                mean = perturb_by_hand(parameters, population, step=step, member=index, paired=False, rank=rank)
                x, y = batches[rank][step * MICRO_BATCHES + index]
                (nn.functional.mse_loss(model(x), y) / (RANKS * MICRO_BATCHES)).backward()
                put(parameters, mean)
        nn.utils.clip_grad_norm_(parameters, 0.3)
        inner.step()
        inner.zero_grad()
    for got, expected in zip(results[0]["accelerated"]["weights"], weights_of(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
