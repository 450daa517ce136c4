"""How a capacity study makes models of an estimator: a clone for each unit, or one ensemble for several seeds."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType] - no types there

__all__ = ["EstimatorFit", "as_fit"]

Floats = NDArray[np.float64]
Rows = tuple[Floats, Floats, Floats | None]
Parameter = str | Callable[[Any], dict[str, Any]]

# What tells `gradwise.torch.GradientEnhancedMLPRegressor` (not to be imported here) from a random forest.
ENSEMBLE = {"n_estimators", "derivative_weight", "hidden_layer_sizes"}


def as_fit(fit: Any, parameter: Parameter) -> Callable[..., Any]:
    """A function ``fit(X, y, dydx, capacity=, seed=)`` from such a function, or from a scikit-learn style estimator."""
    if not (hasattr(fit, "fit") and hasattr(fit, "get_params")):
        if not callable(fit):
            msg = f"`fit` must be a function or an estimator with `fit` and `get_params`; got {fit!r}"
            raise TypeError(msg)
        return fit
    parameters = fit.get_params()
    if isinstance(parameter, str) and parameter not in parameters:
        msg = f"`capacity_parameter` must be a parameter of {type(fit).__name__} or a function; got {parameter!r}"
        raise ValueError(msg)
    if parameters.keys() >= ENSEMBLE and parameters["n_estimators"] == 1:
        return EnsembleFit(fit, parameter)
    return EstimatorFit(fit, parameter)


class EstimatorFit:
    """Fits clones."""

    def __init__(self, estimator: Any, parameter: Parameter) -> None:
        self.estimator, self.parameter = estimator, parameter

    def __call__(self, X: Floats, y: Floats, dydx: Floats | None, *, capacity: float, seed: int, **more: Any) -> Any:
        """Train one clone; `more` parameters may be given."""
        if callable(self.parameter):
            settings = self.parameter(capacity)
        else:
            settings = {self.parameter: (capacity,) if self.parameter == "hidden_layer_sizes" else capacity}
        model = cast("Any", clone(self.estimator))
        if "random_state" in model.get_params():
            settings = {"random_state": seed, **settings}
        model.set_params(**settings, **more)
        return model.fit(X, y) if dydx is None else model.fit(X, y, dydx)


class EnsembleFit(EstimatorFit):
    """Trains the seeds of equal rows as the members of one ensemble, which is one vectorised program."""

    same_rows = True  # of all units that `many` is called with

    def many(self, data: Sequence[Rows], *, capacity: float, seeds: list[int]) -> list[Any]:
        """One model for each seed; if one did not converge all say so, as the ensemble does not tell which."""
        ensemble = self(*data[0], capacity=capacity, seed=seeds[0], n_estimators=len(seeds))
        models: list[Any] = []
        for member in range(len(seeds)):
            model = copy.copy(ensemble)
            model.n_estimators, model.weights_ = 1, ensemble.weights_[member : member + 1]
            models.append(model)
        return models
