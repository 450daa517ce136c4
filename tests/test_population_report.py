"""The report of the population study: its numbers, its statistics, its figures, and the exact gradient."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from population import effects, exact_gradient, exact_report, inference, other_cells, plots, published, report
from population.arms import ARMS, VARIANT_SIGMA, VARIANTS
from population.cells import DEPTHS, DOMAINS, PRIMARY, SECONDARY
from population.networks import make
from population.tasks import CELLS, TUNING_SEEDS, Store, Task
from scipy import stats

CELL = "mnist1d-1000 MLP"
FRAMES = {"closure": 1.0, "unchanged": 0.5, "SAM": -2.0}  # effects


def filled(folder: Path, tasks: Iterable[tuple[Task, float]]) -> Store:
    """A store with records of these scores; losses are a hundredth of what is missing to 100 points."""
    store = Store(folder / "records.jsonl")
    lines: list[str] = []
    for task, value in tasks:
        scores = dict.fromkeys(effects.ENDPOINTS, value)
        scores.update(log_loss=(100 - value) / 100, scaled_log_loss=(100 - value) / 100)
        if CELLS[task.cell].endpoint == "r2":
            scores = {"r2": value, "mse": (100 - value) / 100}
        train = {**scores, "accuracy": value + 20}
        sigma = task.sigma if task.sigma is not None else {**ARMS, **VARIANTS}[task.arm].options.get("sigma")
        record = {"task": vars(task), "version": 1, "rate": 1 / 3, "seconds": 2.0, "steps": 7}
        record.update(options={} if sigma is None else {"sigma": sigma}, train=train, validation=scores)
        lines.append(json.dumps(record if task.seed in TUNING_SEEDS else {**record, "test": scores}))
    store.path.write_text("\n".join(lines) + "\n")
    return Store(store.path)


def trainings(cell: str, arm: str, shift: float, *, sigma: float | None = None) -> list[tuple[Task, float]]:
    """Four seeds; effects of two of them are a tenth above, of the others a tenth below the shift."""
    return [(Task(cell, arm, seed, sigma=sigma), 50.0 + seed + shift * (1 + 0.1 * (-1) ** seed)) for seed in range(4)]


def row(text: str, start: str, section: str = "") -> list[str]:
    """Cells of the first line of a table that starts so, from the section with this heading on."""
    after = text.split(f"## {section}", 1)[1] if section else text
    return [
        part.strip() for part in next(o for o in after.splitlines() if o.startswith(f"| {start} |")).split("|")[1:-1]
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Some of everything that the study measures."""
    tasks = [
        one
        for cell in PRIMARY
        for arm, shift in {"plain": 0.0, **FRAMES}.items()
        for one in trainings(cell, arm, shift)
    ]
    tasks += [(Task(CELL, "plain", seed, setting), 40.0 + setting) for seed in TUNING_SEEDS for setting in range(4)]
    for sigma, shift in {0.05: 0.3, 0.4: -7.0}.items():
        tasks += [one for way in ("closure", "unchanged") for one in trainings(CELL, way, shift, sigma=sigma)]
    tasks += [one for arm in ("plain", "closure") for one in trainings(next(iter(DEPTHS)), arm, FRAMES.get(arm, 0.0))]
    longer = "transformer, 60 epochs"
    tasks += [one for arm in ("plain", "closure") for one in trainings(longer, arm, 4 * FRAMES.get(arm, 0.0))]
    tasks += trainings(longer, "closure", 9.0, sigma=0.2) + trainings(
        "mnist1d-1000 transformer", "closure", 2.0, sigma=0.2
    )
    tasks += trainings(next(iter(DEPTHS)), "closure", 0.4, sigma=0.05)
    tasks += trainings(next(iter(DEPTHS)), "closure", 0.7, sigma=0.2)
    at = None if VARIANT_SIGMA == effects.DEFAULT_SIGMA else VARIANT_SIGMA
    tasks += trainings(CELL, "unchanged", 0.5, sigma=at) if at is not None else []
    tasks += trainings(CELL, "closure", 1.0, sigma=at) if at is not None else []
    for name, arm in VARIANTS.items():
        tasks += trainings(CELL, name, 2.0 if arm.options["population_size"] > 1 else 3.0)
    others = [*list(SECONDARY)[:3], *DOMAINS, "ladder: ground", "ladder: ground + ReLU"]
    for cell in others:
        tasks += [one for arm in ("plain", "closure") for one in trainings(cell, arm, FRAMES.get(arm, 0.0))]
    tasks = [(task, value + 5.0 * task.cell.endswith("ReLU")) for task, value in tasks]
    return filled(tmp_path_factory.mktemp("records"), tasks)


