"""Bases of a linear model with their exact derivatives: polynomials, splines, scalers in front, or the user's own."""

import copy
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType] - no types
from sklearn.pipeline import Pipeline  # pyright: ignore[reportMissingTypeStubs] - scikit-learn ships no types
from sklearn.preprocessing import (  # pyright: ignore[reportMissingTypeStubs] - the same
    MaxAbsScaler,
    MinMaxScaler,
    PolynomialFeatures,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
)
from sklearn.utils.validation import (  # pyright: ignore[reportMissingTypeStubs] - the same
    has_fit_parameter,  # pyright: ignore[reportUnknownVariableType] - the same
)

Array = NDArray[np.float64]


@runtime_checkable
class Basis(Protocol):
    """What `GradientEnhancedRidge` asks of a basis of one's own.

    `fit` is called first if there is one, on a copy. Nothing checks that `derivative` is the derivative of `transform`;
    compare it with ``gradwise.finite_difference_jacobian(basis.transform, X)`` once.
    """

    def transform(self, X: Array) -> Array:
        """Features ``phi_k(x_i)``, shape (n, n_features), for inputs of shape (n, n_inputs)."""
        ...

    def derivative(self, X: Array) -> Array:
        """Derivatives ``d phi_k / d x_j (x_i)``, shape (n, n_features, n_inputs), per unit of each input."""
        ...


def check_basis(basis: Any) -> None:
    """Raise TypeError unless the derivatives of `basis` are known."""
    if isinstance(basis, Pipeline):
        for _, step in _steps(basis):
            check_basis(step)
    elif isinstance(basis, MinMaxScaler) and basis.clip:
        msg = "`basis` must be differentiable; a MinMaxScaler that clips is not. Pass MinMaxScaler(clip=False)"
        raise TypeError(msg)
    elif not (
        basis is None
        or (isinstance(basis, Basis) and not isinstance(basis, type))
        or isinstance(basis, (PolynomialFeatures, SplineTransformer))
        or _is_scaler(basis)
    ):
        msg = (
            "`basis` must be PolynomialFeatures, SplineTransformer, a scaler, a Pipeline of these, or an object with "
            f"the methods `transform(X)` and `derivative(X)`; got {basis!r}. Give it a method `derivative` returning "
            "the derivatives of its features, of shape (n, n_features, n_inputs)"
        )
        raise TypeError(msg)


def fitted_basis(basis: Any, X: Array, sample_weight: Array | None) -> Any:
    """Fit a copy of `basis` to the inputs; the argument stays as it is.

    Sample weights go to the basis where it takes them (quantile knots), so that integer weights are repeated rows.
    """
    check_basis(basis)
    if isinstance(basis, Pipeline):
        fitted: list[tuple[str, Any]] = []
        inner = X
        for name, step in _steps(basis):
            own = fitted_basis(step, inner, sample_weight)
            fitted.append((name, "passthrough" if own is None else own))
            inner = features(own, inner)
        return Pipeline(fitted)
    if basis is None:
        return None
    copied = cast("Callable[[Any], Any]", clone if hasattr(basis, "get_params") else copy.deepcopy)
    own: Any = copied(basis)
    if not hasattr(own, "fit"):
        return own
    if sample_weight is not None and has_fit_parameter(own, "sample_weight"):
        return own.fit(X, sample_weight=sample_weight)
    return own.fit(X)


def features(basis: Any, X: Array) -> Array:
    """Features of a fitted basis, shape (n, n_features); None is the inputs themselves."""
    if basis is None:
        return X
    result: Any = basis.transform(X)
    if hasattr(result, "toarray"):  # a sparse SplineTransformer
        result = result.toarray()
    values = np.asarray(result, dtype=np.float64)
    if values.ndim != 2 or len(values) != len(X):
        msg = f"`basis.transform` must return shape ({len(X)}, n_features); got {values.shape}"
        raise ValueError(msg)
    if not np.isfinite(values).all():
        msg = "`basis` must give finite features; got NaN or infinity. Scale the inputs, or lower the degree"
        raise ValueError(msg)
    return values


