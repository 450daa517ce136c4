"""Cells of the population study: a data set, a network and a recipe each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from population.data import REGRESSION
from population.networks import Look

__all__ = [
    "CURVES",
    "DEPTHS",
    "DOMAINS",
    "LADDER",
    "LENGTHS",
    "MENDED",
    "NORMALISED",
    "OVERFITTED",
    "PAIRS",
    "PRIMARY",
    "SECONDARY",
    "Cell",
    "Recipe",
    "cells",
]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; what is not about the population.

    Attributes
    ----------
    optimizer : {"sgd", "momentum", "adam", "adamw"}
    learning_rate : float
        Of the first step.
    epochs, batch : int
    decay : {"constant", "cosine"}
        Of the learning rate, to zero.
    weight_decay : float
        Decoupled, whatever the optimizer.
    label_smoothing : float
    """

    optimizer: str = "adam"
    learning_rate: float = 3e-3
    epochs: int = 60
    batch: int = 50
    decay: str = "cosine"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Cell:
    """A problem of the study.

    Attributes
    ----------
    source, rows, wrong_labels
        See `population.data.split`.
    network : str
        Of `population.networks.NETWORKS`.
    recipe : Recipe
    look : Look
    """

    source: str
    rows: int
    network: str
    recipe: Recipe
    look: Look = field(default_factory=Look)
    wrong_labels: float = 0.0

    @property
    def steps(self) -> int:
        """Of a training."""
        return self.recipe.epochs * max(1, self.rows // self.recipe.batch)

    @property
    def normalised(self) -> bool:
        """Whether there is batch normalisation."""
        return self.network == "ResNet" or self.look.batch_norm

    @property
    def endpoint(self) -> str:
        """The score by which settings are chosen and effects are judged, in percent."""
        return "r2" if self.source in REGRESSION else "f1"

    def changed(self, recipe: Mapping[str, Any] | None = None, look: Mapping[str, Any] | None = None) -> "Cell":
        """A copy with another recipe or another look."""
        return replace(self, recipe=replace(self.recipe, **(recipe or {})), look=replace(self.look, **(look or {})))


def _cell(source: str, rows: int, network: str, epochs: int, batch: int, **options: Any) -> Cell:
    return Cell(source, rows, network, Recipe(epochs=epochs, batch=batch), **options)


PRIMARY: dict[str, Cell] = {
    "digits-200 MLP": _cell("digits", 200, "MLP", 80, 20),
    "digits-200 CNN": _cell("digits", 200, "CNN", 60, 20),
    "digits-200 ResNet": _cell("digits", 200, "ResNet", 30, 20),
    "mnist1d-1000 MLP": _cell("mnist1d", 1_000, "MLP", 50, 50),
    "mnist1d-1000 CNN": _cell("mnist1d", 1_000, "CNN", 40, 50),
    "mnist1d-1000 ResNet": _cell("mnist1d", 1_000, "ResNet", 15, 50),
    "mnist1d-1000 GRU": _cell("mnist1d", 1_000, "GRU", 25, 50),
    "mnist1d-1000 transformer": _cell("mnist1d", 1_000, "transformer", 15, 50),
    "mnist1d-4000 MLP": _cell("mnist1d", 4_000, "MLP", 25, 100),
    "mnist1d-4000 CNN": _cell("mnist1d", 4_000, "CNN", 15, 100),
    "mnist1d-1000 wrong labels MLP": _cell("mnist1d", 1_000, "MLP", 50, 50, wrong_labels=0.2),
    "mnist1d-1000 wrong labels ResNet": _cell("mnist1d", 1_000, "ResNet", 15, 50, wrong_labels=0.2),
}

_BASES = {"MLP": PRIMARY["mnist1d-1000 MLP"], "CNN": PRIMARY["mnist1d-1000 CNN"]}
_MOVES: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {  # a factor on the epochs, recipe, look
    "a quarter of the width": (1, {}, {"width": 0.25}),
    "three times the width": (1, {}, {"width": 3.0}),
    "a quarter of the epochs": (0.25, {}, {}),
    "twice the epochs": (2, {}, {}),
    "batches of 200": (2, {"batch": 200}, {}),
    "a third of the rate": (1, {"learning_rate": 1e-3}, {}),
    "three times the rate": (1, {"learning_rate": 1e-2}, {}),
    "SGD with momentum": (1, {"optimizer": "momentum", "learning_rate": 0.05}, {}),
    "AdamW, weight decay 0.1": (1, {"optimizer": "adamw", "weight_decay": 0.1}, {}),
    "constant rate": (1, {"decay": "constant"}, {}),
    "tanh": (1, {}, {"activation": "tanh"}),
    "Xavier": (1, {}, {"initial": "xavier"}),
    "BatchNorm": (1, {}, {"batch_norm": True}),
    "dropout 0.3": (1, {}, {"dropout": 0.3}),
}


def _moved(base: Cell, move: str) -> Cell:
    longer, recipe, look = _MOVES[move]
    return base.changed({"epochs": round(longer * base.recipe.epochs), **recipe}, look)


# Of the CNN only the moves that concern what the MLP does not show: 14 + 10 cells.
_OF_CNN = [
    "a quarter of the width",
    "three times the width",
    "twice the epochs",
    "a third of the rate",
    "SGD with momentum",
    "AdamW, weight decay 0.1",
    "constant rate",
    "tanh",
    "BatchNorm",
    "dropout 0.3",
]
SECONDARY: dict[str, Cell] = {
    f"{network}, {move}": _moved(base, move)
    for network, base in _BASES.items()
    for move in (_MOVES if network == "MLP" else _OF_CNN)
}

DOMAINS: dict[str, Cell] = {
    "regression MLP": _cell("friedman", 200, "MLP", 100, 20),
    "tokens transformer": _cell("tokens", 1_000, "reader", 10, 50),
}

CURVES = [
    "digits-200 CNN",
    "mnist1d-1000 MLP",
    "mnist1d-1000 CNN",
    "mnist1d-1000 transformer",
    "mnist1d-4000 MLP",
    "mnist1d-1000 wrong labels ResNet",
]

# Where noise may only make the weights grow: with BatchNorm, and without a decay of the learning rate.
NORMALISED: dict[str, Cell] = {
    "mnist1d-1000 wrong labels ResNet, constant rate": PRIMARY["mnist1d-1000 wrong labels ResNet"].changed(
        {"decay": "constant"}
    ),
    "mnist1d-1000 ResNet, constant rate": PRIMARY["mnist1d-1000 ResNet"].changed({"decay": "constant"}),
}

# What decides how much noise a network bears: its kind, its depth, or whether it has been trained until it fits?
DEPTHS: dict[str, Cell] = {
    "MLP, 4 hidden layers": PRIMARY["mnist1d-1000 MLP"].changed(look={"more_layers": 2}),
    "MLP, 8 hidden layers": PRIMARY["mnist1d-1000 MLP"].changed(look={"more_layers": 6}),
    "CNN, 6 convolutions": PRIMARY["mnist1d-1000 CNN"].changed(look={"more_layers": 3}),
    "transformer, 1 layer, 60 epochs": PRIMARY["mnist1d-1000 transformer"].changed({"epochs": 60}, {"more_layers": -1}),
}
LENGTHS: dict[str, Cell] = {
    "transformer, 60 epochs": PRIMARY["mnist1d-1000 transformer"].changed({"epochs": 60}),
    "ResNet, 60 epochs": PRIMARY["mnist1d-1000 ResNet"].changed({"epochs": 60}),
    "wrong labels ResNet, 60 epochs": PRIMARY["mnist1d-1000 wrong labels ResNet"].changed({"epochs": 60}),
    "CNN, 4,000 rows, 60 epochs": PRIMARY["mnist1d-4000 CNN"].changed({"epochs": 60}),
    "CNN, 10 epochs": PRIMARY["mnist1d-1000 CNN"].changed({"epochs": 10}),
    "MLP, 6 epochs": PRIMARY["mnist1d-1000 MLP"].changed({"epochs": 6}),
}
# The shorter and the longer of two trainings that differ in nothing else (but the learning rate, if tuning says so).
PAIRS: list[tuple[str, str]] = [
    (name, other) if cell.recipe.epochs < near.recipe.epochs else (other, name)
    for name, cell in LENGTHS.items()
    for other, near in PRIMARY.items()
    if near.changed({"epochs": cell.recipe.epochs}) == cell
]
OVERFITTED = ["wrong labels ResNet, 60 epochs", "transformer, 60 epochs"]

MENDED = ["mnist1d-1000 ResNet", "mnist1d-1000 wrong labels ResNet"]

# From tanh, plain initialisation and SGD at a constant rate; each listed method alone, and all of them.
_GROUND = Recipe(optimizer="sgd", learning_rate=0.1, epochs=50, batch=50, decay="constant")
_METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ReLU": ({}, {"activation": "relu"}),
    "BatchNorm": ({}, {"batch_norm": True}),
    "Xavier": ({}, {"initial": "xavier"}),
    "dropout": ({}, {"dropout": 0.3}),
    "rate decay": ({"decay": "cosine"}, {}),
    "Adam": ({"optimizer": "adam", "learning_rate": 3e-3}, {}),
}
_PLAIN = Cell("mnist1d", 1_000, "MLP", _GROUND, Look(activation="tanh", initial="plain"))
_ALL = _PLAIN
for _recipe, _look in _METHODS.values():
    _ALL = _ALL.changed(_recipe, _look)
LADDER: dict[str, Cell] = {
    "ground": _PLAIN,
    **{f"ground + {name}": _PLAIN.changed(*moved) for name, moved in _METHODS.items()},
    "ground + all": _ALL,
}


def cells() -> dict[str, Cell]:
    """All of them by name."""
    return {
        **PRIMARY,
        **SECONDARY,
        **DOMAINS,
        **NORMALISED,
        **DEPTHS,
        **LENGTHS,
        **{f"ladder: {name}": cell for name, cell in LADDER.items()},
    }