@pytest.fixture(scope="module")
def text(store: Store) -> str:
    """All tables."""
    return report.report(store)


def test_no_records_no_tables(tmp_path: Path) -> None:
    assert report.report(Store(tmp_path / "nothing.jsonl")) == "\n"
    assert plots.save(Store(tmp_path / "nothing.jsonl"), tmp_path) == []
    assert published.records_table(Store(tmp_path / "nothing.jsonl")).empty


def test_primary_endpoint_and_arms(text: str) -> None:
    half = stats.t.ppf(0.975, 3) * np.std([1.1, 0.9, 1.1, 0.9], ddof=1) / 2  # of the mean of four
    found = row(text, CELL, "Primary endpoint")
    assert found[1] == "51.50"
    assert found[2] == f"**+1.00 (+{1 - half:.2f} to +{1 + half:.2f})**"
    assert row(text, "all, mixed model", "Primary")[2].startswith("**+1.00")
    assert row(text, "SAM", "All arms")[1:3] == ["**-2.00 ± 0.00**", "**-2.00 ± 0.06**"]
    assert row(text, "SAM", "The population against")[1] == "**+3.00 ± 0.00**"
    assert row(text, "mnist1d-1000 GRU", "Macro-F1, points: every arm")[2] == f"**+0.50 ± {half / 2:.2f}**"
    assert row(text, CELL, "Log-loss, nats: every arm")[1] == f"**-0.010 ± {half / 100:.3f}**"


def test_primary_endpoint_is_corrected_for_the_cells(tmp_path: Path) -> None:
    differences = [0.5, 0.1, 0.4, 0.2]
    tasks = [(Task(cell, "plain", seed), 50.0) for cell in PRIMARY for seed in range(4)]
    tasks += [(Task(cell, "closure", seed), 50.0 + one) for cell in PRIMARY for seed, one in enumerate(differences)]
    tested: Any = stats.ttest_1samp(differences, 0)
    p = tested.pvalue
    found = row(report.report(filled(tmp_path, tasks)), CELL, "Primary endpoint")
    assert found[3:5] == [f"{p:.3f}", f"{12 * p:.3f}"]  # Holm's correction of twelve equal ones


def test_tables_beside_the_main_grid(text: str) -> None:
    assert row(text, "macro-F1, sigma", "Effect over sigma: unchanged")[1:] == ["0.05", "0.1", "0.4"]
    assert [one[:7] for one in row(text, CELL, "Effect over sigma: unchanged")[1:]] == ["**+0.30", "**+0.50", "**-7.00"]
    assert row(text, next(iter(SECONDARY)), "Secondary")[2].startswith("**+1.00")
    ladder = row(text, "ground + ReLU", "Beside widespread")
    assert [ladder[1][:7], ladder[2][:7], ladder[3]] == ["**+5.00", "**-4.00", "not shown"]
    depths = [row(text, cell, "Depth and length") for cell in (CELL, next(iter(DEPTHS)))]
    assert [one[1:5] for one in depths] == [["3", "50", "71.5", "51.50"], ["5", "50", "71.5", "51.50"]]
    assert [[part.strip("*")[:5] for part in one[5:]] for one in depths] == [
        ["+0.30", "+1.00", "", "-7.00"],
        ["+0.40", "+1.00", "+0.70", ""],
    ]
    change = row(text, "transformer, 60 epochs, minus 15 epochs")[1:]
    assert [one[:7] for one in change] == ["**+3.00", "**+7.00"]
    domains = text.split("## Other domains", 1)[1]
    assert "| regression MLP, minus plain | R2, percent |" in domains
    assert row(domains, "closure")[1].startswith("**+1.00")
    ordinary, weighted = "mirrored in time", "loss-weighted members"
    section = text.split("## Other populations", 1)[1]
    for name, expected in ((ordinary, "+2.50"), (weighted, "+1.00")):  # 3 - 0.5 and 2 - 1
        lines = section.splitlines()
        head = next(number for number, line in enumerate(lines) if f"| {name} |" in line)
        place = [part.strip() for part in lines[head].split("|")].index(name)
        assert expected in lines[head + 2].split("|")[place]


def test_variants_are_compared_at_their_own_sigma(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_cells, "VARIANT_SIGMA", 0.4)
    assert "+10.00" in row(other_cells.variants(store), CELL)[1]  # 3 + 7


def test_where_it_helps_is_ranked(tmp_path: Path) -> None:
    tasks: list[tuple[Task, float]] = []
    for cell in PRIMARY:
        tasks += [*trainings(cell, "plain", 0.0), *trainings(cell, "closure", 1.0 / CELLS[cell].rows)]
    found = row(report.report(filled(tmp_path, tasks)), "closure, primary cells", "Where it helps")
    assert found[1:3] == ["12", ""]  # over-fitting is that of all cells
    assert found[3] == "-1.00 (p 0.00)"


