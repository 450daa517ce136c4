"""The population's training step on TensorFlow and torch, where weights are moved in place."""

from collections.abc import Callable
from typing import Any

import keras

from gradwise_keras._backend import (
    BACKEND,
    TorchBuffers,
    TorchStreams,
    after,
    assign_here,
    copies,
    dense,
    detached,
    gradients,
    no_gradients,
    ops,
)
from gradwise_keras._population_step import Members, Outcome, State
from gradwise_keras._training_step import (
    Tap,
    as_tensors,
    check_weights_unwritten,
    counter_of,
    metrics_result,
    tapped,
)

__all__ = ["SavedWeights", "stateful_step"]


class SavedWeights:
    """The mean weights while a member is in place.

    On TensorFlow they are kept in variables too: a compiled step that breaks off cannot clean up after itself.

    Parameters
    ----------
    variables : list of Variable
        The weights that move.
    """

    def __init__(self, variables: list[Any]) -> None:
        self.variables = variables
        self._saved: list[Any] = []
        self._moved = None
        if BACKEND == "tensorflow":
            self._saved = [
                keras.Variable("zeros", shape=variable.shape, dtype=variable.dtype, trainable=False)
                for variable in variables
            ]
            self._moved = keras.Variable("zeros", shape=(), dtype="int32", trainable=False)

    def save(self) -> list[Any]:
        """Take and return the mean."""
        means = [ops.copy(variable.value) for variable in self.variables]
        if self._moved is None:
            return means
        # First all are saved, then the note is made that weights move, and then they do: a step may break off anywhere.
        with after([assign_here(saved, mean) for saved, mean in zip(self._saved, means, strict=True)]):
            noted = assign_here(self._moved, ops.ones((), "int32"))
        with after([noted]):
            return [ops.copy(mean) for mean in means]

    def restore(self, means: list[Any]) -> None:
        """Bring the mean back, bit for bit."""
        done = [assign_here(variable, mean) for variable, mean in zip(self.variables, means, strict=True)]
        if self._moved is not None:
            with after(done):
                assign_here(self._moved, ops.zeros((), "int32"))

    def rescue(self) -> None:
        """On the host, after a compiled step that raised: bring the mean back if a member was left in place."""
        if self._moved is None:
            return
        for replica, moved in enumerate(copies(self._moved)):
            if int(moved):
                for variable, saved in zip(self.variables, self._saved, strict=True):
                    copies(variable)[replica].assign(copies(saved)[replica])
                moved.assign(0)


class _Updates(keras.StatelessScope):
    """Keeps what is assigned to variables, instead of assigning it.

    Parameters
    ----------
    start : State
        What some variables are taken to be.
    variables : dict
        Collects the variables that are assigned to, by id.
    """

    def __init__(self, start: State, variables: dict[int, Any]) -> None:
        mapping = [(variables[key], value) for key, value in start.items()]
        super().__init__(state_mapping=mapping, collect_losses=True)  # else those of `add_loss` are lost
        self.state: State = {}
        self._variables = variables

    def get_current_value(self, variable: Any) -> Any:
        value = super().get_current_value(variable)
        return variable._value if value is None else value  # regularisers ask for weights, which are no state here

    def add_update(self, update: tuple[Any, Any]) -> None:
        super().add_update(update)
        variable, value = update
        self.state[id(variable)] = value
        self._variables[id(variable)] = variable


def stateful_step(
    model: Any, inner: Callable[[Any], dict[str, Any]], members: Members, saved: SavedWeights
) -> Callable[[Any], dict[str, Any]]:
    """The training step that takes the place of `inner`, the model's own.

    Parameters
    ----------
    model : keras.Model
        A compiled model.
    inner : callable
        Its ``train_step``.
    members : Members
        The population over ``saved.variables``.
    saved : SavedWeights
        Looks after the weights.
    """
    trainable = {id(variable) for variable in model.trainable_variables}

    def step(data: Any) -> dict[str, Any]:
        streams, buffers = TorchStreams(), TorchBuffers(model)
        assigned: dict[int, Any] = {}
        taps: list[Tap] = []

        def run(weights: list[Any], part: Any, start: State) -> Outcome:
            if not members.sharded:
                streams.rewind()
            for variable, value in zip(saved.variables, weights, strict=True):
                assign_here(variable, value)
            buffers.write(start)
            start = {key: value for key, value in start.items() if key not in buffers}
            with _Updates(start, assigned) as scope, tapped(model) as tap, gradients():
                logs = inner(part)
            taps.append(tap)
            check_weights_unwritten([assigned[key].path for key in scope.state if key in trainable])
            state = {**scope.state, **buffers.values()}
            collected = [dense(gradient) for gradient in tap.collected()]
            return Outcome(as_tensors(logs), collected, detached(tap.loss(model.metrics)), state)

        with no_gradients():
            counter = ops.copy(counter_of(model.optimizer).value)
            means = saved.save()
            try:
                mean = members.step(counter, means, data, run)
            finally:
                saved.restore(means)
                buffers.write({})
            buffers.write(mean.state)
            for key, value in mean.state.items():
                if key not in buffers:
                    assigned[key].assign(value)
            model.optimizer.apply(mean.gradients, taps[0].variables)
            return metrics_result(taps[0].updated, mean.logs)

    return step
