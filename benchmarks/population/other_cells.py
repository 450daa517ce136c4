"""Tables of the population study beside its main grid: moved cells, the ladder, domains, other populations."""

from statistics import fmean

from population.arms import ARMS, DEFAULT_SIGMA, LARGE_SIGMA, VARIANT_SIGMA, VARIANTS
from population.cells import (
    DEPTHS,
    DOMAINS,
    LADDER,
    LENGTHS,
    MENDED,
    NORMALISED,
    OVERFITTED,
    PAIRS,
    PRIMARY,
    SECONDARY,
    Cell,
)
from population.effects import ENDPOINTS, MARGIN, curve, differences, records, score
from population.inference import effect, non_inferior
from population.markdown import both_ends, section, shown, table
from population.networks import make
from population.tasks import CELLS, Store
from population.variants import MENDS

__all__ = ["depths_and_lengths", "domains", "ladder", "mends", "secondary", "variants"]

PREFIX = "variant: "
COLUMNS = 5  # of a table that is read at the width of a page
NAMES = {"r2": "R2, percent", "mse": "mean squared error", **ENDPOINTS}


def secondary(store: Store) -> str:
    """Descriptive: no tests."""
    arms = ("closure", "unchanged")
    rows = [
        [
            cell,
            f"{score(store, cell):.2f}",
            *[
                shown(list(differences(store, cell, arm, endpoint=endpoint).values()), endpoint)
                for endpoint in ("f1", "log_loss")
                for arm in arms
            ],
        ]
        for cell in SECONDARY
        if len(differences(store, cell, "closure")) > 1
    ]
    header = ["cell", "plain, F1", "closure, F1", "unchanged, F1", "closure, log-loss", "unchanged, log-loss"]
    text = "MNIST-1D with 1,000 rows, one thing moved at a time; the learning rate is the cell's own, six seeds."
    return section("Secondary cells", text, table(header, rows)) if rows else ""


def ladder(store: Store) -> str:
    """The population's effect on the ground beside those of common methods."""
    ground = "ladder: ground"
    if len(records(store, ground, "plain")) < 2:
        return ""
    population = differences(store, ground, "closure")
    rows = [["population, closure", both_ends(effect(list(population.values()))), "", "", ""]]
    for name in LADDER:
        cell = f"ladder: {name}"
        own = differences(store, cell, "plain", other=ground)
        lead = [population[seed] - own[seed] for seed in own if seed in population]
        if name == "ground" or len(lead) < 2:
            continue
        high = "yes" if non_inferior(lead, MARGIN) else "not shown"
        on_top = list(differences(store, cell, "closure").values())
        rows.append([name, both_ends(effect(list(own.values()))), both_ends(effect(lead)), high, shown(on_top)])
    header = ["macro-F1 over the ground", "own effect", "population's minus its own", "as high?", "population on top"]
    text = (
        f"Ground: tanh, plain initialisation, SGD at a constant rate ({score(store, ground):.2f} points of macro-F1). "
        f"As high: the interval of the population's effect minus the method's own lies above -{MARGIN} points."
    )
    return section("Beside widespread methods, each alone", text, table(header, rows))


def domains(store: Store) -> str:
    """What every arm gains, by cell."""
    tables: list[str] = []
    for cell in [name for name in (*DOMAINS, *NORMALISED, *OVERFITTED) if records(store, name, "plain")]:
        scored = next(iter(records(store, cell, "plain").values()))["test"]
        endpoints = [name for name in ("r2", "mse", "f1", "log_loss", "scaled_log_loss") if name in scored]
        rows = [["plain, its scores", *[f"{score(store, cell, endpoint=name):.4g}" for name in endpoints]]]
        tried = {(task.arm, task.sigma) for task in store.records if task.cell == cell}
        known = [one for one in tried if one[0] in ARMS and one[0] != "plain"]
        for arm, sigma in sorted(known, key=lambda one: (list(ARMS).index(one[0]), one[1] or 0.0)):
            found = [list(differences(store, cell, arm, endpoint=name, sigma=sigma).values()) for name in endpoints]
            name = arm if sigma is None else f"{arm}, sigma {sigma:g}"
            rows.append([name, *[shown(values, name) for values, name in zip(found, endpoints, strict=True)]])
        tables.append(table([f"{cell}, minus plain", *[NAMES[name] for name in endpoints]], rows))
    return (
        section("Other domains, BatchNorm at a constant rate, and trainings that over-fit", *tables) if tables else ""
    )


