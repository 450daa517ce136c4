"""The model's own training step, run for its gradients: the optimizer only listens, and state is collected."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras

from gradwise_keras._backend import ops, patched

__all__ = ["Tap", "as_tensors", "check_weights_unwritten", "counter_of", "metrics_result", "tapped"]


class Tap:
    """What the optimizer was given instead of stepping, and what the metrics were told."""

    def __init__(self) -> None:
        self.gradients: list[Any] | None = None
        self.variables: Any = None
        self.updated: list[Any] = []
        self._losses: list[tuple[Any, Any]] = []

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

    def hear(self, metric: Any, values: Any) -> None:
        """Stand in front of ``metric.update_state``."""
        self.updated.append(metric)
        if isinstance(metric, keras.metrics.Mean) and metric.name == "loss":
            self._losses.append((metric, values))

    def loss(self, metrics: list[Any]) -> Any:
        """What the first of `metrics` that tracks the loss was told; NaN if none was."""
        told = [values for metric in metrics for heard, values in self._losses if heard is metric]
        return told[0] if told else math.nan

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
    """Let the optimizer and the metrics report to a tap; neither class nor state of theirs is changed."""
    tap = Tap()

    def stateless(optimizer_variables: Any, gradients: Any, trainable_variables: Any) -> tuple[Any, Any]:
        tap.collect(gradients)
        return trainable_variables, optimizer_variables

    with ExitStack() as stack:
        stack.enter_context(patched(model.optimizer, apply=tap.collect, stateless_apply=stateless))
        for metric in model.metrics:
            stack.enter_context(patched(metric, update_state=_overheard(metric, tap)))
        yield tap


def _overheard(metric: Any, tap: Tap) -> Callable[..., Any]:
    update_state = metric.update_state

    def update(*args: Any, **kwargs: Any) -> Any:
        tap.hear(metric, args[0] if args else kwargs.get("values"))
        return update_state(*args, **kwargs)

    return update


def counter_of(optimizer: Any) -> Any:
    """The variable that counts calls of ``optimizer.apply``, also while gradients are accumulated."""
    while hasattr(optimizer, "inner_optimizer"):  # LossScaleOptimizer's own stands still
        optimizer = optimizer.inner_optimizer
    return optimizer._iterations


def as_tensors(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs that can be averaged, without the levels that Keras takes out too: a step may also log Python's numbers."""
    result: dict[str, Any] = {}
    for name, value in logs.items():
        result.update(as_tensors(value) if isinstance(value, dict) else {name: ops.convert_to_tensor(value)})
    return result


def metrics_result(updated: list[Any], logs: dict[str, Any]) -> dict[str, Any]:
    """`logs` read from the metrics as they stand now, where one was updated; means of ratios are not ratios."""
    results = as_tensors({metric.name: metric.result() for metric in updated})
    return {name: results.get(name, value) for name, value in logs.items()}


def check_weights_unwritten(written: list[str]) -> None:
    """Raise if a training step has moved weights past the optimizer; `written` are their paths."""
    if written:
        msg = (
            "`train_step` must leave trainable weights to `model.optimizer` to be run by PopulationCallback (use "
            f"`constraint` to clip weights). Received: a step that assigns to {', '.join(written)}"
        )
        raise ValueError(msg)
