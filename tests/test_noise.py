"""The noise table: keys that never collide, and numbers as good as fresh draws for what they are used for."""

from itertools import combinations
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwise import Population
from gradwise._noise import CHUNK, GRAIN, SIZE, key_windows, noise_table

words = st.tuples(*[st.integers(0, 2**64 - 1)] * 5)
CLASSES = SIZE // GRAIN  # numbers that one place of a window may hold


@given(one=words, other=words)
def test_windows_belong_to_their_key(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Five windows carry 5 x 19 random bits: equal for distinct keys once in 4e28 pairs."""
    first, second = (key_windows(key, 5 * CHUNK) for key in (one, other))
    assert (first == second) == (one == other)
    assert key_windows.__wrapped__(one, 5 * CHUNK) == first


@given(key=words, size=st.integers(0, 20 * CHUNK))
def test_windows_cover_the_tensor_and_stay_in_the_table(key: tuple[int, ...], size: int) -> None:
    windows = key_windows(key, size)
    assert sum(length for _, length, _ in windows) == size
    assert all(length == CHUNK for _, length, _ in windows[:-1])
    for offset, length, sign in windows:
        assert offset % GRAIN == 0
        assert offset >= 0
        assert offset + length <= len(noise_table("gaussian"))
        assert sign in (-1, 1)


def test_every_window_of_a_large_tensor_is_its_own() -> None:
    """Also beyond the eight that one digest decides."""
    windows = key_windows((0, 0, 0, 0, 0), 40 * CHUNK)
    assert len({offset for offset, _, _ in windows}) == 40
    assert {sign for _, _, sign in windows} == {-1, 1}


def test_offsets_and_signs_are_uniform() -> None:
    draws = [key_windows((7, 0, step, 0, tensor), 1)[0] for step in range(500) for tensor in range(20)]
    offsets = np.array([offset for offset, _, _ in draws]) / SIZE
    signs = np.array([sign for _, _, sign in draws])
    # 10000 draws: standard errors 0.003 (mean, sd 1 / sqrt(12)), 0.01 (sign) and 0.01 (their correlation).
    assert abs(offsets.mean() - 0.5) < 0.012
    assert abs(offsets.std() - 12**-0.5) < 0.01
    assert abs(signs.mean()) < 0.04
    assert abs(np.corrcoef(offsets, signs)[0, 1]) < 0.04


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_the_table_is_standardised_where_a_window_can_start(noise: str) -> None:
    classes = noise_table(noise)[:SIZE].reshape(-1, GRAIN).astype(np.float64)
    np.testing.assert_allclose(np.square(classes).mean(0), 1, atol=1e-5)
    if noise == "gaussian":  # the sign of a window sees to the mean of the other
        np.testing.assert_allclose(classes.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(np.mean(classes**4), 3, atol=0.02)  # sd of the sample kurtosis: sqrt(96 / 2**22)
    assert noise_table(noise).ctypes.data % 64 == 0
    assert np.array_equal(noise_table(noise)[SIZE:], noise_table(noise)[:CHUNK])


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_two_places_of_a_window_are_as_good_as_uncorrelated(noise: str) -> None:
    """Over keys, their correlation is that of two places of the table, for every lag a window can have.

    For ideal noise it is normal with standard deviation 1 / sqrt(CLASSES); its maximum over the 16 x CHUNK pairs of
    place and lag then stays below 6 of them. Fresh draws obey the same bound over as many steps, not a better one.
    """
    classes = noise_table(noise)[:SIZE].reshape(-1, GRAIN).astype(np.float64)
    spectra = np.fft.rfft(classes, axis=0)
    worst = 0.0
    for i in range(GRAIN):
        for j in range(GRAIN):
            correlation = np.fft.irfft(np.conj(spectra[:, i]) * spectra[:, j], n=CLASSES) / CLASSES
            lags = correlation[: CHUNK // GRAIN]
            worst = max(worst, np.abs(lags[1:] if i == j else lags).max())
    assert worst < 6 / np.sqrt(CLASSES)


def test_members_of_a_step_are_uncorrelated() -> None:
    """Sixteen streams and tensors: every pair's correlation, including the overlap that the table allows."""
    population = Population(size=8, antithetic=False)
    draws = [population.unit_noise((4096,), step=3, member=m, tensor=t) for m in range(8) for t in range(2)]
    for a, b in combinations(draws, 2):
        assert abs(np.mean(a * b)) < 6 / np.sqrt(4096)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_estimates_scatter_as_with_fresh_draws(noise: Literal["gaussian", "rademacher"]) -> None:
    """Mean and variance over steps of what the noise is for: projections g . e, and quadratic forms e' H e.

    The directions are smooth, the worst case for a table whose windows are shifts of each other.
    """
    size, steps = 512, 3000
    rng = np.random.default_rng(0)
    population = Population(noise=noise, antithetic=False)
    table = np.stack([population.unit_noise((size,), step=step, member=0, tensor=0) for step in range(steps)])
    fresh = rng.standard_normal((steps, size)) if noise == "gaussian" else rng.choice([-1.0, 1.0], (steps, size))
    positions = np.arange(size)
    smooth = np.stack([np.ones(size), np.sin(positions / 20), np.exp(-positions / 50)])
    smooth /= np.linalg.norm(smooth, axis=1, keepdims=True)
    hessian = np.exp(-np.abs(positions[:, None] - positions) / 10)
    for draws in (table, fresh):
        projections = draws @ smooth.T
        # Standard error of a mean 1 / sqrt(3000) = 0.018, of a variance sqrt(2 / 3000) = 0.026; 4.5 of each.
        assert np.abs(projections.mean(0)).max() < 0.082
        assert np.abs(projections.var(0) - 1).max() < 0.116
        forms = np.einsum("si,ij,sj->s", draws, hessian, draws)
        spread = np.sqrt(2 * np.square(hessian - (np.diag(np.diag(hessian)) if noise == "rademacher" else 0)).sum())
        assert abs(forms.mean() - size) < 4.5 * spread / np.sqrt(steps)
        assert forms.std() == pytest.approx(spread, rel=0.1)
    # Smoothing a step function: the mean of sign(1 + g . e) is erf-like, and the same either way.
    signs = [np.sign(1 + (draws @ smooth[0])).mean() for draws in (table, fresh)]
    assert signs[0] == pytest.approx(signs[1], abs=6 * np.sqrt(2 / steps))
