"""Further training with derivatives that nobody measured: from data alone, by a surrogate, to a better model or not.

A network has been trained on a few noisy values. A surrogate (a Gaussian process, or an ensemble of networks) is fitted
to the same values, and its derivatives become targets for more training. That is distillation, so the control is the
same surrogate's *values*: at the samples, and at so many more points that there are as many numbers as derivatives.
The other controls are as many steps on the data alone, and derivatives estimated by local linear fits. Where the
simulator itself can be called, finite differences of it are the upper bound. All continue from the same weights for the
same number of steps. Measured with tuned settings in docs/further_training.md. Run:
``python examples/further_training.py`` (a minute).
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch import Tensor, nn

from gradwise import estimate_gradients, finite_difference_jacobian
from gradwise.torch import GradientMatching, teacher_jacobian

Array = npt.NDArray[np.float64]
STEPS, TEACHERS = 300, 5


@dataclass(frozen=True)
class Data:
    """Standardised training and test data; `simulator` gives exact values at rows of X, where there is one."""

    X: Array
    y: Array
    test_X: Array
    test_y: Array
    simulator: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Targets:
    """What an arm adds to the data: values and derivatives at some points, either of them optional."""

    points: Array
    values: Array | None = None
    jacobian: Array | None = None


class Surrogate(Protocol):
    """A fitted model of the data."""

    def values(self, X: Array) -> Array:
        """Shape (n,)."""
        ...

    def jacobian(self, X: Array) -> Array:
        """Shape (n, 1, n_inputs)."""
        ...


def network(n_inputs: int) -> nn.Module:
    """Smooth, because its derivatives are to be trained."""
    layers = nn.Linear(n_inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    return nn.Sequential(*layers).double()


def train(
    model: nn.Module,
    data: Data,
    targets: Targets | None = None,
    *,
    weight: float = 1.0,
    decay: float = 1e-2,
) -> nn.Module:
    """Continue the training of a copy: Adam on all data, and on `targets` as well."""
    model = deepcopy(model)
    x, y = torch.tensor(data.X), torch.tensor(data.y)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    extra = _extra_loss(targets, data) if targets is not None else None
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x), y)
        # A penalty and not AdamW's decay, which has hardly begun after so few steps.
        loss = loss + decay * torch.stack([w.square().sum() for w in model.parameters() if w.ndim > 1]).sum()
        if extra is not None:
            loss = loss + weight * extra(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def _extra_loss(targets: Targets, data: Data) -> Callable[[nn.Module], Tensor]:
    points = torch.tensor(targets.points)
    values = None if targets.values is None else torch.tensor(targets.values)[:, None]
    if targets.jacobian is None:
        assert values is not None
        return lambda model: nn.functional.mse_loss(model(points), values)
    jacobian = torch.tensor(targets.jacobian)
    matching = GradientMatching().fit(torch.tensor(data.X), torch.tensor(data.y), jacobian[: len(data.X)])

    def loss(model: nn.Module) -> Tensor:
        if values is None:
            return matching(model, points, jacobian)
        predicted, term = matching.with_values(model, points, jacobian)
        return term + nn.functional.mse_loss(predicted, values)

    return loss


class GaussianProcess:
    """A Gaussian process with a length for each input and noise; its derivatives by finite differences."""

    def __init__(self, X: Array, y: Array, seed: int) -> None:
        lengths: Any = np.full(X.shape[1], 3.0)
        kernel = ConstantKernel(1.0, (1e-2, 1e4)) * RBF(lengths, (0.1, 1e4)) + WhiteKernel(0.1)
        self.process: Any = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
        with warnings.catch_warnings():  # inputs that do not matter have lengths beyond any bound
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.process.fit(X, y)

    def values(self, X: Array) -> Array:
        """Mean of the process."""
        return self.process.predict(X)

    def jacobian(self, X: Array) -> Array:
        """Its derivatives."""
        return finite_difference_jacobian(self.process.predict, X)


class Ensemble(nn.Module):
    """The mean of several networks like the one that is trained; its derivatives by `teacher_jacobian`."""

    def __init__(self, X: Array, y: Array, seed: int, decay: float = 1e-2) -> None:
        super().__init__()
        data = Data(X, y, X, y)
        self.members = nn.ModuleList()
        for member in range(TEACHERS):
            torch.manual_seed(1000 * (seed + 1) + member)
            self.members.append(train(network(X.shape[1]), data, decay=decay))

    def forward(self, x: Tensor) -> Tensor:
        """Mean prediction."""
        return torch.stack([member(x) for member in self.members]).mean(dim=0)

    def values(self, X: Array) -> Array:
        """Mean prediction as an array."""
        with torch.no_grad():
            return self(torch.tensor(X))[:, 0].numpy()

    def jacobian(self, X: Array) -> Array:
        """Its derivatives."""
        return teacher_jacobian(self, torch.tensor(X)).numpy()


def points_between(X: Array, count: int, seed: int) -> Array:
    """More inputs where there are data: random points on lines between two samples."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(len(X), size=(2, count))
    return X[first] + rng.uniform(size=(count, 1)) * (X[second] - X[first])


