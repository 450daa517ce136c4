"""Effects of the population study from its records: what the tables and the pictures have in common."""

from collections.abc import Sequence
from statistics import fmean

import pandas as pd

from population.arms import DEFAULT_SIGMA
from population.cells import PRIMARY
from population.inference import Effect, effect, overall
from population.tasks import SEEDS, Record, Store, Task

__all__ = [
    "ENDPOINTS",
    "GROUPS",
    "clear_cells",
    "curve",
    "differences",
    "mixed",
    "over_cells",
    "overfitting",
    "records",
    "score",
]

ENDPOINTS = {
    "f1": "macro-F1, points",
    "accuracy": "accuracy, points",
    "log_loss": "log-loss, nats",
    "scaled_log_loss": "log-loss after temperature scaling, nats",
    "calibration_error": "calibration error, points",
}
MARGIN = 0.3  # points of macro-F1: "as high or higher"
NOTHING = Effect(float("nan"), float("nan"), float("nan"), float("nan"), 0)  # of fewer than two cells
GROUPS: dict[str, list[str]] = {
    "the population, sigma 0.1, and its controls": [
        "closure",
        "unchanged",
        "sharded",
        "closure, sigma 0",
        "unchanged, sigma 0",
        "sharded, sigma 0",
    ],
    "sigma tuned, and other noise": [
        "closure, sigma tuned",
        "unchanged, sigma tuned",
        "SAM",
        "IVON",
        "averaged weights",
    ],
    "other regularization": ["label smoothing", "dropout", "weight decay"],
    "plain training with more": ["plain, 4 x the epochs", "plain, 4 x the batch", "plain, equal seconds"],
}


def records(store: Store, cell: str, arm: str, sigma: float | None = None) -> dict[int, Record]:
    """Of the seeds that settings were not chosen on."""
    found = {seed: store.records.get(Task(cell, arm, seed, sigma=sigma)) for seed in SEEDS}
    return {seed: record for seed, record in found.items() if record is not None}


def differences(
    store: Store,
    cell: str,
    arm: str,
    *,
    to: str = "plain",
    endpoint: str = "f1",
    sigma: float | None = None,
    other: str | None = None,
    other_sigma: float | None = None,
) -> dict[int, float]:
    """Test scores of an arm minus those of another, by seed, where both have them; `other` is the other's cell."""
    ours, theirs = records(store, cell, arm, sigma), records(store, other or cell, to, other_sigma)
    return {
        seed: ours[seed]["test"][endpoint] - theirs[seed]["test"][endpoint]
        for seed in ours
        if seed in theirs and endpoint in ours[seed]["test"]
    }


def curve(store: Store, cell: str, arm: str, endpoint: str = "f1") -> dict[float, Effect]:
    """Minus plain training, by sigma: that of the control is 0, and records without one have the default."""
    found = {0.0: differences(store, cell, f"{arm}, sigma 0", endpoint=endpoint)}
    found[DEFAULT_SIGMA] = differences(store, cell, arm, endpoint=endpoint)
    moved = {task.sigma for task in store.records if task.cell == cell and task.arm == arm and task.sigma is not None}
    for sigma in moved:
        found[sigma] = differences(store, cell, arm, endpoint=endpoint, sigma=sigma)
    return {sigma: effect(list(found[sigma].values())) for sigma in sorted(found) if len(found[sigma]) > 1}


def over_cells(store: Store, arm: str, *, to: str = "plain", endpoint: str = "f1") -> tuple[dict[str, Effect], Effect]:
    """The effect in every primary cell that has records, and of their means: each cell is one number."""
    found = {cell: list(differences(store, cell, arm, to=to, endpoint=endpoint).values()) for cell in PRIMARY}
    effects = {cell: effect(values) for cell, values in found.items() if len(values) > 1}
    means = [one.mean for one in effects.values()]
    return effects, effect(means) if len(means) > 1 else NOTHING


def mixed(store: Store, arm: str, *, to: str = "plain", endpoint: str = "f1") -> Effect:
    """The effect over the same cells in the mixed model; networks on the same rows share their split."""
    rows = [
        {
            "difference": value,
            "cell": name,
            "data": f"{cell.source}-{cell.rows}-{cell.wrong_labels}",
            "network": cell.network,
            "split": f"{cell.source}-{cell.rows}-{seed}",
        }
        for name, cell in PRIMARY.items()
        for seed, value in differences(store, name, arm, to=to, endpoint=endpoint).items()
    ]
    return overall(pd.DataFrame(rows)) if len({row["cell"] for row in rows}) > 1 else NOTHING


def score(store: Store, cell: str, arm: str = "plain", endpoint: str = "f1", part: str = "test") -> float:
    """Mean over seeds."""
    return fmean(record[part][endpoint] for record in records(store, cell, arm).values())


def overfitting(store: Store, cell: str) -> float:
    """Accuracy of plain training on its own rows minus that on test rows, in points."""
    return score(store, cell, "plain", "accuracy", "train") - score(store, cell, "plain", "accuracy")


def setting(store: Store, cell: str, arm: str) -> float | None:
    """What was chosen; None if there was nothing to choose, and while the choice is not complete."""
    try:
        return store.chosen(cell, arm)
    except RuntimeError:
        return None


def clear_cells(effects: Sequence[Effect], *, above: bool) -> int:
    """How many intervals lie on one side of zero."""
    return sum(one.low > 0 if above else one.high < 0 for one in effects)