def derivatives(basis: Any, X: Array) -> Array:
    """Derivatives of a fitted basis, shape (n, n_features, n_inputs)."""
    n_inputs = X.shape[1]
    if isinstance(basis, Pipeline):
        return _chain(basis, X)
    if isinstance(basis, PolynomialFeatures):
        return _polynomial(cast("NDArray[np.int64]", basis.powers_), X)
    if isinstance(basis, SplineTransformer):
        return _splines(basis, X)
    if basis is None or _is_scaler(basis):
        return np.broadcast_to(np.diag(_factor(basis, n_inputs)), (len(X), n_inputs, n_inputs))
    result = np.asarray(basis.derivative(X), dtype=np.float64)
    if result.ndim != 3 or (result.shape[0], result.shape[2]) != X.shape:
        msg = f"`basis.derivative` must return shape ({len(X)}, n_features, {n_inputs}); got {result.shape}"
        raise ValueError(msg)
    if not np.isfinite(result).all():
        msg = "`basis.derivative` must be finite; got NaN or infinity"
        raise ValueError(msg)
    return result


def _polynomial(powers: NDArray[np.int64], X: Array) -> Array:
    # d/dx_j of a monomial is its exponent of x_j times the monomial with one power of x_j less: no division, so that it
    # is right at x = 0 too. Lowered monomials are shared by many features and computed once.
    feature, column = np.nonzero(powers)
    lowered = powers[feature].copy()
    lowered[np.arange(len(feature)), column] -= 1
    distinct, index = np.unique(lowered, axis=0, return_inverse=True)
    monomials = np.ones((len(X), len(distinct)))
    for k, exponents in enumerate(distinct):
        for j in np.flatnonzero(exponents):
            monomials[:, k] *= X[:, j] ** exponents[j]
    result = np.zeros((len(X), *powers.shape))
    result[:, feature, column] = powers[feature, column] * monomials[:, index.reshape(-1)]
    return result


def _splines(basis: Any, X: Array) -> Array:
    n, n_inputs = X.shape
    n_splines = int(basis.bsplines_[0].c.shape[1])
    result = np.zeros((n, n_inputs, n_splines, n_inputs))
    for j, spline in enumerate(basis.bsplines_):
        low, high = float(spline.t[spline.k]), float(spline.t[-spline.k - 1])
        x = X[:, j]
        if not high > low:  # a column that was constant in `fit`
            continue
        if basis.extrapolation == "periodic":
            x = low + (x - low) % (high - low)
        outside = (x < low) | (x > high)
        if basis.extrapolation == "error" and outside.any():
            msg = "`X` contains values beyond the limits of the knots"
            raise ValueError(msg)
        if basis.extrapolation in {"constant", "linear"}:  # "linear" goes on with the slope at the boundary
            x = np.clip(x, low, high)
        slopes = np.asarray(spline(x, nu=1), dtype=np.float64)
        if basis.extrapolation == "constant":
            slopes[outside] = 0.0
        result[:, j, :, j] = slopes
    if not basis.include_bias:  # scikit-learn leaves the last spline of each input away
        result = result[:, :, :-1]
    return result.reshape(n, -1, n_inputs)


def _chain(pipeline: Pipeline, X: Array) -> Array:
    result: Array | None = None
    lead = np.ones(X.shape[1])  # scalers in front need a product by number only
    at = X
    for _, step in _steps(pipeline):
        if _is_scaler(step) or step is None:
            factor = _factor(step, at.shape[1])
            if result is None:
                lead = lead * factor
            else:
                result = factor[:, None] * result
        else:
            inner = derivatives(step, at)
            result = inner * lead if result is None else inner @ result
        at = features(step, at)
    return result if result is not None else np.broadcast_to(np.diag(lead), (len(X), len(lead), len(lead)))


def _steps(pipeline: Any) -> list[tuple[str, Any]]:
    return [(name, None if step == "passthrough" else step) for name, step in pipeline.steps]


def _is_scaler(basis: Any) -> bool:
    return isinstance(basis, (StandardScaler, RobustScaler, MaxAbsScaler, MinMaxScaler))


def _factor(scaler: Any, n_inputs: int) -> Array:
    """Derivative of a fitted scaler, which acts on each input by itself."""
    scale = None if scaler is None else scaler.scale_
    if scale is None:  # with_std=False, with_scaling=False
        return np.ones(n_inputs)
    # MinMaxScaler multiplies by its scale_, the others divide.
    return np.asarray(scale if isinstance(scaler, MinMaxScaler) else 1.0 / scale, dtype=np.float64)
