"""Where the members of a step are: the mean weights, plus noise to scale."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from gradwise._population import Population, check_sigma
from gradwise_keras._backend import ops
from gradwise_keras._noise import Noise

__all__ = ["Perturbation", "wide"]


class Perturbation:
    """Moves some weights of a model, inside its training step.

    Parameters
    ----------
    population : Population
        How many members, how far apart.
    variables : sequence of Variable
        The weights.
    indices : sequence of int
        Their words in the keys of the noise.
    paired : bool
        Whether members share a batch.

    Attributes
    ----------
    variables : list of Variable
        The weights.
    """

    def __init__(
        self, population: Population, variables: Sequence[Any], indices: Sequence[int], *, paired: bool
    ) -> None:
        self.variables = list(variables)
        self._population, self._paired = population, paired
        shapes = [tuple(int(n) for n in variable.shape) for variable in variables]
        self._noise = Noise(population, shapes, indices, streams=population.streams(population.size, paired=paired))

    def at(self, counter: Any, means: list[Any]) -> Callable[[Any], list[Any]]:
        """Weights by member, at the step that `counter` says, around `means`; both may be known only in the graph."""
        unit = self._noise.at(counter).unit
        sigma: Any = self._population.sigma
        if callable(sigma):
            sigma = sigma(counter)
        if not ops.is_tensor(sigma):
            sigma = check_sigma(sigma)
        wides = [wide(mean) for mean in means]
        sigmas = [ops.cast(sigma, values.dtype) if ops.is_tensor(sigma) else sigma for values in wides]
        scales = [
            self._population.scale_of(values, sigma=size, filter_axis=-1, xp=ops)
            for values, size in zip(wides, sigmas, strict=True)
        ]

        def member_weights(member: Any) -> list[Any]:
            stream, sign = self._population.stream_of(member, paired=self._paired)
            sign = ops.cast(sign, "float32")
            return [
                ops.cast(values + scale * ops.cast(sign * noise, values.dtype), mean.dtype)
                for mean, values, scale, noise in zip(means, wides, scales, unit(stream), strict=True)
            ]

        return member_weights


def wide(values: Any) -> Any:
    """In float32 at least: squares of half precision overflow."""
    return values if keras.backend.standardize_dtype(values.dtype) == "float64" else ops.cast(values, "float32")
