"""GradientEnhancedMLPRegressor: a feed-forward network for scikit-learn that learns from derivatives as well."""

import warnings
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from gradwise._matching import LOSSES, check_choice, check_non_negative
from gradwise._matching_scale import SCALES
from gradwise_torch._mlp_data import Derivatives, as_targets, prepare
from gradwise_torch._mlp_lbfgs import lbfgs, minimise_all
from gradwise_torch._mlp_network import ACTIVATIONS, PIECEWISE_LINEAR, Architecture
from gradwise_torch._mlp_objective import Objective

__all__ = ["GradientEnhancedMLPRegressor"]

_MEMORY = 40


class GradientEnhancedMLPRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Feed-forward network that learns from values and, where they are known, their derivatives.

    Minimises, in standardised units (inputs and outputs divided by their standard deviations, derivatives by the chain
    rule), ``MSE(y) + derivative_weight * L(dydx) + alpha / n * sum W**2``.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise.torch import GradientEnhancedMLPRegressor
    >>> X = np.linspace(-3, 3, 7)[:, None]
    >>> model = GradientEnhancedMLPRegressor((32,), random_state=0)
    >>> _ = model.fit(X, np.sin(X[:, 0]), dydx=np.cos(X))
    >>> bool(np.abs(model.predict([[0.5]]) - np.sin(0.5)) < 0.01)
    True
    """

    def __init__(
        self,
        hidden_layer_sizes: Any = (64, 64),
        activation: str = "tanh",
        solver: str = "lbfgs",
        derivative_weight: float | str = 1.0,
        *,
        alpha: float = 1e-4,
        scale: str = "block",
        derivative_loss: str = "mse",
        max_iter: int = 500,
        tol: float = 1e-3,
        dydx_layout: str = "sklearn",
        random_state: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.derivative_weight = derivative_weight
        self.alpha = alpha
        self.scale = scale
        self.derivative_loss = derivative_loss
        self.max_iter = max_iter
        self.tol = tol
        self.dydx_layout = dydx_layout
        self.random_state = random_state

    def fit(
        self,
        X: Any,
        y: Any,
        dydx: Any = None,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        X_dydx: Any = None,
    ) -> Self:
        """Train on values `y` and, where known, derivatives `dydx`."""
        hidden = self._check_parameters()
        if self.dydx_layout == "jenn":
            X, y = np.transpose(np.asarray(X)), np.transpose(np.asarray(y))
            X_dydx = None if X_dydx is None else np.transpose(np.asarray(X_dydx))
            dydx, mask = (None if part is None else np.moveaxis(np.asarray(part), -1, 0) for part in (dydx, mask))
        checked: Any = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        X, y = checked[0], np.asarray(checked[1], dtype=np.float64)
        outputs = y.reshape(len(y), -1)
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        derivatives: Derivatives | None = None
        weighted = float(self.derivative_weight)
        if dydx is not None and weighted != 0:
            where: Any = X if X_dydx is None else validate_data(self, X_dydx, dtype=np.float64, reset=False)
            derivatives = as_targets(
                dydx, mask, where, weight if X_dydx is None else None, outputs.shape[1], per_sample=X_dydx is None
            )
            if self.activation in PIECEWISE_LINEAR:
                msg = (
                    f"a network of {self.activation!r} is piecewise linear: derivatives cannot move its kinks. "
                    'Use a smooth activation, for example "tanh" or "softplus"'
                )
                warnings.warn(msg, UserWarning, stacklevel=2)
        data, scaler = prepare(X, outputs, weight, derivatives, scale=self.scale, shared=X_dydx is None)
        architecture = Architecture((X.shape[1], *hidden, outputs.shape[1]), self.activation)
        objective = Objective(
            architecture,
            data,
            derivative_weight=weighted,
            alpha=self.alpha,
            loss=self.derivative_loss,
            dtype=torch.float64,
        )
        seed = check_random_state(self.random_state).randint(2**31)
        start = architecture.initial(seed)
        search = lbfgs(start, max_iter=self.max_iter, tol=self.tol, memory=_MEMORY, report=None)

        def evaluate(points: NDArray[np.float64]) -> tuple[Any, Any]:
            loss, gradient = objective(points[0])
            return [loss], [gradient]

        (best,) = minimise_all(evaluate, [search])
        self.architecture_, self.theta_, self.scaler_ = architecture, best.theta, scaler
        self.loss_, self.loss_curve_, self.converged_ = best.loss, best.loss_curve, best.converged
        self.n_iter_, self.n_outputs_ = len(best.loss_curve), outputs.shape[1]
        self.derivative_weight_ = weighted
        self._flat = y.ndim == 1
        if not best.converged:
            msg = f"L-BFGS did not converge in {self.max_iter} iterations. Raise `max_iter` or `tol`"
            warnings.warn(msg, ConvergenceWarning, stacklevel=2)
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Values at `X`."""
        values = self._evaluate(X, jacobian=False)[0]
        if self.dydx_layout == "jenn":
            return values.T
        return values[:, 0] if self._flat else values

    def predict_jacobian(self, X: Any) -> NDArray[np.float64]:
        """Derivatives of the outputs with respect to the inputs at `X`."""
        jacobian = self._evaluate(X, jacobian=True)[1]
        if self.dydx_layout == "jenn":
            return np.moveaxis(jacobian, 0, -1)
        return jacobian[:, 0] if self._flat else jacobian

    def _evaluate(self, X: Any, *, jacobian: bool) -> tuple[Any, Any]:
        check_is_fitted(self, "theta_")
        if self.dydx_layout == "jenn":
            X = np.transpose(np.asarray(X))
        checked: Any = validate_data(self, X, dtype=np.float64, reset=False)
        x = torch.from_numpy((checked - self.scaler_.x_mean_) / self.scaler_.x_scale_)
        with torch.no_grad():
            theta = torch.from_numpy(self.theta_)
            values = self.architecture_.values(theta, x) if not jacobian else None
            slopes = self.architecture_.values_and_jacobian(theta, x)[1].numpy() if jacobian else None
        return (
            None if values is None else values.numpy() * self.scaler_.y_scale_ + self.scaler_.y_mean_,
            None if slopes is None else slopes * (self.scaler_.y_scale_[:, None] / self.scaler_.x_scale_),
        )

    def _check_parameters(self) -> tuple[int, ...]:
        sizes = self.hidden_layer_sizes
        hidden: tuple[Any, ...] = (sizes,) if isinstance(sizes, Integral) else tuple(sizes)
        if not all(isinstance(size, Integral) and int(size) > 0 for size in hidden):
            msg = f"`hidden_layer_sizes` must be positive whole numbers; got {sizes!r}"
            raise ValueError(msg)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("solver", self.solver, ("lbfgs",))
        check_choice("scale", self.scale, SCALES)
        check_choice("derivative_loss", self.derivative_loss, LOSSES)
        check_choice("dydx_layout", self.dydx_layout, ("sklearn", "jenn"))
        weight: Any = self.derivative_weight
        if not isinstance(weight, (int, float, np.floating, np.integer)):
            msg = f'`derivative_weight` must be a number or "auto"; got {self.derivative_weight!r}'
            raise ValueError(msg)
        check_non_negative("derivative_weight", float(weight))
        check_non_negative("alpha", self.alpha)
        return tuple(int(size) for size in hidden)
