"""Population gradient under Lightning's Trainer, on scikit-learn's handwritten digits: two ways, a line each (marked).

100 real scans to train on, 1,697 to test on, nothing tuned on either. Every method starts from the same weights and
sees the same batches. Takes ten seconds.
"""

# ruff: noqa: ARG002, D102 - methods and arguments are Lightning's
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradwise.torch import PopulationGradient
from gradwise.torch.lightning import PopulationCallback

TRAINING_ROWS, BATCH, EPOCHS = 100, 20, 20

# Its notes on devices and loggers, advice on workers for a data set of 100 rows, and what torch 2.13 deprecates in it.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*does not have many workers")
warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)


class Digits(LightningModule):
    """A small network, as one would write it; `wrap` is what becomes of its optimizer."""

    def __init__(self, wrap: Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("accuracy", 100 * (logits.argmax(1) == y).float().mean())
        self.log("log-loss", nn.functional.cross_entropy(logits, y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return optimizer if self.wrap is None else self.wrap(optimizer, self)


@dataclass(frozen=True)
class Method:
    """One row of the comparison; `passes` is its cost per step in forward-backward passes."""

    name: str
    passes: int = 1
    wrap: Callable[..., torch.optim.Optimizer] | None = None
    callback: Callable[[], Callback] | None = None


METHODS = (
    Method("AdamW"),
    Method("PopulationGradient around it", wrap=PopulationGradient),  # return PopulationGradient(optimizer, self)
    Method("PopulationCallback()", 8, callback=PopulationCallback),  # Trainer(callbacks=[PopulationCallback()])
    Method("PopulationCallback(sigma=0), control", 8, callback=lambda: PopulationCallback(sigma=0.0)),
)


def loaders(seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and test images as rows of 64 pixels from 0 to 1, with their labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        (images / 16).astype("float32"), labels, train_size=TRAINING_ROWS, stratify=labels, random_state=seed
    )
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(train_x, train_y), BATCH, shuffle=True, generator=order)
    return train, DataLoader(TensorDataset(test_x, test_y), len(test_x))


def run(method: Method, seed: int, epochs: int = EPOCHS) -> dict[str, float]:
    """Train by one method; its scores on the test data."""
    torch.manual_seed(seed)
    module = Digits(method.wrap)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=None if method.callback is None else method.callback(),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, test = loaders(seed)
    trainer.fit(module, train)
    return dict(trainer.test(module, test, verbose=False)[0])


if __name__ == "__main__":
    torch.set_num_threads(1)  # the fastest, for so small a network
    table = Table("100 digits", "passes", "accuracy, %", "log-loss", caption="one seed, test data")
    for method in METHODS:
        scores = run(method, 0)
        table.add_row(method.name, f"{method.passes}x", f"{scores['accuracy']:.2f}", f"{scores['log-loss']:.4f}")
    Console().print(table)
