"""What the arms of the population study cost: seconds of a training, and of all that it takes to get there."""

from collections import defaultdict
from statistics import fmean, geometric_mean

from population.arms import ARMS, BORROWS_RATE
from population.cells import PRIMARY
from population.effects import records
from population.markdown import section, table
from population.tasks import Store

__all__ = ["costs"]


def costs(store: Store) -> str:
    """Seconds of every arm as multiples of plain training's."""
    cells = [cell for cell in PRIMARY if records(store, cell, "plain")]
    if not cells:
        return ""
    spent: defaultdict[tuple[str, str], float] = defaultdict(float)
    for task, record in store.records.items():
        if task.setting is not None:
            spent[task.cell, task.arm] += record["seconds"]

    def training(cell: str, arm: str) -> float:
        return fmean(record["seconds"] for record in records(store, cell, arm).values())

    def altogether(cell: str, arm: str) -> float:
        return training(cell, arm) + sum(spent[cell, name] for name in {arm, BORROWS_RATE.get(arm, _lender(arm))})

    rows: list[list[str]] = []
    for arm in ARMS:
        own = [cell for cell in cells if records(store, cell, arm)]
        if own:
            ratios = [training(cell, arm) / training(cell, "plain") for cell in own]
            totals = [altogether(cell, arm) / altogether(cell, "plain") for cell in own]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            seconds = sum(training(cell, arm) for cell in own)
            rows.append(
                [arm, f"{geometric_mean(ratios):.2f}", spread, f"{geometric_mean(totals):.2f}", f"{seconds:.1f}"]
            )
    header = ["seconds, as multiples of plain's", "a training", "over cells", "with its tuning", "all cells, seconds"]
    text = (
        "Seconds of one thread: a training, geometric mean over the primary cells, its range, and the same with all "
        "the trainings that chose the arm's setting and the learning rate that it took over (plain training's too "
        "count the choice of its rate). The last column is the sum over the cells of one training each, without tuning."
    )
    return section("Costs", text, table(header, rows))


def _lender(arm: str) -> str:
    """Whose tuning chose the learning rate: plain training's, or the arm's own."""
    knob = ARMS[arm].knob
    return arm if knob is not None and knob[0] == "rate" else "plain"
