"""How fast a step should be, and whether it is: one CPU thread, SGD with momentum, eight members, noise included."""

from collections.abc import Mapping
from dataclasses import dataclass

from models import MODELS
from population_ways import MEMBERS

__all__ = ["CHOSEN", "TARGETS", "Target", "verdicts"]

CHOSEN = "path that auto takes"  # its own row: two timings of the same path may differ by more than the limit

Ratios = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Target:
    """At most so many plain steps.

    Attributes
    ----------
    column, row : str
        Where in the tables.
    limit : float
        For the ratio, divided by `parts`; or divided by the smallest ratio of the rows `against`. In seconds for
        start-up.
    """

    column: str
    row: str
    limit: float
    parts: int = 1
    against: tuple[str, ...] = ()

    def measured(self, ratios: Ratios) -> float | None:
        """None if it was not measured."""
        column = ratios.get(self.column, {})
        if self.row not in column or any(row not in column for row in self.against):
            return None
        unit = min(column[row] for row in self.against) if self.against else 1.0
        return column[self.row] / self.parts / unit

    def described(self) -> str:
        """In words."""
        return (
            self.row
            + (f", over the best of {' and '.join(self.against)}" if self.against else "")
            + (", per member" if self.parts > 1 else "")
        )


SMALL, CNN, TRANSFORMER, WIDE = MODELS
TARGETS = (
    Target(SMALL, "auto, whole", 4.0),
    Target(SMALL, "auto, sharded", 2.5),
    Target(CNN, "auto, whole", 8.4),
    Target(CNN, "auto, sharded", 1.6),
    Target(TRANSFORMER, "auto, whole", 6.3),
    Target(TRANSFORMER, "auto, sharded", 1.3),
    Target(WIDE, "auto, whole", 9.2),
    Target(WIDE, "auto, sharded", 4.8),
    Target(CNN, "one member, unchanged loop", 1.10),
    Target(TRANSFORMER, "one member, unchanged loop", 1.10),
    Target(WIDE, "one member, unchanged loop", 1.5),
    *(Target(model, "noise alone: a closure that computes nothing", 0.1, parts=MEMBERS) for model in MODELS),
    *(
        Target(model, f"{CHOSEN}, {where}", 1.10, against=(f"loop, {where}", f"vmap, {where}"))
        for model in MODELS
        for where in ("whole", "sharded")
    ),
    *(Target(f"D = {outputs}", "matching, one VJP", 1.9) for outputs in (1, 10, 100)),
    Target("D = 1", "matching, full Jacobian", 1.9),
    Target("D = 10", "matching, full Jacobian", 7.5),
    Target("seconds", "import gradwise after numpy and scikit-learn", 0.3),
    Target("seconds", "import gradwise.torch after torch", 0.2),
)


def verdicts(ratios: Ratios) -> list[list[str]]:
    """Rows of: where, what, target, measured, whether it is met.

    What "auto" misses and another path would meet says so.
    """
    rows: list[list[str]] = []
    for target in TARGETS:
        value = target.measured(ratios)
        unit = " s" if target.column == "seconds" else "x"
        if value is None:
            verdict, text = "not measured", ""
        else:
            verdict, text = "met" if value <= target.limit else "missed", f"{value:.3g}{unit}"
            if verdict == "missed" and not target.against:
                verdict += _alternative(target, ratios[target.column])
        rows.append([target.column, target.described(), f"<= {target.limit:g}{unit}", text, verdict])
    return rows


def _alternative(target: Target, column: Mapping[str, float]) -> str:
    path, comma, where = target.row.partition(", ")
    others = {row: value for row, value in column.items() if row.endswith(comma + where)}
    others = {row: others[row] for row in others if row.split(",")[0] in ("loop", "vmap", "compile")}
    if path != "auto" or not others:
        return ""
    best = min(others, key=lambda row: others[row])
    return f"; {best.split(',')[0]}: {others[best]:.3g}x"
