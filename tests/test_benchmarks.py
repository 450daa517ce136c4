"""The benchmarks: their own formulas are right, and each runs (a short smoke of the long studies)."""

import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from models import MODELS, Problem, mlp

TINY = Problem(lambda: mlp(4, 8, 10), (16, 4))


def test_radial_pull_is_what_differentiating_the_scale_adds() -> None:
    from relative_noise import radial_pull

    torch.manual_seed(0)
    mean, e, curvature = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    w = mean.clone().requires_grad_()
    z = 0.3 * w.square().mean().sqrt() * e
    (curvature * (w + z)).sin().sum().backward()
    perturbed = mean + z.detach()
    gradient = curvature * (curvature * perturbed).cos()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, gradient + radial_pull(mean, gradient, z.detach()))


def test_relative_noise_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import relative_noise

    monkeypatch.setattr(relative_noise, "STEPS", 3)
    constant, differentiated = (relative_noise.run("sgd", 100, 0.3, how, 0) for how in (False, True))
    assert np.isfinite([*constant, *differentiated]).all()
    assert constant != differentiated


# -- timing ------------------------------------------------------------------------------------------------------------


def test_interleaved_takes_turns_and_calls_short_steps_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    import timing

    clock = [0.0]
    calls: list[str] = []

    def lasting(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    steps = {"short": lambda: lasting("short", 0.002), "long": lambda: lasting("long", 0.1)}
    timings = timing.interleaved(steps, 2, floor=0.005)
    assert timings["short"].seconds == pytest.approx([0.002] * 2)
    assert timings["long"].seconds == pytest.approx([0.1] * 2)
    assert (timings["short"].loops, timings["long"].loops) == (3, 1)
    once, again = ["short"] * 4 + ["long"] * 2, ["short"] * 4 + ["long"]  # one call warms up, unless it lasts long
    assert calls == ["short"] * 3 + ["long"] * 3 + once + again


def test_messages_are_recorded_once_and_do_not_escape() -> None:
    from timing import interleaved

    def step() -> None:
        warnings.warn("no vmap here", UserWarning, stacklevel=1)
        logging.getLogger("torch._dynamo").warning("too many\nreasons")

    assert interleaved({"step": step}, 2, floor=0.0)["step"].messages == ["too many", "no vmap here"]


def test_path_taken_is_what_the_library_says() -> None:
    from population_ways import Task, batch_step
    from reports import path_taken
    from timing import recorded_messages

    assert path_taken("loop", []) == "loop"
    assert path_taken("compile", []) == "compile"

    def forked(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        return loss if float(loss.detach()) > 0 else -loss  # control flow that depends on data

    with recorded_messages() as messages:
        batch_step(Task(TINY), sharded=False, path="vmap", loss_fn=forked)()
    assert path_taken("vmap", messages) == "loop"
    assert path_taken("compile", [message.replace("vmap", "compile") for message in messages]) == "vmap"


# -- speed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [False, True])
def test_every_way_steps(cuda: bool) -> None:
    from population_ways import Task, ways

    for name, way in ways(compiled=False, cuda=cuda).items():
        if way.installed:
            way.build(Task(TINY, "AdamW"))()
        else:
            assert name.startswith(("IVON", "SAM"))


def test_hand_written_loop_has_the_gradient_of_the_mean() -> None:
    from population_ways import INNERS, Task, by_hand, plain

    model = TINY.make()
    assert INNERS["SGD"][1]["lr"] == 1e-3
    weights: list[list[torch.Tensor]] = []
    for build in (plain, lambda task: by_hand(task, sharded=True)):
        models: list[torch.nn.Module] = []

        def make(models: list[torch.nn.Module] = models) -> torch.nn.Module:
            models.append(TINY.make())
            return models[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", torch.zeros_like)  # no noise: shards make up the batch
            build(Task(Problem(make, TINY.shape)))()
        weights.append([p.detach() for p in models[0].parameters()])
    torch.testing.assert_close(*weights)
    assert len(weights[0]) == len(list(model.parameters()))


@pytest.mark.parametrize("projections", [1, 3])
def test_hand_written_matching_is_the_library_s(projections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import matching_ways

    losses: list[torch.Tensor] = []
    monkeypatch.setattr(matching_ways, "_training", lambda model, loss, *kind: lambda: losses.append(loss().detach()))
    outputs = 1 if projections == 1 else 3  # a single output leaves nothing to draw
    task = matching_ways.Regression(2, 4, outputs, 8, torch.float64)
    matching_ways.by_hand(task, projections=projections)()
    matching_ways.matching_step(task, projections=None)()
    hand, library = losses
    assert hand == pytest.approx(float(library), rel=1e-12)  # rounding


def test_known_derivatives_are_those_of_the_known_values() -> None:
    from matching_ways import sines

    x, slopes = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    each = torch.func.jacrev(lambda row: sines(row[None], slopes)[0][0])
    torch.testing.assert_close(sines(x, slopes)[1], torch.stack([each(row) for row in x]))


def test_targets_say_met_missed_and_by_what() -> None:
    from targets import CHOSEN, TARGETS, Target, verdicts

    first = TARGETS[0]
    ratios = {first.column: {"auto, whole": 5.0, "loop, whole": 5.0, "vmap, whole": 3.9, f"{CHOSEN}, whole": 5.0}}
    rows = {(row[0], row[1].partition(", over")[0]): row for row in verdicts(ratios)}
    assert len(verdicts(ratios)) == len(TARGETS)
    assert rows[first.column, "auto, whole"][2:] == ["<= 4x", "5x", "missed; vmap: 3.9x"]
    assert rows[first.column, f"{CHOSEN}, whole"][2:] == ["<= 1.1x", "1.28x", "missed"]
    assert rows[first.column, "auto, sharded"][2:] == ["<= 2.5x", "", "not measured"]
    met = {first.column: {"auto, whole": 4.0}}
    assert verdicts(met)[0][3:] == ["4x", "met"]
    assert Target("a", "b", 0.1, parts=8).measured({"a": {"b": 0.4}}) == pytest.approx(0.05)
    assert Target("a", "b", 1.1, against=("c", "d")).measured({"a": {"b": 3, "c": 2, "d": 4}}) == 1.5


def test_targets_name_rows_that_exist() -> None:
    from matching_ways import matching_ways
    from population_ways import ways
    from speed import REGRESSIONS
    from startup import IMPORTS
    from targets import CHOSEN, TARGETS

    rows = {
        model: set(ways(compiled=False, cuda=False)) | {f"{CHOSEN}, whole", f"{CHOSEN}, sharded"} for model in MODELS
    }
    rows |= {name: set(matching_ways(outputs, full=outputs <= 10)) for name, outputs in REGRESSIONS.items()}
    rows["seconds"] = set(IMPORTS)
    for target in TARGETS:
        assert {target.row, *target.against} <= rows[target.column]


def test_speed_tables_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    import speed

    monkeypatch.setattr(speed, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(speed, "REGRESSIONS", {"D = 2": 2})
    table = speed.population("SGD", 1, 1, models=["tiny"])
    assert table.ratios()["tiny"][table.reference] == 1
    assert table.notes["tiny"]["vmap, sharded"] == "vmap"
    chosen = speed.with_chosen(table)["tiny"]
    assert chosen["path that auto takes, whole"] == chosen[f"{table.notes['tiny']['auto, whole']}, whole"]
    matching = speed.matching(1, 1)
    text = speed.report([[table, matching]], [], {**speed.environment("cpu"), "repeats": 1})
    assert "| plain step | " in text
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("|"))
    json.dumps([table.as_dict(), matching.as_dict()])


def test_missing_packages_are_named() -> None:
    import speed
    from population_ways import PLAIN, Task, Way, plain

    table = speed.Comparison("", PLAIN)
    rows = {PLAIN: Way(plain), "other": Way(plain, "no_such_package_at_all")}
    speed.compare(table, "tiny", rows, Task(TINY), 1, lambda: None)
    assert table.rows()[-1] == ["other", "not installed"]
    json.dumps(table.as_dict())


# -- growth, memory, the rule ------------------------------------------------------------------------------------------


def test_fitted_slope_ignores_the_lower_half() -> None:
    from growth import fitted_slope

    x = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    y = [7.0, 7.0, 7.0, *(3 * value**1.5 for value in x[3:])]
    assert fitted_slope(x, y) == pytest.approx(1.5)


def test_growth_measures_and_draws(tmp_path: Path) -> None:
    from growth import draw, measure, panels

    done = panels(quick=True)
    for panel in done:
        measure(panel, 1)
        assert all(math.isfinite(slope) for slope in panel.slopes().values())
    draw(done, tmp_path / "docs" / "growth.png")
    assert (tmp_path / "docs" / "growth.png").stat().st_size > 10_000
    json.dumps([panel.as_dict() for panel in done])


def test_peaks_of_memory() -> None:
    from memory import peak_of_changes, status_bytes

    assert peak_of_changes([5, -3, 4, -6, 2]) == 6
    assert peak_of_changes([-3]) == 0
    assert status_bytes("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 7 kB\n", "VmHWM") == 2048 * 1024
    with pytest.raises(ValueError, match="VmHWM"):
        status_bytes("VmRSS: 7 kB", "VmHWM")


def test_live_bytes_of_a_step_are_counted() -> None:
    from memory import peak_live_bytes

    def step() -> torch.Tensor:
        kept = torch.ones(1000)  # 4000 bytes
        torch.ones(500)  # 2000, gone before the next
        return torch.cat([kept, torch.ones(250)])  # 1000, and 5000 for the result

    assert peak_live_bytes(step) == 4000 + 1000 + 5000


def test_rule_counts_its_misses() -> None:
    from vectorize_rule import Cell, grid, measure, misses

    (name, problem), *_ = grid().items()
    cells = measure(name, problem, 1)
    assert [cell.sharded for cell in cells] == [False, True]
    assert cells[0].vectorised == "vmap"
    fine = Cell("a", 1, 1, False, 1.0, 1.09, 1.0, "vmap", "loop")
    slow = Cell("b", 1, 1, False, 1.0, 3.0, 1.0, "vmap", "loop")
    slower = Cell("c", 1, 1, False, 1.0, 1.0, 4.0, "vmap", "vmap")
    assert [cell.model for cell in misses([fine, slow, slower])] == ["c", "b"]
    assert len(fine.texts()) == len(slow.texts()) == 10


# -- Keras -------------------------------------------------------------------------------------------------------------


def test_keras_speed_runs_and_its_table_has_ratios(tmp_path: Path) -> None:
    import keras_speed

    out = tmp_path / "keras_speed.json"
    quick = ["--backends", "torch", "--models", "MLP 64-128-10", "--repeats", "1", "--batches", "1"]
    keras_speed.main([*quick, "--out", str(out)])
    results = json.loads(out.read_text())
    ways = results["torch"]["MLP 64-128-10"]
    assert {"plain", "8 members", "WithDerivatives, one output"} <= set(ways)
    header, body = keras_speed.rows(
        {"torch": {"m": {"plain": {"first": 3.0, "later": 2.0}, "a": {"first": 9.0, "later": 5.0}}}}
    )
    assert len(header) == len(body[0]) == 3
    assert body[1][2] == "2.50x (9.0 s)"
    assert out.with_suffix(".md").exists()
