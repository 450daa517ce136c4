"""The example of further training, and its study: what is compared is what is said, and the gain is there."""

from pathlib import Path

import further_training as example
import further_training_study as study
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from sklearn.datasets import make_friedman1

from gradwise import finite_difference_jacobian


@pytest.fixture(scope="module")
def fitted():
    data = example.friedman(100, 0)
    return data, *example.fitted(data, 0)


def test_the_simulator_is_the_function_of_the_data_with_its_derivatives():
    data = example.friedman(50, 3)
    noiseless = example.friedman(50, 3, noise=0.0)
    X, y = make_friedman1(50, noise=1.0, random_state=3)
    assert_allclose(data.y, (y - y.mean()) / y.std(), rtol=1e-12)
    assert data.simulator is not None
    assert noiseless.simulator is not None
    assert_allclose(noiseless.simulator(noiseless.X), noiseless.y, rtol=1e-9, atol=1e-9)
    assert_allclose(data.simulator(data.test_X), data.test_y, rtol=1e-9, atol=1e-9)
    jacobian = finite_difference_jacobian(data.simulator, data.X)[:, 0]
    product = 10 * np.pi * np.cos(np.pi * X[:, 0] * X[:, 1])
    slopes = np.zeros((50, 10))
    slopes[:, 0], slopes[:, 1], slopes[:, 2] = product * X[:, 1], product * X[:, 0], 40 * (X[:, 2] - 0.5)
    slopes[:, 3:5] = 10, 5
    assert_allclose(jacobian, slopes / np.sqrt(12) / y.std(), rtol=1e-6, atol=1e-8)


def test_all_arms_continue_the_same_weights_and_leave_them_alone(fitted):
    data, start, _ = fitted
    before = [weight.clone() for weight in start.parameters()]
    one, other = example.train(start, data), example.train(start, data)
    for weight, kept in zip(start.parameters(), before, strict=True):
        assert torch.equal(weight, kept)
    for weight, same in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)
    assert any(not torch.equal(weight, kept) for weight, kept in zip(one.parameters(), before, strict=True))


def test_controls_have_the_same_points_or_as_many_numbers(fitted):
    data, _, surrogates = fitted
    arms = example.arms(data, surrogates, 0)
    assert arms["data alone"] is None
    for name, surrogate in surrogates.items():
        values, more, derivatives, both = (
            arms[f"{name}: {what}"]
            for what in ("values", "values at n (1 + d) points", "derivatives", "values and derivatives")
        )
        assert values is not None
        assert more is not None
        assert derivatives is not None
        assert both is not None
        assert values.jacobian is more.jacobian is derivatives.values is None
        assert more.points.shape == (100 * 11, 10)
        assert_allclose(more.points[:100], data.X)
        assert (more.points.min(0) >= data.X.min(0)).all()
        assert (more.points.max(0) <= data.X.max(0)).all()
        assert values.values is not None
        assert derivatives.jacobian is not None
        assert both.jacobian is not None
        assert_allclose(values.values, surrogate.values(data.X))
        assert_allclose(derivatives.jacobian, finite_difference_jacobian(surrogate.values, data.X), atol=1e-5)
        assert_allclose(both.jacobian, derivatives.jacobian)


def test_a_surrogates_derivatives_help_more_than_its_values_and_not_beyond_itself(fitted):
    """The claim of the example, on one seed of the Friedman function."""
    data, start, surrogates = fitted
    arms = example.arms(data, surrogates, 0)
    errors = {
        name: example.score(example.train(start, data, arms[name]), data)
        for name in ("data alone", "process: values", "process: derivatives", "true derivatives")
    }
    assert errors["process: derivatives"] < 0.7 * errors["data alone"]
    assert errors["process: derivatives"] < 0.8 * errors["process: values"]
    assert errors["true derivatives"] < errors["process: derivatives"]
    assert errors["process: derivatives"] > 0.8 * example.error(surrogates["process"].values(data.test_X), data)


# -- study -------------------------------------------------------------------------------------------------------------


