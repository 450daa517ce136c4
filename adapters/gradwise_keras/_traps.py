"""Silent traps that `fit` looks for before it trains a model by its derivatives."""

import warnings
from typing import Any
from weakref import WeakSet

import keras
from keras import layers

__all__ = ["kinks_between_linear_parts", "warn_free_offset", "warn_kinks"]

_with_kinks: WeakSet[keras.Model] = WeakSet()
_free: WeakSet[keras.Model] = WeakSet()

_KINKED_ACTIVATIONS = {
    "relu", "relu6", "leaky_relu", "hard_tanh", "hard_sigmoid", "hard_shrink", "soft_shrink", "threshold",
    "sparse_plus", "sparse_sigmoid",
}  # fmt: skip
_KINKED_OPERATIONS = {
    "Absolute", "Clip", "HardShrink", "HardSigmoid", "HardTanh", "LeakyRelu", "MaxPool", "Maximum", "Minimum", "Relu",
    "Relu6", "SoftShrink", "Threshold",
}  # fmt: skip
_LINEAR_OPERATIONS = {
    "Add", "Concatenate", "ExpandDims", "GetItem", "Mean", "Negative", "Reshape", "Squeeze", "Stack", "Subtract", "Sum",
    "Transpose",
}  # fmt: skip
_KINKED_LAYERS: tuple[type[Any], ...] = (
    layers.LeakyReLU, layers.PReLU, layers.ReLU, layers.Maximum, layers.Minimum,
    layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D,
    layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D,
)  # fmt: skip
# Linear in their input, apart from what they have as `activation`.
_LINEAR_LAYERS: tuple[type[Any], ...] = (
    layers.Activation, layers.Add, layers.AlphaDropout, layers.Average, layers.AveragePooling1D,
    layers.AveragePooling2D, layers.AveragePooling3D, layers.BatchNormalization, layers.Concatenate, layers.Conv1D,
    layers.Conv1DTranspose, layers.Conv2D, layers.Conv2DTranspose, layers.Conv3D, layers.Conv3DTranspose,
    layers.Cropping1D, layers.Cropping2D, layers.Cropping3D, layers.Dense, layers.DepthwiseConv1D,
    layers.DepthwiseConv2D, layers.Dropout, layers.EinsumDense, layers.Flatten, layers.GaussianDropout,
    layers.GaussianNoise, layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D,
    layers.Identity, layers.InputLayer, layers.Normalization, layers.Permute, layers.RepeatVector, layers.Rescaling,
    layers.Reshape, layers.SeparableConv1D, layers.SeparableConv2D, layers.SpatialDropout1D, layers.SpatialDropout2D,
    layers.SpatialDropout3D, layers.Subtract, layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D,
    layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D,
)  # fmt: skip


def warn_kinks(model: keras.Model) -> None:
    """Say, once for a model, that its derivatives are piecewise constant."""
    if model in _with_kinks:
        return
    kinks = kinks_between_linear_parts(model)
    if kinks:
        _with_kinks.add(model)
        warnings.warn(
            f"`model` is linear between kinks ({', '.join(sorted(kinks))}): its derivatives are piecewise constant, "
            "and a derivative loss cannot move the kinks, nor train most biases. Matching such derivatives helps less; "
            "use a smooth activation (tanh, softplus, gelu, silu)",
            UserWarning,
            stacklevel=3,
        )


def kinks_between_linear_parts(model: keras.Model) -> set[str]:
    """Names of the activations and layers with kinks, if all else is known to be linear; else nothing.

    Looks at types of layers, never into a `call` that somebody wrote, of a layer or of a model: what that does is
    unknown, and may be smooth.
    """
    kinks: set[str] = set()
    for part in _parts(model):
        found = _kinks_of(part)
        if found is None:
            return set()
        kinks |= found
    return kinks


def _kinks_of(part: Any) -> set[str] | None:
    """Names of what has kinks in a layer or operation; None if it is not known to be linear otherwise."""
    kind = type(part).__name__
    if not isinstance(part, layers.Layer):
        return {kind} if kind in _KINKED_OPERATIONS else set() if kind in _LINEAR_OPERATIONS else None
    if type(part) in _KINKED_LAYERS:
        return {kind}
    if type(part) not in _LINEAR_LAYERS:
        return None
    activation = getattr(part, "activation", None)
    if activation is None or isinstance(activation, layers.Layer):
        return set() if activation is None else _kinks_of(activation)
    name = getattr(activation, "__name__", "")
    return {name} if name in _KINKED_ACTIVATIONS else set() if name == "linear" else None


def _parts(model: Any) -> list[Any]:
    """Layers and other operations of a Sequential or functional model, those of nested ones included; else itself."""
    call = type(model).call.__qualname__
    if call not in {"Sequential.call", "Functional.call"}:
        return [model]
    found: list[Any] = []
    for part in model.layers if call == "Sequential.call" else model.operations:
        found.extend(_parts(part) if isinstance(part, keras.Model) else [part])
    return found


def warn_free_offset(model: keras.Model, *, free: bool) -> None:
    """Say, once for a model, if its values are not trained."""
    if free and model not in _free:
        _free.add(model)
        warnings.warn(
            "the offset of `model` is free: it is compiled with a loss for its derivatives only, which do not depend "
            'on the last bias, so that values are right up to a constant only. Give "y" a loss too',
            UserWarning,
            stacklevel=3,
        )
