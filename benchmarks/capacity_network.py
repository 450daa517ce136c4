"""A network with one hidden layer of tanh nodes in numpy and scipy: a `fit` for `capacity_study` of milliseconds.

Data are standardised (derivatives by the chain rule); the loss is ``mean (f - y)^2 + mean |J - T|^2 / mean |T|^2 +
alpha / n * |weights|^2`` with hand-written gradients, minimised by L-BFGS. A study needs thousands of trainings of tiny
networks, where a framework's overhead is most of the time; `tests/test_capacity_evidence.py` checks the gradient.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from gradwise import DerivativeScaler

__all__ = ["ALPHA", "ITERATIONS", "Network", "fit", "initial", "loss_and_gradient"]

Array = npt.NDArray[np.float64]
ALPHA = 1e-4
ITERATIONS = 1500


@dataclass(frozen=True)
class Network:
    """A fitted network.

    Attributes
    ----------
    weights : array of shape (width (n_inputs + 2) + 1,)
        Of standardised data: first layer, its biases, second layer, its bias.
    width : int
        Hidden nodes.
    scaler : DerivativeScaler
        Of the training data.
    converged_ : bool
        Whether the optimizer stopped by itself.
    """

    weights: Array
    width: int
    scaler: DerivativeScaler
    converged_: bool

    def predict(self, X: Array) -> Array:
        """Values of shape (n,), in the units of y."""
        inputs = self.scaler.transform(X)[0]
        first, bias, second, offset = _layers(self.weights, self.width)
        return self.scaler.inverse_transform(y=np.tanh(inputs @ first + bias) @ second + offset)[1]

    def predict_jacobian(self, X: Array) -> Array:
        """Derivatives of shape (n, n_inputs), in the units of y per unit of x."""
        inputs = self.scaler.transform(X)[0]
        first, bias, second, _ = _layers(self.weights, self.width)
        slopes = ((1 - np.tanh(inputs @ first + bias) ** 2) * second) @ first.T
        return self.scaler.inverse_transform(dydx=slopes)[2]


def fit(X: Array, y: Array, dydx: Array | None, *, capacity: float, seed: int) -> Network:
    """Train `capacity` hidden nodes; the same initial weights with and without derivatives."""
    width = int(capacity)
    scaler = DerivativeScaler().fit(X, y, dydx)
    inputs, values, slopes = scaler.transform(X, y, dydx)
    start = initial(inputs.shape[1], width, seed)
    done = minimize(
        loss_and_gradient,
        start,
        (width, inputs, values, slopes),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "ftol": 1e-6, "gtol": 1e-5, "maxcor": 20},
    )
    return Network(done.x, width, scaler, bool(done.success))


def initial(inputs: int, width: int, seed: int) -> Array:
    """Weights of a new network (Glorot's variances), by seed."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(inputs, width)) * np.sqrt(2 / (inputs + width))
    second = rng.normal(size=width) * np.sqrt(2 / (width + 1))
    return np.concatenate([first.ravel(), rng.normal(size=width) * 0.5, second, [0.0]])


def loss_and_gradient(
    weights: Array, width: int, inputs: Array, values: Array, slopes: Array | None
) -> tuple[float, Array]:
    """Objective on standardised data, and its gradient of the shape of `weights`."""
    first, bias, second, offset = _layers(weights, width)
    n = len(inputs)
    hidden = np.tanh(inputs @ first + bias)
    error = hidden @ second + offset - values
    loss = error @ error / n
    to_output = 2 / n * error
    steep = 1 - hidden * hidden
    to_second = hidden.T @ to_output
    to_sum = np.outer(to_output, second) * steep
    to_first: Array = 0.0 * first
    if slopes is not None:
        gain = steep * second
        miss = gain @ first.T - slopes
        size = np.vdot(slopes, slopes) or 1.0
        loss += np.vdot(miss, miss) / size
        miss *= 2 / size
        to_gain = miss @ first
        to_first = miss.T @ gain
        to_second = to_second + np.einsum("ij,ij->j", to_gain, steep)
        to_sum -= 2 * to_gain * hidden * gain
    to_first = to_first + inputs.T @ to_sum + 2 * ALPHA / n * first
    loss += ALPHA / n * (np.vdot(first, first) + second @ second)
    to_second = to_second + 2 * ALPHA / n * second
    gradient = np.concatenate([to_first.ravel(), to_sum.sum(axis=0), to_second, [to_output.sum()]])
    return float(loss), gradient


def _layers(weights: Array, width: int) -> tuple[Array, Array, Array, float]:
    inputs = (len(weights) - 1) // width - 2
    at = inputs * width
    return (
        weights[:at].reshape(inputs, width),
        weights[at : at + width],
        weights[at + width : at + 2 * width],
        float(weights[-1]),
    )
