"""Ridge regression on values and derivatives."""

from collections.abc import Callable
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import (  # pyright: ignore[reportMissingTypeStubs] - scikit-learn ships no types
    BaseEstimator,
    MultiOutputMixin,
    RegressorMixin,
)
from sklearn.utils.validation import (  # pyright: ignore[reportMissingTypeStubs] - the same
    _check_sample_weight,  # pyright: ignore[reportUnknownVariableType, reportPrivateUsage] - as scikit-learn's own
    check_is_fitted,  # pyright: ignore[reportUnknownVariableType] - the same
    validate_data,  # pyright: ignore[reportUnknownVariableType] - the same
)

from gradwise._basis import derivatives, features, fitted_basis
from gradwise._matching import check_non_negative
from gradwise._ridge_data import Array, Samples, blocks, derivative_scale, estimated, training_samples
from gradwise._ridge_equations import Equations, coefficients, equations

# Arrays, or what makes them of X and y.
Derivatives = ArrayLike | Callable[[Array, Array], ArrayLike] | None


class LinearInBasis(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """A fitted linear model of features: predictions and their derivatives."""

    coef_: Array
    intercept_: Any
    basis_: Any
    derivative_scale_: Any
    n_features_in_: int
    feature_names_in_: NDArray[np.object_]
    fit_intercept: bool
    basis: Any

    def predict(self, X: ArrayLike) -> Array:
        """Predicted values.

        Parameters
        ----------
        X : array of shape (n, n_inputs)

        Returns
        -------
        array of shape (n,) or (n, n_outputs)
            In units of y, shaped as the y of `fit`.
        """
        inputs = self._inputs(X)
        result = np.empty((len(inputs), *self.coef_.shape[:-1]))
        for rows in blocks(len(inputs), self.coef_.shape[-1]):
            result[rows] = features(self.basis_, inputs[rows]) @ self.coef_.T + self.intercept_
        return result

    def predict_jacobian(self, X: ArrayLike) -> Array:
        """Exact derivatives of the predictions with respect to the inputs.

        Parameters
        ----------
        X : array of shape (n, n_inputs)

        Returns
        -------
        array of shape (n, n_inputs) or (n, n_outputs, n_inputs)
            In units of y per unit of X; of two dimensions if the y of `fit` had one.
        """
        inputs = self._inputs(X)
        result = np.empty((len(inputs), *self.coef_.shape[:-1], inputs.shape[1]))
        for rows in blocks(len(inputs), self.coef_.shape[-1] * inputs.shape[1]):
            if self.basis_ is None:
                result[rows] = self.coef_
            else:
                result[rows] = self.coef_ @ derivatives(self.basis_, inputs[rows])
        return result

    def _inputs(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        return cast("Array", validate_data(self, cast("Any", X), dtype=np.float64, reset=False))

    def _samples(
        self, X: Any, y: Any, dydx: Derivatives, sample_weight: Any, mask: ArrayLike | None
    ) -> tuple[Samples, tuple[int, ...]]:
        """Check the data, fit the basis and the scale; the samples, and the shape of one sample's y."""
        inputs, values = cast(
            "tuple[Array, Array]",
            validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True),
        )
        weight = (
            None
            if sample_weight is None
            else cast("Array", _check_sample_weight(sample_weight, inputs, dtype=np.float64))
        )
        values = np.asarray(values, dtype=np.float64)
        given = None if callable(dydx) else dydx
        samples = training_samples(inputs, values, given, mask=mask, sample_weight=weight)
        if callable(dydx):
            samples = estimated(samples, dydx, values.shape[1:])
        self.basis_ = fitted_basis(self.basis, samples.X, None if weight is None else samples.weight)
        self.derivative_scale_ = None if dydx is None else derivative_scale(samples)
        return samples, values.shape[1:]

    def _solve(self, system: Equations, alpha: Array, derivative_weight: float, y_shape: tuple[int, ...]) -> None:
        coef = coefficients(system, alpha=alpha, derivative_weight=derivative_weight)
        intercept = system.level - coef @ system.center
        self.coef_ = coef.reshape(*y_shape, -1)
        self.intercept_ = 0.0 if not self.fit_intercept else float(intercept[0]) if y_shape == () else intercept


class GradientEnhancedRidge(LinearInBasis):
    """Ridge regression on values and on known derivatives of the targets with respect to the inputs.

    For each output, with features ``phi(x)`` (the inputs themselves unless there is a `basis`), weights ``s_i`` of the
    samples and known derivatives ``T_ij``, minimises over ``w`` and the intercept ``b``, which is not penalised,

    ``sum_i s_i (y_i - b - phi(x_i).w)**2 + alpha * |w|**2``
    ``+ derivative_weight * sum_i s_i sum_j c_j**2 (d_j phi(x_i).w - T_ij)**2``

    where j runs over the known derivatives and ``c_j = sigma_y sigma_xj / sqrt(n_inputs * mean_ij sigma_xj**2
    T_ij**2)`` is the scale "block" of `gradwise.torch.GradientMatching`, one number for all derivatives of an output
    and the standard deviation of each input: at `derivative_weight` 1 a relative error of the derivatives counts like
    a relative error of the values, in any units. Gradient information as a regulariser of linear regression is idea 3
    of McDonagh and Chen (arXiv 2112.00094), and least squares on values and derivatives is known as differential
    regression (Huge and Savine, 2020) and gradient-enhanced regression; this formula is gradwise's own.

    Without derivatives, or with `derivative_weight` 0, it is `sklearn.linear_model.Ridge`. With exact derivatives and
    ``alpha=0``, one sample determines a linear model. Predictions do not depend on the units of y; nor on those of X
    with ``alpha=0``, or if each coefficient is penalised in the same units (put a StandardScaler in front, by a
    `Pipeline` as `basis`, which does the chain rule).

    An input that is constant in the samples has no sigma_x, and yet its derivative may be known. Its coefficient then
    follows the derivative: ``c_j`` is such that its derivatives count as much as an average input's. If all inputs are
    constant, sigma_x is 1.

    Not for derivatives that are wrong as often as right: from a relative noise on, which depends on the data, they do
    harm at weight 1. `GradientEnhancedRidgeCV` chooses the weight, 0 included. Not for targets that are far from the
    span of the basis either: there the derivatives pull the values away (a polynomial that follows the slopes of a
    kink misses its height).

    Not behind a scaler in a `Pipeline` of scikit-learn: the scaler changes X but not `dydx`, and nobody can see that.
    The scaler belongs into `basis`.

    Parameters
    ----------
    alpha : float or array of shape (n_outputs,), default 1.0
        Penalty as in `Ridge`, in squared units of y per squared unit of a coefficient.
    derivative_weight : float, default 1.0
        Weight of the derivatives; 0 ignores them.
    fit_intercept : bool, default True
        Whether there is an intercept.
    basis : scikit-learn transformer or object, optional
        `PolynomialFeatures`, `SplineTransformer`, `StandardScaler` and the other scalers that act on each input, a
        `Pipeline` of these, or any object with ``transform(X) -> (n, n_features)`` and ``derivative(X) -> (n,
        n_features, n_inputs)``. A copy is fitted; the derivatives of the features are exact.

    Attributes
    ----------
    coef_ : array of shape (n_features,) or (n_outputs, n_features)
        Coefficients of the features, in units of y per unit of a feature.
    intercept_ : float or array of shape (n_outputs,)
        In units of y.
    basis_ : object or None
        The fitted basis.
    derivative_scale_ : array of shape (n_outputs, n_inputs) or None
        The ``c_j``, in units of X.
    n_features_in_ : int
        Number of inputs.
    feature_names_in_ : array of str
        Names of the inputs, if `X` had any.

    Notes
    -----
    With n samples of d inputs, p features and m outputs, samples are worked off block by block and reduced by QR to at
    most p rows (TSQR), so neither the n (1 + d) rows nor a product of the matrix with itself is formed and
    ill-conditioned bases keep their digits. Operations: O(n (1 + d) p**2 + m p**3) with a basis (the first term for
    each group of outputs that do not share their known entries), O(n p**2 + m p**3) without, where derivatives only
    add a diagonal. Memory besides the data: a few p x p arrays and blocks of 32 MiB. With fewer rows than features (and
    no basis: n < p) the dual is solved in O(m n**2 p), with a few n x p arrays and none of p x p. Measured times and
    memory: `docs/ridge.md`.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.preprocessing import PolynomialFeatures
    >>> from gradwise import GradientEnhancedRidge
    >>> X, y, dydx = np.array([[1.0, 2.0]]), np.array([8.0]), np.array([[3.0, 0.5]])  # y = 4 + 3 x0 + x1 / 2
    >>> model = GradientEnhancedRidge(alpha=0.0).fit(X, y, dydx)
    >>> model.coef_, round(model.intercept_, 12)
    (array([3. , 0.5]), 4.0)
    >>> X = np.array([[0.0], [2.0]])
    >>> model = GradientEnhancedRidge(alpha=0.0, basis=PolynomialFeatures(3)).fit(X, X[:, 0] ** 3, 3 * X**2)
    >>> model.predict([[1.0]]).round(12), model.predict_jacobian([[1.0]]).round(12)
    (array([1.]), array([[3.]]))
    """

    def __init__(
        self,
        alpha: float | ArrayLike = 1.0,
        derivative_weight: float = 1.0,
        fit_intercept: bool = True,
        basis: Any = None,
    ) -> None:
        self.alpha = alpha
        self.derivative_weight = derivative_weight
        self.fit_intercept = fit_intercept
        self.basis = basis

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        dydx: Derivatives = None,
        sample_weight: ArrayLike | float | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> Self:
        """Fit the model.

        Parameters
        ----------
        X : array of shape (n, n_inputs)
            Inputs.
        y : array of shape (n,) or (n, n_outputs)
            Values.
        dydx : array of shape (n, n_outputs, n_inputs), or (n, n_inputs) for one output, or callable, optional
            Derivatives at the same points, in units of y per unit of X. NaN means unknown. A function of (X, y), such
            as `gradwise.estimate_gradients`, is called with the samples.
        sample_weight : array of shape (n,) or float, optional
            Weights of samples, values and derivatives alike. Integers are repeated rows, 0 removes.
        mask : boolean array of the shape of `dydx`, optional
            False means unknown, whatever stands in `dydx`.

        Returns
        -------
        GradientEnhancedRidge
            The fitted model itself.

        Raises
        ------
        ValueError
            If shapes do not belong together, a value is not finite, or a parameter is negative.
        TypeError
            If the derivatives of `basis` are not known, or `mask` is not boolean or has nothing to mask.
        """
        weight = check_non_negative("derivative_weight", self.derivative_weight)
        samples, y_shape = self._samples(X, y, dydx, sample_weight, mask)
        alpha = _penalties(self.alpha, samples.y.shape[1])
        scale = self.derivative_scale_ if weight > 0 else None
        system = equations(samples, self.basis_, scale, fit_intercept=self.fit_intercept)
        self._solve(system, alpha, weight, y_shape)
        return self


def _penalties(alpha: float | ArrayLike, n_outputs: int) -> NDArray[np.float64]:
    penalties = np.asarray(alpha, dtype=np.float64)
    if penalties.shape not in {(), (n_outputs,)}:
        msg = f"`alpha` must be a number or have shape ({n_outputs},), one for each output; got shape {penalties.shape}"
        raise ValueError(msg)
    if not (np.isfinite(penalties) & (penalties >= 0)).all():
        msg = f"`alpha` must be finite and not negative; got {alpha!r}"
        raise ValueError(msg)
    return np.broadcast_to(penalties, (n_outputs,))
