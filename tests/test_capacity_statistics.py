"""The statistics of a capacity study: coverage of the band, and its definition in loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers

from gradwise._capacity_statistics import last_before_rise, rise_band, within_one_standard_error

GAPS = np.array([0.0, 0.0, 0.1, 0.6, 1.0, 0.9])
RISES = np.array([GAPS[h] - GAPS[:h].min() for h in range(1, len(GAPS))])


def noisy(rng: np.random.Generator, units: int, kind: str) -> np.ndarray:
    """Units around the known gaps: a shift of their own, and errors that grow with capacity."""
    shape = (units, len(GAPS))
    errors = {"normal": rng.normal(size=shape), "skewed": 1 - rng.exponential(size=shape)}[kind]
    return GAPS + errors * np.linspace(0.1, 0.4, len(GAPS)) + rng.normal(size=(units, 1))


@pytest.mark.parametrize("units", [5, 10, 20])
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_band_covers_known_rises_together(units: int, kind: str) -> None:
    rng = np.random.default_rng(99 + units)
    bands = [rise_band(noisy(rng, units, kind), n_resamples=400, rng=rng)[1:] for _ in range(200)]
    covered = np.mean([np.all(band <= RISES) for band in bands])
    assert covered >= 0.92  # 0.95 less two standard errors of 200 draws
    found = np.mean([band.max() > np.log(1.5) for band in bands])
    assert found > (0.7 if units == 5 else 0.95)  # and not by lying far below


def test_no_rise_is_seldom_found() -> None:
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(10, 1)) + 0.3 * rng.normal(size=(10, 6)) for _ in range(150)]
    assert np.mean([rise_band(value, n_resamples=400, rng=rng).max() > 0 for value in values]) <= 0.08


def test_band_is_its_definition_in_loops() -> None:
    values = noisy(np.random.default_rng(3), 7, "normal")
    n, size = values.shape
    counts = np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), size=200)
    pairs = [(low, high) for low in range(size) for high in range(low + 1, size)]
    difference = {(low, high): values[:, high] - values[:, low] for low, high in pairs}
    error = {pair: d.std(ddof=1) / np.sqrt(n) for pair, d in difference.items()}
    steady = np.median(list(error.values()))
    largest = []
    for count in counts:
        drawn = {pair: np.repeat(d, count) for pair, d in difference.items()}
        largest.append(
            max(
                (drawn[pair].mean() - d.mean()) / (drawn[pair].std() / np.sqrt(n - 1) + steady)
                for pair, d in difference.items()
            )
        )
    critical = sorted(largest)[190]  # of 200: the first that at least 0.95 * 199 of the others do not exceed
    expected = [
        max(difference[low, high].mean() - critical * (error[low, high] + steady) for low in range(high))
        for high in range(1, size)
    ]
    band = rise_band(values, n_resamples=200, rng=np.random.default_rng(5))
    np.testing.assert_allclose(band[1:], expected, rtol=1e-12)  # rounding
    assert band[0] == -np.inf


@given(factor=floats(0.1, 10), seed=integers(0, 100))
def test_band_ignores_what_a_unit_adds_everywhere_and_scales(factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, shifts = rng.normal(size=(6, 4)), rng.normal(size=(6, 1))
    band, other = (
        rise_band(array, n_resamples=50, rng=np.random.default_rng(seed))
        for array in (values, factor * values + shifts)
    )
    np.testing.assert_allclose(other[1:], factor * band[1:], rtol=1e-9, atol=1e-12)


def test_band_of_units_without_differences_and_of_one_unit() -> None:
    rng = np.random.default_rng(0)
    same = np.tile([0.0, 0.5, 0.25], (4, 1))
    np.testing.assert_allclose(rise_band(same, rng=rng)[1:], [0.5, 0.25])
    assert np.all(rise_band(same[:1], rng=rng) == -np.inf)


def test_last_before_rise() -> None:
    band = np.array([-np.inf, 0.2, 0.5, 0.3])
    assert last_before_rise(band, 0.4) == 1
    assert last_before_rise(band, 0.1) == 0
    assert last_before_rise(band, 0.5) is None  # must exceed it


def test_within_one_standard_error_by_hand() -> None:
    errors = np.array([[5.0, 1.1, 0.9, 2.0], [5.0, 1.1, 1.1, 2.0]])  # means 5, 1.1, 1.0, 2; standard error 0.1
    assert within_one_standard_error(errors) == 1
    assert within_one_standard_error(errors + np.array([0, 0.01, 0, 0])) == 2
    assert within_one_standard_error(errors[:1]) == 2  # one unit has no standard error
