"""The benchmarks: their own formulas are right, and each runs (a short smoke of the long studies)."""

import numpy as np
import pytest
import torch


def test_radial_pull_is_what_differentiating_the_scale_adds() -> None:
    from relative_noise import radial_pull

    torch.manual_seed(0)
    mean, e, curvature = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    w = mean.clone().requires_grad_()
    z = 0.3 * w.square().mean().sqrt() * e
    (curvature * (w + z)).sin().sum().backward()
    perturbed = mean + z.detach()
    gradient = curvature * (curvature * perturbed).cos()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, gradient + radial_pull(mean, gradient, z.detach()))


def test_relative_noise_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import relative_noise

    monkeypatch.setattr(relative_noise, "STEPS", 3)
    constant, differentiated = (relative_noise.run("sgd", 100, 0.3, how, 0) for how in (False, True))
    assert np.isfinite([*constant, *differentiated]).all()
    assert constant != differentiated


def test_overhead_steps_train() -> None:
    import overhead

    make, shape = next(iter(overhead.MODELS.values()))
    for way in overhead.WAYS:
        overhead.step_of(way, make, shape)()
