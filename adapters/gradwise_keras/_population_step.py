"""One training step of a population: what its members are, and how what they leave behind is combined."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from gradwise._matching_scale import standard_deviation
from gradwise._population import Population, check_sigma
from gradwise._statistics import gradient_agreement, running_mean
from gradwise_keras._noise import Noise
from gradwise_keras._shards import Share, shares

__all__ = ["AGREEMENT", "SPREAD", "Members", "Outcome", "State"]

AGREEMENT = "population_agreement"
SPREAD = "population_spread"

State = dict[int, tuple[Any, Any]]
"""Variables and values, by the variables' ids."""


class Outcome(NamedTuple):
    """What one run of the model's training step, or the population's, came to."""

    logs: dict[str, Any]
    gradients: list[Any]
    loss: Any
    """None if the step does not tell."""
    state: State
    """New values of what is no weight: metrics, statistics of normalisation layers, seeds."""


class Members:
    """The members of a population over some weights.

    Parameters
    ----------
    population : Population
        How many, how far apart.
    variables : list of Variable
        The weights that are perturbed.
    indices : list of int
        Their words in the keys of the noise.
    metrics : list of Variable
        State that counts rows.
    sharded : bool
        Whether members share out the batch.
    """

    def __init__(
        self,
        population: Population,
        variables: list[Any],
        indices: list[int],
        *,
        metrics: list[Any],
        sharded: bool,
    ) -> None:
        self._population, self._sharded = population, sharded
        shapes = [tuple(int(n) for n in variable.shape) for variable in variables]
        streams = population.streams(population.size, paired=not sharded)
        self._noise = Noise(population, shapes, indices, streams=streams)
        self._metrics = {id(variable) for variable in metrics}

    def step(
        self, counter: Any, means: list[Any], data: Any, run: Callable[[list[Any], Any, State], Outcome]
    ) -> Outcome:
        """Run every member, and combine gradients, state and logs.

        Parameters
        ----------
        counter : tensor of shape ()
            Steps before this one.
        means : list of tensors
            Mean values of the weights.
        data : tree of tensors
            The batch.
        run : callable
            ``run(weights, data, state)`` is the model's own training step at these weights, from its own state except
            for that in `state`; it must leave the optimizer alone and return its gradients.
        """
        unit = self._noise.at(counter).unit
        scales = self._scales(counter, means)
        combination = _Combination(self._chained)
        for member, share in enumerate(shares(data, self._population.size, sharded=self._sharded)):
            stream, sign = self._population.stream_of(member, paired=not self._sharded)
            moved = [
                ops.cast(_wide(mean) + sign * scale * ops.cast(noise, _wide(mean).dtype), mean.dtype)
                for mean, scale, noise in zip(means, scales, unit(stream), strict=True)
            ]
            combination.add(run(moved, share.data, combination.carried), share)
        return combination.outcome()

    def _scales(self, counter: Any, means: list[Any]) -> list[Any]:
        sigma: Any = self._population.sigma
        if callable(sigma):
            sigma = sigma(counter)
        if not keras.ops.is_tensor(sigma):
            sigma = check_sigma(sigma)
        return [self._population.scale_of(_wide(mean), sigma=sigma, filter_axis=-1, xp=ops) for mean in means]

    def _chained(self, variable: Any) -> bool:
        """Whether a member goes on from where the one before it left this.

        Members with rows of their own count them once and draw dropout masks of their own.
        """
        return self._sharded and (id(variable) in self._metrics or not _is_float(variable))


class _Combination:
    """Running means over the members so far."""

    def __init__(self, chained: Callable[[Any], bool]) -> None:
        self.carried: State = {}
        self._chained = chained
        self._state: State = {}
        self._gradients: list[Any] = []
        self._logs: dict[str, Any] = {}
        self._losses: list[Any] = []
        self._square_norms: list[Any] = []
        self._sizes: list[Any] = []

    def add(self, outcome: Outcome, share: Share) -> None:
        """Take in the next member."""
        if not self._sizes:
            self._gradients, self._logs = list(outcome.gradients), dict(outcome.logs)
        else:
            self._gradients = [
                mean if gradient is None else running_mean(mean, gradient, _like(share.fraction, gradient))
                for mean, gradient in zip(self._gradients, outcome.gradients, strict=True)
            ]
            self._logs = {
                name: running_mean(self._logs[name], value, _like(share.fraction, value)) if _is_float(value) else value
                for name, value in outcome.logs.items()
            }
        for key, (variable, value) in outcome.state.items():
            self._state[key] = variable, self._combined(key, variable, value, share)
            if self._chained(variable):
                self.carried[key] = self._state[key]
        self._losses.append(outcome.loss)
        self._square_norms.append(_square_norm(outcome.gradients))
        self._sizes.append(share.size)

    def _combined(self, key: int, variable: Any, value: Any, share: Share) -> Any:
        if key not in self._state:
            return value
        before = self._state[key][1]
        if self._chained(variable):
            return value if share.empty is False else ops.where(share.empty, before, value)
        # Seeds and counters end where one plain step leaves them.
        return running_mean(before, value, _like(share.fraction, value)) if _is_float(variable) else before

    def outcome(self) -> Outcome:
        """What the population's step came to."""
        sizes = ops.stack([ops.cast(size, "float32") for size in self._sizes])
        logs = dict(self._logs)
        logs[AGREEMENT] = gradient_agreement(
            _square_norm(self._gradients), ops.stack(self._square_norms), sizes=sizes, xp=ops
        )
        losses = [loss for loss in self._losses if loss is not None]
        logs[SPREAD] = (
            standard_deviation(ops.stack([ops.cast(loss, "float32") for loss in losses]), xp=ops)
            if losses
            else ops.convert_to_tensor(float("nan"))
        )
        return Outcome(logs, self._gradients, None, self._state)


def _is_float(values: Any) -> bool:
    dtype = getattr(values, "dtype", None)
    return dtype is not None and keras.backend.is_float_dtype(keras.backend.standardize_dtype(dtype))


def _wide(values: Any) -> Any:
    """In float32 at least: squares of half precision overflow."""
    return values if keras.backend.standardize_dtype(values.dtype) == "float64" else ops.cast(values, "float32")


def _like(fraction: Any, values: Any) -> Any:
    return ops.cast(fraction, values.dtype) if ops.is_tensor(fraction) else fraction


def _square_norm(gradients: list[Any]) -> Any:
    squares = [ops.sum(ops.square(_wide(gradient))) for gradient in gradients if gradient is not None]
    return ops.cast(sum(squares[1:], squares[0]) if squares else 0.0, "float32")
