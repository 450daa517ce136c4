"""A multilayer perceptron as a function of flat weight vectors: sizes, initial weights, values, input derivatives."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwise_torch._mlp_activations import ACTIVATIONS

__all__ = ["Architecture", "Pass"]

Layers = list[tuple[Tensor, Tensor]]


class Architecture(NamedTuple):
    """Sizes and activation. Weights are vectors `theta` of shape (members, n_parameters): members are independent."""

    sizes: tuple[int, ...]
    """Inputs, hidden layers, outputs."""
    activation: str

    @property
    def fans(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    @property
    def n_parameters(self) -> int:
        """Length of a weight vector."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in self.fans)

    def initial(self, seed: int) -> NDArray[np.float64]:
        """Draw Xavier's normal weights; biases of hidden layers are uniform within 0.3, those of the output are 0."""
        rng = np.random.default_rng(seed)
        parts: list[NDArray[np.float64]] = []
        for layer, (fan_in, fan_out) in enumerate(self.fans):
            parts.append(rng.standard_normal(fan_in * fan_out) * math.sqrt(2 / (fan_in + fan_out)))
            last = layer == len(self.fans) - 1
            # Small: with biases within 1 the errors on ten test functions were 1.2 times as large (geometric mean).
            parts.append(np.zeros(fan_out) if last else rng.uniform(-0.3, 0.3, fan_out))
        return np.concatenate(parts)

    def penalised(self) -> NDArray[np.float64]:
        """Ones where a weight is penalised, zeros for biases, shape (n_parameters,)."""
        parts = [np.repeat([1.0, 0.0], [fan_in * fan_out, fan_out]) for fan_in, fan_out in self.fans]
        return np.concatenate(parts)

    def layers(self, theta: Tensor) -> Layers:
        """Weights (members, fan_in, fan_out) and biases (members, 1, fan_out) of each layer, as views of `theta`."""
        lengths = [length for fan_in, fan_out in self.fans for length in (fan_in * fan_out, fan_out)]
        parts = torch.split(theta, lengths, dim=1)
        return [
            (weight.view(-1, fan_in, fan_out), bias.view(-1, 1, fan_out))
            for (fan_in, fan_out), weight, bias in zip(self.fans, parts[::2], parts[1::2], strict=True)
        ]

    def values(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs of shape (members, n, n_outputs) at `x` of shape (n, n_inputs)."""
        activation = ACTIVATIONS[self.activation]
        *hidden, (weight, bias) = self.layers(theta)
        h = x.expand(len(theta), *x.shape)
        for w, b in hidden:
            h = activation.value(torch.baddbmm(b, h, w))
        return torch.baddbmm(bias, h, weight)


class Pass:
    """A forward pass with input derivatives, and the gradient of a loss of both, by plain operations without a graph.

    The adjoints A of the outputs are carried back through the layers, ``F_l = A_l * s_l``, ``A_(l-1) = F_l W_l^T`` with
    the slopes s of the activations; A_0 is the Jacobian. `gradient` is the chain rule for the whole program, two to
    three times as fast as autograd's for small networks.

    Attributes
    ----------
    values : Tensor of shape (members, n, n_outputs)
    jacobian : Tensor of shape (members, n - first, n_outputs, n_inputs), or None
        At the rows from `first` on.
    """

    def __init__(self, architecture: Architecture, theta: Tensor, x: Tensor, first: int | None) -> None:
        """Run at `x` of shape (n, n_inputs); without derivatives if `first` is None."""
        activation = self.activation = ACTIVATIONS[architecture.activation]
        self.first = first
        *self.hidden, self.output = architecture.layers(theta)
        h = x.expand(len(theta), *x.shape)
        self.inputs: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.slopes: list[Tensor] = []
        for w, b in self.hidden:
            self.inputs.append(h)
            z = torch.baddbmm(b, h, w)
            h = activation.value(z)
            self.sums.append(z)
            self.slopes.append(activation.slope(z, h))
        self.inputs.append(h)
        self.values = torch.baddbmm(self.output[1], h, self.output[0])
        self.jacobian: Tensor | None = None
        if first is None:
            return
        members, n, n_outputs = self.values.shape
        self.adjoints: list[Tensor] = []  # each (members, n_outputs, rows, width)
        self.carried: list[Tensor] = []
        adjoint = self.output[0].mT[:, :, None, :]
        for (w, _), slope in zip(reversed(self.hidden), reversed(self.slopes), strict=True):
            carried = (adjoint * slope[:, None, first:]).reshape(members, n_outputs * (n - first), w.shape[2])
            self.adjoints.append(adjoint)
            self.carried.append(carried)
            adjoint = torch.bmm(carried, w.mT).reshape(members, n_outputs, n - first, w.shape[1])
        self.jacobian = adjoint.transpose(1, 2).expand(members, n - first, n_outputs, architecture.sizes[0])

    def gradient(self, values_gradient: Tensor, jacobian_gradient: Tensor | None) -> Tensor:
        """Gradient with respect to theta, (members, n_parameters), of a loss with these gradients.

        Parameters
        ----------
        values_gradient : Tensor of the shape of `values`
        jacobian_gradient : Tensor of the shape of `jacobian`, or None
        """
        weights, biases = [torch.empty(0)] * len(self.inputs), [torch.empty(0)] * len(self.inputs)
        bends: list[Tensor] = []
        through_slopes = None
        if jacobian_gradient is not None:
            back = jacobian_gradient.transpose(1, 2)
            for layer, (w, _) in enumerate(self.hidden):
                back = back.reshape(len(w), -1, w.shape[1])
                weights[layer] = torch.bmm(back.mT, self.carried[-1 - layer])
                adjoint = self.adjoints[-1 - layer]
                slope = self.slopes[layer][:, None, self.first :]
                bend = torch.bmm(back, w).view(len(w), -1, slope.shape[2], w.shape[2])
                product = bend * adjoint
                bends.append(product[:, 0] if product.shape[1] == 1 else product.sum(dim=1))
                back = bend * slope
            through_slopes = back.sum(dim=2).mT
        back = values_gradient
        weights[-1] = weighted = torch.bmm(self.inputs[-1].mT, back)
        if through_slopes is not None:
            weights[-1] = weighted + through_slopes
        biases[-1] = back.sum(dim=1)
        incoming = self.output[0]
        for layer in reversed(range(len(self.hidden))):
            w, _ = self.hidden[layer]
            h, slope = self.inputs[layer + 1], self.slopes[layer]
            back = torch.bmm(back, incoming.mT) * slope
            if bends:
                curvature = self.activation.curvature(self.sums[layer], h, slope)
                if self.first:
                    back[:, self.first :] += bends[layer] * curvature[:, self.first :]
                else:
                    back = torch.addcmul(back, bends[layer], curvature)
            if bends:
                weights[layer] = torch.baddbmm(weights[layer], self.inputs[layer].mT, back)
            else:
                weights[layer] = torch.bmm(self.inputs[layer].mT, back)
            biases[layer] = back.sum(dim=1)
            incoming = w
        parts = [part.flatten(1) for pair in zip(weights, biases, strict=True) for part in pair]
        return torch.cat(parts, dim=1)