def arms(data: Data, surrogates: dict[str, Surrogate], seed: int) -> dict[str, Targets | None]:
    """What each arm adds to the data."""
    result: dict[str, Targets | None] = {"data alone": None}
    n, n_inputs = data.X.shape
    more = np.concatenate([data.X, points_between(data.X, n * n_inputs, seed)])
    for name, surrogate in surrogates.items():
        values, jacobian = surrogate.values(data.X), surrogate.jacobian(data.X)
        result[f"{name}: values"] = Targets(data.X, values)
        result[f"{name}: values at n (1 + d) points"] = Targets(more, surrogate.values(more))
        result[f"{name}: derivatives"] = Targets(data.X, None, jacobian)
        result[f"{name}: values and derivatives"] = Targets(data.X, values, jacobian)
    result["estimate_gradients"] = Targets(data.X, None, estimate_gradients(data.X, data.y)[:, None])
    if data.simulator is not None:
        result["true derivatives"] = Targets(data.X, None, finite_difference_jacobian(data.simulator, data.X))
    return result


def error(predicted: Array, data: Data) -> float:
    """Root mean square error on the test points, in standard deviations of y there."""
    return float(np.sqrt(np.mean(np.square(predicted - data.test_y))) / np.std(data.test_y))


def score(model: nn.Module, data: Data) -> float:
    """Error of a network."""
    with torch.no_grad():
        return error(model(torch.tensor(data.test_X))[:, 0].numpy(), data)


def friedman(n: int, seed: int, noise: float = 1.0) -> Data:
    """Friedman's first function (5 of 10 inputs matter), noise of a fifth of its spread; noiseless test data."""
    X, y = make_friedman1(n, noise=noise, random_state=seed)
    test_X, test_y = make_friedman1(2000, random_state=10_000 + seed)
    mean, std = y.mean(), y.std()

    def simulator(u: Array) -> Array:
        x = u / np.sqrt(12) + 0.5
        value = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        return (value - mean) / std

    scale = np.sqrt(12)  # uniform on [0, 1]: standard deviation 1 / sqrt(12)
    return Data((X - 0.5) * scale, (y - mean) / std, (test_X - 0.5) * scale, (test_y - mean) / std, simulator)


def fitted(data: Data, seed: int, decay: float = 1e-2) -> tuple[nn.Module, dict[str, Surrogate]]:
    """The network that all arms start from, and the surrogates; none has seen anything but the data."""
    torch.manual_seed(seed)
    start = train(network(data.X.shape[1]), data, decay=decay)
    return start, {
        "process": GaussianProcess(data.X, data.y, seed),
        "ensemble": Ensemble(data.X, data.y, seed, decay),
    }


def run(data: Data, seed: int) -> dict[str, float]:
    """Errors of all arms, of the network that they start from, and of the surrogates."""
    start, surrogates = fitted(data, seed)
    scores = {"before": score(start, data)}
    scores |= {f"{name} itself": error(model.values(data.test_X), data) for name, model in surrogates.items()}
    scores |= {name: score(train(start, data, more), data) for name, more in arms(data, surrogates, seed).items()}
    return scores


if __name__ == "__main__":
    runs = [run(friedman(100, seed), seed) for seed in range(3)]
    for name in runs[0]:
        print(f"{name:45s} relative error {np.mean([scores[name] for scores in runs]):.3f}")
