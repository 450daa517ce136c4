"""What a step costs: the population gradient and gradient matching as ratios to a plain step of the same model.

One thread, medians of interleaved repeats, so that a noisy machine slows all columns alike.
Run: ``python benchmarks/overhead.py [repeats]``; writes ``out/overhead.json``.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from gradwise.torch import GradientMatching, PopulationGradient


class Transformer(nn.Module):
    """Two encoder layers of width 64 over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        return self.head(self.encoder(x).mean(1))


def mlp(*widths: int) -> nn.Module:
    """Dense layers with ReLU in between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Two convolutions on 28 x 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 64-128-10, batch 64": (lambda: mlp(64, 128, 10), (64, 64)),
    "CNN 28x28, batch 64": (cnn, (64, 1, 28, 28)),
    "transformer, batch 32": (Transformer, (32, 16, 64)),
    "MLP 256-1024-1024-10, batch 64": (lambda: mlp(256, 1024, 1024, 10), (64, 256)),
}
WAYS = ("plain", "unchanged loop", "closure, 8 members", "matching, 1 of 10 outputs")


def step_of(way: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Callable[[], Any]:
    """One training step as a function."""
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])
    optimizer: Any = torch.optim.AdamW(model.parameters())
    if way in ("unchanged loop", "closure, 8 members"):
        optimizer = PopulationGradient(optimizer, model)
    matching = GradientMatching(scale="none", projections=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        if way.startswith("matching"):
            logits, loss = matching.with_values(model, x)
            loss = loss + nn.functional.cross_entropy(logits, y)
        else:
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step() -> None:
        if way.startswith("closure"):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    return step


def main() -> None:
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    table = Table("model", "plain, ms", *WAYS[1:])
    results: dict[str, dict[str, float]] = {}
    for name, (make, shape) in track(MODELS.items(), description="steps"):
        steps = {way: step_of(way, make, shape) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(repeats + 2):  # the first two warm up
            for way, step in steps.items():
                start = time.perf_counter()
                for _ in range(3):
                    step()
                if repeat >= 2:
                    seconds[way].append((time.perf_counter() - start) / 3)
        medians = {way: statistics.median(values) for way, values in seconds.items()}
        results[name] = medians
        ratios = [f"{medians[way] / medians['plain']:.2f}x" for way in WAYS[1:]]
        table.add_row(name, f"{1000 * medians['plain']:.2f}", *ratios)
    Console(width=130).print(table)
    out = Path("out")
    out.mkdir(exist_ok=True)
    (out / "overhead.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
