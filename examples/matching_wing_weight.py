"""Gradient matching on the wing weight of a light aircraft: 10 inputs, 40 samples, known derivatives.

The function is the conceptual-design formula of Forrester, Sobester and Keane (Engineering Design via Surrogate
Modelling, Wiley 2008, eq. 1.1) after Raymer; its derivatives are exact. An adjoint solver would give all ten for about
the price of one more evaluation, so 80 samples without derivatives is the fair opponent.
Run: ``python examples/matching_wing_weight.py``.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import qmc
from torch import Tensor, nn

from gradwise.torch import GradientMatching

Array = npt.NDArray[np.float64]

# Wing area (ft^2), fuel weight (lb), aspect ratio, sweep (deg), dynamic pressure (lb/ft^2), taper ratio,
# thickness to chord, ultimate load factor, design gross weight (lb), paint weight (lb/ft^2).
LOWER = np.array([150.0, 220.0, 6.0, -10.0, 16.0, 0.5, 0.08, 2.5, 1700.0, 0.025])
UPPER = np.array([200.0, 300.0, 10.0, 10.0, 45.0, 1.0, 0.18, 6.0, 2500.0, 0.08])
EXPONENTS = np.array([0.758, 0.0035, 0.6, 0.0, 0.006, 0.04, -0.3, 0.49, 0.49, 0.0])
SWEEP, PAINT = 3, 9
DECAYS = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    derivatives: bool = False
    weight_decay: float | None = 0.0  # None: chosen by cross-validation
    samples: int = 40


METHODS = (
    Method("40 values"),
    Method("40 values, cross-validated weight decay", weight_decay=None),
    Method("80 values", samples=80),
    Method("40 values and derivatives", derivatives=True),
)


def wing_weight(x: Array) -> tuple[Array, Array]:
    """Weight in lb of shape (n,), and its derivatives of shape (n, 10) in lb per unit of each input."""
    cosine = np.cos(np.radians(x[:, SWEEP]))
    # cos enters as A / cos^2 to the 0.6 and t/c / cos to the -0.3: together to the power -0.9.
    main = 0.036 * 100**-0.3 * np.prod(x**EXPONENTS, axis=1) * cosine**-0.9
    slopes = main[:, None] * EXPONENTS / x
    slopes[:, SWEEP] = main * 0.9 * np.tan(np.radians(x[:, SWEEP])) * np.pi / 180
    slopes[:, 0] += x[:, PAINT]
    slopes[:, PAINT] += x[:, 0]
    return main + x[:, 0] * x[:, PAINT], slopes


def sample(count: int, seed: int) -> Array:
    """Latin hypercube of shape (count, 10) within the bounds."""
    return qmc.scale(qmc.LatinHypercube(10, rng=np.random.default_rng(seed)).random(count), LOWER, UPPER)


def standardised(x: Array) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in units of the bounds, weight and derivatives to match, as float64 tensors."""
    y, dydx = wing_weight(x)
    half = (UPPER - LOWER) / 2
    return (
        torch.tensor((x - LOWER) / half - 1),
        torch.tensor(y / 100).unsqueeze(1),  # in 100 lb
        torch.tensor(dydx * half / 100),  # the chain rule: 100 lb per half width of each input
    )


def train(method: Method, x: Tensor, y: Tensor, dydx: Tensor, seed: int) -> nn.Module:
    """Fit a tanh network by L-BFGS; the derivatives are one more term of the loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    matching = GradientMatching()
    if method.derivatives:
        matching.fit(x, y, dydx)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        if method.derivatives:
            predicted, loss = matching.with_values(model, x, dydx)
            loss = loss + nn.functional.mse_loss(predicted, y)
        else:
            loss = nn.functional.mse_loss(model(x), y)
        penalty = sum((w.square().sum() for w in model.parameters() if w.ndim > 1), torch.zeros(()))
        loss = loss + (method.weight_decay or 0.0) * penalty / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def score(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Root mean square error on the test points, relative to the standard deviation of the weight there."""
    with torch.no_grad():
        return ((model(x) - y).square().mean().sqrt() / y.std()).item()


def choose_decay(x: Tensor, y: Tensor, dydx: Tensor, seed: int) -> float:
    """The weight decay with the least error in 3-fold cross-validation over the samples."""

    def validation_error(decay: float) -> float:
        folds = torch.arange(len(x)) % 3
        method = Method("", weight_decay=decay)
        models = [train(method, x[folds != k], y[folds != k], dydx[folds != k], seed) for k in range(3)]
        return sum(score(model, x[folds == k], y[folds == k]) for k, model in enumerate(models))

    return min(DECAYS, key=validation_error)


def run(seed: int) -> dict[str, float]:
    """Relative error of every method for one seed (its own design of experiments and initial weights)."""
    test_x, test_y, _ = standardised(sample(2000, 10_000))
    scores: dict[str, float] = {}
    for method in METHODS:
        x, y, dydx = standardised(sample(method.samples, seed))
        decay = choose_decay(x, y, dydx, seed) if method.weight_decay is None else method.weight_decay
        model = train(replace(method, weight_decay=decay), x, y, dydx, seed)
        scores[method.name] = score(model, test_x, test_y)
    return scores


if __name__ == "__main__":
    runs = [run(seed) for seed in range(3)]
    for method in METHODS:
        print(f"{method.name:40s} relative error {np.mean([scores[method.name] for scores in runs]):.4f}")
