"""The scales of the gradient-matching loss, as buffers: set once, saved in state_dict."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from gradwise._matching_data import check_training_data, scale_from_data, second_order_scale_from_data
from gradwise._matching_scale import MatchingScale, directional_scale, matching_scale, second_order_scale
from gradwise_torch._matching_goals import Goal
from gradwise_torch._target_shapes import as_directional

__all__ = ["MatchingScales", "processes"]

_KINDS = ("jacobian", "jvp", "hvp", "curvature")
_NAMES = tuple(f"{kind}_{what}" for kind in _KINDS for what in ("scale", "threshold"))


def processes() -> tuple[int, int]:
    """Rank and number of processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class MatchingScales(nn.Module):
    """Scale and Huber threshold of each kind of target: "jacobian", "jvp", "hvp", "curvature".

    Parameters
    ----------
    scale : {"block", "per_input", "none"}
        See `GradientMatching`.

    Attributes
    ----------
    jacobian_scale, hvp_scale : Tensor of shape (n_outputs, n_inputs)
        In units of x; empty until it is set.
    jvp_scale, curvature_scale : Tensor of shape (n_outputs, 1)
        Without unit.
    jacobian_threshold, jvp_threshold, hvp_threshold, curvature_threshold : Tensor of shape (n_outputs,)
        In units of y.
    """

    jacobian_scale: Tensor
    jacobian_threshold: Tensor
    jvp_scale: Tensor
    jvp_threshold: Tensor
    hvp_scale: Tensor
    hvp_threshold: Tensor
    curvature_scale: Tensor
    curvature_threshold: Tensor

    def __init__(self, scale: str) -> None:
        super().__init__()
        self.scale = scale
        for name in _NAMES:
            self.register_buffer(name, torch.empty(0))
        self._warned = False

    def fit(self, X: Any, y: Any, *, mask: Any, **targets: Any) -> None:
        """Set the buffers; arguments as for `GradientMatching.fit`."""
        given = [name for name, values in targets.items() if values is not None]
        if len(given) != 1:
            names = ", ".join(f"`{name}`" for name in targets)
            got = " and ".join(f"`{name}`" for name in given) or "none"
            msg = f"exactly one of {names} must be given; got {got}. Use one GradientMatching for each"
            raise ValueError(msg)
        (name,) = given
        inputs = _array(X)
        values = None if y is None else _array(y)
        known = None if mask is None else np.asarray(_array(mask), dtype=bool)
        dtype = X.dtype if isinstance(X, Tensor) and X.is_floating_point() else torch.get_default_dtype()
        derivatives = _array(targets[name])
        if name == "dydx":
            self._set("jacobian", scale_from_data(inputs, values, derivatives, mask=known, scale=self.scale), dtype)
        elif name == "target_hvp":
            statistics = second_order_scale_from_data(inputs, values, derivatives, mask=known, scale=self.scale)
            self._set("hvp", statistics, dtype)
        else:
            statistics = self._fit_directional(name, inputs, values, derivatives, known)
            self._set(name.removeprefix("target_"), statistics, dtype)

    def _fit_directional(self, name: str, inputs: Any, values: Any, derivatives: Any, known: Any) -> MatchingScale:
        check_training_data(inputs, values, derivatives, name)
        values = None if values is None else values.reshape(len(values), -1)
        columns = derivatives[:, None] if derivatives.ndim == 1 else derivatives
        n_outputs = columns.shape[1] if values is None else values.shape[1]
        n_directions = derivatives.shape[2] if derivatives.ndim > 2 else None
        derivatives = as_directional(name, derivatives, len(inputs), n_outputs, n_directions)
        known = None if known is None else as_directional("mask", known, len(inputs), n_outputs, n_directions)
        return directional_scale(values, derivatives, mask=known, scale=self.scale, xp=np)

    def lookup(self, goal: Goal, x: Tensor, *, training: bool) -> tuple[Tensor | None, Tensor | float]:
        """Scale of shape (n_outputs, width) and threshold for `goal`; the first training batch sets them if need be."""
        if self.scale == "none" or goal.kind == "norm":
            return None, 1.0
        scale: Tensor = getattr(self, f"{goal.kind}_scale")
        threshold: Tensor = getattr(self, f"{goal.kind}_threshold")
        if scale.numel() == 0:
            scale, threshold = self._first_batch(goal, x, training=training)
        _, n_outputs, width = goal.target.shape
        shape = (n_outputs, _width_of_scale(goal))
        if tuple(scale.shape) != shape:
            msg = (
                f"`x` and y must have the sizes (n_outputs, n_inputs) that were fitted, {tuple(scale.shape)}; got "
                f"{shape}. Use one GradientMatching for each model, or fit again"
            )
            raise ValueError(msg)
        scale = scale.to(goal.target)
        scale = scale.repeat(1, width // shape[1]) if goal.kind == "hvp" else scale.expand(n_outputs, width)
        return scale, threshold.to(goal.target)

    def _first_batch(self, goal: Goal, x: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "GradientMatching is not fitted: the first training batch sets its scales, with the standard deviation "
                "of y to first order in x. Call `matching.fit(X, y, dydx)` with (a sample of) the training data before",
                UserWarning,
                stacklevel=2,
            )
        target = _array(goal.target)
        mask = None if goal.mask is None else goal.mask.cpu().numpy()
        known = np.isfinite(target) if mask is None else np.isfinite(target) & mask
        if not known.any():
            n_outputs = target.shape[1]
            statistics = MatchingScale(np.ones((n_outputs, _width_of_scale(goal))), np.ones(n_outputs))
        elif goal.kind == "jacobian":
            statistics = matching_scale(_array(x).reshape(len(x), -1), None, target, mask=mask, scale=self.scale, xp=np)
        elif goal.second is not None and goal.kind == "hvp":
            shape = (*target.shape[:2], *goal.second.shape[1:])
            known_products = None if mask is None else mask.reshape(shape)
            statistics = second_order_scale(
                _array(x).reshape(len(x), -1), None, target.reshape(shape), mask=known_products, scale=self.scale, xp=np
            )
        else:
            statistics = directional_scale(None, target, mask=mask, scale=self.scale, xp=np)
        scale, threshold = (torch.from_numpy(array).to(goal.target) for array in statistics)
        shared = training and processes()[1] > 1
        if shared:  # one scale for all processes: that of the first one's batch
            dist.broadcast(scale, 0)
            dist.broadcast(threshold, 0)
        # Evaluation must not decide what training does, and a batch without any known entry says nothing.
        if training and (shared or known.any()):
            self._set(goal.kind, MatchingScale(scale, threshold), scale.dtype)
        return scale, threshold

    def _set(self, kind: str, statistics: MatchingScale, dtype: torch.dtype) -> None:
        for name, value in zip(("scale", "threshold"), statistics, strict=True):
            buffer: Tensor = getattr(self, f"{kind}_{name}")
            setattr(self, f"{kind}_{name}", torch.as_tensor(value).to(buffer.device, dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in _NAMES:  # a fitted state may be loaded into an unfitted module
            saved = state_dict.get(prefix + name)
            if saved is not None:
                current: Tensor = getattr(self, name)
                setattr(self, name, torch.empty(saved.shape, dtype=saved.dtype, device=current.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _width_of_scale(goal: Goal) -> int:
    """Number of inputs that the scale of `goal` distinguishes."""
    if goal.kind == "hvp" and goal.second is not None:
        return goal.second.shape[2]
    return goal.target.shape[2] if goal.kind == "jacobian" else 1


def _array(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(values, Tensor):  # by way of float64, as numpy has no bfloat16
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
