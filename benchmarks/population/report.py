"""Tables of the population study, from the records that there are, as Markdown."""

from collections.abc import Iterable, Sequence
from statistics import fmean

import pandas as pd

from population.arms import ARMS
from population.cells import CURVES, LADDER, PRIMARY, SECONDARY
from population.inference import Effect, effect, holm, non_inferior, overall
from population.tasks import CELLS, SEEDS, Record, Store, Task

__all__ = ["differences", "report"]

MARGIN = 0.3  # points of macro-F1: "as high or higher"
ENDPOINTS = {
    "f1": "macro-F1, points",
    "accuracy": "accuracy, points",
    "log_loss": "log-loss, nats",
    "scaled_log_loss": "log-loss after temperature scaling, nats",
    "calibration_error": "calibration error, points",
}


def records(store: Store, cell: str, arm: str, sigma: float | None = None) -> dict[int, Record]:
    """Of the seeds that settings were not chosen on."""
    found = {seed: store.records.get(Task(cell, arm, seed, sigma=sigma)) for seed in SEEDS}
    return {seed: record for seed, record in found.items() if record is not None}


def differences(
    store: Store, cell: str, arm: str, *, to: str = "plain", endpoint: str = "f1", sigma: float | None = None
) -> list[float]:
    """Test scores of an arm minus those of another, over the seeds that both have."""
    ours, theirs = records(store, cell, arm, sigma), records(store, cell, to)
    return [ours[seed]["test"][endpoint] - theirs[seed]["test"][endpoint] for seed in ours if seed in theirs]


def report(store: Store) -> str:
    """All tables of which there is something to show."""
    parts = [
        _primary(store),
        *[_endpoint(store, endpoint) for endpoint in ENDPOINTS],
        _costs(store),
        _settings(store),
        _curves(store),
        _secondary(store),
        _ladder(store),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _primary(store: Store) -> str:
    """The primary endpoint: the closure with its default minus plain training."""
    found = {cell: values for cell in PRIMARY if len(values := differences(store, cell, "closure")) > 1}
    if not found:
        return ""
    effects = {cell: effect(values) for cell, values in found.items()}
    corrected = holm([one.p for one in effects.values()])
    rows = [
        [cell, f"{_plain(store, cell):.2f}", str(one), f"{one.p:.3f}", f"{p:.3f}", str(one.pairs)]
        for (cell, one), p in zip(effects.items(), corrected, strict=True)
    ]
    if len(found) == len(PRIMARY):
        data = pd.DataFrame(
            [
                {"cell": cell, "source": CELLS[cell].source, "network": CELLS[cell].network, "difference": value}
                for cell, values in found.items()
                for value in values
            ]
        )
        every = overall(data)
        rows.append(["all, mixed model", "", str(every), f"{every.p:.3f}", "", str(every.pairs)])
    header = ["macro-F1, points", "plain", "closure, sigma 0.1, minus plain", "p", "p, Holm", "seeds"]
    return _table(header, rows)


def _plain(store: Store, cell: str) -> float:
    return fmean(record["test"]["f1"] for record in records(store, cell, "plain").values())


def _endpoint(store: Store, endpoint: str) -> str:
    """Every arm minus plain training, with its interval."""
    cells = [cell for cell in PRIMARY if len(differences(store, cell, "closure")) > 1]
    rows = [
        [arm, *[_shown(differences(store, cell, arm, endpoint=endpoint)) for cell in cells]]
        for arm in ARMS
        if arm != "plain" and cells
    ]
    return _table([f"{ENDPOINTS[endpoint]}, minus plain", *cells], rows) if rows else ""


def _costs(store: Store) -> str:
    cells = [cell for cell in PRIMARY if records(store, cell, "plain")]
    rows: list[list[str]] = []
    for arm in ARMS:
        row = [arm]
        for cell in cells:
            seconds = [record["seconds"] for record in records(store, cell, arm).values()]
            spent = sum(
                record["seconds"]
                for task, record in store.records.items()
                if (task.cell, task.arm) == (cell, arm) and task.setting is not None
            )
            row.append(f"{fmean(seconds):.2f}" + (f" (+{spent:.0f})" if spent else "") if seconds else "")
        rows.append(row)
    return _table(["seconds of a training (of all of its tuning)", *cells], rows) if cells else ""


def _settings(store: Store) -> str:
    cells = [cell for cell in PRIMARY if records(store, cell, "plain")]
    tuned = [arm for arm in ARMS if ARMS[arm].knob is not None]
    rows = [[arm, *[_number(store.chosen(cell, arm)) for cell in cells]] for arm in tuned]
    return _table(["settings that were chosen", *cells], rows) if cells else ""


def _curves(store: Store) -> str:
    sigmas = sorted({task.sigma for task in store.records if task.sigma is not None})
    rows = [
        [cell, *[_shown(differences(store, cell, "closure", sigma=sigma)) for sigma in sigmas]]
        for cell in CURVES
        if any(differences(store, cell, "closure", sigma=sigma) for sigma in sigmas)
    ]
    return _table(["macro-F1 minus plain", *[f"sigma {sigma}" for sigma in sigmas]], rows) if rows else ""


def _secondary(store: Store) -> str:
    rows = [
        [cell, f"{_plain(store, cell):.2f}", *[_shown(differences(store, cell, a)) for a in ("closure", "unchanged")]]
        for cell in SECONDARY
        if len(differences(store, cell, "closure")) > 1
    ]
    return _table(["macro-F1, descriptive", "plain", "closure", "unchanged loop"], rows) if rows else ""


def _ladder(store: Store) -> str:
    ground = "ladder: ground"
    if len(records(store, ground, "plain")) < 2:
        return ""
    base = records(store, ground, "plain")
    population = differences(store, ground, "closure")
    rows = [["population, closure", str(effect(population)), "", ""]]
    for name in LADDER:
        cell = f"ladder: {name}"
        theirs = records(store, cell, "plain")
        seeds = [seed for seed in base if seed in theirs]
        if name == "ground" or len(seeds) < 2:
            continue
        own = [theirs[seed]["test"]["f1"] - base[seed]["test"]["f1"] for seed in seeds]
        lead = [ours - other for ours, other in zip(population, own, strict=False)]
        verdict = f"{effect(lead)}, {'yes' if non_inferior(lead, MARGIN) else 'not shown'}"
        rows.append([name, str(effect(own)), verdict, _shown(differences(store, cell, "closure"))])
    header = ["macro-F1 over the ground", "own effect", "population's minus its own; as high?", "population on top"]
    return _table(header, rows)


def _shown(values: Sequence[float]) -> str:
    return _text(effect(values)) if len(values) > 1 else ""


def _text(found: Effect) -> str:
    text = str(found)
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
