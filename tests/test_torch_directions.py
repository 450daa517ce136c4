"""Derivatives known only along directions: against closed forms, finite differences and the full Jacobian."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_torch_matching import DOUBLE, INPUTS, MODELS, OUTPUTS, N, grads, setup
from torch import Tensor, nn

from gradwise_torch._derivatives import value_and_jacobian
from gradwise_torch._matching import GradientMatching

DIRECTIONS = 3


def raw(**kwargs) -> GradientMatching:
    return GradientMatching(scale="none", **kwargs)


def along(name="mlp") -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Return a model, inputs, values, directions and targets of shape (batch, n_outputs, DIRECTIONS)."""
    model, x, y, target = setup(name)
    tangents = torch.randn(N, DIRECTIONS, *x.shape[1:], dtype=DOUBLE)
    return model, x, y, tangents, torch.randn(N, target.shape[1], DIRECTIONS, dtype=DOUBLE)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_slopes_of_the_values(name):
    """Against central differences of the outputs along each direction."""
    model, x, _, tangents, _ = along(name)
    with torch.no_grad():
        slopes = torch.stack(
            [(model(x + 1e-6 * v) - model(x - 1e-6 * v)) / 2e-6 for v in tangents.unbind(1)], dim=2
        ).contiguous()
    # Zero up to rounding of the differences: 1e-16 / 1e-6, squared.
    assert raw()(model, x, tangents=tangents, target_jvp=slopes).item() < 1e-16
    slopes[2, 0, 1] += 0.1
    loss = raw()(model, x, tangents=tangents, target_jvp=slopes).item()
    assert loss == pytest.approx(0.01 / slopes.numel(), rel=1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("loss_name", ["mse", "huber"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_equals_central_differences(name, loss_name, train):
    model, x, y, tangents, target = along(name)
    model.train(train)
    mask = torch.rand(target.shape) > 0.3
    target[~mask] = math.nan  # and what is masked must not matter
    target[1, 0, 0], mask[1, 0, 0] = math.nan, True
    weight = torch.rand(N, dtype=DOUBLE)
    matching = GradientMatching(loss=loss_name).fit(x, y, target_jvp=target)

    def loss():
        return matching(model, x, tangents=tangents, target_jvp=target, mask=mask, sample_weight=weight)

    exact = torch.cat([gradient.reshape(-1) for gradient in grads(loss(), model)])
    generator = torch.Generator().manual_seed(0)
    parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
    direction = torch.randn(len(parameters), dtype=DOUBLE, generator=generator)
    ends = []
    for step in (1e-5, -1e-5):
        nn.utils.vector_to_parameters(parameters + step * direction, model.parameters())
        ends.append(loss().item())
    # 1e-6: rounding of a central difference with step 1e-5 in float64
    assert (exact @ direction).item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)


def test_unit_directions_are_the_jacobian():
    model, x, y, _, _ = along("layer norm")
    jacobian = torch.randn(N, OUTPUTS, INPUTS, dtype=DOUBLE)
    axes = torch.eye(INPUTS, dtype=DOUBLE).expand(N, -1, -1)
    full = raw()(model, x, jacobian)
    torch.testing.assert_close(raw()(model, x, tangents=axes, target_jvp=jacobian), full / INPUTS)  # a mean
    # In units of the standard deviations of x the two scales agree as well: sigma_y^2 times relative errors.
    sigma = x.std(dim=0, correction=0)
    scaled = torch.diag(sigma).expand(N, -1, -1)
    one = GradientMatching().fit(x, y, jacobian)(model, x, jacobian)
    other = GradientMatching().fit(x, y, target_jvp=jacobian * sigma)
    torch.testing.assert_close(other(model, x, tangents=scaled, target_jvp=jacobian * sigma), one)


@pytest.mark.parametrize("name", ["mlp", "layer norm", "images"])
def test_finished_outputs_and_both_in_one_pass_give_the_same(name):
    model, x, y, tangents, target = along(name)
    matching = GradientMatching().fit(x, y, target_jvp=target)
    plain = matching(model, x, tangents=tangents, target_jvp=target)
    values, loss = matching.with_values(model, x, tangents=tangents, target_jvp=target)
    leaf = x.clone().requires_grad_()
    finished = matching.from_outputs(model(leaf), wrt=leaf, tangents=tangents, target_jvp=target)
    forces = matching.from_outputs(model(leaf), wrt=leaf, tangents=tangents, target_jvp=-target, sign=-1)
    torch.testing.assert_close(values, model(x))
    for other in (loss, finished, forces):
        torch.testing.assert_close(other, plain)
        for a, b in zip(grads(other, model), grads(plain, model), strict=True):
            torch.testing.assert_close(a, b)


def test_unknown_directions_do_not_count():
    model, x, y, tangents, target = along()
    few = raw()(model, x, tangents=tangents[:, :2], target_jvp=target[:, :, :2])
    hidden = target.clone()
    hidden[:, :, 2] = math.nan
    torch.testing.assert_close(raw()(model, x, tangents=tangents, target_jvp=hidden), few)
    mask = torch.ones_like(target, dtype=torch.bool)
    mask[:, :, 2] = False
    torch.testing.assert_close(raw()(model, x, tangents=tangents, target_jvp=target, mask=mask), few)
    fitted = GradientMatching().fit(x, y, target_jvp=target, mask=mask)
    torch.testing.assert_close(
        fitted.scales.jvp_scale, GradientMatching().fit(x, y, target_jvp=hidden).scales.jvp_scale
    )
    one_output = GradientMatching().fit(x, y[:, 0], target_jvp=target[:, 0, 0])
    assert one_output.scales.jvp_scale.shape == (1, 1)


@given(log_x=st.floats(-3, 3), log_y=st.floats(-3, 3), log_v=st.floats(-3, 3))
def test_units_and_the_common_length_of_directions_do_not_matter(log_x, log_y, log_v):
    model, x, y, tangents, target = along()
    a, b, c = 10.0**log_x, 10.0**log_y, 10.0**log_v
    with torch.no_grad():
        reference = GradientMatching().fit(x, y, target_jvp=target)(model, x, tangents=tangents, target_jvp=target)
        fitted = GradientMatching().fit(a * x, b * y, target_jvp=b * c * target)
        loss = fitted(lambda x: b * model(x / a), a * x, tangents=a * c * tangents, target_jvp=b * c * target)
    assert loss.item() == pytest.approx(b**2 * reference.item(), rel=1e-6)


def test_projections_with_directions_average_to_the_full_loss():
    model, x, y, tangents, target = along()
    exact = GradientMatching().fit(x, y, target_jvp=target)(model, x, tangents=tangents, target_jvp=target).item()
    drawn = GradientMatching(projections=1, seed=0).fit(x, y, target_jvp=target)
    losses = torch.tensor([drawn(model, x, tangents=tangents, target_jvp=target).item() for _ in range(500)])
    assert losses.mean().item() == pytest.approx(exact, abs=4 * losses.std().item() / math.sqrt(500))


def test_a_path_is_enough_for_a_field_that_varies_along_it():
    """Sensors on a track: the slope along the track alone recovers a linear field's component along it, exactly."""
    torch.manual_seed(0)
    heading = torch.nn.functional.normalize(torch.randn(20, 2, dtype=DOUBLE), dim=1)
    position = torch.cumsum(heading, dim=0)
    field = torch.tensor([2.0, -1.0], dtype=DOUBLE)
    model = nn.Linear(2, 1, bias=False).double()
    matching = GradientMatching().fit(position, position @ field, target_jvp=heading @ field)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = matching(model, position, tangents=heading, target_jvp=heading @ field)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    torch.testing.assert_close(model.weight.detach()[0], field, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        slopes = value_and_jacobian(model, position)[1][:, 0]
    torch.testing.assert_close((slopes * heading).sum(1), heading @ field, rtol=1e-5, atol=1e-5)
