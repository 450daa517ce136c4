"""Gradient matching for people who keep their own model object, and for random projections."""

import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import keras

from gradwise_keras._backend import ops, patched
from gradwise_keras._derivatives import Linearization, linearize
from gradwise_keras._matching_loss import GradientMatching
from gradwise_keras._projections import DerivativeLossTracker, draw_outputs
from gradwise_keras._training_data import check_targets, fit_scales
from gradwise_keras._traps import warn_free_offset, warn_kinks
from gradwise_keras._vjp import outside_compilation

__all__ = ["AttachedMatching", "attach_gradient_matching"]

Tensor = Any

_MARK = "_gradwise_attached"


def attach_gradient_matching(
    model: keras.Model,
    matching: GradientMatching | None = None,
    *,
    projections: int | None = None,
    seed: int | None = None,
) -> "AttachedMatching":
    """Let a compiled model's own `fit` match input derivatives too.

    Afterwards ``model.fit(x, {"y": y, "dydx": dydx})`` minimises what the model was compiled with, on "y", plus
    `matching` on "dydx", whose mean the logs show as "derivative_loss". Compiled losses and metrics see "y" alone;
    `sample_weight` may be one array or a dict with both keys. Validation and `evaluate` take the same targets;
    `predict`, a custom `train_step` and saving are as before: a saved model is a plain Keras model and knows nothing of
    this. Not for models with several inputs or outputs.

    Parameters
    ----------
    model : keras.Model
        Compiled; from one floating-point input to values of shape (batch,) or (batch, n_outputs).
    matching : GradientMatching, optional
        The loss; ``GradientMatching()`` by default. If it is not fitted, `fit` does so, as `WithDerivatives.fit` does.
    projections : int, optional
        Match this many outputs of each sample, drawn anew in every training step without replacement, instead of all:
        an unbiased estimate that costs so many backward passes. Exact from `n_outputs` on. Evaluation matches all.
    seed : int, optional
        Seed of these draws, 0 by default. The user's random streams stay untouched.

    Returns
    -------
    AttachedMatching
        Its `detach` restores the model; so does leaving it as a context manager.

    Raises
    ------
    ValueError
        If `model` is not compiled, something is attached already, or an argument is invalid.

    Notes
    -----
    The derivatives come from the forward pass of the training step itself. Where they cannot (evaluation, mixed
    precision, a `train_step` that compares other outputs than those it got last), a second pass computes them, which
    changes no state; its dropout masks are those that the next step will draw. Batch normalisation is treated as in
    `WithDerivatives`.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> from gradwise.keras import attach_gradient_matching
    >>> keras.utils.set_random_seed(0)
    >>> x = np.linspace(-2, 2, 32)[:, None]
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(32, "tanh"), keras.layers.Dense(1)])
    >>> model.compile("adam", loss="mse")
    >>> with attach_gradient_matching(model):
    ...     history = model.fit(x, {"y": np.sin(x), "dydx": np.cos(x)}, batch_size=8, epochs=20, verbose=0)
    >>> sorted(history.history)
    ['derivative_loss', 'loss']
    """
    if not isinstance(model, keras.Model):
        msg = f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}"
        raise ValueError(msg)
    if not (matching is None or isinstance(matching, GradientMatching)):
        msg = (
            f"`matching` must be a GradientMatching. Received: matching={matching!r} of type {type(matching).__name__}"
        )
        raise ValueError(msg)
    for name, value, least in (("projections", projections, 1), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            msg = f"`{name}` must be a whole number of at least {least}. Received: {name}={value!r}"
            raise ValueError(msg)
    if not model.compiled:
        msg = "`model` must be compiled before gradient matching is attached. Received: a model without `compile()`"
        raise ValueError(msg)
    if _MARK in vars(model):
        msg = "`model` must have one gradient matching at a time. Received: one that is attached; `detach()` that first"
        raise ValueError(msg)
    return AttachedMatching(model, GradientMatching() if matching is None else matching, projections, seed or 0)


class AttachedMatching:
    """Gradient matching on somebody's model; see `attach_gradient_matching`.

    Attributes
    ----------
    model : keras.Model
        The model.
    matching : GradientMatching
        The loss.
    """

    def __init__(self, model: keras.Model, matching: GradientMatching, projections: int | None, seed: int) -> None:
        self.model = model
        self.matching = matching
        self._projections = projections
        self._seed = seed
        with model.distribute_strategy.scope() if hasattr(model, "distribute_strategy") else ExitStack():
            self._tracker = DerivativeLossTracker(name="derivative_loss")
        self._passes = _Passes(model, model.call)
        self._compute_loss, self._compute_metrics, self._fit = model.compute_loss, model.compute_metrics, model.fit
        self._takes_training = model._compute_loss_has_training_arg
        self._installed = ExitStack()
        for name, value in (
            (_MARK, self),
            ("call", outside_compilation(self._passes.run)),
            ("compute_loss", outside_compilation(self._loss)),
            ("compute_metrics", self._metrics),
            ("fit", self._fit_scales_and_model),
            ("_compute_loss_has_training_arg", True),
        ):
            self._installed.enter_context(patched(model, **{name: value}))
        model._metrics.append(self._tracker)
        self._forget_compiled_steps()

    def detach(self) -> None:
        """Restore the model completely; nothing happens if that was done before."""
        if vars(self.model).get(_MARK) is not self:
            return
        self._installed.close()
        self.model._metrics[:] = [metric for metric in self.model._metrics if metric is not self._tracker]
        self._forget_compiled_steps()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.detach()

    def _forget_compiled_steps(self) -> None:
        for name in ("train_function", "test_function", "predict_function"):
            setattr(self.model, name, None)

    def _fit_scales_and_model(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.fit`, with targets ``{"y": y, "dydx": dydx}``."""
        if self.matching.derivative_weight > 0:
            warn_kinks(self.model)
            # A model that has no compiled loss may compute its own. If not, Keras raises on some backends.
            own = type(self.model).compute_loss is not keras.Model.compute_loss
            warn_free_offset(self.model, free=self.model.loss is None and not own)
        before = self.matching.statistics
        fit_scales([self.matching], self._fit, args, kwargs)
        if self.matching.statistics is not before:
            self._forget_compiled_steps()
        return self._fit(*args, **kwargs)

    def _loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """As `keras.Model.compute_loss`, plus gradient matching."""
        check_targets(y)
        weights = sample_weight if isinstance(sample_weight, dict) else {"y": sample_weight, "dydx": sample_weight}
        keywords = {"training": training} if self._takes_training else {}
        loss = self._compute_loss(x=x, y=y["y"], y_pred=y_pred, sample_weight=weights.get("y"), **keywords)
        if self.matching.derivative_weight == 0:
            return loss
        term = self._term(self._passes.take(x, y_pred, training), y["dydx"], weights.get("dydx"), training)
        self._tracker.update_state(term, sample_weight=ops.shape(y_pred)[0])
        return ops.add(loss, self.model._aggregate_additional_loss(term))

    def _term(self, linearization: Linearization, target: Any, weight: Any, training: bool) -> Tensor:
        n_outputs, x = linearization.n_outputs, linearization.x
        self.matching.expect(n_outputs)
        chosen = None
        if training and self._projections is not None:
            calls = self._tracker.next_call()
            if self._projections < n_outputs:
                chosen = draw_outputs((self._seed, calls), ops.shape(x)[0], n_outputs, self._projections)
        rows = ops.cast(linearization.rows(chosen), self.matching.dtype)
        rows = ops.reshape(rows, (-1, rows.shape[1], math.prod(x.shape[1:])))
        target = ops.convert_to_tensor(target, dtype=self.matching.dtype)
        weight = None if weight is None else ops.convert_to_tensor(weight, dtype=self.matching.dtype)
        return self.matching.compare(rows, target, weight, tuple(x.shape), chosen=chosen, n_outputs=n_outputs)

    def _metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """As `keras.Model.compute_metrics`, for "y"."""
        check_targets(y)
        weight = sample_weight.get("y") if isinstance(sample_weight, dict) else sample_weight
        return self._compute_metrics(x, y["y"], y_pred, weight)


class _Pass(NamedTuple):
    values: Tensor
    linearization: Linearization


class _Passes(threading.local):
    """The model's last training pass, so that its derivatives cost no second one.

    One for each thread: `MirroredStrategy` traces each replica in its own.
    """

    def __init__(self, model: keras.Model, call: Callable[..., Any]) -> None:
        self.model = model
        self.call = call
        self.last: _Pass | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's `call` returns; a training pass is kept."""
        self.last = None
        model = self.model
        # Under mixed precision x is rounded here, and its derivatives would be.
        mixed = model.compute_dtype != model.variable_dtype
        if not kwargs.get("training") or len(args) != 1 or not model.built or mixed:
            return self.call(*args, **kwargs)
        linearization = linearize(model, args[0], training=True, call=lambda x: self.call(x, **kwargs))
        for loss in linearization.losses:
            model.add_loss(loss)
        self.last = _Pass(linearization.values, linearization)
        return linearization.values

    def take(self, x: Any, y_pred: Any, training: bool) -> Linearization:
        """The pass that gave `y_pred`, or another one that changes nothing."""
        last, self.last = self.last, None
        if last is not None and last.values is y_pred:
            return last.linearization
        return linearize(self.model, x, training=training, commit=False)
