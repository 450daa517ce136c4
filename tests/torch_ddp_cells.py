"""Models and batches that the processes of the DDP tests and the tests themselves both make."""

from typing import Any

import torch
from torch import Tensor, nn

ROWS, INPUTS, OUTPUTS = 12, 6, 2


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(ROWS, INPUTS, generator=generator), torch.randn(ROWS, OUTPUTS, generator=generator)


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def mse_of_both(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return mse(model["a"], x, y) + mse(model["b"], x, y)


def small() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, OUTPUTS))


def regularised() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, OUTPUTS))


class Branches(nn.Module):
    """Uses its second layer at every second call only, and its third one never."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(INPUTS, OUTPUTS) for _ in range(3))
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.first(x) + (self.second(x) if self.calls % 2 else 0)
