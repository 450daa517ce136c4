"""A fitted network as a scikit-learn estimator: predictions, their derivatives, and files."""

from os import PathLike
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils.validation import check_is_fitted, validate_data

from gradwise._scaling import DerivativeScaler
from gradwise_torch._mlp_network import Architecture, Pass
from gradwise_torch._mlp_save import read, write

__all__ = ["FittedNetwork"]

Floats = NDArray[np.float64]

# Numbers in one layer of a prediction, so that a million rows do not take gigabytes.
_BLOCK = 2**22


class FittedNetwork(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What `GradientEnhancedMLPRegressor` does once it is fitted."""

    architecture_: Architecture
    scaler_: DerivativeScaler
    weights_: Floats
    n_features_in_: int
    n_outputs_: int
    flat_: bool
    dydx_layout: str
    dtype: str
    n_estimators: int

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Values at `X`: the mean over members.

        Parameters
        ----------
        X : array-like of shape (n, n_inputs)
        return_std : bool, default False
            Also return the members' standard deviation (of one member from another, dividing by one less than their
            number): how far the data leave the network open, not the noise of y. Often too small.

        Returns
        -------
        array of shape (n,) or (n, n_outputs), like the y of `fit`
            Values, in units of y; with `return_std` two such arrays.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        ValueError
            If `return_std` is asked of a single member.
        """
        if return_std and self.n_estimators < 2:
            msg = f"`return_std` needs `n_estimators` of at least 2; got {self.n_estimators}"
            raise ValueError(msg)
        values = self._evaluate(X, jacobian=False)
        mean = self._out(values.mean(axis=0))
        return (mean, self._out(values.std(axis=0, ddof=1))) if return_std else mean

    def predict_jacobian(self, X: Any) -> Floats:
        """Derivatives of the predicted values with respect to the inputs.

        Parameters
        ----------
        X : array-like of shape (n, n_inputs)

        Returns
        -------
        array of shape (n, n_inputs) if y was one-dimensional, else (n, n_outputs, n_inputs)
            Exact derivatives of `predict`, in units of y per unit of X.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        """
        jacobian = self._evaluate(X, jacobian=True).mean(axis=0)
        if self.dydx_layout == "jenn":
            return np.moveaxis(jacobian, 0, -1)
        return jacobian[:, 0] if self.flat_ else jacobian

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Coefficient of determination of `predict`, as scikit-learn has it; X and y in the estimator's layout."""
        if self.dydx_layout == "jenn":
            return float(r2_score(np.transpose(y), self.predict(X).T, sample_weight=sample_weight))
        return float(super().score(X, y, sample_weight))

    def save(self, path: str | PathLike[str]) -> None:
        """Write parameters and weights to a file that `load` reads without executing anything in it.

        The file takes its name only when it is complete: a full disk, an exception or a killed process leaves what was
        there before.

        Raises
        ------
        OSError
            The disk is full, or the folder cannot be written to.
        NotFittedError
            If `fit` has not been called.
        TypeError
            If a parameter is not a plain value, for example a RandomState instance.
        """
        check_is_fitted(self, "weights_")
        write(path, self.get_params(deep=False), {name: value for name, value in vars(self).items() if name[-1] == "_"})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` has written; predictions are the same, bit for bit.

        Raises
        ------
        ValueError
            If the file is something else.
        pickle.UnpicklingError
            If it holds anything but tensors and plain values.
        """
        parameters, state = read(path)
        model = cls(**parameters)
        for name, value in state.items():
            setattr(model, name, value)
        return model

    def _evaluate(self, X: Any, *, jacobian: bool) -> Floats:
        """Outputs, or derivatives, of every member in the user's units."""
        check_is_fitted(self, "weights_")
        if self.dydx_layout == "jenn":
            X = np.transpose(np.asarray(X))
        checked: Any = validate_data(self, X, dtype=np.float64, reset=False)
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        x = torch.from_numpy((checked - self.scaler_.x_mean_) / self.scaler_.x_scale_).to(dtype)
        theta = torch.from_numpy(self.weights_).to(dtype)
        width = max(self.architecture_.sizes) * len(theta) * (self.n_outputs_ if jacobian else 1)
        parts: list[torch.Tensor] = []
        with torch.no_grad():
            for rows in torch.split(x, max(1, _BLOCK // width)):
                part: Any = self.architecture_.values(theta, rows)
                if jacobian:
                    part = Pass(self.architecture_, theta, rows, 0).jacobian
                parts.append(part)
        predicted = torch.cat(parts, dim=1).double().numpy()
        if jacobian:
            return predicted * (self.scaler_.y_scale_[:, None] / self.scaler_.x_scale_)
        return predicted * self.scaler_.y_scale_ + self.scaler_.y_mean_

    def _out(self, values: Floats) -> Floats:
        if self.dydx_layout == "jenn":
            return values.T
        return values[:, 0] if self.flat_ else values
