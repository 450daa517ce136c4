"""The core of the population gradient: keys, noise, scales, the running mean and the statistics."""

import math
import os
import subprocess
import sys
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwise import Population
from gradwise._statistics import gradient_agreement, loss_spread, running_mean, sharpness

words = st.integers(0, 2**64 - 1)
keys = st.fixed_dictionaries({"rank": words, "step": words, "member": words, "tensor": words})


def namespaces() -> list[Any]:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import jax.numpy
    import keras.ops
    import torch

    return [
        pytest.param(np, np.asarray, id="numpy"),
        pytest.param(torch, torch.tensor, id="torch"),
        pytest.param(keras.ops, keras.ops.convert_to_tensor, id="keras"),
        pytest.param(jax.numpy, jax.numpy.asarray, id="jax"),
    ]


@given(key=keys, seed=words)
def test_same_key_same_noise(key: Any, seed: int) -> None:
    first, second = (Population(seed=seed).unit_noise((3, 2), **key) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("word", ["seed", "rank", "step", "member", "tensor"])
def test_each_word_changes_the_noise_also_above_32_bits(word: str) -> None:
    noises = []
    for value in (1, 2, 1 + 2**32, 1 + 2**63):
        key = {"rank": 0, "step": 0, "member": 0, "tensor": 0, "seed": 0, word: value}
        seed = key.pop("seed")
        noises.append(Population(seed=seed).unit_noise((8,), paired=False, **key))
    for i, a in enumerate(noises):
        for b in noises[:i]:
            assert np.abs(a - b).min() > 0


@given(key=keys)
def test_device_seed_fits_and_depends_on_every_word(key: dict[str, int]) -> None:
    population = Population(seed=5)
    named = {"stream": key["member"], "step": key["step"], "tensor": key["tensor"], "rank": key["rank"]}
    seed = population.device_seed(**named)
    assert 0 <= seed < 2**63
    for word in named:
        assert population.device_seed(**{**named, word: named[word] ^ 1}) != seed


@given(pair=st.integers(0, 1000), noise=st.sampled_from(["gaussian", "rademacher"]))
def test_antithetic_pairs_are_opposite(pair: int, noise: Any) -> None:
    population = Population(noise=noise)
    up, down = (population.unit_noise((64,), step=3, member=2 * pair + side, tensor=1) for side in (0, 1))
    assert np.array_equal(up, -down)
    alone = population.unit_noise((64,), step=3, member=2 * pair + 1, tensor=1, paired=False)
    assert not np.array_equal(alone, down)


@given(a=st.floats(-2, 2), x=st.floats(-2, 2), b=st.floats(-2, 2), sigma=st.floats(0.01, 1.0))
def test_antithetic_mean_is_exact_for_quadratics(a: float, x: float, b: float, sigma: float) -> None:
    """The slope of a x^2 / 2 + b x is linear, so its mean over +e and -e is the slope at x."""
    population = Population(size=8, sigma=sigma, scale="absolute")
    slopes = [a * (x + sigma * float(population.unit_noise((), step=0, member=i, tensor=0))) + b for i in range(8)]
    assert np.mean(slopes) == pytest.approx(a * x + b, abs=1e-12)  # rounding only


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_unit_noise_is_standardised(noise: Any, dtype: Any) -> None:
    values = Population(noise=noise).unit_noise((400, 500), step=0, member=1, tensor=0, dtype=dtype)
    assert values.dtype == dtype
    assert abs(values.mean()) < 0.01  # 200000 draws: standard error 0.002
    assert abs(values.std() - 1) < 0.01
    if noise == "rademacher":
        assert set(np.unique(values)) == {-1, 1}


@pytest.mark.parametrize(("xp", "array"), namespaces())
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("scale", ["rms", "filter", "absolute"])
def test_scales_agree_with_plain_numpy(scale: Any, shape: tuple[int, ...], xp: ModuleType, array: Any) -> None:
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    got = Population(sigma=0.5, scale=scale).scale_of(array(weights), xp=xp)
    expected = np.full(shape, 0.5, dtype=np.float32)
    if scale == "rms":
        expected = expected * np.sqrt(np.mean(weights**2))
    elif scale == "filter" and shape:
        expected = expected * np.stack([np.full(shape[1:], np.sqrt(np.mean(row**2))) for row in weights])
    elif scale == "filter":
        expected = expected * np.abs(weights)
    np.testing.assert_allclose(np.broadcast_to(np.asarray(got), shape), expected, rtol=1e-6)


@given(factor=st.floats(1e-3, 1e3), sigma=st.floats(0, 2))
def test_scale_laws(factor: float, sigma: float) -> None:
    """Relative scales follow the weights, absolute ones do not; all are proportional to sigma."""
    weights = np.random.default_rng(0).standard_normal((3, 5))
    powers: dict[Literal["rms", "filter", "absolute"], int] = {"rms": 1, "filter": 1, "absolute": 0}
    for scale, power in powers.items():
        population = Population(sigma=sigma, scale=scale)
        unit = Population(sigma=1.0, scale=scale)
        np.testing.assert_allclose(
            population.scale_of(factor * weights, xp=np),
            sigma * factor**power * unit.scale_of(weights, xp=np),
            rtol=1e-9,
        )
    assert Population(sigma=1.0).scale_of(np.zeros((2, 2)), xp=np) == 0


def test_filter_axis_is_the_hosts() -> None:
    weights = np.arange(1.0, 7.0).reshape(2, 3)
    population = Population(sigma=1.0, scale="filter")
    last = population.scale_of(weights, filter_axis=-1, xp=np)
    assert last.shape == (1, 3)
    np.testing.assert_allclose(last, population.scale_of(weights.T, xp=np).T)


def test_sigma_schedules() -> None:
    population = Population(sigma=lambda step: 0.1 * step)
    assert [population.sigma_at(step) for step in (0, 1, 3)] == pytest.approx([0, 0.1, 0.3])
    assert population.scale_of(np.ones((2, 2)), step=3, xp=np) == pytest.approx(0.3)
    assert population.scale_of(np.ones((2, 2)), sigma=0.7, xp=np) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="`sigma` must be finite and not negative; got -1"):
        Population(sigma=lambda step: -1.0).sigma_at(0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": 3}, ValueError, r"`Population\.size`.*even.*antithetic=False"),
        ({"size": 0}, ValueError, "positive"),
        ({"size": True}, ValueError, "positive"),
        ({"sigma": -1}, ValueError, "`sigma`"),
        ({"sigma": math.inf}, ValueError, "`sigma`"),
        ({"sigma": "0.1"}, TypeError, "`sigma`"),
        ({"scale": "layer"}, ValueError, "`scale`.*layer"),
        ({"noise": "laplace"}, ValueError, "`noise`.*laplace"),
        ({"seed": 2**64}, ValueError, "`seed`"),
        ({"seed": 1.0}, ValueError, "`seed`"),
    ],
)
def test_bad_populations(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Population(**options)


def test_bad_keys() -> None:
    with pytest.raises(ValueError, match=r"`step`.*-1"):
        Population().unit_noise((2,), step=-1, member=0, tensor=0)


@given(value=st.floats(-1e300, 1e300), count=st.integers(1, 100))
def test_running_mean_of_equal_values_is_exact(value: float, count: int) -> None:
    mean = math.nan
    for k in range(1, count + 1):
        mean = running_mean(mean, value, 1 / k)
    assert mean == value


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_running_mean_is_the_mean(values: list[float]) -> None:
    mean = 0.0
    for k, value in enumerate(values, start=1):
        mean = running_mean(mean, value, 1 / k)
    assert mean == pytest.approx(math.fsum(values) / len(values), abs=1e-12)


@pytest.mark.parametrize(("xp", "array"), namespaces())
def test_running_mean_on_arrays(xp: ModuleType, array: Any) -> None:
    del xp
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    mean: Any = None
    for k, row in enumerate(rows, start=1):
        mean = running_mean(mean, array(row), 1 / k)
    np.testing.assert_allclose(np.asarray(mean), rows.mean(0), rtol=1e-5)


@given(rows=st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=8))
def test_agreement_lies_between_zero_and_one(rows: list[list[float]]) -> None:
    gradients = np.array(rows)
    norms = np.square(gradients).sum(1)
    agreement = gradient_agreement(np.sum(gradients.mean(0) ** 2), norms, sizes=np.ones(len(rows)), xp=np)
    assert -1e-12 <= agreement <= 1 + 1e-9
    if len({tuple(row) for row in rows}) == 1:
        assert agreement == pytest.approx(1.0)


