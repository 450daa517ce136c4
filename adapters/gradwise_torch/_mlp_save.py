"""Save and load fitted estimators as tensors and plain values: reading such a file executes nothing."""

from os import PathLike
from typing import Any

import numpy as np
import torch

from gradwise import __version__
from gradwise._files import written_whole
from gradwise._scaling import DerivativeScaler
from gradwise_torch._mlp_network import Architecture

__all__ = ["read", "write"]

_FORMAT = "gradwise.torch.GradientEnhancedMLPRegressor/1"
_SCALER = ("x_mean_", "x_scale_", "y_mean_", "y_scale_")


def write(path: str | PathLike[str], parameters: dict[str, Any], state: dict[str, Any]) -> None:
    """Write an estimator's parameters and fitted attributes; `path` is whole afterwards, or what it was before.

    Raises
    ------
    TypeError
        If a parameter is neither a number, a string, None nor a tuple or list of those.
    """
    content: dict[str, Any] = {"format": _FORMAT, "version": __version__}
    content["parameters"] = {name: _plain(name, value) for name, value in parameters.items()}
    content["state"] = {name: _encode(name, value) for name, value in state.items()}
    with written_whole(path) as file:
        torch.save(content, file)


def read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and fitted attributes from a file of `write`.

    Raises
    ------
    ValueError
        If the file is something else.
    pickle.UnpicklingError
        If it holds anything but tensors and plain values.
    """
    content = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        msg = f"`path` must be a file that `GradientEnhancedMLPRegressor.save` has written; got {str(path)!r}"
        raise ValueError(msg)
    return content["parameters"], {name: _decode(value) for name, value in content["state"].items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(name, part) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    msg = f"`{name}` must be a number, a string or None to be saved; got {value!r}. Use `set_params({name}=None)`"
    raise TypeError(msg)


def _encode(name: str, value: Any) -> Any:
    if isinstance(value, DerivativeScaler):
        return {"scaler": {key: torch.from_numpy(getattr(value, key)) for key in _SCALER}, "n": value.n_features_in_}
    if isinstance(value, Architecture):
        return {"sizes": list(value.sizes), "activation": value.activation}
    if isinstance(value, np.ndarray):
        if value.dtype == object:  # names of features
            return {"names": [str(part) for part in value]}
        return torch.from_numpy(np.ascontiguousarray(value))
    return _plain(name, value)


def _decode(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if not isinstance(value, dict):
        return value
    if "names" in value:
        return np.array(value["names"], dtype=object)
    if "sizes" in value:
        return Architecture(tuple(value["sizes"]), value["activation"])
    scaler = DerivativeScaler()
    for key, statistic in value["scaler"].items():
        setattr(scaler, key, statistic.numpy())
    scaler.n_features_in_ = value["n"]
    return scaler
