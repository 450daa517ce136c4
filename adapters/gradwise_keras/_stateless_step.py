"""The population's training step on JAX, where the model's step is a function of its state."""

from collections.abc import Callable
from typing import Any

import keras

from gradwise_keras._population_step import Members, Outcome, State
from gradwise_keras._training_step import (
    Tap,
    as_tensors,
    check_weights_unwritten,
    counter_of,
    metrics_result,
    tapped,
)

__all__ = ["stateless_step"]

Step = Callable[[tuple[Any, ...], Any], tuple[dict[str, Any], tuple[Any, ...]]]


def stateless_step(model: Any, inner: Step, members: Members, chosen: list[int]) -> Step:
    """The training step that takes the place of `inner`, the model's own.

    Parameters
    ----------
    model : keras.Model
        A compiled and built model.
    inner : callable
        Its ``train_step``: ``(state, data) -> (logs, state)``.
    members : Members
        The population.
    chosen : list of int
        Which of the model's trainable variables it is over.
    """
    counter = next(i for i, v in enumerate(model.optimizer.variables) if v is counter_of(model.optimizer))

    def step(state: tuple[Any, ...], data: Any) -> tuple[dict[str, Any], tuple[Any, ...]]:
        trainable, non_trainable, optimizer, metrics = state
        weight_variables, taps = model.trainable_variables, list[Tap]()
        others = [*model.non_trainable_variables, *model.metrics_variables]
        start = {id(variable): value for variable, value in zip(others, [*non_trainable, *metrics], strict=True)}

        def values(changed: State) -> tuple[list[Any], list[Any]]:
            now = [changed.get(id(variable), start[id(variable)]) for variable in others]
            return now[: len(non_trainable)], now[len(non_trainable) :]

        def run(weights: list[Any], part: Any, changed: State) -> Outcome:
            moved = list(trainable)
            for index, value in zip(chosen, weights, strict=True):
                moved[index] = value
            before, counts = values(changed)
            with tapped(model) as tap:
                logs, (returned, after, _, counted) = inner((moved, before, optimizer, counts), part)
            gradients = tap.collected()
            taps.append(tap)
            check_weights_unwritten(
                [v.path for v, w, old in zip(weight_variables, returned, moved, strict=True) if w is not old]
            )
            new = {
                id(variable): value
                for variable, value, old in zip(others, [*after, *counted], [*before, *counts], strict=True)
                if value is not old
            }
            return Outcome(as_tensors(logs), gradients, tap.loss(model.metrics), new)

        mean = members.step(optimizer[counter], [trainable[index] for index in chosen], data, run)
        weights, optimizer = model.optimizer.stateless_apply(optimizer, mean.gradients, trainable)
        non_trainable, metrics = values(mean.state)
        with keras.StatelessScope(state_mapping=list(zip(model.metrics_variables, metrics, strict=True))):
            logs = metrics_result(taps[0].updated, mean.logs)
        return logs, (weights, non_trainable, optimizer, metrics)

    return step
