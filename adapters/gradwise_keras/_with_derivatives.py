"""A Keras model that returns its input derivatives beside its values."""

from typing import Any, Self

import keras

from gradwise_keras._backend import ops
from gradwise_keras._derivatives import Linearization, linearize
from gradwise_keras._matching_loss import GradientMatching
from gradwise_keras._training_data import check_targets, fit_scales
from gradwise_keras._traps import warn_free_offset, warn_kinks
from gradwise_keras._vjp import outside_compilation

__all__ = ["WithDerivatives"]

Tensor = Any


@keras.saving.register_keras_serializable(package="gradwise")
class WithDerivatives(keras.Model):
    """Model with outputs ``{"y": y, "dydx": derivatives of y with respect to x}``, in one forward pass.

    Compile it with a loss for each of the two and train it with
    ``fit(x, {"y": y, "dydx": dydx}, sample_weight={"y": ..., "dydx": ...})``; validation, `predict`, `evaluate`,
    metrics and ordinary losses work as for any model with two outputs. `model` is trained in place. The
    derivatives are exact, by one backward pass for each output. Not for hundreds of outputs (see
    `attach_gradient_matching`), and not for models that are to be trained by a `train_step` of their own.

    Batch normalisation in training mode couples the rows of a batch: y is then what ``model(x, training=True)`` gives,
    and derivatives come from a second forward pass with the moving statistics and the same dropout masks; a warning
    says so once.

    Parameters
    ----------
    model : keras.Model
        From one floating-point input of shape (batch, ...) to values of shape (batch,) or (batch, n_outputs). Treats
        the rows of a batch independently.
    name : str, optional
        Name of the wrapper.

    Attributes
    ----------
    model : keras.Model
        The model itself. ``wrapped.model.save(path)`` saves a plain Keras model that needs no gradwise.

    Raises
    ------
    ValueError
        When called, if there are several inputs, x is not floating-point, y has another rank or does not depend on x.
        When compiled with a list of losses or weights instead of a dict, or trained with targets that are not a dict.

    Notes
    -----
    "dydx" has the shape of x for one output, else (batch, n_outputs, *shape of an input), in units of y per unit of x,
    and float32 at least. Under a mixed precision policy it is computed in that precision and returned in float32.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> from gradwise.keras import GradientMatching, WithDerivatives
    >>> keras.utils.set_random_seed(0)
    >>> x = np.linspace(-2, 2, 32)[:, None]
    >>> y, dydx = np.sin(x), np.cos(x)
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(32, "tanh"), keras.layers.Dense(1)])
    >>> wrapped = WithDerivatives(model)
    >>> wrapped.compile("adam", loss={"y": "mse", "dydx": GradientMatching()})
    >>> history = wrapped.fit(x, {"y": y, "dydx": dydx}, batch_size=8, epochs=20, verbose=0)
    >>> history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    True
    >>> tuple(wrapped(x)["dydx"].shape)
    (32, 1)
    """

    def __init__(self, model: keras.Model, *, name: str | None = None) -> None:
        if not isinstance(model, keras.Model) or isinstance(model, WithDerivatives):
            msg = f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}"
            raise ValueError(msg)
        # Not the global policy: under a mixed one Keras would round x, and so the derivatives, to half precision.
        super().__init__(name=name, dtype="float64" if model.compute_dtype == "float64" else "float32")
        self.model = model

    def build(self, input_shape: Any) -> None:
        """Build the model."""
        if isinstance(input_shape, dict) or (input_shape and isinstance(input_shape[0], (list, tuple))):
            msg = (
                "`x` must be one tensor: derivatives with respect to several inputs are not supported. Received: "
                f"shapes {input_shape}. Concatenate the inputs, and split them inside the model"
            )
            raise ValueError(msg)
        if not self.model.built:
            # Not model.build, which does nothing for a model that defines only `call`.
            self.model(keras.KerasTensor(input_shape, dtype=self.compute_dtype))
        self.built = True

    def call(self, x: Tensor, training: bool = False) -> dict[str, Tensor]:
        """Values and derivatives."""
        y, dydx, losses = _values_and_derivatives(self.model, x, training=bool(training))
        for loss in losses:
            self.add_loss(loss)
        return {"y": y, "dydx": dydx}

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, loss_weights: Any = None, **kwargs: Any) -> None:
        """As `keras.Model.compile`; `loss` and `loss_weights` are dicts with keys "y" and "dydx"."""
        for name, value in (("loss", loss), ("loss_weights", loss_weights)):
            # Keras would match the entries of a list with the sorted names: the first with "dydx".
            if isinstance(value, (list, tuple)):
                msg = f'`{name}` must be a dict with keys "y" and "dydx". Received: {name}={value!r}'
                raise ValueError(msg)
        if isinstance(loss, GradientMatching) or (isinstance(loss, dict) and _matchings(loss.get("y"))):
            msg = f'`loss` must have GradientMatching at key "dydx" only. Received: loss={loss!r}'
            raise ValueError(msg)
        half = self.model.dtype_policy.name == "mixed_float16"
        if half and kwargs.get("auto_scale_loss", True):  # Keras looks at the policy of the wrapper
            optimizer = keras.optimizers.get(optimizer)
            if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        self._trains_values = not isinstance(loss, dict) or (
            loss.get("y") is not None and (loss_weights or {}).get("y", 1.0) != 0
        )
        super().compile(optimizer, loss, loss_weights, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """As `keras.Model.compile_from_config`, which leaves out models with a `compile` of their own."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.fit`, with targets ``{"y": y, "dydx": dydx}``.

        A `GradientMatching` that is not fitted is fitted first: to the training data if they are arrays, else to their
        first batch, with a warning. Once, a warning says so if "y" has no loss, or if derivatives have one and the
        model is linear between kinks (ReLU), which they cannot move.
        """
        if isinstance(self.loss, dict) and self.loss.get("dydx") is not None:
            warn_kinks(self.model)
            warn_free_offset(self, free=not self._trains_values)
        fit_scales(_matchings(self.loss), super().fit, args, kwargs)
        return super().fit(*args, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """As `keras.Model.compute_loss`."""
        check_targets(y)
        if y_pred is not None:
            values = y_pred["y"].shape
            for matching in _matchings(self.loss):
                # Shapes alone cannot tell derivatives of one output by an image from those of several by a vector.
                matching.expect(1 if len(values) == 1 else values[1])
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def make_train_function(self, force: bool = False) -> Any:
        """As `keras.Model.make_train_function`; made again when scales were fitted again."""
        return super().make_train_function(force or self._scales_changed("train"))

    def make_test_function(self, force: bool = False) -> Any:
        """As `keras.Model.make_test_function`; made again when scales were fitted again."""
        return super().make_test_function(force or self._scales_changed("test"))

    def get_config(self) -> dict[str, Any]:
        """Name and model."""
        return {"name": self.name, "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        """The wrapper that `get_config` describes."""
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(model, name=config.get("name"))

    def _scales_changed(self, kind: str) -> bool:
        """Whether a compiled step holds scales that are no longer those of the losses, as constants."""
        current = [matching.statistics for matching in _matchings(self.loss)]
        name = f"_{kind}_statistics"
        previous = vars(self).get(name)
        object.__setattr__(self, name, current)
        return previous is not None and any(a is not b for a, b in zip(previous, current, strict=False))


@outside_compilation
def _values_and_derivatives(model: keras.Model, x: Tensor, *, training: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    linearization: Linearization = linearize(model, x, training=training)
    rows = linearization.rows()
    return linearization.values, ops.squeeze(rows, 1) if linearization.n_outputs == 1 else rows, linearization.losses


def _matchings(loss: Any) -> list[GradientMatching]:
    found = loss.values() if isinstance(loss, dict) else loss if isinstance(loss, (list, tuple)) else [loss]
    return [matching for matching in found if isinstance(matching, GradientMatching)]
