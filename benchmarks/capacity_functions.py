"""Functions of one to five inputs with exact derivatives, for the evidence on `capacity_study`.

Inputs lie in the unit cube; derivatives come from the complex step ``imag f(x + ih) / h``, which has no cancellation
and is exact to rounding. Two targets are networks themselves ("teachers"), whose needed width is known.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import qmc

__all__ = ["FUNCTIONS", "Data", "Function", "teacher", "training_data", "unseen_data", "value_and_slopes"]

Array = npt.NDArray[np.float64]
STEP = 1e-30
Formula = Callable[[npt.NDArray[np.complex128]], npt.NDArray[np.complex128]]


@dataclass(frozen=True)
class Function:
    """A target, and how little of it is known.

    Attributes
    ----------
    formula : callable
        ``formula(x) -> y`` for x of shape (n, inputs) in the unit cube, real or complex.
    inputs : int
    samples : int
        Training points.
    noise : float
        Standard deviation of the noise on y, relative to that of y. Derivatives have none.
    """

    formula: Formula
    inputs: int
    samples: int
    noise: float


@dataclass(frozen=True)
class Data:
    """Points of shape (n, inputs), values (n,) and derivatives (n, inputs)."""

    X: Array
    y: Array
    dydx: Array


def teacher(inputs: int, width: int, seed: int, steep: float = 3.0) -> Formula:
    """A tanh network of `width` hidden nodes in different directions, with kinks inside the unit cube."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(inputs, width))
    directions *= 2 * steep / np.linalg.norm(directions, axis=0)
    centres = rng.uniform(0.25, 0.75, size=(width, inputs))
    second = rng.choice([-1.0, 1.0], width) * rng.uniform(0.8, 1.2, width)

    def formula(x: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
        return np.tanh(x @ directions - np.einsum("hi,ih->h", centres, directions)) @ second

    return formula


def _branin(x: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    a, b = 15 * x[:, 0] - 5, 15 * x[:, 1]
    return (b - 5.1 / (4 * np.pi**2) * a**2 + 5 / np.pi * a - 6) ** 2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a) + 10


def _rosenbrock(x: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    z = 4 * x - 2
    return np.sum(100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2, axis=1)


def _ishigami(x: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    z = np.pi * (2 * x - 1)
    return np.sin(z[:, 0]) + 7 * np.sin(z[:, 1]) ** 2 + 0.1 * z[:, 2] ** 4 * np.sin(z[:, 0])


def _friedman(x: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    return 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]


def _robot_arm(x: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    angle, reach = np.pi * x[:, :2], x[:, 2:]  # two joints
    turned = np.cumsum(angle, axis=1)
    across, along = (reach * np.sin(turned)).sum(axis=1), (reach * np.cos(turned)).sum(axis=1)
    return np.sqrt(across**2 + along**2 + 0.01)


FUNCTIONS = {
    "x sin x, 1-D": Function(lambda x: (12 * x[:, 0] - 6) * np.sin(12 * x[:, 0] - 6), 1, 20, 0.1),
    "Forrester, 1-D": Function(lambda x: (6 * x[:, 0] - 2) ** 2 * np.sin(12 * x[:, 0] - 4), 1, 15, 0.05),
    "sin(3a) b + a^2, 2-D": Function(
        lambda x: np.sin(6 * x[:, 0] - 3) * (2 * x[:, 1] - 1) + (2 * x[:, 0] - 1) ** 2, 2, 40, 0.1
    ),
    "Branin, 2-D": Function(_branin, 2, 30, 0.05),
    "Rosenbrock, 2-D": Function(_rosenbrock, 2, 30, 0.1),
    "teacher of 3, 2-D": Function(teacher(2, 3, seed=1), 2, 40, 0.1),
    "Ishigami, 3-D": Function(_ishigami, 3, 50, 0.1),
    "robot arm, 4-D": Function(_robot_arm, 4, 50, 0.05),
    "teacher of 6, 4-D": Function(teacher(4, 6, seed=2), 4, 60, 0.1),
    "Friedman, 5-D": Function(_friedman, 5, 60, 0.1),
}


def value_and_slopes(function: Function, x: Array) -> tuple[Array, Array]:
    """Exact y of shape (n,) and dy/dx of shape (n, inputs)."""
    steps = 1j * STEP * np.eye(function.inputs)
    slopes = [function.formula(x + step).imag / STEP for step in steps]
    return function.formula(x.astype(np.complex128)).real, np.stack(slopes, axis=1)


def training_data(function: Function, seed: int) -> Data:
    """A Latin hypercube; noise on y only."""
    rng = np.random.default_rng(seed)
    x = qmc.LatinHypercube(function.inputs, rng=rng).random(function.samples)
    y, dydx = value_and_slopes(function, x)
    spread = unseen_data(function, 1000).y.std()
    return Data(x, y + function.noise * spread * rng.normal(size=len(y)), dydx)


def unseen_data(function: Function, count: int) -> Data:
    """Uniform points, no noise; always the same, and of another stream than all training data."""
    x = np.random.default_rng(987_654_321).random((count, function.inputs))
    return Data(x, *value_and_slopes(function, x))
