"""Arms of the population study: what is done to a cell's training, and which of its settings is tuned."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from population.cells import Cell
from population.variants import CHANGES

__all__ = [
    "ARMS",
    "BORROWS_RATE",
    "DEFAULT_SIGMA",
    "LARGE_SIGMA",
    "MEMBERS",
    "VARIANTS",
    "VARIANT_SIGMA",
    "Arm",
    "prepared",
]

MEMBERS = 4
DEFAULT_SIGMA = 0.1
VARIANT_SIGMA = 0.1
LARGE_SIGMA = 0.2  # does harm to residual networks with batch normalisation in the unchanged loop
RATES = (0.33, 1.0, 3.3, 10.0)  # factors on the cell's learning rate


@dataclass(frozen=True)
class Arm:
    """A way to train, with one knob at most.

    Attributes
    ----------
    way : {"plain", "closure", "unchanged", "sharded", "sam", "ivon", "variant"}
        How a step is made, see `population.training`.
    options : dict
        Of that way: those of `PopulationGradient`, rho of SAM, the rate of IVON, the decay of the average of weights.
    recipe, look : dict
        What changes in the cell.
    epochs, batch : int
        Factors on those of the cell: budgets in passes.
    knob : (str, str) or None
        What is tuned: ("options" | "recipe" | "look" | "rate", name).
    values : tuple of float
        The settings that are tried; for "rate" they are factors on the cell's learning rate.
    """

    way: str = "plain"
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    look: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 1
    batch: int = 1
    knob: tuple[str, str] | None = None
    values: tuple[float, ...] = ()

    def at(self, setting: float | None) -> "Arm":
        """With its knob at a setting; "rate" is for `prepared`."""
        if setting is None or self.knob is None or self.knob[0] == "rate":
            return self
        where, name = self.knob
        return replace(self, **{where: {**getattr(self, where), name: setting}})

    def with_sigma(self, sigma: float) -> "Arm":
        """With another sigma."""
        return replace(self, options={**self.options, "sigma": sigma})


def _population(way: str, sigma: float, **arm: Any) -> Arm:
    return Arm(way, {"population_size": MEMBERS, "sigma": sigma}, **arm)


SIGMAS = (0.03, 0.1, 0.3, 0.5)
_RATE = ("rate", "learning_rate")
ARMS: dict[str, Arm] = {
    "plain": Arm(knob=_RATE, values=RATES),
    "closure": _population("closure", DEFAULT_SIGMA),
    "closure, sigma 0": _population("closure", 0.0),
    "closure, sigma tuned": _population("closure", DEFAULT_SIGMA, knob=("options", "sigma"), values=SIGMAS),
    "unchanged": _population("unchanged", DEFAULT_SIGMA),
    "unchanged, sigma 0": _population("unchanged", 0.0),
    "unchanged, sigma tuned": _population("unchanged", DEFAULT_SIGMA, knob=("options", "sigma"), values=SIGMAS),
    "sharded": _population("sharded", DEFAULT_SIGMA),
    "sharded, sigma 0": _population("sharded", 0.0),
    "SAM": Arm("sam", knob=("options", "rho"), values=(0.02, 0.05, 0.1, 0.2)),
    "IVON": Arm("ivon", knob=("options", "rate"), values=(0.03, 0.1, 0.3, 1.0)),
    "averaged weights": Arm(knob=("options", "decay"), values=(0.9, 0.98, 0.99, 0.995)),
    "label smoothing": Arm(knob=("recipe", "label_smoothing"), values=(0.05, 0.1, 0.2, 0.3)),
    "dropout": Arm(knob=("look", "dropout"), values=(0.1, 0.2, 0.3, 0.5)),
    "weight decay": Arm(knob=("recipe", "weight_decay"), values=(0.03, 0.1, 0.3, 1.0)),
    "plain, 4 x the epochs": Arm(epochs=MEMBERS, knob=_RATE, values=RATES),
    "plain, 4 x the batch": Arm(batch=MEMBERS, epochs=MEMBERS, knob=_RATE, values=RATES),
    "plain, equal seconds": Arm(),
}
# Each is compared with the arm of its way at the same sigma: the unchanged loop, where one draw of noise is all there
# is, but for the one that needs several members.
VARIANTS: dict[str, Arm] = {
    f"variant: {name}": Arm(
        "variant",
        {"population_size": MEMBERS if change.weighted else 1, "sigma": VARIANT_SIGMA, "change": name},
    )
    for name, change in CHANGES.items()
}
# Settings that an arm takes over: the learning rate of plain training unless another arm is named here.
BORROWS_RATE = {"plain, equal seconds": "plain, 4 x the epochs"}


def prepared(cell: Cell, arm: Arm, *, rate: float, stretch: float = 1.0) -> Cell:
    """The cell as an arm trains it.

    Parameters
    ----------
    cell : Cell
    arm : Arm
        With its setting.
    rate : float
        Factor on the learning rate.
    stretch : float
        One more factor on the epochs.
    """
    recipe = cell.recipe
    batch = min(arm.batch * recipe.batch, cell.rows)
    changed = cell.changed(
        {
            "learning_rate": rate * recipe.learning_rate,
            "batch": batch,
            "epochs": max(1, round(stretch * arm.epochs * recipe.epochs)),
        }
    )
    return changed.changed(arm.recipe, arm.look)
