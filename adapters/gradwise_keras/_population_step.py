"""One training step of a population: what its members are, and how what they leave behind is combined."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from gradwise._population import Population
from gradwise._statistics import gradient_agreement, loss_spread, running_mean
from gradwise_keras._backend import loop, ops
from gradwise_keras._perturbation import Perturbation, wide
from gradwise_keras._shards import Share, Shares

__all__ = ["AGREEMENT", "SPREAD", "Members", "Outcome", "State"]

AGREEMENT = "population_agreement"
SPREAD = "population_spread"

State = dict[int, Any]
"""Values of variables, by the variables' ids."""


class Outcome(NamedTuple):
    """What one run of the model's training step came to, or the mean over the members' runs."""

    logs: dict[str, Any]
    gradients: list[Any]
    loss: Any
    """NaN if the step does not tell."""
    state: State
    """New values of what is no weight: metrics, statistics of normalisation layers, seeds."""


Run = Callable[[list[Any], Any, State], Outcome]


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
    unroll : bool
        Whether the loop over members is Python's: slow to compile, but open to a debugger.

    Attributes
    ----------
    sharded : bool
    """

    def __init__(
        self,
        population: Population,
        variables: list[Any],
        indices: list[int],
        *,
        metrics: list[Any],
        sharded: bool,
        unroll: bool,
    ) -> None:
        self.sharded = sharded
        self._size, self._unroll = population.size, unroll
        self._perturbation = Perturbation(population, variables, indices, paired=not sharded)
        self._metrics = {id(variable) for variable in metrics}

    def step(self, counter: Any, means: list[Any], data: Any, run: Run) -> Outcome:
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
        weights_of = self._perturbation.at(counter, means)
        shares = Shares(data, self._size, sharded=self.sharded)
        share = shares.first()
        first = run(weights_of(0), share.data, {})
        # Only gradients that there are go through the loop: a model may have variables without.
        present = [index for index, gradient in enumerate(first.gradients) if gradient is not None]
        mean = _Mean.of(first, present, share, shares.members)
        for begin, end in shares.alike():

            def add(member: Any, mean: _Mean, begin: int = begin) -> _Mean:
                share = shares.of(member, begin)
                carried = {key: value for key, value in mean.state.items() if self._chained(key, value)}
                return mean.with_member(member, run(weights_of(member), share.data, carried), present, share, carried)

            mean = loop(begin, end, add, mean, unroll=self._unroll)
        return mean.outcome(present, len(first.gradients))

    def _chained(self, key: int, value: Any) -> bool:
        """Whether a member goes on from where the one before it left this.

        Members with rows of their own count them once and draw dropout masks of their own.
        """
        return self.sharded and (key in self._metrics or not _is_float(value))


class _Mean(NamedTuple):
    """Means over the members so far, and what the statistics are made of; all of it can be carried through a loop."""

    gradients: list[Any]
    logs: dict[str, Any]
    state: State
    losses: Any
    """Of each member, like the following two: shape (members,)."""
    square_norms: Any
    sizes: Any

    @classmethod
    def of(cls, first: Outcome, present: list[int], share: Share, members: int) -> "_Mean":
        """The mean of one."""
        gradients = [first.gradients[index] for index in present]
        zeros = ops.zeros((members,), "float32")
        statistics = (first.loss, _square_norm(gradients), share.size)
        return cls(gradients, first.logs, first.state, *(_put(zeros, 0, value) for value in statistics))

    def with_member(self, member: Any, outcome: Outcome, present: list[int], share: Share, carried: State) -> "_Mean":
        """The mean of one more."""

        def mean(before: Any, value: Any) -> Any:
            if not _is_float(value):  # seeds and counters end where one plain step leaves them
                return before
            # Not in half precision, which cannot count rows.
            exact = "float64" if keras.backend.standardize_dtype(value.dtype) == "float64" else "float32"
            size, so_far = (ops.cast(count, exact) for count in (share.size, share.so_far))
            return running_mean(before, value, ops.cast(size / so_far, value.dtype))

        def combined(key: int, value: Any) -> Any:
            before = self.state.get(key, value)
            if key in carried:
                return value if isinstance(share.size, int) else ops.where(share.size > 0, value, before)
            return mean(before, value)

        gradients = [outcome.gradients[index] for index in present]
        return _Mean(
            [mean(before, gradient) for before, gradient in zip(self.gradients, gradients, strict=True)],
            {name: mean(self.logs[name], value) for name, value in outcome.logs.items()},
            {**self.state, **{key: combined(key, value) for key, value in outcome.state.items()}},
            _put(self.losses, member, outcome.loss),
            _put(self.square_norms, member, _square_norm(gradients)),
            _put(self.sizes, member, share.size),
        )

    def outcome(self, present: list[int], count: int) -> Outcome:
        """What the population's step came to, with what its members say of each other in the logs."""
        gradients: list[Any] = [None] * count
        for index, gradient in zip(present, self.gradients, strict=True):
            gradients[index] = gradient
        agreement = gradient_agreement(_square_norm(self.gradients), self.square_norms, sizes=self.sizes, xp=ops)
        spread = loss_spread(self.losses, self.sizes > 0, xp=ops)
        return Outcome(
            {**self.logs, AGREEMENT: agreement, SPREAD: spread}, gradients, ops.mean(self.losses), self.state
        )


def _put(values: Any, index: Any, value: Any) -> Any:
    here = ops.arange(values.shape[0], dtype="int32") == ops.cast(index, "int32")  # the default follows floatx
    return ops.where(here, ops.cast(value, values.dtype), values)


def _is_float(value: Any) -> bool:
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(value.dtype))


def _square_norm(gradients: list[Any]) -> Any:
    squares = [ops.cast(ops.sum(ops.square(wide(gradient))), "float32") for gradient in gradients]
    return sum(squares[1:], squares[0]) if squares else ops.zeros(())