def depths_and_lengths(store: Store) -> str:
    """The closure over sigma where depth or length of the training are others, and in the primary cells beside them."""
    moved = {**DEPTHS, **LENGTHS}
    if not any(records(store, name, "plain") for name in moved):
        return ""
    near = [name for name in PRIMARY if name.startswith("mnist1d")]
    kinds = dict.fromkeys(cell.network for cell in moved.values())
    cells = [name for kind in kinds for name in (*near, *moved) if CELLS[name].network == kind]
    curves = {name: found for name in cells if len(found := curve(store, name, "closure")) > 2}
    sigmas = sorted({sigma for found in curves.values() for sigma in found if 0 < sigma < 0.5})
    rows = [
        [
            name,
            str(_matrices(CELLS[name])),
            str(CELLS[name].recipe.epochs),
            f"{score(store, name, endpoint='accuracy', part='train'):.1f}",
            f"{score(store, name):.2f}",
            *[shown(found.get(sigma), "f1") for sigma in sigmas],
        ]
        for name, found in curves.items()
    ]
    header = [
        "closure, macro-F1",
        "matrices",
        "epochs",
        "plain, training accuracy",
        "plain, F1",
        *[f"sigma {s:g}" for s in sigmas],
    ]
    text = (
        "Macro-F1 minus that of plain training; six seeds in cells that are not primary ones, whose learning rate was "
        "tuned as theirs was. Matrices: weight tensors of two axes or more."
    )
    return section("Depth and length of the training", text, table(header, rows), _longer(store))


def _longer(store: Store) -> str:
    """How much more the population does in the longer of two trainings that differ in nothing else."""
    found: dict[str, list[list[float]]] = {}
    for short, long in PAIRS:
        changes: list[list[float]] = []
        for sigma in (None, LARGE_SIGMA):
            before, after = (differences(store, one, "closure", sigma=sigma) for one in (short, long))
            changes.append([after[seed] - before[seed] for seed in after if seed in before])
        if any(changes):
            found[f"{long}, minus {CELLS[short].recipe.epochs} epochs"] = changes
    rows = [[name, *[shown(change) for change in changes]] for name, changes in found.items()]
    means = [[fmean(change) for change in changes if change] for changes in zip(*found.values(), strict=True)]
    rows.append(["mean", *[shown(values) for values in means]])
    header = ["effect in the longer minus that in the shorter training", "default", f"sigma {LARGE_SIGMA:g}"]
    return table(header, rows) if found else ""


def _matrices(cell: Cell) -> int:
    model = make(cell.network, cell.source, cell.look, 0)
    return sum(parameter.ndim >= 2 for parameter in model.parameters())


def variants(store: Store) -> str:
    """Each variant minus the library's population of the same way, at the same sigma."""
    sigma = None if VARIANT_SIGMA == DEFAULT_SIGMA else VARIANT_SIGMA

    def against_its_base(cell: str, name: str, endpoint: str) -> list[float]:
        base = "closure" if VARIANTS[name].options["population_size"] > 1 else "unchanged"
        return list(differences(store, cell, name, to=base, endpoint=endpoint, other_sigma=sigma).values())

    cells = [cell for cell in CELLS if any(records(store, cell, name) for name in VARIANTS)]
    names = [name for name in VARIANTS if any(records(store, cell, name) for cell in cells)]
    tables: list[str] = []
    for endpoint in ("f1", "log_loss"):
        rows = [[cell, *[shown(against_its_base(cell, name, endpoint), endpoint) for name in names]] for cell in cells]
        for part in range(0, len(names), COLUMNS):
            header = [
                NAMES[endpoint].split(",")[0],
                *[name.removeprefix(PREFIX) for name in names[part : part + COLUMNS]],
            ]
            tables.append(table(header, [[row[0], *row[1 + part : 1 + part + COLUMNS]] for row in rows]))
    text = (
        f"Each minus the library's population in the same way and at the same sigma, {VARIANT_SIGMA:g}: the unchanged "
        "loop, and for loss-weighted members the closure."
    )
    return section("Other populations", text, *tables) if tables else ""


def mends(store: Store) -> str:
    """The library's population and what might mend it at a sigma that does harm, minus plain training."""
    kept = f"{PREFIX}norms kept"
    arms = [("unchanged", LARGE_SIGMA), *((f"{PREFIX}{name}", LARGE_SIGMA) for name in sorted(MENDS)), (kept, 0.0)]
    cells = [cell for cell in MENDED if records(store, cell, kept, LARGE_SIGMA)]

    def minus_plain(cell: str, arm: str, sigma: float, endpoint: str) -> str:
        return shown(list(differences(store, cell, arm, endpoint=endpoint, sigma=sigma).values()), endpoint)

    names = [arm.removeprefix(PREFIX) + ("" if sigma else ", sigma 0") for arm, sigma in arms]
    tables = [
        table(
            [f"{NAMES[endpoint].split(',')[0]}, minus plain", *names],
            [[cell, *[minus_plain(cell, *arm, endpoint) for arm in arms]] for cell in cells],
        )
        for endpoint in ("f1", "log_loss")
    ]
    text = f"The unchanged loop at sigma {LARGE_SIGMA:g}, and what may keep weights before BatchNorm from growing."
    return section("BatchNorm and a larger sigma", text, *tables) if cells else ""
