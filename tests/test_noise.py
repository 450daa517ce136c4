"""The noise table: keys that never collide, and numbers as good as fresh draws for what they are used for."""

from itertools import combinations
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwise import Population
from gradwise._noise import CHUNK, GRAIN, SIZE, key_windows, key_words, noise_table, window_draw, window_of

words = st.tuples(*[st.integers(0, 2**64 - 1)] * 5)
steps = st.integers(0, 2**32 - 1)
CLASSES = SIZE // GRAIN  # numbers that one place of a window may hold


@given(one=words, other=words, step=steps, later=steps)
def test_windows_belong_to_their_key_and_step(
    one: tuple[int, ...], other: tuple[int, ...], step: int, later: int
) -> None:
    """Five windows carry 5 x 19 random bits: equal for distinct keys or steps once in 4e28 pairs."""
    first, second, third = (
        key_windows(*at) for at in ((one, 5 * CHUNK, step), (other, 5 * CHUNK, step), (one, 5 * CHUNK, later))
    )
    assert (first == second) == (one == other)
    assert (first == third) == (step == later)
    assert key_words.__wrapped__(one, 5 * CHUNK) == key_words(one, 5 * CHUNK)


@given(key=words, step=steps, size=st.integers(0, 20 * CHUNK))
def test_windows_cover_the_tensor_and_stay_in_the_table(key: tuple[int, ...], step: int, size: int) -> None:
    windows = key_windows(key, size, step)
    assert sum(length for _, length, _ in windows) == size
    assert all(length == CHUNK for _, length, _ in windows[:-1])
    for offset, length, sign in windows:
        assert offset % GRAIN == 0
        assert offset >= 0
        assert offset + length <= len(noise_table("gaussian"))
        assert sign in (-1, 1)


def test_every_window_of_a_large_tensor_is_its_own() -> None:
    """Also beyond the eight that one digest decides."""
    windows = key_windows((0, 0, 0, 0, 0), 40 * CHUNK, 0)
    assert len({offset for offset, _, _ in windows}) == 40
    assert {sign for _, _, sign in windows} == {-1, 1}


def test_steps_beyond_32_bits_are_keys_of_their_own() -> None:
    population = Population()
    at = [population.windows_of(5 * CHUNK, step=step, members=[0], tensor=0) for step in (3, 3 + 2**32, 3 + 2**33)]
    assert at[0] != at[1] != at[2] != at[0]


@pytest.mark.parametrize(
    ("keys", "draws_of"),
    [(1, 200_000), (200_000, 1), (450, 450)],
    ids=["steps of one key", "keys at one step", "both"],
)
def test_draws_are_uniform_and_independent(keys: int, draws_of: int) -> None:
    """Over consecutive steps and neighbouring keys: places, signs, bits, and how one goes with the next."""
    words_of_keys = np.array([key_words((7, 0, 0, 0, tensor), 1)[0] for tensor in range(keys)])
    draws = window_draw(words_of_keys[:, :1], words_of_keys[:, 1:], np.arange(draws_of)[None])
    offsets, signs = window_of(draws.reshape(-1))
    n = offsets.size
    bits = (draws.reshape(-1)[:, None] >> np.arange(32)) & 1
    # Each frequency and each correlation has standard error at most 1 / sqrt(n); there are under 2000 of them: 5 of it.
    bound = 5 / np.sqrt(n)
    assert np.abs(2 * bits.mean(0) - 1).max() < bound
    pairs = np.corrcoef(bits.T) - np.eye(32)
    assert np.abs(pairs).max() < bound
    for axis in (0, 1):
        if draws.shape[axis] > 1:
            one, following = np.delete(draws, -1, axis).reshape(-1), np.delete(draws, 0, axis).reshape(-1)
            flips = ((one ^ following)[:, None] >> np.arange(32)) & 1
            assert np.abs(2 * flips.mean(0) - 1).max() < bound
            assert abs(np.corrcoef(one, following)[0, 1]) < bound
    # Chi-square with 255 degrees of freedom over the highest bits of the place, with each sign: mean 255, sd 22.6.
    for sign in (0, 1):
        counts = np.bincount(offsets[signs == sign] * 256 // SIZE, minlength=256)
        expected = counts.sum() / 256
        assert 255 - 5 * 22.6 < np.sum((counts - expected) ** 2 / expected) < 255 + 5 * 22.6
    assert offsets.min() >= 0
    assert offsets.max() < SIZE
    assert np.all(offsets % GRAIN == 0)


@given(first=st.integers(0, 2**32 - 1), second=st.integers(0, 2**32 - 1), step=steps)
def test_arrays_draw_what_integers_draw(first: int, second: int, step: int) -> None:
    expected = window_draw(first, second, step)
    assert 0 <= expected < 2**32
    for dtype in (np.int64, np.uint32):
        arrays = (np.array([value], dtype=dtype) for value in (first, second, step))
        assert window_draw(*arrays, word=dtype(2**32 - 1)).tolist() == [expected]


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
