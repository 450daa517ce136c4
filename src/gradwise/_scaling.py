"""Standardise data together with its derivatives: the chain rule done once, in one place."""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator  # pyright: ignore[reportMissingTypeStubs] - scikit-learn ships no types - scikit-learn ships none
from sklearn.utils.validation import (  # pyright: ignore[reportMissingTypeStubs] - scikit-learn ships no types
    check_is_fitted,  # pyright: ignore[reportUnknownVariableType] - the same
)

from gradwise._matching import Array
from gradwise._matching_scale import positive_or_one, standard_deviation


class DerivativeScaler(BaseEstimator):
    """Standardise inputs, outputs and, by the chain rule, derivatives.

    Computes ``x' = (x - mean_x) / sigma_x``, ``y' = (y - mean_y) / sigma_y`` and ``dydx' = dydx * sigma_x / sigma_y``,
    so that the transformed derivatives are the derivatives of the transformed data. Standard deviations divide by n.
    Not for derivatives of different units in one column.

    Attributes
    ----------
    x_mean_, x_scale_ : array of shape (n_inputs,)
        Mean and standard deviation of each input, in its units; the scale of a constant column is 1.
    y_mean_, y_scale_ : array of shape (n_outputs,)
        The same for each output.
    n_features_in_ : int
        Number of inputs.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise import DerivativeScaler
    >>> X = np.array([[0.0], [2.0]])
    >>> y = np.array([1.0, 7.0])  # y = 1 + 3 x
    >>> dydx = np.array([[3.0], [3.0]])
    >>> scaler = DerivativeScaler().fit(X, y, dydx)
    >>> X_, y_, dydx_ = scaler.transform(X, y, dydx)
    >>> y_
    array([-1.,  1.])
    >>> dydx_
    array([[1.],
           [1.]])
    >>> scaler.inverse_transform(dydx=dydx_)[2]
    array([[3.],
           [3.]])
    """

    x_mean_: NDArray[np.floating[Any]]
    x_scale_: NDArray[np.floating[Any]]
    y_mean_: NDArray[np.floating[Any]]
    y_scale_: NDArray[np.floating[Any]]
    n_features_in_: int

    def fit(self, X: ArrayLike, y: ArrayLike, dydx: ArrayLike | None = None) -> Self:
        """Learn means and standard deviations.

        Parameters
        ----------
        X : array of shape (n, n_inputs)
        y : array of shape (n,) or (n, n_outputs)
        dydx : array of shape (n, n_inputs) for one output, or (n, n_outputs, n_inputs), optional
            Derivatives, in units of y per unit of x; NaN means unknown. Only its shape and finiteness are checked: the
            chain rule needs no statistics of it.

        Returns
        -------
        DerivativeScaler
            The fitted scaler itself.

        Raises
        ------
        ValueError
            If shapes do not belong together, there are no rows, or a value is infinite (or NaN, in `X` or `y`).
        """
        inputs, outputs = _floats("X", X), _floats("y", y)
        if inputs.ndim != 2 or 0 in inputs.shape:
            msg = f"`X` must have shape (n, n_inputs) with at least one row and column; got {inputs.shape}"
            raise ValueError(msg)
        if outputs.ndim not in {1, 2} or len(outputs) != len(inputs):
            msg = f"`y` must have shape ({len(inputs)},) or ({len(inputs)}, n_outputs) like `X`; got {outputs.shape}"
            raise ValueError(msg)
        columns = outputs.reshape(len(outputs), -1)
        self.n_features_in_ = inputs.shape[1]
        self.x_mean_, self.x_scale_ = inputs.mean(axis=0), positive_or_one(standard_deviation(inputs, xp=np), np)
        self.y_mean_, self.y_scale_ = columns.mean(axis=0), positive_or_one(standard_deviation(columns, xp=np), np)
        if dydx is not None:
            self._derivatives(dydx, len(inputs))
        return self

    def transform(
        self, X: ArrayLike | None = None, y: ArrayLike | None = None, dydx: ArrayLike | None = None
    ) -> tuple[Any, Any, Any]:
        """Standardise whichever of `X`, `y` and `dydx` are given; those that are None come back as None.

        Parameters
        ----------
        X, y, dydx : arrays shaped as in `fit`, or None

        Returns
        -------
        tuple of three arrays or None
            New arrays of the given shapes, without units.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        ValueError
            If a shape does not match the fitted data.
        """
        inputs, outputs, derivatives = self._check(X, y, dydx)
        return (
            None if inputs is None else (inputs - self.x_mean_) / self.x_scale_,
            None
            if outputs is None
            else (outputs - self._row(outputs, self.y_mean_)) / self._row(outputs, self.y_scale_),
            None if derivatives is None else derivatives * self._chain(derivatives),
        )

    def inverse_transform(
        self, X: ArrayLike | None = None, y: ArrayLike | None = None, dydx: ArrayLike | None = None
    ) -> tuple[Any, Any, Any]:
        """Undo `transform`: standardised arrays back to their units; None stays None.

        Parameters
        ----------
        X, y, dydx : arrays shaped as in `fit`, or None

        Returns
        -------
        tuple of three arrays or None
            New arrays of the given shapes, in the units of the fitted data.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        ValueError
            If a shape does not match the fitted data.
        """
        inputs, outputs, derivatives = self._check(X, y, dydx)
        return (
            None if inputs is None else inputs * self.x_scale_ + self.x_mean_,
            None if outputs is None else outputs * self._row(outputs, self.y_scale_) + self._row(outputs, self.y_mean_),
            None if derivatives is None else derivatives / self._chain(derivatives),
        )

    def _check(self, X: ArrayLike | None, y: ArrayLike | None, dydx: ArrayLike | None) -> tuple[Any, Any, Any]:
        check_is_fitted(self, "x_scale_")
        n_outputs = len(self.y_scale_)
        inputs = None if X is None else _floats("X", X)
        outputs = None if y is None else _floats("y", y)
        if inputs is not None and (inputs.ndim != 2 or inputs.shape[1] != self.n_features_in_):
            msg = f"`X` must have shape (n, {self.n_features_in_}), as fitted; got {inputs.shape}"
            raise ValueError(msg)
        if outputs is not None and not (outputs.shape[1:] == (n_outputs,) or (outputs.ndim == 1 and n_outputs == 1)):
            accepted = f"(n, {n_outputs}){' or (n,)' if n_outputs == 1 else ''}"
            msg = f"`y` must have shape {accepted}, as fitted; got {outputs.shape}"
            raise ValueError(msg)
        return inputs, outputs, None if dydx is None else self._derivatives(dydx)

    def _derivatives(self, dydx: ArrayLike, n: int | None = None) -> NDArray[np.floating[Any]]:
        derivatives = _floats("dydx", dydx, unknown=True)
        n_outputs, n_inputs = len(self.y_scale_), self.n_features_in_
        accepted = [(n_outputs, n_inputs)] + ([(n_inputs,)] if n_outputs == 1 else [])
        if derivatives.shape[1:] not in accepted or derivatives.ndim == 0 or n not in {None, len(derivatives)}:
            rows = "n" if n is None else str(n)
            shapes = " or ".join(f"({rows}, {', '.join(map(str, shape))})" for shape in accepted)
            msg = f"`dydx` must have shape {shapes}; got {derivatives.shape}"
            raise ValueError(msg)
        return derivatives

    def _chain(self, derivatives: Array) -> Array:
        factor = self.x_scale_ / self.y_scale_[:, None]
        return factor[0] if derivatives.ndim == 2 else factor

    @staticmethod
    def _row(outputs: Array, statistic: Array) -> Array:
        return statistic[0] if outputs.ndim == 1 else statistic


def _floats(name: str, values: ArrayLike, *, unknown: bool = False) -> NDArray[np.floating[Any]]:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    if not np.all(np.isfinite(array) | (np.isnan(array) & unknown)):
        msg = f"`{name}` must be finite{' or NaN, which means unknown' if unknown else ''}; got a value that is not"
        raise ValueError(msg)
    return array