def test_over_fitting(store: Store) -> None:
    assert effects.overfitting(store, CELL) == pytest.approx(20.0)


def test_costs_and_settings(text: str) -> None:
    # Plain training: 12 of tuning and 1, all of 2 seconds; the closure takes its rate over and has the same.
    assert row(text, "closure", "Costs")[1:4] == ["1.00", "1.00 to 1.00", "1.00"]
    assert row(text, CELL, "Settings that were chosen")[1] == f"{ARMS['plain'].values[3]:g}"


def test_costs_count_the_tuning_of_the_arm_and_of_its_rate(tmp_path: Path) -> None:
    tasks = [(Task(CELL, arm, 0), 50.0) for arm in ("plain", "SAM", "plain, 4 x the epochs", "plain, equal seconds")]
    for arm in ("plain", "SAM", "plain, 4 x the epochs"):
        tasks += [(Task(CELL, arm, seed, setting), 40.0) for seed in TUNING_SEEDS for setting in range(4)]
    found = report.costs(filled(tmp_path, tasks))
    assert row(found, "SAM")[3] == f"{25 / 13:.2f}"  # the rate of plain training, its rho, a training
    assert row(found, "plain, 4 x the epochs")[3] == "1.00"  # has a rate of its own
    assert row(found, "plain, equal seconds")[3] == "1.00"  # which this one takes over


def test_records_are_exported_with_their_settings(store: Store, tmp_path: Path) -> None:
    probes = store.path.parent / "population_auto.jsonl"
    probes.write_text('{"version": 0, "probe": "of another version"}\n')
    report.write(store, tmp_path)
    again = Store(tmp_path / "again" / "population.jsonl")
    published.unpack(tmp_path, again)
    assert set(Store(again.path).records) == set(store.records)
    assert (again.path.parent / probes.name).read_text() == probes.read_text()
    table = pd.read_csv(tmp_path / published.FILE)
    assert len(table) == len(store.records)
    loaded = {Task(**record["task"]): record for record in published.load(tmp_path / published.FILE)}
    assert set(loaded) == set(store.records)
    for task, record in loaded.items():
        assert record["validation"] == pytest.approx(store.records[task]["validation"], rel=1e-4)
        assert record.get("test", {}) == pytest.approx(store.records[task].get("test", {}), rel=1e-4)
    tuned = table[(table["cell"] == CELL) & (table["arm"] == "plain")]
    assert sorted(set(tuned["setting"])) == sorted(ARMS["plain"].values)
    assert set(tuned[tuned["seed"] < 100]["setting"]) == {ARMS["plain"].values[3]}
    assert np.isnan(np.asarray(tuned[tuned["seed"] >= 100]["test_f1"])).all()
    assert set(table["rate"]) == {0.33333}
    assert {name.name for name in (tmp_path / "images").iterdir()} == {
        f"population_{name}.png" for name in ("effects", "arms", "sigma", "lengths", "where")
    }


def test_figures_show_the_effects(store: Store) -> None:
    figure = plots.draw_effects(store)
    assert figure is not None
    dots = {round(float(np.asarray(o.get_xdata())[0]), 9) for o in figure.axes[0].lines if o.get_marker() == "o"}
    assert dots == {1.0, 0.5}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(PRIMARY)
    plots.plt.close(figure)


def test_lengths_of_a_training_are_drawn_in_pairs(store: Store) -> None:
    figure = plots.draw_lengths(store)
    assert figure is not None
    axis = figure.axes[0]
    assert axis.get_title() == "mnist1d-1000 transformer"
    shown = {
        container.get_label(): [round(float(y), 9) for y in container[0].get_ydata()] for container in axis.containers
    }
    assert shown == {"15 epochs": [1.0, 2.0], "60 epochs": [4.0, 9.0]}
    plots.plt.close(figure)


def test_mixed_model_without_effects_of_groups_is_students() -> None:
    rng = np.random.default_rng(0)
    cells = np.repeat(np.arange(6), 5)
    values = rng.normal(size=(6, 5))
    values -= values.mean(1, keepdims=True)  # nothing between cells: their variance is zero
    found = inference.overall(pd.DataFrame({"difference": values.ravel() + 1.0, "cell": cells}))
    assert found.mean == pytest.approx(1.0)
    expected = stats.t.ppf(0.975, 5) * stats.sem(values.ravel())  # all rows alike; as many cells as before
    assert found.half_width == pytest.approx(expected, rel=1e-6)