@pytest.mark.parametrize(("xp", "array"), namespaces())
def test_agreement_counts_members_by_their_size(xp: ModuleType, array: Any) -> None:
    one, other = np.array([1.0, 0.0]), np.array([0.0, 2.0])
    mean = (3 * one + other) / 4
    agreement = gradient_agreement(array(mean @ mean), array([1.0, 4.0]), sizes=array([3.0, 1.0]), xp=xp)
    assert float(agreement) == pytest.approx((9 + 4) / 16 / (7 / 4))
    assert math.isnan(float(gradient_agreement(array(1.0), array([math.nan, 1.0]), sizes=array([1.0, 1.0]), xp=xp)))
    assert float(gradient_agreement(array(0.0), array([0.0, 0.0]), sizes=array([1.0, 1.0]), xp=xp)) == 1


@pytest.mark.parametrize(("xp", "array"), namespaces())
def test_spread_is_over_the_members_that_count(xp: ModuleType, array: Any) -> None:
    losses, counted = array([3.0, 7.0, 5.0, 99.0]), array([1.0, 1.0, 1.0, 0.0]) > 0
    assert float(loss_spread(losses, counted, xp=xp)) == pytest.approx(math.sqrt(8 / 3))  # divided by n
    assert float(loss_spread(array([0.1] * 6), array([1.0] * 6) > 0, xp=xp)) == 0


def test_sharpness_is_half_the_mean_projection() -> None:
    assert sharpness(3.0) == 1.5


FRAMEWORKS = ("torch", "keras", "tensorflow", "jax")


def imported_frameworks(statement: str) -> str:
    code = f"import sys; {statement}; print(*[name for name in {FRAMEWORKS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_core_imports_no_framework() -> None:
    assert imported_frameworks("import gradwise") == ""
    assert imported_frameworks("import gradwise, torch") == "torch"  # the check itself can fail


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{0}":
            raise ModuleNotFoundError("No module named '{0}'", name="{0}")

sys.meta_path.insert(0, Absent())
import gradwise.{0}
"""


@pytest.mark.parametrize(("framework", "extra"), [("torch", "torch"), ("keras", "tensorflow")])
def test_a_missing_framework_is_explained(framework: str, extra: str) -> None:
    code = WITHOUT.format(framework)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f'pip install "gradwise[{extra}]"' in done.stderr
