"""The study of linear regression: its formulas are right, it runs, and it picks up where it stopped."""

import json

import numpy as np
import pytest
import ridge_report
import ridge_size
import ridge_study
from ridge_study import SETTINGS, Cell, differential_regression, run, standard_features, wing_weight

from gradwise._basis import derivatives, features, fitted_basis


def test_wing_weight_has_its_derivatives():
    x = ridge_study.LOWER + (ridge_study.UPPER - ridge_study.LOWER) * np.random.default_rng(0).random((5, 10))
    step = 1e-6 * (ridge_study.UPPER - ridge_study.LOWER)
    slopes = [(wing_weight(x + e)[0] - wing_weight(x - e)[0]) / (2 * step[j]) for j, e in enumerate(np.diag(step))]
    np.testing.assert_allclose(wing_weight(x)[1], np.stack(slopes, axis=1), rtol=1e-6, atol=1e-6)


def test_simulated_payoffs_have_the_price_as_their_mean():
    data = ridge_study.basket(400_000, np.random.default_rng(0))
    # The average over all prices at one year is the price of an option with twice the variance.
    deviation = np.sqrt(2) * np.linalg.norm(ridge_study.HOLDINGS @ ridge_study.ROOT)
    distance = (100 - ridge_study.STRIKE) / deviation
    price = deviation * (distance * ridge_study.norm.cdf(distance) + ridge_study.norm.pdf(distance))
    assert data.y.mean() == pytest.approx(price, rel=0.01)
    assert data.test_y.mean() == pytest.approx(price, rel=0.1)
    delta = ridge_study.HOLDINGS * ridge_study.norm.cdf(distance)
    np.testing.assert_allclose(data.dydx.mean(axis=0), delta, rtol=0.01)
    x, steps = data.test_x[:20], 1e-4 * np.eye(3)
    slopes = [(ridge_study.basket_price(x + e)[0] - ridge_study.basket_price(x - e)[0]) / 2e-4 for e in steps]
    np.testing.assert_allclose(ridge_study.basket_price(x)[1], np.stack(slopes, axis=1), rtol=1e-6, atol=1e-8)


def test_differential_regression_recovers_a_polynomial_with_unknown_derivatives():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 3))
    basis = fitted_basis(standard_features(2), x, None)
    truth = rng.standard_normal(9)
    phi, slopes = features(basis, x), derivatives(basis, x)
    dydx = truth @ slopes
    dydx[rng.random(dydx.shape) < 0.3] = np.nan
    coef, intercept = differential_regression(phi, slopes, phi @ truth + 3, dydx)
    np.testing.assert_allclose(coef, truth, rtol=1e-9)
    assert intercept == pytest.approx(3)
    plain, _ = differential_regression(phi, slopes, phi @ truth + 3, np.full(dydx.shape, np.nan))
    np.testing.assert_allclose(plain, truth, rtol=1e-9)


def test_noise_of_derivatives_has_the_size_it_says():
    dydx = np.random.default_rng(0).standard_normal((20_000, 2)) * [1.0, 100.0]
    rms = np.sqrt(np.mean(dydx**2, axis=0))
    for kind in ("random", "systematic"):
        error = ridge_study.spoiled(dydx, 0.5, kind, np.random.default_rng(1)) - dydx
        np.testing.assert_allclose(np.sqrt(np.mean(error**2, axis=0)), 0.5 * rms, rtol=0.02)
        assert not (ridge_study.spoiled(dydx, 0.0, kind, np.random.default_rng(1)) - dydx).any()


def test_methods_see_the_same_samples_and_derivatives_help():
    setting = SETTINGS[1]
    errors = {method: run(setting, 20, 0.0, "random", 0, method)["error"] for method in ridge_study.METHODS[:-1]}
    assert errors[ridge_study.OURS_CV] < 0.1 * errors["RidgeCV"]
    first, second = (setting.draw(20, np.random.default_rng([0, 20])) for _ in range(2))
    np.testing.assert_array_equal(first.x, second.x)


def test_ratio_is_paired():
    assert ridge_report.ratio([1.0, 20.0], [2.0, 40.0]) == pytest.approx((0.5, 0.5, 0.5))
    middle, low, high = ridge_report.ratio([1.0, 4.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    assert middle == pytest.approx(2)
    assert 1 <= low < 2 < high <= 4


def test_study_runs_and_resumes(tmp_path, monkeypatch, capsys):
    small = [cell for cell in ridge_study.cells(1) if cell.n in {20, 40} and cell.level in {0.0, 0.5}]
    assert {cell.setting for cell in small} == {"wing weight", "diabetes, degree 2", "diabetes, linear"}
    monkeypatch.setattr(ridge_study, "cells", lambda seeds: small)
    out, plot = tmp_path / "study.jsonl", tmp_path / "plot.png"
    monkeypatch.setattr("sys.argv", ["ridge_study.py", "--seeds", "1", "--out", str(out), "--plot", str(plot)])
    ridge_study.main()
    lines = out.read_text().splitlines()
    assert [Cell(**json.loads(line)["cell"]) for line in lines] == small
    assert plot.stat().st_size > 10_000
    assert "| wing weight | 20 |" in capsys.readouterr().out
    monkeypatch.setattr(ridge_study, "run", None)  # nothing is left to do
    ridge_study.main()
    assert out.read_text().splitlines() == lines


def test_sizes_are_measured():
    results = [ridge_size.measure(60, 6, degree) for degree in (1, 2)]
    assert [r["features"] for r in results] == [6, 27]
    assert all(r["seconds"] >= 0 and r["stacked_mb"] == 60 * 7 * r["features"] * 8 / 2**20 for r in results)
    assert ridge_size.table(results).count("\n") == 5
