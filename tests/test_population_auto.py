"""Rules for sigma: probes of real trainings, and choices where the right one is known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from population import auto
from population.arms import ARMS
from population.auto_probes import DEFAULT, GRID, PROBES, decided, losses, neighbours
from population.auto_rules import RULES, Pair, fitted
from population.auto_training import Run, parted
from population.cells import PRIMARY, Cell
from population.data import split
from population.tasks import Store
from population.training import train

CELL = "digits-200 MLP"


def short(name: str = CELL) -> Cell:
    return PRIMARY[name].changed({"epochs": 3})


def weights(run: Run) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in run.model.state_dict().values()])


@pytest.mark.parametrize("name", [CELL, "digits-200 ResNet"])
def test_a_run_is_the_study_s_own_training_and_a_fork_goes_on_as_the_run_does(name: str) -> None:
    cell = short(name)
    run = Run(cell, split(cell.source, cell.rows, 0.0, 0).train, 0, DEFAULT).until(11)
    fork, other = run.fork(DEFAULT), run.fork(0.2)
    run.until(cell.steps)
    for key, value in train(cell, ARMS["unchanged"], 0).model.state_dict().items():
        assert torch.equal(run.model.state_dict()[key], value)
    assert torch.equal(weights(fork.until(cell.steps)), weights(run))
    assert not torch.equal(weights(other.until(cell.steps)), weights(run))


def test_held_out_rows_are_training_rows_that_no_run_sees() -> None:
    cell = short()
    fit, held = parted(cell, 3)
    rows = [{tuple(x.tolist()) for x in part[0]} for part in (fit, held, split(cell.source, cell.rows, 0.0, 3).train)]
    assert len(fit[1]) == 4 * len(held[1]) == 160
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == rows[2]
    assert Run(cell, fit, 3, DEFAULT).cell.steps == 24  # its schedule ends with it


def test_candidates_are_half_and_double_and_always_zero() -> None:
    assert neighbours(0.1) == [0.0, 0.05, 0.1, 0.2]
    assert neighbours(0.05) == neighbours(0.0) == [0.0, 0.05, 0.1]
    assert neighbours(0.8) == [0.0, 0.4, 0.8]


def test_forks_move_only_on_what_is_significant() -> None:
    rng = np.random.default_rng(0)
    rows = rng.gamma(1.0, size=200)  # losses differ more between rows than between sigmas: the test is paired
    better, worse = rows - 0.02 + 0.05 * rng.normal(size=200), rows + 0.02 + 0.05 * rng.normal(size=200)
    assert decided({0.0: better, 0.05: worse, 0.1: rows, 0.2: worse}, 0.1)[0] == 0.0
    assert decided({0.0: worse, 0.05: worse, 0.1: rows, 0.2: better}, 0.1)[0] == 0.2
    unclear = rows - 0.01 + rng.normal(size=200)
    assert unclear.mean() < rows.mean()
    sigma, t = decided({0.0: unclear, 0.1: rows, 0.2: worse}, 0.1)
    assert sigma == 0.1
    assert -2 < t[0.0] < 0
    assert t[0.2] > 2


def test_softness_alone_earns_nothing_after_scaling() -> None:
    logits = np.random.default_rng(1).normal(size=(300, 10))
    labels = torch.tensor(logits.argmax(1))
    labels[:60] = 0
    raw, scaled = ([losses(k * logits, labels, scaled=s).mean() for k in (1, 5)] for s in (False, True))
    assert abs(raw[0] - raw[1]) > 0.1
    assert scaled[0] == pytest.approx(scaled[1], abs=1e-4)  # the minimiser's tolerance


# -- rules on made-up probes -------------------------------------------------------------------------------------------


def made_up(best: float, overfit: float) -> dict[str, Any]:
    """Probes of a cell whose best sigma is known, and which says so."""
    worth = [{"train": {"log_loss": 0.0, "accuracy": 100.0}, "cost": 0.8} for _ in range(3)]
    held = {"log_loss": overfit, "accuracy": 100 - 20 * overfit}
    members = {"agreement": [1 - s * 0.2 / max(best, 0.04) for s in GRID], "rise": [s / max(best, 0.04) for s in GRID]}
    return {
        "forks": {"sigma": best, "cost": 1.0, "rate": 0.1},
        "forks, scaled": {"sigma": best, "cost": 1.0, "rate": 0.1},
        "members": {"moments": [{**members, "cost": 0.4}, {**members, "cost": 0.8}], "rate": 0.1},
        "search": {"best": best, "worth": [{**one, "held_out": held} for one in worth], "rate": 0.1},
        "short search": {"best": best, "cautious": best, "worth": [{"cost": 0.2}] * 4, "rate": 0.1},
        "late forks": {"best": best, "shared": 0.4, "worth": [{"cost": 0.4}] * 3, "rate": 0.1},
    }


def value(sigma: float, best: float) -> float:
    """Test score: 3 points for every step of the grid away from the best."""
    return 90 - 3.0 * abs(GRID.index(sigma) - GRID.index(best))


KNOWN = {  # cells of two data sets and two networks: MLPs over-fit here, and want more
    "digits-200 MLP": 0.4,
    "digits-200 ResNet": 0.0,
    "mnist1d-1000 MLP": 0.4,
    "mnist1d-1000 ResNet": 0.0,
}


def known_pairs() -> list[Pair]:
    return [
        Pair(
            cell,
            PRIMARY[cell].network,
            seed,
            {sigma: value(sigma, best) + 0.01 * seed for sigma in GRID},
            best,
            made_up(best, overfit=2.0 if best else 0.2),
        )
        for cell, best in KNOWN.items()
        for seed in range(2)
    ]


@pytest.mark.parametrize("name", [name for name in RULES if name != "one sigma for all cells"])
def test_every_rule_finds_what_its_probes_say_on_cells_that_it_was_not_fitted_on(name: str) -> None:
    found = known_pairs()
    assert auto.choices(RULES[name], found, "data sets") == [KNOWN[pair.cell] for pair in found]


def test_a_rule_is_not_fitted_on_the_cells_that_it_is_judged_on() -> None:
    rule = RULES["one sigma for all cells"]
    found = known_pairs()
    assert fitted(rule, [pair for pair in found if pair.network == "MLP"]) == 0.4
    # What is best for the other network is worst here; leaving out data sets, both networks are seen.
    assert auto.choices(rule, found, "architectures") == [0.4 - KNOWN[pair.cell] for pair in found]
    lied = [
        replace(pair, test={s: 100.0 - pair.test[s] for s in GRID}) if "digits" in pair.cell else pair for pair in found
    ]
    gap = RULES["gap of accuracy"]
    assert auto.choices(gap, lied, "data sets")[:4] == [KNOWN[pair.cell] for pair in found[:4]]
    assert auto.choices(gap, lied, "data sets")[4:] != [KNOWN[pair.cell] for pair in found[4:]]


def test_the_verdict_takes_all_three() -> None:
    found = known_pairs()

    def verdict(name: str, chosen: list[float]) -> str:
        return auto.judged(name, RULES[name], found, chosen)[-1]

    right = [KNOWN[pair.cell] for pair in found]
    assert verdict("forks, log-loss", right) == "yes"
    assert verdict("grid search", right) == "no: 3"  # not cheaper than itself
    assert verdict("forks, log-loss", [DEFAULT] * len(found)) == "no: 1"
    assert verdict("forks, log-loss", [0.4] * len(found)) == "no: 1, 2"


def filled(path: Path, rate: float = 0.1) -> tuple[Store, dict[auto.Key, Any]]:
    store, probes = Store(path), {}
    for pair in known_pairs():
        for sigma in GRID:
            points = {"f1": pair.test[sigma]}
            task = vars(auto.fixed(pair.cell, pair.seed, sigma))
            store.add({"task": task, "version": 1, "rate": rate, "validation": points, "test": points})
        probes |= {(pair.cell, pair.seed, name): record for name, record in pair.probes.items()}
    return store, probes


def test_report_compares_with_the_best_sigma_of_other_seeds(tmp_path: Path) -> None:
    store, probes = filled(tmp_path / "records.jsonl")
    task = auto.fixed(CELL, 0, 0.8)
    store.records[task] = {**store.records[task], "validation": {"f1": 99.0}, "test": {"f1": 95.0}}
    best = {pair.seed: pair.best_fixed for pair in auto.pairs(store, probes) if pair.cell == CELL}
    assert best == {0: 0.4, 1: 0.8}  # each seed sees the other one only
    text = auto.report(store, probes)
    assert "8 pairs of 4 cells" in text
    assert "| grid search" in text
    assert not auto.report(Store(tmp_path / "none.jsonl"), probes)


def test_probes_at_another_learning_rate_are_refused(tmp_path: Path) -> None:
    store, probes = filled(tmp_path / "records.jsonl", rate=0.2)
    with pytest.raises(RuntimeError, match="another learning rate"):
        auto.pairs(store, probes)
    rounded, probes = filled(tmp_path / "published.jsonl", rate=0.100001)  # nearer than five digits
    assert len(auto.pairs(rounded, probes)) == 8


def test_probes_of_a_short_training(tmp_path: Path) -> None:
    found = {name: auto.probed(CELL, short(), 0, name) for name in PROBES}
    forks = found["forks"]
    assert [one["at"] for one in forks["path"]] == [0.15, 0.35, 0.55, 0.75]
    assert forks["path"][-1]["to"] == forks["sigma"] in GRID
    assert 0.8 < forks["cost"] < 2  # 0.8 trainings; forks of a step each are 4 % of so short a one
    assert [one["sigma"] for one in found["search"]["worth"]] == [0.0, 0.1, 0.4]
    assert found["search"]["worth"][0]["cost"] == pytest.approx(0.8 + 1 / 9)  # one pass forward of three epochs
    assert RULES["forks from half way to the end"].cost(found) == pytest.approx(4 * 0.4 + 3 / 9)
    for moment in found["members"]["moments"]:
        assert moment["agreement"][0] == 1
        assert moment["rise"][0] == 0
        assert 1 / 8 <= moment["agreement"][-1] < moment["agreement"][1] < 1
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found.values()) + '{"cell": "torn')
    again = {probe: record for (_, _, probe), record in auto.read(path).items()}
    assert again == found
    for name, rule in RULES.items():
        assert rule.choose(again, rule.parameters[0] if rule.parameters else None) in GRID
        assert rule.cost(again) > 0 or name == "one sigma for all cells"
