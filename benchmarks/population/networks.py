"""Networks of the population study: small ones of five kinds, with the options that cells and arms move."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from population.data import CLASSES, REGRESSION, TOKENS

__all__ = ["NETWORKS", "Look", "make"]

SHAPE = {"digits": (8, 8), "mnist1d": (40,), "friedman": (10,), "tokens": (32,)}
CONV: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}
NORM: dict[int, Callable[..., nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


@dataclass(frozen=True)
class Look:
    """What a cell or an arm may change about a network.

    Attributes
    ----------
    width : float
        Factor on the numbers of units and channels.
    activation : {"relu", "tanh"}
    batch_norm : bool
        In networks that have none by themselves; the residual network always has it.
    dropout : float
        Before the last layer.
    initial : {"torch", "xavier", "plain"}
        torch's own initialisation, Xavier's (Glorot), or normal numbers of standard deviation 0.1 whatever the layer.
    more_layers : int
        Of MLPs, CNNs (of the last kind) and transformers; below 0 for fewer, not of CNNs.
    """

    width: float = 1.0
    activation: Literal["relu", "tanh"] = "relu"
    batch_norm: bool = False
    dropout: float = 0.0
    initial: Literal["torch", "xavier", "plain"] = "torch"
    more_layers: int = 0

    def act(self) -> nn.Module:
        """The activation, as a layer."""
        return nn.ReLU() if self.activation == "relu" else nn.Tanh()

    def units(self, number: int) -> int:
        """A number of units or channels at this width; a multiple of four, for the heads of attention."""
        return max(4, 4 * round(number * self.width / 4))

    def last(self, features: int, outputs: int) -> list[nn.Module]:
        """From features to outputs."""
        dropped: list[nn.Module] = [nn.Dropout(self.dropout)] if self.dropout else []
        return [*dropped, nn.Linear(features, outputs)]


def mlp(shape: tuple[int, ...], outputs: int, look: Look) -> nn.Module:
    """Two hidden layers."""
    hidden = look.units(128)
    layers: list[nn.Module] = []
    for before, after in pairwise([torch.Size(shape).numel(), *[hidden] * (2 + look.more_layers)]):
        norm: list[nn.Module] = [nn.BatchNorm1d(after)] if look.batch_norm else []
        layers += [nn.Linear(before, after), *norm, look.act()]
    return nn.Sequential(*layers, *look.last(hidden, outputs))


def cnn(shape: tuple[int, ...], outputs: int, look: Look) -> nn.Module:
    """Three convolutions, and a dense layer of all that is left."""
    axes = len(shape)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, *shape))]
    channels = (1, look.units(16), look.units(24), look.units(24), *[look.units(24)] * look.more_layers)
    for number, (before, after) in enumerate(pairwise(channels)):
        layers.append(CONV[axes](before, after, 3, stride=2 if number < 3 else 1, padding=1))
        layers += [NORM[axes](after)] if look.batch_norm else []
        layers.append(look.act())
    left = torch.Size((size + 7) // 8 for size in shape).numel()
    return nn.Sequential(*layers, nn.Flatten(), *look.last(left * channels[-1], outputs))


class Block(nn.Module):
    """Two convolutions with batch normalisation around a shortcut."""

    def __init__(self, axes: int, before: int, after: int, stride: int, look: Look) -> None:
        super().__init__()
        conv, norm = CONV[axes], NORM[axes]
        self.inner = nn.Sequential(
            conv(before, after, 3, stride, 1, bias=False),
            norm(after),
            look.act(),
            conv(after, after, 3, 1, 1, bias=False),
            norm(after),
        )
        self.shortcut = conv(before, after, 1, stride, bias=False)
        self.act = look.act()

    def forward(self, x: Tensor) -> Tensor:
        """From `before` channels to `after`; every axis shorter by `stride`."""
        return self.act(self.inner(x) + self.shortcut(x))


def resnet(shape: tuple[int, ...], outputs: int, look: Look) -> nn.Module:
    """Three residual blocks, and the mean over places."""
    axes = len(shape)
    channels = (1, look.units(12), look.units(16), look.units(24))
    blocks = [
        Block(axes, before, after, stride, look)
        for (before, after), stride in zip(pairwise(channels), (1, 2, 2), strict=True)
    ]
    return nn.Sequential(
        nn.Unflatten(1, (1, *shape)), *blocks, nn.Flatten(2), Mean(-1), *look.last(channels[-1], outputs)
    )


class Mean(nn.Module):
    """Mean over an axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Without that axis."""
        return x.mean(self.axis)


class States(nn.Module):
    """A recurrent layer's outputs without its last state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(batch, steps, features)."""
        return self.layer(x)[0]


def gru(shape: tuple[int, ...], outputs: int, look: Look) -> nn.Module:
    """A gated recurrent layer that reads four numbers at a time, and the mean over its states."""
    hidden = look.units(48)
    steps = torch.Size(shape).numel() // 4
    layer = States(nn.GRU(4, hidden, batch_first=True))
    return nn.Sequential(nn.Unflatten(1, (steps, 4)), layer, Mean(1), *look.last(hidden, outputs))


class Places(nn.Module):
    """Adds a learnt vector to every token of a sequence."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(steps, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, steps, width)."""
        return x + self.places


def transformer(shape: tuple[int, ...], outputs: int, look: Look) -> nn.Module:
    """Two encoder layers over tokens of four numbers, and the mean over the tokens."""
    width = look.units(32)
    steps = torch.Size(shape).numel() // 4
    return nn.Sequential(nn.Unflatten(1, (steps, 4)), nn.Linear(4, width), *_encoded(steps, width, outputs, look))


def reader(shape: tuple[int, ...], outputs: int, look: Look) -> nn.Module:
    """The same, of tokens from a vocabulary."""
    width = look.units(32)
    return nn.Sequential(nn.Embedding(TOKENS, width), *_encoded(shape[0], width, outputs, look))


def _encoded(steps: int, width: int, outputs: int, look: Look) -> list[nn.Module]:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=look.dropout, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2 + look.more_layers, enable_nested_tensor=False)
    return [Places(steps, width), encoder, nn.LayerNorm(width), Mean(1), *look.last(width, outputs)]


NETWORKS: dict[str, Callable[[tuple[int, ...], int, Look], nn.Module]] = {
    "MLP": mlp,
    "CNN": cnn,
    "ResNet": resnet,
    "GRU": gru,
    "transformer": transformer,
    "reader": reader,
}


def make(network: str, source: str, look: Look, seed: int) -> nn.Module:
    """A network with the weights of a seed."""
    torch.manual_seed(seed)
    model = NETWORKS[network](SHAPE[source], 1 if source in REGRESSION else CLASSES, look)
    for parameter in model.parameters() if look.initial != "torch" else ():
        if parameter.ndim >= 2 and look.initial == "xavier":
            nn.init.xavier_uniform_(parameter)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.1)
    return model
