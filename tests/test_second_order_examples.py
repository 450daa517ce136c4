"""The examples of second derivatives and of directions, and their study: formulas, gains, and what is written."""

from dataclasses import replace
from pathlib import Path

import normal_modes
import numpy as np
import option_gamma
import pytest
import second_order_study
import torch


def test_greeks_equal_central_differences() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(option_gamma.LOWER, option_gamma.UPPER, (50, 4))
    price, delta, gamma = option_gamma.black_scholes(x)
    step = np.array([1e-2, 0, 0, 0])
    up, down = option_gamma.black_scholes(x + step)[0], option_gamma.black_scholes(x - step)[0]
    np.testing.assert_allclose(delta, (up - down) / 2e-2, rtol=1e-5, atol=1e-7)  # truncation of the difference
    np.testing.assert_allclose(gamma, (up - 2 * price + down) / 1e-4, rtol=1e-3, atol=1e-7)  # and its rounding
    # A call is worth at least its discounted payoff, and at most the asset.
    discounted = x[:, 0] - option_gamma.STRIKE * np.exp(-x[:, 3] * x[:, 2])
    assert np.all(price >= discounted)
    assert np.all(price <= x[:, 0])


def test_samples_are_in_the_units_of_the_networks() -> None:
    data = option_gamma.sample(40, 0)
    x = option_gamma.LOWER + (data.x.numpy() + 1) * option_gamma.HALF
    assert np.all((x >= option_gamma.LOWER) & (x <= option_gamma.UPPER))

    def price(scaled: np.ndarray) -> np.ndarray:
        return option_gamma.black_scholes(option_gamma.LOWER + (scaled + 1) * option_gamma.HALF)[0] / option_gamma.PRICE

    step = np.array([1e-3, 0, 0, 0])
    up, middle, down = (price(data.x.numpy() + k * step) for k in (1, 0, -1))
    np.testing.assert_allclose(data.delta, (up - down) / 2e-3, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(data.gamma, (up - 2 * middle + down) / 1e-6, rtol=1e-2, atol=1e-5)


def test_gammas_help_gammas() -> None:
    torch.set_num_threads(1)
    data, test = option_gamma.sample(32, 0), option_gamma.sample(500, 1)
    errors = {}
    for method in option_gamma.METHODS:
        errors[method.name] = option_gamma.score(option_gamma.train(method, data, 0, 150)[0], test)
    assert errors["prices and deltas"]["delta"] < 0.8 * errors["prices"]["delta"]
    assert errors["prices, deltas and gammas"]["gamma"] < 0.8 * errors["prices and deltas"]["gamma"]


def test_chain_forces_and_modes() -> None:
    u = np.random.default_rng(0).normal(size=(5, normal_modes.ATOMS)) * 0.1
    values, gradients = normal_modes.energy(u)
    for j, step in enumerate(1e-5 * np.eye(normal_modes.ATOMS)):
        slope = (normal_modes.energy(u + step)[0] - normal_modes.energy(u - step)[0]) / 2e-5
        np.testing.assert_allclose(gradients[:, j], slope, rtol=1e-6, atol=1e-8)  # truncation of the difference
    squares, modes = normal_modes.normal_modes()
    np.testing.assert_allclose(modes.T @ np.diag(normal_modes.MASSES) @ modes, np.eye(normal_modes.ATOMS), atol=1e-12)
    assert np.all(np.diff(squares) > 0)
    # The curvature of the energy along a mode at rest is its squared frequency.
    for square, mode in zip(squares, modes.T, strict=True):
        ends = [normal_modes.energy(k * 1e-4 * mode[None])[0][0] for k in (1, 0, -1)]
        assert (ends[0] - 2 * ends[1] + ends[2]) / 1e-8 == pytest.approx(square, rel=1e-4)
    assert values.shape == (5,)


def test_forces_along_modes_help() -> None:
    torch.set_num_threads(1)
    data, test = normal_modes.sample(60, 0), normal_modes.sample(500, 1)
    errors = {
        modes: normal_modes.score(normal_modes.train(normal_modes.Method("", modes=modes), data, 0, 150)[0], test)
        for modes in (0, 2, 6)
    }
    assert errors[2]["energy"] < 0.9 * errors[0]["energy"]
    assert errors[6]["forces"] < 0.9 * errors[2]["forces"]


def test_the_study_goes_on_where_it_was_stopped_and_writes_its_table(tmp_path: Path) -> None:
    problem = replace(second_order_study.problems()[0], points=8)
    cells = second_order_study.Cells(tmp_path / "out" / "cells.jsonl")
    rows = [row for row in second_order_study.study(problem, cells, 2, 10) if row]
    assert len(rows) == 2 * len(problem.methods)
    again = second_order_study.Cells(tmp_path / "out" / "cells.jsonl")
    assert again.done == cells.done
    lines = (tmp_path / "out" / "cells.jsonl").read_text()
    repeated = [row for row in second_order_study.study(problem, again, 2, 10) if row]
    assert (tmp_path / "out" / "cells.jsonl").read_text() == lines
    assert second_order_study.table(problem, repeated) == second_order_study.table(problem, rows)
    header, body = second_order_study.table(problem, rows)
    assert header[-3:] == ["price", "delta", "gamma"]
    assert "(" not in body[0][-1]
    page = tmp_path / "page.md"
    page.write_text("Above\n<!-- measured -->\nold\n<!-- end -->\nBelow\n")
    second_order_study.publish(page, "new\n")
    assert page.read_text() == "Above\n<!-- measured -->\nnew\n<!-- end -->\nBelow\n"
    second_order_study.draw([(problem, rows)], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_ratio_is_paired() -> None:
    reference = np.array([1.0, 10.0, 100.0])
    centre, low, high = second_order_study.ratio(reference / 2, reference)
    assert (centre, low, high) == pytest.approx((0.5, 0.5, 0.5))
