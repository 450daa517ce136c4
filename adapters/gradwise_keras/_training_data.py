"""Fitting the scales of gradient matching to what a user passes to `fit`."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from gradwise_keras._backend import ops
from gradwise_keras._matching_loss import GradientMatching

__all__ = ["check_targets", "fit_scales"]

Tensor = Any

_REMEDY = "Call `matching.fit(X, y, dydx)` on the GradientMatching with (a sample of) the training data before"


def check_targets(y: Any) -> None:
    """Raise ValueError unless `y` is a dict of "y" and "dydx".

    A list would do for Keras, which sorts names: y would be compared with derivatives, silently where shapes agree.
    """
    if not isinstance(y, dict) or set(y) != {"y", "dydx"}:
        received = f"a dict with keys {sorted(map(str, y))}" if isinstance(y, dict) else type(y).__name__
        msg = f'`y` must be a dict {{"y": values, "dydx": derivatives}}. Received: {received}'
        raise ValueError(msg)


def fit_scales(
    matchings: list[GradientMatching], fit: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Fit those `matchings` that are not fitted to the training data in the arguments of a call of Keras's `fit`.

    Raises
    ------
    ValueError
        If the data can be read only once, targets are missing or invalid, or a sample weight is negative.
    """
    needed = [matching for matching in matchings if matching.statistics is None and matching.scale != "none"]
    if not needed:
        return
    arguments = inspect.signature(fit).bind(*args, **kwargs).arguments
    x, y, sample_weight = (arguments.get(name) for name in ("x", "y", "sample_weight"))
    if y is None:
        batch = _first_batch(x)
        if not isinstance(batch, (tuple, list)) or len(batch) not in {2, 3}:
            msg = f"training data must come as (x, y) or (x, y, sample_weight). Received: {type(batch).__name__}"
            raise ValueError(msg)
        x, y, sample_weight = (*batch, None)[:3]
        warnings.warn(
            f"GradientMatching is not fitted: the first batch of the training data sets its scales. {_REMEDY}",
            UserWarning,
            stacklevel=3,
        )
        n = None
    else:
        split = arguments.get("validation_split") or 0.0
        validates = split and arguments.get("validation_data") is None
        n = math.floor(_length(x) * (1 - split)) if validates else None  # as Keras splits
    check_targets(y)
    if isinstance(x, (dict, list, tuple)):
        msg = f"`x` must be one array: derivatives of several inputs are not supported. Received: {type(x).__name__}"
        raise ValueError(msg)
    targets = dict(y or {})
    inputs, values, derivatives = (_array(array)[:n] for array in (x, targets["y"], targets["dydx"]))
    weight = sample_weight.get("dydx") if isinstance(sample_weight, dict) else sample_weight
    mask = None if weight is None else _mask(_array(weight)[:n], derivatives.shape)
    for matching in needed:
        matching.fit(inputs, values, derivatives, mask=mask)


def _mask(weight: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Which derivatives count, from weights of samples or of entries."""
    if not np.all(weight >= 0):
        msg = f"`sample_weight` must not be negative or NaN. Received: sample_weight with minimum {weight.min()}"
        raise ValueError(msg)
    if weight.shape == shape:
        return weight > 0
    if weight.shape not in {shape[:1], (shape[0], 1)}:
        msg = f"`sample_weight` must have shape {shape[:1]} or {shape}. Received: sample_weight of shape {weight.shape}"
        raise ValueError(msg)
    return np.broadcast_to((weight > 0).reshape(-1, *[1] * (len(shape) - 1)), shape)


def _first_batch(data: Any) -> Any:
    if isinstance(data, keras.utils.PyDataset):
        return data[0]
    if isinstance(data, Iterator) or not hasattr(data, "__iter__"):
        msg = f"GradientMatching is not fitted, and these training data can be read only once. {_REMEDY}"
        raise ValueError(msg)
    if type(data).__module__.partition(".")[0] == "torch":  # a DataLoader draws its seed from torch's random stream
        import torch

        with torch.random.fork_rng():
            return next(iter(data))
    return next(iter(data))


def _length(x: Any) -> int:
    return len(x) if hasattr(x, "__len__") else int(x.shape[0])


def _array(values: Any) -> np.ndarray[Any, Any]:
    return ops.convert_to_numpy(values) if ops.is_tensor(values) else np.asarray(values)
