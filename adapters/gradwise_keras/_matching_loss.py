"""Gradient matching as a Keras loss, for the derivatives that `WithDerivatives` returns."""

import math
from typing import Any, Self

import keras
import numpy as np

from gradwise._matching import LOSSES, known_entries, known_weight, matching_numerators, reduce_terms
from gradwise._matching_data import scale_from_data
from gradwise._matching_scale import SCALES, MatchingScale
from gradwise_keras._backend import ops
from gradwise_keras._target_shapes import as_jacobian, as_weight

__all__ = ["GradientMatching"]

Tensor = Any


@keras.saving.register_keras_serializable(package="gradwise")
class GradientMatching(keras.losses.Loss):
    """Loss of input derivatives against known ones (Sobolev training, Jacobian matching).

    With standard deviations sigma_x of the inputs and sigma_y of the outputs, each output contributes
    ``weight * sigma_y**2 * mean_i sum_j sigma_xj**2 (J_ij - T_ij)**2 / mean_i sum_j sigma_xj**2 T_ij**2`` and the loss
    is the mean over outputs. It has the units of a mean squared error of y: at weight 1 a relative error of the
    derivatives counts like a relative error of the values. It goes with a loss of the values, which alone fixes the
    offset.

    Not for derivatives with respect to parameters (data-set condensation), and of little use for models whose
    derivatives are piecewise constant (a ReLU network cannot move its kinks by this loss). Noise in the derivatives of
    about half their size makes them worthless; use a smaller weight or "huber" before that.

    Parameters
    ----------
    derivative_weight : float, default 1.0
        Weight of the term, without unit. At 0 the loss is 0 and needs no scales. For a schedule, see `loss_weights` of
        `compile`.
    scale : {"block", "per_input", "none"}, default "block"
        "block" is the formula above: one denominator for an output. "per_input" divides every input's derivatives by
        their own root mean square, floored at a tenth of the largest, so that all inputs count alike. "none" uses
        raw derivatives, ``weight * mean_i sum_j (J_ij - T_ij)**2``.
    loss : {"mse", "huber"}, default "mse"
        "huber" grows linearly beyond the size of a typical entry, ``sigma_y / sqrt(n_inputs)`` (1 for scale "none").
    name : str, default "gradient_matching"
        Name of the loss.

    Attributes
    ----------
    statistics : MatchingScale or None
        Scale of shape (n_outputs, n_inputs), in units of x, and threshold of shape (n_outputs,), in units of y; None
        before `fit`.

    Raises
    ------
    ValueError
        If an argument is invalid; in a call, if shapes are not exactly those below or `fit` is missing.

    Notes
    -----
    As ``loss(y_true, y_pred, sample_weight)``: `y_pred` and `y_true` have the shape of x for one output, else
    (batch, n_outputs, *shape of an input), in units of y per unit of x; `y_true` may be (batch, n_outputs, n_inputs)
    and keep the axis of a single output. A shape that merely broadcasts is an error. NaN in `y_true` means unknown.
    `sample_weight` of shape (batch,) or (batch, 1) weighs samples, of the shape of `y_true` single entries; only
    ratios matter (unlike in Keras's own losses), and 0 removes what it weighs, whatever stands there. A negative
    weight makes the loss NaN.

    The scales come from `fit`, once, are saved in the configuration and never change. `WithDerivatives.fit` and models
    with `attach_gradient_matching` call it for you if you do not. Under `tf.distribute` Keras averages the replicas'
    losses: with equally many known entries in each, that is the loss of the whole batch.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise.keras import GradientMatching
    >>> x = np.linspace(-1, 1, 5)[:, None]
    >>> matching = GradientMatching().fit(x, x**2, 2 * x)
    >>> float(matching(2 * x, 2 * x))
    0.0
    >>> round(float(matching(2 * x, 0 * x) / np.var(x**2)), 5)  # no derivative at all: an error of 100 %
    1.0
    """

    def __init__(
        self,
        derivative_weight: float = 1.0,
        *,
        scale: str = "block",
        loss: str = "mse",
        name: str = "gradient_matching",
    ) -> None:
        super().__init__(name=name, dtype="float64" if keras.config.floatx() == "float64" else "float32")
        _check_choice("scale", scale, SCALES)
        _check_choice("loss", loss, LOSSES)
        number = isinstance(derivative_weight, (int, float, np.number)) and not isinstance(derivative_weight, bool)
        if not (number and math.isfinite(derivative_weight) and derivative_weight >= 0):
            msg = (
                "`derivative_weight` must be a finite number that is not negative. Received: "
                f"derivative_weight={derivative_weight!r}"
            )
            raise ValueError(msg)
        self.derivative_weight = float(derivative_weight)
        self.scale = scale
        self.loss = loss
        self.statistics: MatchingScale | None = None
        self.n_outputs: int | None = None  # set by `fit`, or by the model that computes the derivatives

    def fit(self, X: Any, y: Any = None, dydx: Any = None, *, mask: Any = None) -> Self:
        """Set the scales from training data, once.

        Parameters
        ----------
        X : array of shape (n, ...)
            Inputs, any number of rows: a sample of the training data will do.
        y : array of shape (n,) or (n, n_outputs), optional
            Values. Without them sigma_y is the standard deviation of y to first order in x.
        dydx : array
            Derivatives, shaped like `y_true`, in units of y per unit of x; NaN means unknown.
        mask : boolean array of the shape of `dydx`, optional
            False means unknown.

        Returns
        -------
        GradientMatching
            The loss itself.

        Raises
        ------
        ValueError
            If shapes do not belong together, values are not finite, or `dydx` is missing.
        """
        if dydx is None:
            msg = "`dydx` must be given, to fit the scales to. Received: dydx=None"
            raise ValueError(msg)
        known = None if mask is None else _array(mask).astype(bool)
        values = None if y is None else _array(y)
        self._set(scale_from_data(_array(X), values, _array(dydx), mask=known, scale=self.scale))
        return self

    def expect(self, n_outputs: int) -> None:
        """Tell a loss that is not fitted how many outputs its derivatives belong to."""
        if self.statistics is None:
            self.n_outputs = n_outputs

    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss, a scalar; see the notes of the class."""
        # Keras would multiply terms by weights, and 0 * NaN is NaN: the weights go where the core can select instead.
        return super().__call__((y_true,) if sample_weight is None else (y_true, sample_weight), y_pred)

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        """The loss with shape (1,): Keras takes the mean, and divides by the number of replicas."""
        target, weight = (*y_true, None)[:2] if isinstance(y_true, (tuple, list)) else (y_true, None)
        n_outputs, x_shape = self._sizes(y_pred)
        n_inputs = math.prod(x_shape[1:])
        predicted = ops.reshape(y_pred, (-1, n_outputs, n_inputs))
        return ops.reshape(self.compare(predicted, target, weight, x_shape), (1,))

    def compare(
        self,
        predicted: Tensor,
        target: Tensor,
        weight: Tensor | None,
        x_shape: tuple[Any, ...],
        *,
        chosen: Tensor | None = None,
        n_outputs: int | None = None,
    ) -> Tensor:
        """The loss of rows of a Jacobian, a scalar.

        Parameters
        ----------
        predicted : Tensor of shape (batch, n_rows, n_inputs)
        target : Tensor
            Known derivatives of all outputs, as the user gave them.
        weight : Tensor or None
            The user's `sample_weight`.
        x_shape : tuple
            Shape of x.
        chosen : integer Tensor of shape (batch, n_rows), optional
            Which outputs the rows belong to; all by default.
        n_outputs : int, optional
            How many outputs there are, if some are chosen.
        """
        n_inputs = predicted.shape[2]
        n_outputs = n_outputs or int(predicted.shape[1])
        batch = ops.shape(predicted)[0]
        like = predicted if chosen is None else ops.zeros((batch, n_outputs, n_inputs), dtype=predicted.dtype)
        scale, threshold = self._looked_up(n_outputs, n_inputs, predicted.dtype)
        if weight is not None:
            weight = as_weight(weight, target, x_shape, like)
        target = as_jacobian("y_true", target, x_shape, like)
        known = known_entries(target, mask=None, sample_weight=weight, xp=ops)
        total = known_weight(target, known, sample_weight=weight, xp=ops)
        share = 1.0
        if chosen is not None:
            rows = ops.expand_dims(chosen, 2)
            target, known = ops.take_along_axis(target, rows, axis=1), ops.take_along_axis(known, rows, axis=1)
            if weight is not None and len(weight.shape) > 1:
                weight = ops.take_along_axis(weight, rows, axis=1)
            if scale is not None:
                scale, threshold = ops.take(scale, chosen, axis=0), ops.take(threshold, chosen, axis=0)
            share = n_outputs / chosen.shape[1]
        if self.derivative_weight == 0:  # nothing counts, and nothing that stands anywhere does harm
            known = ops.zeros_like(known)
        numerators = matching_numerators(
            predicted,
            target,
            known=known,
            sample_weight=weight,
            scale=scale,
            loss=self.loss,
            threshold=threshold,
            xp=ops,
        )
        factor = self.derivative_weight * share * n_inputs
        return reduce_terms(numerators, total, factor=factor, reduction="mean", xp=ops)

    def get_config(self) -> dict[str, Any]:
        """Arguments and fitted scales, which loading a saved model restores."""
        fitted = None if self.statistics is None else [np.asarray(array).tolist() for array in self.statistics]
        return {
            "derivative_weight": self.derivative_weight,
            "scale": self.scale,
            "loss": self.loss,
            "name": self.name,
            "fitted": fitted,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The loss that `get_config` describes, fitted if that one was."""
        config = dict(config)
        fitted = config.pop("fitted", None)
        matching = cls(**config)
        if fitted is not None:
            matching._set(MatchingScale(*(np.asarray(array, dtype=np.float64) for array in fitted)))
        return matching

    def _set(self, statistics: MatchingScale) -> None:
        self.statistics = statistics
        self.n_outputs = statistics.scale.shape[0]

    def _sizes(self, y_pred: Tensor) -> tuple[int, tuple[Any, ...]]:
        """Number of outputs, and shape of x, that go with derivatives of the shape of `y_pred`."""
        shape = tuple(y_pred.shape)
        if None in shape[1:] or len(shape) < 2:
            msg = f"`y_pred` must be derivatives of shape (batch, ...), of known sizes. Received: shape {shape}"
            raise ValueError(msg)
        n_outputs = self.n_outputs
        if n_outputs is None:
            if len(shape) > 2:  # could be an image and one output, or a vector and several
                raise _unfitted(self.scale)
            n_outputs = 1
        if n_outputs == 1:
            return 1, shape
        if shape[1] != n_outputs or len(shape) < 3:
            msg = f"`y_pred` must have shape (batch, {n_outputs}, ...), as `fit` saw. Received: shape {shape}"
            raise ValueError(msg)
        return n_outputs, (shape[0], *shape[2:])

    def _looked_up(self, n_outputs: int, n_inputs: int, dtype: Any) -> tuple[Tensor | None, Tensor | float]:
        if self.scale == "none" or self.derivative_weight == 0:
            return None, 1.0
        if self.statistics is None:
            raise _unfitted(self.scale)
        if self.statistics.scale.shape != (n_outputs, n_inputs):
            msg = (
                "`y_pred` must have the sizes (n_outputs, n_inputs) that were fitted, "
                f"{self.statistics.scale.shape}. Received: {(n_outputs, n_inputs)}. Use one GradientMatching for each "
                "model, or fit again"
            )
            raise ValueError(msg)
        return (
            ops.convert_to_tensor(self.statistics.scale, dtype=dtype),
            ops.convert_to_tensor(self.statistics.threshold, dtype=dtype),
        )


def _unfitted(scale: str) -> ValueError:
    return ValueError(
        f"GradientMatching(scale={scale!r}) must be fitted before its first call. Call `matching.fit(X, y, dydx)` with "
        "(a sample of) the training data, or train with `WithDerivatives.fit` on arrays, which does so"
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        msg = f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={value!r}"
        raise ValueError(msg)


def _array(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if ops.is_tensor(values):  # bfloat16 by way of float32, as numpy has none
        half = keras.backend.standardize_dtype(values.dtype) == "bfloat16"
        values = ops.convert_to_numpy(ops.cast(values, "float32") if half else values)
    return np.asarray(values, dtype=np.float64)
