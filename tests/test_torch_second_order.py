"""Second derivatives as targets: closed forms, the formula, the loss gradient against finite differences, units."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_torch_matching import DOUBLE, INPUTS, MODELS, OUTPUTS, N, grads, mlp, setup
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss

from gradwise._matching_scale import matching_scale, second_order_scale
from gradwise_torch._matching import GradientMatching

DIRECTIONS = 2


def raw(**kwargs) -> GradientMatching:
    return GradientMatching(scale="none", **kwargs)


def per_sample_hessians(model, x: Tensor) -> Tensor:
    """Reference: torch's Jacobian of its Jacobian, one sample at a time, (batch, n_outputs, n_inputs, n_inputs)."""
    n = x[0].numel()

    def one(flat: Tensor) -> Tensor:
        return model(flat.reshape(1, *x.shape[1:]))[0]

    rows: list[Any] = [jacobian(lambda f: jacobian(one, f, create_graph=True), row.flatten()) for row in x]
    return torch.stack(rows).reshape(len(x), -1, n, n)


def with_tangents(name="mlp", seed=0) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Return a model, inputs, values, directions, and targets (batch, n_outputs, DIRECTIONS, n_inputs)."""
    model, x, y, target = setup(name, seed)
    tangents = torch.randn(N, DIRECTIONS, *x.shape[1:], dtype=DOUBLE)
    hvp = torch.randn(N, target.shape[1], DIRECTIONS, target.shape[2], dtype=DOUBLE)
    return model, x, y, tangents, hvp


@pytest.mark.parametrize("name", MODELS)
def test_products_equal_those_with_per_sample_hessians(name):
    model, x, _, tangents, hvp = with_tangents(name)
    with sdpa_kernel(SDPBackend.MATH):
        hessians = per_sample_hessians(model, x)
    expected = torch.einsum("bojk,bdk->bodj", hessians, tangents.flatten(2))
    loss = raw()(model, x, tangents=tangents, target_hvp=hvp)
    torch.testing.assert_close(loss, (expected - hvp).square().sum(dim=3).mean())
    curvature = torch.einsum("bodj,bdj->bod", expected, tangents.flatten(2))
    loss = raw()(model, x, tangents=tangents, target_curvature=torch.zeros_like(curvature))
    torch.testing.assert_close(loss, curvature.square().mean())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("loss_name", ["mse", "huber"])
@pytest.mark.parametrize("name", [*MODELS, "instance norm", "rms norm", "group norm"])
def test_gradient_equals_central_differences(name, loss_name, train):
    norms = {
        "instance norm": lambda: nn.Sequential(
            nn.Unflatten(1, (5, 1)), Widen(), nn.InstanceNorm1d(5, eps=0.5), nn.Flatten()
        ),
        "rms norm": lambda: nn.RMSNorm(5),
        "group norm": lambda: nn.GroupNorm(1, 5),
    }
    if name in norms:
        _, x, y, tangents, hvp = with_tangents()
        model = mlp(norms[name]()).double() if name != "instance norm" else wide(norms[name]()).double()
    else:
        model, x, y, tangents, hvp = with_tangents(name)
    model.train(train)
    hvp[1, 0, 0] = math.nan
    weight = torch.rand(N, dtype=DOUBLE)
    matching = GradientMatching(loss=loss_name).fit(x, y, target_hvp=hvp)

    def loss():
        return matching(model, x, tangents=tangents, target_hvp=hvp, sample_weight=weight)

    exact = torch.cat([gradient.reshape(-1) for gradient in grads(loss(), model)])
    generator = torch.Generator().manual_seed(0)
    parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
    for _ in range(2):
        direction = torch.randn(len(parameters), dtype=DOUBLE, generator=generator)
        ends = []
        for step in (1e-5, -1e-5):
            nn.utils.vector_to_parameters(parameters + step * direction, model.parameters())
            ends.append(loss().item())
        nn.utils.vector_to_parameters(parameters.clone(), model.parameters())
        # 1e-6: rounding of a central difference with step 1e-5 in float64
        assert (exact @ direction).item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)


class Widen(nn.Module):
    """Three positions for each channel, so that instance normalisation has something to normalise."""

    def forward(self, x):
        return torch.cat([x, x.sin(), x.square()], dim=2)


def wide(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, 5), norm, nn.Tanh(), nn.Linear(15, OUTPUTS))


def test_layers_by_formula_equal_torchs_own_and_update_the_same_statistics():
    from gradwise_torch._hessian_norms import thrice_differentiable_norms

    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, dtype=DOUBLE)
    layers = [
        nn.LayerNorm(5),
        nn.LayerNorm([3, 5], eps=1e-2),
        nn.LayerNorm(5, elementwise_affine=False),
        nn.InstanceNorm1d(3),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        nn.InstanceNorm1d(3, track_running_stats=True).eval(),
    ]
    for layer in layers:
        layer.double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        statistics = []
        results = []
        start = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        for by_formula in (False, True):
            layer.load_state_dict(start, strict=False)
            if by_formula:
                with thrice_differentiable_norms():
                    results.append(layer(x))
            else:
                results.append(layer(x))
            statistics.append([buffer.clone() for buffer in layer.buffers()])
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(statistics[1], statistics[0])
    with thrice_differentiable_norms():
        by_keyword = nn.functional.layer_norm(input=x, normalized_shape=[5])
    torch.testing.assert_close(by_keyword, nn.functional.layer_norm(x, [5]))


def test_torchs_own_third_derivative_of_layer_norm_is_wrong_so_finished_outputs_are_refused():
    """If this fails because torch was mended, the formula may go."""
    model, x, _, tangents, hvp = with_tangents("layer norm")
    leaf = x.clone().requires_grad_()

    def by_hand() -> Tensor:
        (gradient,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf, create_graph=True)
        (product,) = torch.autograd.grad(gradient, leaf, tangents[:, 0], create_graph=True)
        return product.square().sum()

    weight = next(model.parameters())
    direction = torch.randn_like(weight)
    wrong = (torch.autograd.grad(by_hand(), weight)[0] * direction).sum().item()
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
        ends.append(by_hand().item())
        with torch.no_grad():
            weight.sub_(direction, alpha=step)
    assert wrong != pytest.approx((ends[0] - ends[1]) / 2e-5, rel=0.01)
    with pytest.raises(RuntimeError, match="layer, instance or batch normalisation must not be trained"):
        raw().from_outputs(model(leaf), wrt=leaf, tangents=tangents, target_hvp=hvp)
    exact = raw()(model, x, tangents=tangents, target_hvp=hvp)
    evaluated = raw().eval().from_outputs(model(leaf), wrt=leaf, tangents=tangents, target_hvp=hvp)
    torch.testing.assert_close(evaluated, exact.detach())  # second derivatives themselves are right
    assert not evaluated.requires_grad


def test_a_quadratic_form_is_matched_exactly_and_nothing_else_is():
    torch.manual_seed(0)
    root = torch.randn(3, 3, dtype=DOUBLE)
    hessian = root + root.T
    x, v = torch.randn(5, 3, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    matrix = nn.Parameter(hessian.clone())

    def model(x: Tensor) -> Tensor:
        return torch.einsum("bi,ij,bj->b", x, matrix, x) / 2

    matching = GradientMatching().fit(x, model(x), target_hvp=v @ hessian)
    loss = matching(model, x, tangents=v, target_hvp=v @ hessian)
    assert loss.item() < 1e-25  # rounding of 3 x 3 products, squared
    curvature = torch.einsum("bi,ij,bj->b", v, hessian, v)
    assert raw()(model, x, tangents=v, target_curvature=curvature).item() < 1e-25
    for i, j in np.ndindex(5, 3):
        target = v @ hessian
        target[i, j] += 0.1
        # one entry of five samples is off by 0.1: sigma_y^2 sigma_xj^2 0.01 / sum of (sigma_x T)^2
        sigma_x, sigma_y = x.std(dim=0, correction=0), model(x).std(correction=0)
        fitted_to = (sigma_x * (v @ hessian)).square().sum()
        expected = sigma_y.square() * (0.1 * sigma_x[j]).square() / fitted_to
        torch.testing.assert_close(matching(model, x, tangents=v, target_hvp=target), expected)


def test_the_formula_of_the_scale():
    model, x, y, tangents, hvp = with_tangents("layer norm")
    hvp[0, :, 1, 2] = math.nan
    hvp[2, 0] = math.nan
    hessians = per_sample_hessians(model, x)
    predicted = torch.einsum("bojk,bdk->bodj", hessians, tangents)
    sigma_x = x.std(dim=0, correction=0)
    expected = numerator = 0.0
    total = 0
    for o in range(OUTPUTS):
        squares = (sigma_x * hvp[:, o]).square()
        known = ~squares.isnan()
        factor = y[:, o].var(correction=0) / (INPUTS * squares[known].mean())
        residuals = (sigma_x * (predicted - hvp)[:, o]).square()
        numerator += factor * residuals[known].sum()
        total += int(known.sum())
    expected = INPUTS * numerator / total
    matching = GradientMatching().fit(x, y, target_hvp=hvp)
    torch.testing.assert_close(matching(model, x, tangents=tangents, target_hvp=hvp), expected)
    mask = ~hvp.isnan()
    masked = GradientMatching().fit(x, y, target_hvp=hvp.nan_to_num(7.0), mask=mask)
    loss = masked(model, x, tangents=tangents, target_hvp=hvp.nan_to_num(7.0), mask=mask)
    torch.testing.assert_close(loss, expected)
    # A unit relative error costs the variance of y.
    truth = predicted.detach()
    loss = GradientMatching().fit(x, y, target_hvp=truth / 2)(model, x, tangents=tangents, target_hvp=truth / 2)
    torch.testing.assert_close(loss, y.var(dim=0, correction=0).mean())


def test_one_direction_is_the_core_scale_of_gradients():
    rng = np.random.default_rng(0)
    x, y, target = rng.normal(size=(7, 3)), rng.normal(size=(7, 2)), rng.normal(size=(7, 2, 1, 3))
    for scale in ("block", "per_input", "none"):
        second = second_order_scale(x, y, target, scale=scale, xp=np)
        first = matching_scale(x, y, target[:, :, 0], scale=scale, xp=np)
        np.testing.assert_allclose(second.scale, first.scale)
        np.testing.assert_allclose(second.threshold, first.threshold)


@given(
    log_x=st.lists(st.floats(-3, 3), min_size=INPUTS, max_size=INPUTS),
    log_y=st.floats(-3, 3),
    log_v=st.floats(-3, 3),
    scale=st.sampled_from(["block", "per_input"]),
    kind=st.sampled_from(["target_hvp", "target_curvature"]),
)
def test_units_do_not_matter(log_x, log_y, log_v, scale, kind):
    """The loss is in squared units of y, whatever the units of x and the common length of the directions."""
    if kind == "target_curvature":
        scale = "block"
    model, x, y, tangents, hvp = with_tangents()
    target = hvp if kind == "target_hvp" else hvp.sum(dim=3)
    matching = GradientMatching(scale=scale).fit(x, y, **{kind: target})
    with torch.no_grad():
        reference = matching(model, x, tangents=tangents, **{kind: target})
    a, b, c = 10.0 ** torch.tensor(log_x, dtype=DOUBLE), 10.0**log_y, 10.0**log_v

    def rescaled(x: Tensor) -> Tensor:
        return b * model(x / a)

    other = target * b * c / a if kind == "target_hvp" else target * b * c**2
    fitted = GradientMatching(scale=scale).fit(a * x, b * y, **{kind: other})
    with torch.no_grad():
        loss = fitted(rescaled, a * x, tangents=c * a * tangents, **{kind: other})
    assert loss.item() == pytest.approx(b**2 * reference.item(), rel=1e-6)


def test_accepted_shapes_and_all_others():
    model, x, y, tangents, hvp = with_tangents()
    matching = GradientMatching().fit(x, y, target_hvp=hvp)
    one = matching(model, x, tangents=tangents[:, 1], target_hvp=hvp[:, :, 1])
    both = matching(model, x, tangents=tangents[:, [1, 1]], target_hvp=hvp[:, :, [1, 1]])
    torch.testing.assert_close(one, both)  # a mean over directions
    for shape in [(N, OUTPUTS, INPUTS), (N, DIRECTIONS, INPUTS), (N, DIRECTIONS, OUTPUTS, INPUTS), (N, OUTPUTS, 1, 4)]:
        with pytest.raises(ValueError, match=r"`target_hvp` must have shape \(6, 3, 2, 4\); got"):
            matching(model, x, tangents=tangents, target_hvp=torch.zeros(shape, dtype=DOUBLE))
        with pytest.raises(ValueError, match="`mask` must have shape"):
            matching(model, x, tangents=tangents, target_hvp=hvp, mask=torch.ones(shape, dtype=torch.bool))
    for shape in [(N, OUTPUTS), (N, DIRECTIONS, OUTPUTS), (N, OUTPUTS, DIRECTIONS, 1)]:
        with pytest.raises(ValueError, match=r"`target_curvature` must have shape \(6, 3, 2\); got"):
            raw()(model, x, tangents=tangents, target_curvature=torch.zeros(shape, dtype=DOUBLE))
    with pytest.raises(ValueError, match="`target_hvp` must have shape"):
        GradientMatching().fit(x, y, target_hvp=hvp[:, :2])
    image_model, images, values, directions, products = with_tangents("images")
    flat = GradientMatching().fit(images, values, target_hvp=products)
    shaped = products.unflatten(3, (1, 3, 3))
    as_image = GradientMatching().fit(images, values, target_hvp=shaped)
    torch.testing.assert_close(
        as_image(image_model, images, tangents=directions, target_hvp=shaped),
        flat(image_model, images, tangents=directions, target_hvp=products),
    )
    single = mlp(n_outputs=1).double()
    wanted = torch.randn(N, DIRECTIONS, INPUTS, dtype=DOUBLE)
    fitted = GradientMatching().fit(x, y[:, 0], target_hvp=wanted)
    a = fitted(single, x, tangents=tangents, target_hvp=wanted)
    torch.testing.assert_close(fitted(single, x, tangents=tangents, target_hvp=wanted[:, None]), a)
    assert fitted.scales.hvp_scale.shape == (1, INPUTS)
    for kwargs in (
        {"target_hvp": hvp},
        {"tangents": tangents, "target_hvp": hvp, "target_curvature": hvp[..., 0]},
        {"tangents": tangents, "target_norm": 1.0},
        {"target_jacobian": hvp[:, :, 0], "tangents": tangents, "target_hvp": hvp},
    ):
        with pytest.raises(ValueError, match="targets must be one of"):
            raw()(model, x, **kwargs)


def test_entries_that_are_unknown_reach_neither_loss_nor_gradient():
    """One entry of H v: what a gamma is."""
    model, x, _, _, _ = with_tangents()
    along = torch.zeros_like(x)
    along[:, 2] = 1.0
    gamma = torch.randn(N, OUTPUTS, dtype=DOUBLE)
    target = torch.full((N, OUTPUTS, INPUTS), math.nan, dtype=DOUBLE)
    target[:, :, 2] = gamma
    by_nan = raw()(model, x, tangents=along, target_hvp=target)
    by_curvature = raw()(model, x, tangents=along, target_curvature=gamma)
    torch.testing.assert_close(by_nan, INPUTS * by_curvature)  # n_inputs times the mean over known entries
    for a, b in zip(grads(by_nan, model), grads(by_curvature, model), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, INPUTS * b)


def test_values_and_both_orders_in_one_forward_pass():
    model, x, y, tangents, hvp = with_tangents()
    dydx = torch.randn(N, OUTPUTS, INPUTS, dtype=DOUBLE)
    first = GradientMatching().fit(x, y, dydx)
    second = GradientMatching(0.3).fit(x, y, target_hvp=hvp)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    leaf = x.clone().requires_grad_()
    prediction = model(leaf)
    together = (
        mse_loss(prediction, y)
        + first.from_outputs(prediction, wrt=leaf, target=dydx)
        + second.from_outputs(prediction, wrt=leaf, tangents=tangents, target_hvp=hvp)
    )
    assert len(passes) == 1
    handle.remove()
    apart = mse_loss(model(x), y) + first(model, x, dydx) + second(model, x, tangents=tangents, target_hvp=hvp)
    torch.testing.assert_close(together, apart)
    for a, b in zip(grads(together, model), grads(apart, model), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_that_share_an_output_have_one_hessian():
    """Atoms of a chain: the force constants between neighbours belong to the product too."""
    k = nn.Parameter(torch.tensor(2.0, dtype=DOUBLE))
    positions = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    energy = k / 2 * (positions[1:] - positions[:-1]).square().sum()
    v = torch.randn(4, 3, dtype=DOUBLE)
    chain = 2 * torch.eye(4, dtype=DOUBLE) - torch.diag(torch.ones(3, dtype=DOUBLE), 1)
    chain = chain - torch.diag(torch.ones(3, dtype=DOUBLE), -1)
    chain[0, 0] = chain[3, 3] = 1.0
    target = 2.0 * chain @ v
    assert raw().from_outputs(energy, wrt=positions, tangents=v, target_hvp=target).item() < 1e-25
    minus = raw().from_outputs(energy, wrt=positions, tangents=v, target_hvp=-target, sign=-1)  # of forces
    assert minus.item() < 1e-25


def test_projections_are_unbiased():
    model, x, y, tangents, hvp = with_tangents()
    whole = GradientMatching().fit(x, y, target_hvp=hvp)
    drawn = GradientMatching(projections=1, seed=3).fit(x, y, target_hvp=hvp)
    exact = whole(model, x, tangents=tangents, target_hvp=hvp).item()
    losses = [drawn(model, x, tangents=tangents, target_hvp=hvp).item() for _ in range(800)]
    error = float(np.std(losses)) / math.sqrt(len(losses))
    assert np.mean(losses) == pytest.approx(exact, abs=4 * error)
    assert error < 0.1 * exact


def test_evaluation_keeps_no_graph_and_the_callers_graph_of_values_survives():
    model, x, y, tangents, hvp = with_tangents()
    matching = GradientMatching().fit(x, y, target_hvp=hvp)
    trained = matching(model, x, tangents=tangents, target_hvp=hvp)
    matching.eval()
    values, loss = matching.with_values(model, x, tangents=tangents, target_hvp=hvp)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, trained.detach())
    values.sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(matching(model, x, tangents=tangents, target_hvp=hvp), trained.detach())


def test_batch_norm_in_training_uses_running_statistics():
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(5)).double()
    _, x, _, tangents, hvp = with_tangents()
    model(x)
    with pytest.warns(UserWarning, match="batch normalisation in training mode"):
        loss = raw()(model, x, tangents=tangents, target_hvp=hvp)
    statistics = model[1].running_mean.clone()  # type: ignore[union-attr] - a batch norm
    torch.testing.assert_close(loss, raw()(model.eval(), x, tangents=tangents, target_hvp=hvp))
    torch.testing.assert_close(model[1].running_mean, statistics)


def test_state_first_batch_and_huber():
    model, x, y, tangents, hvp = with_tangents()
    matching = GradientMatching(loss="huber").fit(x, y, target_hvp=hvp)
    loss = matching(model, x, tangents=tangents, target_hvp=hvp)
    other = GradientMatching(loss="huber")
    other.load_state_dict(matching.state_dict())
    assert other(model, x, tangents=tangents, target_hvp=hvp).item() == loss.item()
    huge = hvp.clone()
    huge[0, 0, 0, 0] = 1e6
    more = matching(model, x, tangents=tangents, target_hvp=2 * huge - hvp) - matching(
        model, x, tangents=tangents, target_hvp=huge
    )
    again = matching(model, x, tangents=tangents, target_hvp=3 * huge - 2 * hvp) - matching(
        model, x, tangents=tangents, target_hvp=2 * huge - hvp
    )
    torch.testing.assert_close(more, again, rtol=1e-6, atol=0)  # linear in an outlier
    for kind, target in (("target_hvp", hvp), ("target_curvature", hvp[..., 0])):
        unfitted = GradientMatching()
        with pytest.warns(UserWarning, match="is not fitted"):
            loss = unfitted(model, x, tangents=tangents, **{kind: target})
        torch.testing.assert_close(
            loss, GradientMatching().fit(x, **{kind: target})(model, x, tangents=tangents, **{kind: target})
        )
    with pytest.raises(ValueError, match=r"that were fitted, \(3, 4\)"):
        matching(mlp(n_outputs=2).double(), x, tangents=tangents, target_hvp=hvp[:, :2])


def test_models_without_second_derivatives_are_errors():
    _, x, _, tangents, hvp = with_tangents()
    linear = nn.Linear(INPUTS, OUTPUTS).double()
    with pytest.raises(ValueError, match="linear in `x`"):
        raw()(linear, x, tangents=tangents, target_hvp=hvp)
    rectified = nn.Sequential(nn.Linear(INPUTS, 5), nn.ReLU(), nn.Linear(5, OUTPUTS)).double()
    with pytest.raises(ValueError, match=r"linear between kinks \(ReLU\)"):
        raw()(rectified, x, tangents=tangents, target_hvp=hvp)
    silent = mlp().double()
    nn.init.zeros_(silent[-1].weight)  # type: ignore[arg-type] - zero second derivatives that training will change
    assert grads(raw()(silent, x, tangents=tangents, target_hvp=hvp), silent)[2].abs().sum() > 0

    def attention(x: Tensor) -> Tensor:
        h = x.reshape(-1, 1, 2, 2) * linear.weight.sum()
        return nn.functional.scaled_dot_product_attention(h, h, h).flatten(1)

    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"must be differentiable twice.*SDPBackend.MATH"):
        raw().from_outputs(attention(leaf), wrt=leaf, tangents=tangents, target_hvp=torch.zeros(N, 4, 2, 4))


def test_learning_curvature_recovers_it():
    """A spring constant from second derivatives alone, by gradient descent on the loss."""
    k = nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))
    x, v = torch.linspace(-1, 1, 9, dtype=DOUBLE)[:, None], torch.ones(9, 1, dtype=DOUBLE)
    target = 3.0 * torch.cosh(x)
    matching = GradientMatching().fit(x, 3 * torch.cosh(x), target_hvp=target)
    optimizer = torch.optim.LBFGS([k], line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = matching(lambda x: k * torch.cosh(x), x, tangents=v, target_hvp=target)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert k.item() == pytest.approx(3.0, abs=1e-6)
