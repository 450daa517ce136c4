"""Models that the benchmarks step: dense, convolutional and attention, from a tenth of a millisecond upwards."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Problem", "Transformer", "cnn", "cross_entropy", "mlp"]


class Transformer(nn.Module):
    """Two encoder layers with four heads, and the mean over the tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        return self.head(self.encoder(x).mean(1))


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Dense layers with an activation in between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int = 8) -> nn.Module:
    """Two convolutions on 28 x 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * 49, 10),
    )


@dataclass(frozen=True)
class Problem:
    """A model with ten classes, and the shape of a batch for it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model_and_batch(self, device: str = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
        """The model, inputs and labels; the same numbers every time."""
        torch.manual_seed(0)
        return (
            self.make().to(device),
            torch.randn(self.shape).to(device),
            torch.randint(0, 10, self.shape[:1]).to(device),
        )


MODELS = {
    "MLP 64-128-10, batch 64": Problem(lambda: mlp(64, 128, 10), (64, 64)),
    "CNN 28x28, batch 64": Problem(cnn, (64, 1, 28, 28)),
    "transformer, batch 32": Problem(Transformer, (32, 16, 64)),
    "MLP 256-1024-1024-10, batch 64": Problem(lambda: mlp(256, 1024, 1024, 10), (64, 256)),
}


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of all of them, as ``backward`` wants it."""
    return nn.functional.cross_entropy(model(x), y)
