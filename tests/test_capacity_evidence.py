"""The evidence on `capacity_study`: its network, functions, rules and tables; and the example with Optuna."""

import json
from pathlib import Path
from typing import Any

import capacity_evidence
import capacity_functions
import capacity_network
import numpy as np
import pytest
from scipy.optimize import check_grad

from gradwise import finite_difference_jacobian


@pytest.mark.parametrize("derivatives", [False, True])
def test_gradient_of_the_network_equals_differences(derivatives: bool) -> None:
    rng = np.random.default_rng(0)
    inputs, values, slopes = rng.normal(size=(9, 3)), rng.normal(size=9), rng.normal(size=(9, 3))
    weights = capacity_network.initial(3, 4, seed=1)
    arguments = (4, inputs, values, slopes if derivatives else None)

    def loss(w: Any) -> float:
        return capacity_network.loss_and_gradient(w, *arguments)[0]

    def gradient(w: Any) -> Any:
        return capacity_network.loss_and_gradient(w, *arguments)[1]

    assert check_grad(loss, gradient, weights) < 1e-6 * np.linalg.norm(gradient(weights)) + 1e-6


def test_loss_of_the_network_in_its_own_words() -> None:
    rng = np.random.default_rng(0)
    inputs, values, slopes = rng.normal(size=(9, 3)), rng.normal(size=9), rng.normal(size=(9, 3))
    weights = capacity_network.initial(3, 4, seed=1)
    first, bias, second = weights[:12].reshape(3, 4), weights[12:16], weights[16:20]

    def network(x: Any) -> Any:
        return np.tanh(x @ first + bias) @ second + weights[20]

    jacobian = finite_difference_jacobian(network, inputs)[:, 0]
    expected = (
        np.mean((network(inputs) - values) ** 2)
        + np.sum((jacobian - slopes) ** 2) / np.sum(slopes**2)
        + capacity_network.ALPHA / 9 * (np.sum(first**2) + np.sum(second**2))
    )
    assert capacity_network.loss_and_gradient(weights, 4, inputs, values, slopes)[0] == pytest.approx(expected)


def test_network_predicts_its_own_derivatives_and_starts_alike() -> None:
    data = capacity_functions.training_data(capacity_functions.FUNCTIONS["Branin, 2-D"], 0)
    model = capacity_network.fit(data.X, data.y, data.dydx, capacity=6, seed=0)
    differences = finite_difference_jacobian(model.predict, data.X)[:, 0]
    np.testing.assert_allclose(model.predict_jacobian(data.X), differences, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(capacity_network.initial(2, 6, 3), capacity_network.initial(2, 6, 3))
    assert not np.allclose(capacity_network.initial(2, 6, 3), capacity_network.initial(2, 6, 4))


@pytest.mark.parametrize("name", capacity_functions.FUNCTIONS)
def test_slopes_of_the_functions_equal_differences(name: str) -> None:
    function = capacity_functions.FUNCTIONS[name]
    x = np.random.default_rng(0).uniform(0.01, 0.99, (5, function.inputs))
    values, slopes = capacity_functions.value_and_slopes(function, x)
    differences = finite_difference_jacobian(lambda at: capacity_functions.value_and_slopes(function, at)[0], x)[:, 0]
    np.testing.assert_allclose(slopes, differences, rtol=1e-6, atol=1e-6 * np.abs(slopes).max())
    data = capacity_functions.training_data(function, 3)
    exact = capacity_functions.value_and_slopes(function, data.X)
    np.testing.assert_array_equal(data.dydx, exact[1])
    noise = np.std(data.y - exact[0]) / capacity_functions.unseen_data(function, 1000).y.std()
    assert 0.5 * function.noise < noise < 1.7 * function.noise
    assert values.shape == (5,)


def test_a_cell_and_the_report_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capacity_network, "ITERATIONS", 5)
    monkeypatch.setattr(capacity_evidence, "needed_width", lambda *_: 3)
    entries = [capacity_evidence.cell(name, 0, [1, 2]) for name in ("Forrester, 1-D", "x sin x, 1-D")]
    assert entries == json.loads(json.dumps(entries))
    spent = {rule: trainings for rule, (_, trainings) in entries[0]["choices"]["without"].items()}
    assert spent["gap: min(need, upper bound)"] == 2 * 2 * 5 * 2
    assert spent["cross-validation, values"] == 2 * 5 * 2
    assert spent["Optuna TPE, values held out"] == 2 * 5 * 2
    assert spent["derivative error at the training points, 5 seeds"] == 2 * 5
    for key in ("without", "with"):
        for rule, values in capacity_evidence.regrets(entries, key).items():
            for entry, value in zip(entries, values, strict=True):
                means = {width: np.mean(np.log(errors)) for width, errors in entry["test_errors"][key].items()}
                width = entry["choices"][key][rule][0]
                assert value == pytest.approx(means[str(width)] - min(means["1"], means["2"]))
    capacity_evidence.report(entries)
    printed = capsys.readouterr().out
    assert "| gap: min(need, upper bound) | 40 |" in printed
    picture = tmp_path / "images" / "capacity.png"
    capacity_evidence.draw(entries, picture)
    assert picture.stat().st_size > 20_000
    monkeypatch.setattr(capacity_network, "ITERATIONS", 1500)
    capacity_evidence.draw_study(picture, [1, 2])
    assert picture.stat().st_size > 20_000


def test_what_is_missing_is_done_by_data_sets() -> None:
    names = list(capacity_functions.FUNCTIONS)
    todo = capacity_evidence.missing([{"function": names[0], "dataset": 0}], 2)
    assert todo == [*((name, 0) for name in names[1:]), *((name, 1) for name in names)]


def test_optuna_example_runs() -> None:
    import capacity_optuna as example

    without, with_ = example.run(0, trials=2, widths=[1, 2], seeds=1)
    assert (without.widest, without.trainings) == (2, 6 + 20 // 3 * 3)
    assert with_.widest in {1, 2}
    assert with_.trainings == 6 + 20
    assert with_.width <= with_.widest
    assert 0 < with_.error < 2


def test_optuna_example_has_right_slopes() -> None:
    import capacity_optuna as example

    x, _, slopes = example.sample(5, 0)
    differences = finite_difference_jacobian(lambda at: example.target(at)[0], x)[:, 0]
    np.testing.assert_allclose(slopes, differences, rtol=1e-6, atol=1e-8)