def test_test_data_are_untouched():
    X, _, order = study._diabetes()
    test = {tuple(row) for row in X[order[: study.DIABETES_TEST]].round(9)}
    for seed in (0, 1, *study.TUNING):
        data = study.diabetes(100, seed)
        rows: NDArray[np.intp] = np.random.default_rng(seed).permutation(len(X) - study.DIABETES_TEST)[:100]
        used = X[order[study.DIABETES_TEST :][rows]]
        assert_allclose(data.X * used.std(0) + used.mean(0), used, atol=1e-12)
        assert not test & {tuple(row) for row in used.round(9)}
        judged = {tuple(row) for row in (data.test_X * used.std(0) + used.mean(0)).round(9)}
        assert (judged == test) == (seed not in study.TUNING)
        assert bool(judged & test) == (seed not in study.TUNING)
    assert not set(study.SEEDS) & set(study.TUNING)


def test_wing_weight_has_noise_of_five_percent_and_a_noiseless_test():
    data = study.wing(200, 0)
    assert data.simulator is not None
    assert np.std(data.y - data.simulator(data.X)) == pytest.approx(0.05, rel=0.2)
    assert_allclose(data.test_y, data.simulator(data.test_X))


def test_linear_arms(monkeypatch):
    monkeypatch.setattr(study, "ALPHAS", (0.1, 10.0))
    monkeypatch.setattr(study, "WEIGHTS", (1.0,))
    scores = study.linear_cell("wing weight, n = 50", 0)
    assert set(scores) == {"process itself", *study.LINEAR}
    assert scores["true derivatives"] < 0.1
    assert scores["process: derivatives"] < 0.3 * scores["data alone"]


def test_the_decay_is_that_with_the_least_error_on_tuning_seeds():
    results = {("decay", "a", seed, d): {"before": abs(d - 3e-3)} for seed in study.TUNING for d in study.DECAYS}
    assert study.best_decay(results, "a") == 3e-3


def test_the_study_goes_on_where_it_was_stopped_and_reports(tmp_path: Path, monkeypatch):
    arms = ["data alone", "process: derivatives", "process: values", "process itself", "estimate_gradients"]
    calls: list[object] = []

    def cell(name, seed, *_):
        calls.append((name, seed))
        return {"before": 1.0} | {arm: 1.0 + 0.1 * place + 0.01 * (seed % 7) for place, arm in enumerate(arms)}

    for name in ("network_cell", "decay_cell", "linear_cell", "straight_cell"):
        monkeypatch.setattr(study, name, cell)
    results = study.measure(tmp_path / "results.jsonl")
    done = len(calls)
    per_data_set = len(study.TUNING) * len(study.DECAYS) + 3 * len(study.SEEDS)
    assert done == 3 * per_data_set
    assert study.measure(tmp_path / "results.jsonl") == results
    assert len(calls) == done
    text = study.tables(results)
    assert "| process: derivatives / data alone |" in text
    assert "1.10 (0 of 10" in text  # the geometric mean of (1.1 + s) / (1 + s), s from 0 to 0.06
    study.picture(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_rates_of_check_derivatives_are_counted_as_said(tmp_path: Path, monkeypatch):
    import check_derivatives_rates as rates

    monkeypatch.setattr(rates, "FUNCTIONS", {"Friedman, 5": rates.FUNCTIONS["Friedman, 5"]})
    monkeypatch.setattr(rates, "DEFECTS", {name: rates.DEFECTS[name] for name in ("none", "sign", "transposed")})
    results = rates.measure(tmp_path / "rates.jsonl", 1)
    assert len(results) == 3 * 2 * 3
    assert rates.measure(tmp_path / "rates.jsonl", 1) == [{**r, "outcome": _listed(r["outcome"])} for r in results]
    monkeypatch.setattr(rates, "CHOSEN", ("sign",))
    text = rates.tables(results)
    assert "| sign | 100 | 100 | 100 | 0 | 0 | 0 |" in text
    assert "| Friedman, 5 | 0 of 6 | 100 | 100 |" in text
    monkeypatch.undo()
    rates.picture(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def _listed(found):
    return None if found is None else [found[0], list(found[1])]
