"""The model's own training step, run for its gradients: the optimizer only listens, and state is collected."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from gradwise_keras._backend import ops, patched

__all__ = ["Tap", "as_tensors", "counter_of", "metrics_result", "tapped"]


class Tap:
    """What the optimizer was given instead of stepping, and what the loss metric was."""

    def __init__(self) -> None:
        self.gradients: list[Any] | None = None
        self.variables: Any = None
        self.loss: Any = math.nan

    def collect(self, gradients: Any, variables: Any = None) -> None:
        """Stand in for ``optimizer.apply``."""
        if self.gradients is not None:
            msg = (
                "`train_step` must apply the optimizer once for each batch to be run by PopulationCallback. "
                "Received: a second call of `optimizer.apply` in one step"
            )
            raise ValueError(msg)
        self.gradients = list(gradients)
        self.variables = None if variables is None else list(variables)

    def collected(self) -> list[Any]:
        """The gradients of the step."""
        if self.gradients is None:
            msg = (
                "`train_step` must apply its gradients with `model.optimizer` to be run by PopulationCallback. "
                "Received: a step that did not"
            )
            raise ValueError(msg)
        return self.gradients


@contextmanager
def tapped(model: Any) -> Iterator[Tap]:
    """Let the optimizer and the metric named "loss" report to a tap; neither class nor state of theirs is changed."""
    tap = Tap()

    def stateless(optimizer_variables: Any, gradients: Any, trainable_variables: Any) -> tuple[Any, Any]:
        tap.collect(gradients)
        return trainable_variables, optimizer_variables

    metric = next((metric for metric in model.metrics if _tracks_the_loss(metric)), None)
    with patched(model.optimizer, apply=tap.collect, stateless_apply=stateless):
        if metric is None:
            yield tap
            return
        with patched(metric, update_state=_overheard(metric.update_state, tap)):
            yield tap


def _tracks_the_loss(metric: Any) -> bool:
    return isinstance(metric, keras.metrics.Mean) and metric.name == "loss"


def _overheard(update_state: Callable[..., Any], tap: Tap) -> Callable[..., Any]:
    def update(values: Any, *args: Any, **kwargs: Any) -> Any:
        tap.loss = values
        return update_state(values, *args, **kwargs)

    return update


def counter_of(optimizer: Any) -> Any:
    """The variable that counts calls of ``optimizer.apply``, also while gradients are accumulated."""
    while hasattr(optimizer, "inner_optimizer"):  # LossScaleOptimizer's own stands still
        optimizer = optimizer.inner_optimizer
    return optimizer._iterations


def as_tensors(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs that can be averaged: a training step may also log Python's numbers."""
    return {name: ops.convert_to_tensor(value) for name, value in logs.items()}


def metrics_result(model: Any, logs: dict[str, Any]) -> dict[str, Any]:
    """`logs` read from the metrics as they stand now, where they are the metrics'; means of ratios are not ratios."""
    current = model.get_metrics_result()
    return {**logs, **current} if set(current) <= set(logs) else logs
