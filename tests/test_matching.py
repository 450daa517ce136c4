"""The gradient-matching loss on arrays: closed forms, a naive reference, and what masks and weights mean."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwise._matching import gradient_matching_loss, gradient_norm_loss, gradient_norms, reduce_terms

SHAPE = (5, 2, 3)


def data(seed: int, shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    target = rng.standard_normal(shape)
    target[rng.random(shape) < 0.2] = np.nan
    return {
        "predicted": rng.standard_normal(shape),
        "target": target,
        "mask": rng.random(shape) < 0.7,
        "sample_weight": rng.random(shape[0]),
        "scale": rng.random(shape[1:]),
    }


def naive(predicted, target, mask=None, sample_weight=None, scale=None, loss="mse", threshold=1.0):
    total = weight = 0.0
    batch, n_outputs, n_inputs = predicted.shape
    for i, o, j in product(range(batch), range(n_outputs), range(n_inputs)):
        if math.isnan(target[i, o, j]) or (mask is not None and not mask[i, o, j]):
            continue
        w = 1.0 if sample_weight is None else sample_weight[i]
        r = (predicted[i, o, j] - target[i, o, j]) * (1.0 if scale is None else scale[o, j])
        t = np.broadcast_to(threshold, n_outputs)[o]
        total += w * (r**2 if loss == "mse" or abs(r) <= t else 2 * t * abs(r) - t**2)
        weight += w
    return n_inputs * total / weight if weight else 0.0


def test_without_extras_it_is_the_mean_over_samples_and_outputs_of_the_sum_over_inputs():
    rng = np.random.default_rng(0)
    predicted, target = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
    expected = ((predicted - target) ** 2).sum(axis=2).mean()
    assert gradient_matching_loss(predicted, target, xp=np) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("threshold", [0.3, np.array([0.2, 0.6])], ids=["one", "per output"])
@pytest.mark.parametrize("given_arguments", [(), ("mask",), ("sample_weight",), ("mask", "sample_weight", "scale")])
def test_equals_a_loop(loss, threshold, given_arguments):
    arrays = data(1)
    optional = {name: arrays[name] for name in given_arguments}
    args = (arrays["predicted"], arrays["target"])
    got = gradient_matching_loss(*args, **optional, loss=loss, threshold=threshold, xp=np)
    assert got == pytest.approx(naive(*args, **optional, loss=loss, threshold=threshold), rel=1e-13)  # rounding only


def test_huber_is_quadratic_inside_linear_beyond_and_smooth_between():
    def h(r, t=2.0):
        return float(
            gradient_matching_loss(np.full((1, 1, 1), r), np.zeros((1, 1, 1)), loss="huber", threshold=t, xp=np)
        )

    assert h(1.5) == pytest.approx(2.25)
    assert h(-5.0) == pytest.approx(2 * 2 * 5 - 4)
    assert h(2.0) == pytest.approx(4.0)
    assert (h(2 + 1e-6) - h(2 - 1e-6)) / 2e-6 == pytest.approx(4.0, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_mask_algebra(seed):
    arrays = data(seed)
    predicted, target, mask, weight = (arrays[k] for k in ("predicted", "target", "mask", "sample_weight"))

    def loss(predicted=predicted, target=target, **kwargs):
        return gradient_matching_loss(predicted, target, xp=np, **kwargs)

    assert loss(mask=np.ones(SHAPE, bool)) == loss()
    assert loss(mask=mask) == loss(target=np.where(mask, target, np.nan))
    assert loss(sample_weight=np.ones(SHAPE[0])) == pytest.approx(loss(), rel=1e-12)
    assert loss(sample_weight=7 * weight) == pytest.approx(loss(sample_weight=weight), rel=1e-12)
    order = np.random.default_rng(seed).permutation(SHAPE[0])
    shuffled = loss(predicted[order], target[order], mask=mask[order], sample_weight=weight[order])
    assert shuffled == pytest.approx(loss(mask=mask, sample_weight=weight), rel=1e-12)
    weight = np.where(np.arange(SHAPE[0]) == 2, 0.0, weight)
    predicted_inf = predicted.copy()
    predicted_inf[2] = np.inf  # a removed sample may hold anything
    keep = np.arange(SHAPE[0]) != 2
    removed = loss(predicted[keep], target[keep], mask=mask[keep], sample_weight=weight[keep])
    assert loss(predicted_inf, mask=mask, sample_weight=weight) == pytest.approx(removed, rel=1e-12)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_zero_if_and_only_if_known_derivatives_are_equal(seed):
    arrays = data(seed)
    target, mask = arrays["target"], arrays["mask"]
    known = mask & ~np.isnan(target)
    predicted = np.where(known, target, arrays["predicted"])
    assert gradient_matching_loss(predicted, target, mask=mask, xp=np) == 0
    if known.any():
        predicted[tuple(np.argwhere(known)[0])] += 1e-3
        assert gradient_matching_loss(predicted, target, mask=mask, xp=np) > 0


def test_nothing_known_gives_zero():
    predicted = np.ones(SHAPE)
    assert gradient_matching_loss(predicted, np.full(SHAPE, np.nan), xp=np) == 0
    assert gradient_matching_loss(predicted, predicted + 1, sample_weight=np.zeros(5), xp=np) == 0
    assert gradient_matching_loss(np.ones((0, 2, 3)), np.ones((0, 2, 3)), xp=np) == 0


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_unknown_entries_do_not_reach_the_gradient(loss):
    torch = pytest.importorskip("torch")
    arrays = data(3)
    target = torch.tensor(arrays["target"])
    mask = torch.tensor(arrays["mask"])
    target[0] = math.nan
    predicted = torch.tensor(arrays["predicted"], requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    gradient_matching_loss(predicted, target, mask=mask, sample_weight=weight, loss=loss, xp=torch).backward()
    gradient = predicted.grad
    assert gradient is not None
    unknown = ~mask | target.isnan()
    unknown[1] = True
    assert (gradient[unknown] == 0).all()
    assert (gradient[~unknown] != 0).all()
    predicted.grad = None
    gradient_matching_loss(predicted, torch.full(SHAPE, math.nan), loss=loss, xp=torch).backward()
    gradient = predicted.grad
    assert gradient is not None
    assert (gradient == 0).all()


@pytest.mark.parametrize("namespace", ["torch", "keras.ops", "jax.numpy"])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_namespaces_agree(namespace, loss):
    xp = pytest.importorskip(namespace)
    convert = getattr(xp, "asarray", None) or xp.convert_to_tensor
    arrays = {k: v if v.dtype == bool else v.astype(np.float32) for k, v in data(4).items()}
    threshold = np.array([0.2, 0.5], np.float32)
    expected = gradient_matching_loss(**arrays, loss=loss, threshold=threshold, xp=np)
    tensors = {k: convert(v) for k, v in arrays.items()}
    got = gradient_matching_loss(**tensors, loss=loss, threshold=convert(threshold), xp=xp)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)  # float32
    norms = gradient_norm_loss(tensors["predicted"], 1.0, xp=xp)
    assert float(norms) == pytest.approx(float(gradient_norm_loss(arrays["predicted"], 1.0, xp=np)), rel=1e-5)


def test_reductions():
    terms = np.array([1.0, 4.0, 7.0])
    mean, total, each = (reduce_terms(terms, np.array(6.0), reduction=r, xp=np) for r in ("mean", "sum", "none"))
    assert mean == pytest.approx(2.0)
    assert each.mean() == pytest.approx(mean)
    assert each.sum() == pytest.approx(total)


def test_gradient_norm_loss_and_its_gradient_at_zero():
    torch = pytest.importorskip("torch")
    jacobian = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]], requires_grad=True)
    loss = gradient_norm_loss(jacobian, 1.0, xp=torch)
    assert loss.item() == pytest.approx(((5 - 1) ** 2 + 1) / 2)
    loss.backward()
    assert jacobian.grad is not None
    assert jacobian.grad.tolist() == [[[pytest.approx(4 * 0.6), pytest.approx(4 * 0.8)]], [[0.0, 0.0]]]
    assert gradient_norms(np.zeros((1, 1, 2)), xp=np).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("target", (5, 1, 3)),
        ("target", (5, 3, 2)),
        ("target", (2, 3)),
        ("mask", (1, 2, 3)),
        ("sample_weight", (5, 1)),
        ("scale", (1, 3)),
        ("scale", (3,)),
        ("threshold", (3,)),
        ("predicted", (5, 3)),
    ],
)
def test_shapes_that_merely_broadcast_are_errors(name, shape):
    arrays = data(0)
    arrays[name] = np.ones(shape, bool if name == "mask" else float)
    with pytest.raises(ValueError, match=f"`{name}` must"):
        gradient_matching_loss(**arrays, xp=np)


def test_other_bad_arguments():
    arrays = data(0)
    with pytest.raises(ValueError, match="`loss` must be one of 'mse', 'huber'"):
        gradient_matching_loss(**arrays, loss="mae", xp=np)
    with pytest.raises(TypeError, match="`mask` must be boolean"):
        gradient_matching_loss(**{**arrays, "mask": np.ones(SHAPE)}, xp=np)
