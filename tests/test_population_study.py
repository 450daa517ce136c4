"""The study of the population gradient: its data, its arms, its choices and its statistics."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from population import inference, scores, study
from population.arms import ARMS, prepared
from population.cells import PRIMARY, SECONDARY, cells
from population.data import REGRESSION, SOURCES, split
from population.networks import Look, make
from population.tasks import TUNING_SEEDS, Store, Task, measure
from population.training import train
from scipy.special import log_softmax
from sklearn.metrics import log_loss

CELL = "digits-200 CNN"


def test_rows_of_a_seed_are_disjoint_and_labels_wrong_where_they_should_be() -> None:
    parts = split("digits", 200, 0.2, 3)
    rows = [{tuple(x.tolist()) for x in part[0]} for part in (parts.train, parts.validation, parts.test)]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]
    clean = split("digits", 200, 0.0, 3)
    assert torch.equal(parts.train[0], clean.train[0])
    assert int((parts.train[1] != clean.train[1]).sum()) == 40
    assert int((parts.validation[1] != clean.validation[1]).sum()) == 80
    assert torch.equal(parts.test[1], clean.test[1])
    assert not torch.equal(clean.train[0], split("digits", 200, 0.0, 4).train[0])


def test_every_cell_makes_a_network_for_its_data() -> None:
    for cell in cells().values():
        x, _ = SOURCES[cell.source]()
        outputs = 1 if cell.source in REGRESSION else 10
        assert make(cell.network, cell.source, cell.look, 0)(torch.tensor(x[:6])).shape == (6, outputs)
    assert len(PRIMARY) == 12
    assert len(SECONDARY) == 24


@pytest.mark.parametrize(("network", "more", "matrices"), [("MLP", 3, 3), ("CNN", 3, 3), ("transformer", -1, -4)])
def test_layers_are_added(network: str, more: int, matrices: int) -> None:
    few, many = (
        sum(parameter.ndim >= 2 for parameter in make(network, "mnist1d", Look(more_layers=layers), 0).parameters())
        for layers in (0, more)
    )
    assert many - few == matrices


@pytest.mark.parametrize("way", ["closure, sigma 0", "unchanged, sigma 0"])
@pytest.mark.parametrize("network", ["CNN", "ResNet"])
def test_sigma_zero_is_plain_training(way: str, network: str) -> None:
    cell = PRIMARY[f"digits-200 {network}"].changed({"epochs": 2})
    plain, control = (train(cell, ARMS[name], 0).model.state_dict() for name in ("plain", way))
    for name, value in plain.items():
        # 4 members of the same gradient: exact; their BatchNorm statistics: to rounding.
        torch.testing.assert_close(control[name], value, rtol=1e-5, atol=1e-6)


def test_arms_of_a_seed_share_weights_and_batches_and_differ_otherwise() -> None:
    cell = PRIMARY[CELL].changed({"epochs": 1})
    found = {}
    for name in ("plain", "closure", "unchanged", "sharded", "SAM", "IVON", "averaged weights"):
        arm = ARMS[name].at(ARMS[name].values[0] if ARMS[name].values else None)
        found[name] = torch.cat([p.detach().flatten() for p in train(cell, arm, 0).model.parameters()])
        again = torch.cat([p.detach().flatten() for p in train(cell, arm, 0).model.parameters()])
        assert torch.equal(found[name], again)
    assert len({float(weights.sum()) for weights in found.values()}) == len(found)


def test_budgets() -> None:
    cell = PRIMARY["mnist1d-1000 MLP"]
    plain = prepared(cell, ARMS["plain"], rate=1.0)
    longer = prepared(cell, ARMS["plain, 4 x the epochs"], rate=1.0)
    wider = prepared(cell, ARMS["plain, 4 x the batch"], rate=1.0)
    assert longer.steps == 4 * plain.steps  # 4 members see as many rows as 4 steps
    assert wider.steps == plain.steps
    assert wider.recipe.batch == 4 * plain.recipe.batch
    assert prepared(cell, ARMS["plain, equal seconds"], rate=1.0, stretch=4.5).recipe.epochs == 225
    assert prepared(cell, ARMS["plain"], rate=3.3).recipe.learning_rate == pytest.approx(
        3.3 * cell.recipe.learning_rate
    )


def test_settings_are_chosen_on_validation_rows_and_a_torn_line_is_no_record(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    assert store.chosen(CELL, "dropout") is None
    for setting, value in enumerate([70.0, 74.0, 73.0, 71.0]):
        for seed in TUNING_SEEDS:
            task = Task(CELL, "dropout", seed, setting)
            short = prepared(PRIMARY[CELL].changed({"epochs": 1}), ARMS["dropout"].at(0.1), rate=1.0)
            record = measure(task, short, ARMS["dropout"]) if setting == seed - 100 == 0 else {"task": vars(task)}
            assert "test" not in record  # nobody can look at what is not there
            store.add({"version": 1, **record, "validation": {"f1": value + seed % 3 - 1}})
    with store.path.open("a") as file:
        file.write(json.dumps({"task": {"cell": CELL}})[:-4])
    again = Store(store.path)
    assert again.chosen(CELL, "dropout") == ARMS["dropout"].values[1]
    cell, _ = again.configuration(Task(CELL, "dropout", 0))
    assert cell.look.dropout == ARMS["dropout"].values[1]
    del again.records[Task(CELL, "dropout", 101, 2)]
    with pytest.raises(RuntimeError, match="not complete"):
        again.chosen(CELL, "dropout")


def test_scores_are_those_of_scikit_learn_and_scaling_finds_the_temperature() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4_000, 10))
    labels = np.array([rng.choice(10, p=row) for row in np.exp(log_softmax(logits, axis=1))])
    assert scores.temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)  # 4,000 draws
    got = scores.scores(logits, labels, scaled_by=2.0)
    assert got["log_loss"] == pytest.approx(log_loss(labels, np.exp(log_softmax(logits, axis=1))))
    assert got["scaled_log_loss"] == pytest.approx(log_loss(labels, np.exp(log_softmax(logits / 2, axis=1))))
    assert got["calibration_error"] < 4  # labels were drawn with these very probabilities
    assert scores.scores(5 * logits, labels, scaled_by=1.0)["calibration_error"] > 30


def test_inference() -> None:
    assert inference.effect([1.0, 1.0, 1.0]) == inference.Effect(1.0, 1.0, 1.0, 0.0, 3)
    found = inference.effect([0.1, 0.5, 0.3, -0.1])
    assert found.low < 0.2 < found.high
    assert found.p > 0.05
    assert inference.non_inferior([0.1, 0.2, -0.1, 0.0], 0.3)
    assert not inference.non_inferior([-0.5, -0.4, -0.6, -0.5], 0.3)
    np.testing.assert_allclose(inference.holm([0.01, 0.04, 0.5]), [0.03, 0.08, 0.5])


def test_the_mixed_model_is_wider_than_independent_rows_where_cells_differ() -> None:
    rng = np.random.default_rng(1)
    rows = [
        {"source": source, "network": network, "cell": source + network, "difference": 0.5 + shift + rng.normal()}
        for source, a in (("a", 1.0), ("b", -1.0), ("c", 0.0))
        for network, b in (("x", 0.3), ("y", -0.3))
        for shift in [a + b]
        for _ in range(20)
    ]
    data = pd.DataFrame(rows)
    overall, pooled = inference.overall(data), inference.effect(data["difference"].tolist())
    assert overall.mean == pytest.approx(pooled.mean, abs=1e-3)  # balanced
    assert overall.high - overall.low > 1.5 * (pooled.high - pooled.low)


def test_quick_run_makes_a_record_of_every_arm(tmp_path: Path) -> None:
    store = Store(tmp_path / "quick.jsonl")
    study.quick(store)
    assert {task.arm for task in store.records} == set(ARMS)
    assert len(Store(store.path).records) == 2 * len(ARMS)
    assert all(np.isfinite(record["test"]["log_loss"]) for record in store.records.values())
