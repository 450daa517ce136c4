"""Ways to step with a derivative loss: the library's, the same written by hand, and jenn."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from models import mlp
from population_ways import PLAIN, Way
from timing import Step
from torch import Tensor, nn

from gradwise.torch import GradientMatching

__all__ = ["JENN_ITERATIONS", "Regression", "jenn_ways", "matching_ways", "sines"]

JENN_ITERATIONS = 20  # of one fit, so that preparing the data counts for little


@dataclass(frozen=True)
class Regression:
    """A tanh network with known values and derivatives.

    Attributes
    ----------
    inputs, width, outputs : int
        Of two hidden layers.
    rows : int
        Length of the one batch.
    """

    inputs: int = 20
    width: int = 256
    outputs: int = 1
    rows: int = 256
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def parts(self) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """Model, inputs, values and derivatives of shape (rows, outputs, inputs)."""
        torch.manual_seed(0)
        model = mlp(self.inputs, self.width, self.width, self.outputs, activation=nn.Tanh)
        x = torch.randn(self.rows, self.inputs)
        slopes = torch.randn(self.outputs, self.inputs) / self.inputs**0.5
        y, dydx = sines(x, slopes)
        to = {"dtype": self.dtype, "device": self.device}
        return model.to(**to), x.to(**to), y.to(**to), dydx.to(**to)


def sines(x: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """``sin(x . slope)`` for each row of `slopes`, and its derivatives of shape (rows, outputs, inputs)."""
    angles = x @ slopes.T
    return angles.sin(), angles.cos().unsqueeze(2) * slopes


def matching_ways(outputs: int, *, full: bool = True) -> dict[str, Way]:
    """Rows of the table for a number of outputs; the first is the plain step on values alone."""
    kinds = (("one VJP", 1), *([("full Jacobian", None)] if full else []))
    rows: dict[str, Way] = {PLAIN: Way(values_only)}
    for name, projections in kinds:
        rows[f"matching, {name}"] = Way(partial(matching_step, projections=projections))
        rows[f"by hand, {name}"] = Way(partial(by_hand, projections=projections or outputs))
    return rows


def values_only(task: Regression) -> Step:
    """Forward, backward, step."""
    model, x, y, _ = task.parts()
    return _training(model, lambda: nn.functional.mse_loss(model(x), y))


def matching_step(task: Regression, *, projections: int | None, kind: Any = torch.optim.SGD) -> Step:
    """The values' loss and the library's term."""
    model, x, y, dydx = task.parts()
    matching = GradientMatching(scale="none", projections=projections)

    def loss() -> Tensor:
        prediction, term = matching.with_values(model, x, dydx)
        return nn.functional.mse_loss(prediction, y) + term

    return _training(model, loss, kind)


def by_hand(task: Regression, *, projections: int) -> Step:
    """The same by `torch.autograd.grad`: derivatives of a drawn output of each row, or of all outputs one by one."""
    model, x, y, dydx = task.parts()
    rows = torch.arange(task.rows, device=task.device)

    def slopes(prediction: Tensor, inputs: Tensor, output: Tensor) -> Tensor:
        cotangent = nn.functional.one_hot(output, task.outputs).to(prediction)
        return torch.autograd.grad(prediction, inputs, cotangent, create_graph=True)[0]

    def loss() -> Tensor:
        inputs = x.detach().requires_grad_()
        prediction = model(inputs)
        value = nn.functional.mse_loss(prediction, y)
        if projections == 1:
            output = torch.randint(task.outputs, (task.rows,), device=task.device)
            return value + (slopes(prediction, inputs, output) - dydx[rows, output]).square().sum(1).mean()
        columns = [slopes(prediction, inputs, torch.full_like(rows, output)) for output in range(task.outputs)]
        return value + (torch.stack(columns, 1) - dydx).square().sum(2).mean()

    return _training(model, loss)


def _training(model: nn.Module, loss: Callable[[], Tensor], kind: Any = torch.optim.SGD) -> Step:
    optimizer = kind(model.parameters(), lr=1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def jenn_ways() -> dict[str, Way]:
    """One full-batch epoch with the full Jacobian.

    Not comparable to the letter: jenn computes in float64 only, propagates the derivatives forwards (a tangent for each
    input, where the library goes backwards from each output), evaluates the cost again after the update, and has an
    Adam of its own. The first row is the same network, data, precision and rule (Adam) with the library.
    """
    adam = torch.optim.Adam
    return {
        "gradwise, float64, Adam": Way(partial(matching_step, projections=None, kind=adam)),
        "jenn, float64, its Adam": Way(jenn_epochs, "jenn", JENN_ITERATIONS),
    }


def jenn_epochs(task: Regression) -> Step:
    """`JENN_ITERATIONS` epochs: iterations of its optimizer, each on all rows."""
    _, x, y, dydx = task.parts()
    network = importlib.import_module("jenn").NeuralNet([task.inputs, task.width, task.width, task.outputs])
    data = [np.ascontiguousarray(array) for array in (x.T.numpy(), y.T.numpy(), dydx.permute(1, 2, 0).numpy())]
    return lambda: network.fit(*data, alpha=1e-3, max_iter=JENN_ITERATIONS, random_state=0)
