"""The gradient matching study: its problems have the derivatives they claim, its statistics are right, and it runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matching_peers import METHODS, Fitted, own_version
from matching_problems import PROBLEMS, STRIKE, WEIGHTS, Problem, Sample, basket_payoff, basket_price, noisy
from matching_statistics import cell_ratio, geometric_mean
from matching_tasks import (
    TUNING_SEEDS,
    Store,
    Task,
    chosen,
    equal_time_tasks,
    main_tasks,
    measure,
    noise_tasks,
    relative_errors,
)

FORMULAS = [
    "Rosenbrock 2-D",
    "Rosenbrock 5-D",
    "Branin",
    "Rastrigin",
    "Wing weight",
    "Water flow",
    "Bachelier basket",
    "x sin x",
]


# -- problems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_derivatives_of_a_formula_are_those_of_its_values(name: str) -> None:
    problem = PROBLEMS[name]
    assert problem.truth is not None
    points = problem.test(0)
    x = points.x[::97]
    steps = 1e-5 * (points.x.max(axis=0) - points.x.min(axis=0)) * np.eye(problem.dim)
    differences = [problem.truth(x + step)[0] - problem.truth(x - step)[0] for step in steps]
    slopes = np.stack(differences, axis=-1) / (2 * steps.sum(axis=0))
    expected = points.dydx[::97, 0]
    np.testing.assert_array_equal(expected, problem.truth(x)[1])
    # Step and rounding leave 1e-10 of the third derivative and of y / step; in units of the whole range of y.
    size = np.abs(points.y).max() / steps.sum(axis=0) * 1e-5
    np.testing.assert_allclose(slopes / size, expected / size, atol=2e-7)


def test_the_basket_is_the_mean_of_its_payoffs_and_so_are_its_deltas() -> None:
    x = np.tile([1.1, 0.9, 1.05, 1.0, 0.8], (200_000, 1))
    payoff, pathwise = basket_payoff(x, 0)
    price, delta = basket_price(x[:1])
    deviation = payoff.std() / len(x) ** 0.5
    assert abs(payoff.mean() - price[0]) < 4 * deviation
    np.testing.assert_allclose(pathwise.mean(axis=0), delta[0], atol=4 * 0.5 * WEIGHTS.max() / len(x) ** 0.5)
    assert STRIKE == 1


def test_engine_and_airfoil_derivatives_belong_to_their_values() -> None:
    """To second order a difference of values is the mean slope times the step: between neighbours, on average."""
    from matching_problems import airfoil_rows, engine_rows

    for sample, n in ((engine_rows(), 400), (airfoil_rows(), 1500)):
        x = sample.x[:n] / sample.x.std(axis=0)
        distance = np.linalg.norm(x[:, None] - x, axis=-1) + 1e9 * np.eye(n)
        i, j = np.arange(n), distance.argmin(axis=1)
        step = sample.x[j] - sample.x[i]
        predicted = np.einsum("nod,nd->no", (sample.dydx[i] + sample.dydx[j]) / 2, step)
        for output in range(sample.y.shape[1]):
            assert np.corrcoef(predicted[:, output], (sample.y[j] - sample.y[i])[:, output])[0, 1] > 0.9


@pytest.mark.parametrize("name", ["Airfoil drag", "B777 engine"])
def test_test_rows_are_in_no_training_and_no_validation_set(name: str) -> None:
    problem = PROBLEMS[name]
    test = {tuple(row) for row in problem.test(0).x}
    assert len(test) in {8000, 256}
    for seed in (0, 1, *TUNING_SEEDS):
        for sample in (problem.draw(problem.sizes[-1], seed), problem.draw(800, seed), problem.validate(seed)):
            assert not test & {tuple(row) for row in sample.x}
    for seed in TUNING_SEEDS:
        train = {tuple(row) for row in problem.draw(problem.sizes[0], seed).x}
        assert not train & {tuple(row) for row in problem.validate(seed).x}


def test_designs_differ_between_seeds_and_fill_every_stratum() -> None:
    x = PROBLEMS["Branin"].draw(10, 0).x
    assert not np.allclose(x, PROBLEMS["Branin"].draw(10, 1).x)
    strata = np.floor((x - [-5, 0]) / 15 * 10)
    assert all(sorted(column) == list(range(10)) for column in strata.T)


def test_noise_has_the_size_asked_for_and_leaves_the_values() -> None:
    sample = PROBLEMS["Airfoil drag"].draw(3000, 0)
    rough = noisy(sample, 0.2, 0)
    rms = np.sqrt((sample.dydx**2).mean(axis=0))
    np.testing.assert_allclose((rough.dydx - sample.dydx).std(axis=0) / rms, 0.2, rtol=0.06)  # 3000 rows: +-1.3 %
    np.testing.assert_array_equal(rough.y, sample.y)
    assert noisy(sample, 0, 0) is sample


def test_gradients_cost_as_many_runs_as_there_are_inputs() -> None:
    assert PROBLEMS["Water flow"].extra(40) == {1: 80, 3: 160, 8: 360}
    assert PROBLEMS["B777 engine"].extra(200) == {1: 400, 3: 800}
    assert PROBLEMS["B777 engine"].extra(400) == {1: 800}  # there are not more rows


# -- statistics --------------------------------------------------------------------------------------------------------


def test_errors_of_the_mean_and_of_nothing() -> None:
    problem = PROBLEMS["B777 engine"]
    test = problem.test(0)
    scale = test.x.std(axis=0)
    value, derivative = relative_errors(np.broadcast_to(test.y.mean(axis=0), test.y.shape), 0 * test.dydx, test, scale)
    np.testing.assert_allclose([value, derivative], 1)  # the mean has the standard deviation as error
    assert relative_errors(test.y, test.dydx, test, scale) == ([0, 0], [0, 0])
    half = relative_errors(test.y, 1.5 * test.dydx, test, scale)[1]
    np.testing.assert_allclose(half, 0.5)


def test_cell_ratio_is_paired() -> None:
    assert cell_ratio({0: 1, 1: 20, 2: 3}, {0: 2, 1: 40, 2: 6, 9: 1e9}) == pytest.approx(0.5)
    assert math.isnan(cell_ratio({0: 1}, {1: 1}))


def test_problems_count_alike_however_many_sizes_they_have() -> None:
    ratio = geometric_mean({("a", 1): 0.25, ("a", 2): 0.25, ("a", 3): 0.25, ("b", 1): 4, ("c", 1): math.nan})
    assert ratio.mean == pytest.approx(1)
    assert ratio.problems == pytest.approx({"a": 0.25, "b": 4})
    assert (ratio.lower, ratio.upper) == pytest.approx((0.25, 4))  # two problems: a quarter of the resamples each
    assert ratio.wins == 1


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8), st.floats(0.1, 10))
def test_ratios_scale(ratios: list[float], factor: float) -> None:
    cells = {(str(i), 0): ratio for i, ratio in enumerate(ratios)}
    plain = geometric_mean(cells)
    scaled = geometric_mean({cell: factor * ratio for cell, ratio in cells.items()})
    assert scaled.mean == pytest.approx(factor * plain.mean)
    assert (scaled.lower, scaled.upper) == pytest.approx((factor * plain.lower, factor * plain.upper))
    assert plain.lower <= plain.mean * (1 + 1e-12)
    assert plain.mean <= plain.upper * (1 + 1e-12)


# -- tasks and records -------------------------------------------------------------------------------------------------


def record(task: Task, value: float, seconds: float = 1.0, n_iter: int = 100) -> dict[str, object]:
    from dataclasses import asdict

    return {"task": asdict(task), "version": task.version, "value": value, "seconds": seconds, "n_iter": n_iter}


def test_records_survive_and_those_of_other_code_do_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.jsonl")
    own, theirs = Task("GI", "Branin", 10, 0), Task("jenn", "Branin", 10, 0)
    store.add(record(own, 0.1))
    store.add(record(theirs, 0.2))
    assert Store(store.path).missing([own, theirs, replace(own, seed=1)]) == [replace(own, seed=1)]
    lines = [json.loads(line) for line in store.path.read_text().splitlines()]
    lines[0]["version"] = "another"
    store.path.write_text("\n".join(map(json.dumps, lines)))
    assert Store(store.path).missing([own, theirs]) == [own]


def test_settings_are_chosen_by_the_tuning_seeds_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.jsonl")
    assert chosen(store, "jenn", "Branin") == 0
    for seed in TUNING_SEEDS:
        for setting, value in enumerate((0.3, 0.1, 0.2, 0.4)):
            store.add(record(Task("jenn", "Branin", 10, seed, setting=setting), value))
    store.add(record(Task("jenn", "Branin", 10, 0, setting=3), 1e-9))
    assert chosen(store, "jenn", "Branin") == 1


def test_equal_time_shortens_ours_until_it_fits(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.jsonl")
    for seed in range(2):
        store.add(record(Task("jenn", "Branin", 10, seed), 0.2, seconds=0.5))
        store.add(record(Task("GI", "Branin", 10, seed), 0.1, seconds=1.0))
    tasks = equal_time_tasks(store)
    assert [(task.iterations, task.seed) for task in tasks] == [(45, 0), (45, 1)]  # 0.9 of a half of 100
    for task in tasks:
        store.add(record(task, 0.15, seconds=0.6, n_iter=45))
    again = equal_time_tasks(store)
    assert [task.iterations for task in again] == [33, 33]
    for task in again:
        store.add(record(task, 0.16, seconds=0.45, n_iter=33))
    assert equal_time_tasks(store) == []
    assert [entry["value"] for entry in store.within("Branin", 10, 0.5)] == [0.16, 0.16]


def test_what_a_method_cannot_do_is_left_out() -> None:
    tasks = main_tasks(list(PROBLEMS), list(METHODS), 10)
    engine = {task.method for task in tasks if task.problem == "B777 engine"}
    assert engine == {"GI", "GI, defaults", "without GI", "jenn"}
    assert not [task for task in tasks if task.problem == "x sin x" and task.method == "GEKPLS"]
    assert {task.noise for task in noise_tasks(["Branin"], ["GENN", "KRG"], 1)} == {0.05, 0.2}
    assert len(dict.fromkeys(tasks)) == len(tasks)


def test_a_fit_that_fails_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sample: Sample, problem: Problem, seed: int, settings: object) -> Fitted:
        raise ValueError("not positive definite")

    monkeypatch.setitem(METHODS, "KRG", replace(METHODS["KRG"], fit=fails))
    assert measure(Task("KRG", "Branin", 10, 0), 0)["error"] == "ValueError: not positive definite"


def test_a_fit_that_takes_too_long_is_stopped() -> None:
    from matching_tasks import TooLongError, limited

    def endless() -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:  # noqa: BLE001 - as optimisers do
                continue

    with pytest.raises(TooLongError, match=r"0\.05"), limited(0.05):
        endless()
    with limited(0.05):
        pass
    sum(range(10_000_000))  # the clock does not run on


def test_version_follows_the_code_not_its_comments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gradwise_torch

    versions: list[str] = []
    for text in ('"""One."""\nA = 1\n', "# two\nA = 1\n", "A = 2\n"):
        (tmp_path / "_mlp_x.py").write_text(text)
        monkeypatch.setattr(gradwise_torch, "__file__", str(tmp_path / "__init__.py"))
        own_version.cache_clear()
        versions.append(own_version())
    monkeypatch.undo()
    own_version.cache_clear()
    assert versions[0] == versions[1] != versions[2]


def test_the_study_runs_and_reports(tmp_path: Path) -> None:
    """Five iterations of every method on two problems, tables, plots."""
    from matching_report import comparisons, report
    from matching_study import quick

    store = quick(tmp_path)
    assert not [entry for entry in store.records.values() if "error" in entry]
    methods = {entry["task"]["method"] for entry in store.records.values()}
    assert methods == set(METHODS) - {"GI, auto weight"}
    plain = Store(tmp_path / "plain.jsonl")  # the same as if it had run to its end
    for entry in store.records.values():
        plain.add({**entry, "task": {**entry["task"], "iterations": 0}})
    report(plain, tmp_path)
    assert "Branin, 10" in (tmp_path / "matching_tables.md").read_text()
    assert (tmp_path / "images" / "matching_ratios.png").stat().st_size > 10_000
    assert (tmp_path / "images" / "matching_curves.png").exists()
    assert set(comparisons(plain)["better of jenn and GENN, each to its end"].problems) == {"Branin", "B777 engine"}


def test_every_seed_that_is_asked_for_is_planned() -> None:
    from matching_tasks import curve_tasks, main_tasks, noise_tasks

    problems, methods = list(PROBLEMS), list(METHODS)
    for tasks in (main_tasks(problems, methods, 10), noise_tasks(problems, methods, 10), curve_tasks(10)):
        seeds: dict[object, set[int]] = {}
        for task in tasks:
            seeds.setdefault(replace(task, seed=0), set()).add(task.seed)
        assert set(map(frozenset, seeds.values())) == {frozenset(range(10))}