def test_mixed_model_of_a_balanced_design_is_the_analysis_of_variance() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(8, 1)) + 0.5 * rng.normal(size=(8, 6))
    data = pd.DataFrame({"difference": values.ravel(), "cell": np.repeat(np.arange(8), 6)})
    found, means = inference.overall(data), inference.effect(values.mean(1).tolist())
    assert found.mean == pytest.approx(means.mean)
    assert found.half_width == pytest.approx(means.half_width, rel=1e-3)  # where the optimizer stops
    assert inference.overall(data.assign(difference=2.0)).half_width == 0


def test_estimates_of_the_gradient() -> None:
    cell = PRIMARY["digits-200 MLP"].changed(look={"activation": "tanh"})  # smooth; and no data to generate
    model = make(cell.network, cell.source, cell.look, 0)
    x, y = torch.randn(100, 64), torch.arange(100) % 10
    whole = exact_gradient.gradient(model, x, y)
    halves = [exact_gradient.gradient(model, x[part], y[part]) for part in (slice(50), slice(50, None))]
    torch.testing.assert_close(whole, torch.stack(halves).mean(0), rtol=1e-4, atol=1e-6)  # float32 sums
    estimates = dict(exact_gradient.estimates(model, cell, 0, 0))
    for way, rows, order in (("population", "mini-batch", 2), ("sharded", "4 x the batch", 1)):
        near, far = (float((estimates[f"{way}, sigma {s}"] - estimates[rows]).norm()) for s in (0.03, 0.3))
        # Antithetic members cancel the first order of sigma, members with rows of their own do not. Tenfold sigma.
        assert far / near == pytest.approx(10**order, rel=0.3)


def exact_lines(folder: Path) -> None:
    """Two trainings and a torn line; the population's error is 2 and 8 times the mini-batch's, its cosine 0.1 more."""
    errors = {"mini-batch": (1.0, 0.2), "4 x the batch": (0.5, 0.6), "all training rows": (0.2, 0.9)}
    for sigma in exact_gradient.SIGMAS:
        errors |= {f"population, sigma {sigma}": (2.0, 0.3), f"sharded, sigma {sigma}": (0.5, 0.6)}
    lines = [
        [
            {"cell": CELL, "seed": seed, "moment": moment, "estimate": name, "uncertain": 0.05}
            | {"error": error * (1 + seed + moment) * (4 if "pop" in name and moment == 1 else 1), "cosine": cosine}
            for name, (error, cosine) in errors.items()
            for moment in (0.1, 1.0)
        ]
        for seed in range(2)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / exact_gradient.FILE).write_text(text + '[{"cell": "')


def test_tables_of_the_exact_gradient_pair_seeds(tmp_path: Path) -> None:
    exact_lines(tmp_path)
    found = exact_report.exact_records(tmp_path)
    assert len(found) == 2 * 2 * (3 + 2 * len(exact_gradient.SIGMAS))  # the torn training was not made
    ratio, cosine = exact_report.nearer(found, "population, sigma 0.1", "mini-batch")
    assert (ratio.mean, cosine.mean) == (pytest.approx(4.0), pytest.approx(0.1))
    assert ratio.half_width == pytest.approx(0.0, abs=1e-12)  # the seeds' own errors cancel
    text = exact_report.exact_tables(tmp_path)
    assert "| population, sigma 0.1, to mini-batch | **4.000 (4.000 to 4.000)** | **+0.100 ± 0.000** |" in text
    assert "5.0% of its length" in text
    figure = plots.draw_exact(Store(tmp_path / "records.jsonl"))
    assert figure is not None
    assert len(figure.axes) == 2
    plots.plt.close(figure)


def test_exact_gradient_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(20, 64), torch.arange(20) % 10
    monkeypatch.setattr(exact_gradient, "fresh", lambda _: rows)
    monkeypatch.setattr(exact_gradient, "CHUNK", 10)
    records = exact_gradient.measure("digits-200 ResNet", 0, draws=1, epochs=2)
    assert {record["moment"] for record in records} == set(exact_gradient.MOMENTS)
    assert all(math.isfinite(record[name]) for record in records for name in ("error", "cosine", "uncertain"))
    calls: list[tuple[str, int]] = []

    def measured(name: str, seed: int) -> list[dict[str, object]]:
        calls.append((name, seed))
        return [{"cell": name, "seed": seed}]

    monkeypatch.setattr(exact_gradient, "measure", measured)
    path = tmp_path / exact_gradient.FILE
    exact_gradient.run(path)
    path.write_text(path.read_text()[:-5])  # torn
    exact_gradient.run(path)
    assert len(calls) == len(exact_gradient.CELLS) * len(exact_gradient.SEEDS) + 1
