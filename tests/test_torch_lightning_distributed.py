"""Two processes under Lightning's DDP strategy: every rank has members of its own, the replicas stay the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cells import BATCHES, assert_near, by_hand

from gradwise import Population

WORKER = """
import sys
import warnings
import torch
from lightning.pytorch import Callback, Trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from lightning_cells import BATCHES, Regression, adamw, weights
from gradwise.torch import PopulationGradient
from gradwise.torch.lightning import PopulationCallback

reductions = []

def counted(state, bucket):
    reductions.append(1)
    return allreduce_hook(state, bucket)

class Saved(Callback):
    def __init__(self, name):
        self.path = f"{folder}/{name}"

    def on_train_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, counted)  # the strategy would do so on GPUs only

    def on_train_end(self, trainer, pl_module):
        saved = {"weights": weights(pl_module), "losses": pl_module.losses, "reductions": len(reductions)}
        saved["states"] = [callback.state_dict() for callback in trainer.callbacks]
        torch.save(saved, f"{self.path}-{trainer.global_rank}.pt")
        reductions.clear()

class Ranked:  # every process has batches of its own
    def __len__(self):
        return 4

    def __iter__(self):
        return iter(BATCHES[torch.distributed.get_rank() : 4 : 2] * 2)

def fit(name, module, *callbacks, **options):
    Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, Saved(name)],
        **options,
    ).fit(module, Ranked())

torch.set_num_threads(1)
warnings.simplefilter("ignore")
members = PopulationCallback(2, sigma=0.3, seed=5)
fit("callback", Regression(adamw), members)
fit("accumulated", Regression(adamw), members, accumulate_grad_batches=2, gradient_clip_val=0.1)

class Unseeded(Callback):
    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(7 + trainer.global_rank)

fit("unseeded", Regression(adamw), Unseeded(), PopulationCallback(2), max_steps=1)
fit("wrapper", Regression(lambda m: PopulationGradient(adamw(m), m, sigma=0.3, seed=5)))
"""

CASES: dict[str, dict[str, Any]] = {
    "callback": {"members": 2, "paired": True},
    "accumulated": {"members": 2, "paired": True, "accumulate": 2, "clip": 0.1},
    "wrapper": {"members": 1, "paired": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-c", WORKER, str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_members_and_replicas_stay_identical(case: str, folder: Path) -> None:
    first, second = (torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    options = CASES[case]
    data = [BATCHES[i] for i in (0, 1, 2, 3, 0, 1, 2, 3)]
    expected, losses = by_hand(Population(2, sigma=0.3, seed=5), ranks=2, data=data, **options)
    assert_near(first["weights"], expected)  # DDP sums in another order
    both = [sum(losses[rank::2]) / 4 for rank in range(2)]
    assert [sum(r["losses"]) / len(r["losses"]) for r in (first, second)] == pytest.approx(both, rel=1e-4)
    assert first["reductions"] == 4 // options.get("accumulate", 1)  # one per step, whatever the number of members


def test_ranks_that_seed_torch_differently_save_one_seed(folder: Path) -> None:
    states = [torch.load(folder / f"unseeded-{rank}.pt", weights_only=True)["states"] for rank in range(2)]
    assert states[0] == states[1]  # the checkpoint holds that of the first process, for all that resume from it
    assert {"seed": 7, "skipped": 0} in states[0]
