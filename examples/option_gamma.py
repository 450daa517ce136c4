"""Option pricing surrogate: prices, deltas and gammas of European calls, learnt together in one forward pass.

Black and Scholes' formula stands in for a slow pricer; inputs are spot, volatility, maturity and rate, the strike is
100. A desk hedges by delta (dV/dS) and sizes its hedge errors by gamma (d2V/dS2): a surrogate must have them right,
not the price alone. By bumping the spot both ways a pricer without derivatives gives delta and gamma for two more
valuations, so three times as many prices are the fair opponent.
Run: ``python examples/option_gamma.py``; all of it, with ten seeds: ``make bench-second-order``.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import norm, qmc
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradwise.torch import GradientMatching, value_and_jacobian

Array = npt.NDArray[np.float64]

STRIKE = 100.0
LOWER = np.array([60.0, 0.15, 0.25, 0.0])  # spot, volatility (per root year), maturity (years), rate (per year)
UPPER = np.array([140.0, 0.5, 2.0, 0.06])
HALF = (UPPER - LOWER) / 2
PRICE = 20.0  # the unit in which networks see prices


@dataclass(frozen=True)
class Method:
    """What a network is trained by.

    Attributes
    ----------
    delta, gamma : float
        Weights of the derivative losses; 0 leaves one away.
    decay : float
        Weight decay.
    valuations : int
        Training points for each valuation that the others spend on a point: 3 for prices only, at equal cost.
    """

    name: str
    delta: float = 0.0
    gamma: float = 0.0
    decay: float = 0.0
    valuations: int = 1


METHODS = (
    Method("prices"),
    Method("prices, 3 times as many", valuations=3),
    Method("prices and deltas", delta=1.0),
    Method("prices, deltas and gammas", delta=1.0, gamma=1.0),
)


@dataclass(frozen=True)
class Data:
    """Points and what is known there, in units of the networks (half widths of the bounds, `PRICE`)."""

    x: Tensor
    """Shape (n, 4)."""
    price: Tensor
    """Shape (n, 1)."""
    delta: Tensor
    """Shape (n,)."""
    gamma: Tensor
    """Shape (n,)."""


def black_scholes(x: Array) -> tuple[Array, Array, Array]:
    """Price, delta and gamma of calls at `x` of shape (n, 4), each of shape (n,)."""
    spot, volatility, maturity, rate = x.T
    deviation = volatility * np.sqrt(maturity)
    d1 = (np.log(spot / STRIKE) + rate * maturity) / deviation + deviation / 2
    price = spot * norm.cdf(d1) - STRIKE * np.exp(-rate * maturity) * norm.cdf(d1 - deviation)
    return price, norm.cdf(d1), norm.pdf(d1) / (spot * deviation)


def sample(count: int, seed: int) -> Data:
    """Latin hypercube within the bounds."""
    x = qmc.scale(qmc.LatinHypercube(4, rng=np.random.default_rng(seed)).random(count), LOWER, UPPER)
    price, delta, gamma = black_scholes(x)
    scaled = (
        (x - LOWER) / HALF - 1,
        price[:, None] / PRICE,
        delta * HALF[0] / PRICE,  # the chain rule, once and twice
        gamma * HALF[0] ** 2 / PRICE,
    )
    return Data(*(torch.tensor(array) for array in scaled))


def train(method: Method, data: Data, seed: int, iterations: int = 300) -> tuple[nn.Module, float]:
    """Fit a softplus network by L-BFGS; returns it, and the seconds of one core that this took."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.Softplus(), nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, 1)).double()
    # Only the derivatives by the spot are known: NaN for the others, and a direction along the spot.
    dydx = torch.full_like(data.x, torch.nan)
    dydx[:, 0] = data.delta
    along_spot = torch.zeros_like(data.x)
    along_spot[:, 0] = 1.0
    first = GradientMatching(method.delta).fit(data.x, data.price, dydx)
    second = GradientMatching(method.gamma).fit(data.x, data.price, target_curvature=data.gamma)
    x = data.x.clone().requires_grad_()
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=iterations, max_eval=2 * iterations, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        price = model(x)
        loss = mse_loss(price, data.price)
        if method.delta:
            loss = loss + first.from_outputs(price, wrt=x, target=dydx)
        if method.gamma:
            loss = loss + second.from_outputs(price, wrt=x, tangents=along_spot, target_curvature=data.gamma)
        loss = loss + method.decay / len(x) * sum((weight.square().sum() for weight in weights), torch.zeros(()))
        loss.backward()
        return loss

    start = time.process_time()
    optimizer.step(closure)
    return model, time.process_time() - start


def score(model: nn.Module, test: Data) -> dict[str, float]:
    """Root mean square errors of price, delta and gamma, relative to their standard deviations."""
    x = test.x.clone().requires_grad_()
    price, jacobian = value_and_jacobian(model, x)
    delta = jacobian[:, 0, 0]
    (second,) = torch.autograd.grad(delta.sum(), x)
    pairs = {"price": (price, test.price), "delta": (delta, test.delta), "gamma": (second[:, 0], test.gamma)}
    return {name: ((a - b).square().mean().sqrt() / b.std()).item() for name, (a, b) in pairs.items()}


def run(seed: int, points: int = 32, iterations: int = 300) -> dict[str, dict[str, float]]:
    """Errors of every method, with the same initial weights."""
    test = sample(2000, 10_000)
    return {
        method.name: score(train(method, sample(points * method.valuations, seed), seed, iterations)[0], test)
        for method in METHODS
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [run(seed) for seed in range(3)]
    print(f"{'32 points, 3 seeds; relative errors of':40s} {'price':>8s} {'delta':>8s} {'gamma':>8s}")
    for method in METHODS:
        errors = [np.exp(np.mean([np.log(r[method.name][key]) for r in runs])) for key in ("price", "delta", "gamma")]
        print(f"{method.name:40s} " + " ".join(f"{error:8.4f}" for error in errors))
