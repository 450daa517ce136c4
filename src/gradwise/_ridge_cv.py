"""Ridge regression on values and derivatives whose penalty and derivative weight are chosen by cross-validation."""

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import (  # pyright: ignore[reportMissingTypeStubs] - scikit-learn ships no types
    BaseEstimator,
    RegressorMixin,
)
from sklearn.metrics import check_scoring  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from sklearn.model_selection import check_cv  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from gradwise._matching import check_non_negative
from gradwise._ridge import Derivatives, GradientEnhancedRidge, LinearInBasis
from gradwise._ridge_data import Array, Samples, estimated, weighted_mean
from gradwise._ridge_equations import Equations, coefficients, equations
from gradwise._ridge_loo import leave_one_out

Rows = NDArray[np.intp]

_ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
_WEIGHTS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)


class GradientEnhancedRidgeCV(LinearInBasis):
    """`GradientEnhancedRidge` that chooses `alpha` and `derivative_weight` by cross-validation over whole samples.

    A sample is held out with its value and all its derivatives, which know too much of each other to be told apart.
    The score is the error of held-out *values*. Weight 0 is among the candidates, so that derivatives too noisy to
    help are found out and ignored, as far as the values can tell.

    With ``cv=None`` every sample is left out once, by a formula and without refitting (what `RidgeCV` calls generalised
    cross-validation): with ``A_i`` the rows of sample i in the least-squares problem of `GradientEnhancedRidge` (its
    value and its known derivatives, each times the root of its weight), the residuals ``e_i = c_i - A_i w`` and
    ``H_i = A_i (A.T A + alpha)**-1 A_i.T``, the residuals without sample i are ``(1 - H_i)**-1 e_i``, a system of
    1 + n_inputs equations. Otherwise the model is refitted for each fold. The scale ``c_j`` of the derivatives and the
    basis (its knots, for example) see all samples in either case: neither knows the values, but for one number per
    output, sigma_y.

    Derivatives that were estimated from the values know the values of their neighbours, held out or not; the scores
    are then too good and the weight too large. Hand over the function that estimates them as `dydx`, and folds.

    Not for choosing among more candidates than there are samples to tell them apart, and not with ``cv=None`` for more
    than some hundreds of inputs: see the cost below.

    Parameters
    ----------
    alphas : sequence of float, default 1e-6 to 1e3 in decades
        Candidates for `alpha`, not negative.
    derivative_weights : sequence of float, default (0, 0.01, 0.1, 1, 10, 100)
        Candidates for `derivative_weight`. Without `dydx` only the weight 0 is tried.
    fit_intercept : bool, default True
        Whether there is an intercept.
    basis : scikit-learn transformer or object, optional
        See `GradientEnhancedRidge`.
    cv : int, splitter or iterable of (train, test), optional
        Folds over whole samples; None leaves one out.
    scoring : str or callable, optional
        A scikit-learn scorer of values. None is the share of the variance of y that held-out values explain, a mean
        over outputs: ``1 - sum_i s_i (y_i - f_-i(x_i))**2 / (sum_i s_i sigma_y**2)``, over the held-out samples.

    Attributes
    ----------
    alpha_, derivative_weight_ : float
        The choice.
    best_score_ : float
        Its score.
    cv_results_ : dict of arrays
        For each candidate: "alpha", "derivative_weight", "mean_test_score", "rank_test_score" and, for folds,
        "std_test_score", the standard deviation over folds. ``pandas.DataFrame(model.cv_results_)`` is a table.
    coef_, intercept_, basis_, derivative_scale_, n_features_in_, feature_names_in_
        As in `GradientEnhancedRidge`, fitted to all samples.

    Notes
    -----
    With n samples of d inputs and p features, ``cv=None`` takes O((n (1 + d) + p) p**2) operations for each derivative
    weight and O(n (1 + d)**2 p) for each candidate; k folds take k times the first part of a fit, and O(p**3) for each
    candidate and fold.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.preprocessing import PolynomialFeatures
    >>> from gradwise import GradientEnhancedRidgeCV
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(-1, 1, (12, 2))
    >>> y = np.sin(2 * X[:, 0]) + X[:, 1] + 0.3 * rng.standard_normal(12)  # noisy values, exact derivatives
    >>> dydx = np.stack([2 * np.cos(2 * X[:, 0]), np.ones(12)], axis=1)
    >>> model = GradientEnhancedRidgeCV(basis=PolynomialFeatures(3))
    >>> new = rng.uniform(-1, 1, (1000, 2))
    >>> truth = np.sin(2 * new[:, 0]) + new[:, 1]
    >>> round(float(np.std(model.fit(X, y).predict(new) - truth)), 1)
    0.2
    >>> round(float(np.std(model.fit(X, y, dydx).predict(new) - truth)), 2)
    0.07
    """

    alpha_: float
    derivative_weight_: float
    best_score_: float
    cv_results_: dict[str, NDArray[Any]]

    def __init__(
        self,
        alphas: Sequence[float] = _ALPHAS,
        derivative_weights: Sequence[float] = _WEIGHTS,
        *,
        fit_intercept: bool = True,
        basis: Any = None,
        cv: Any = None,
        scoring: str | Callable[..., float] | None = None,
    ) -> None:
        self.alphas = alphas
        self.derivative_weights = derivative_weights
        self.fit_intercept = fit_intercept
        self.basis = basis
        self.cv = cv
        self.scoring = scoring

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        dydx: Derivatives = None,
        sample_weight: ArrayLike | float | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> Self:
        """Choose the parameters and fit the model to all samples.

        Parameters
        ----------
        X, y, dydx, sample_weight, mask
            As in `GradientEnhancedRidge.fit`. Weights count in the score too. With a function `dydx` each fold
            estimates its derivatives from its own training samples.

        Returns
        -------
        GradientEnhancedRidgeCV
            The fitted model itself.

        Raises
        ------
        ValueError
            As `GradientEnhancedRidge.fit`; if `dydx` is a function and `cv` is None; if a list of candidates is empty
            or there are fewer than two samples; and if no candidate has a score (with ``alpha=0``, a fit may not be
            determined without one of the samples).
        TypeError
            As `GradientEnhancedRidge.fit`.
        """
        alphas = _candidates("alphas", self.alphas)
        weights = _candidates("derivative_weights", self.derivative_weights)
        if callable(dydx) and self.cv is None:
            msg = "`cv` must not be None where `dydx` is a function of the training samples; pass cv=5"
            raise ValueError(msg)
        samples, y_shape = self._samples(X, y, dydx, sample_weight, mask)
        if dydx is None:
            weights = [0.0]
        if len(samples.X) < 2:
            msg = (
                f"`X` must have at least 2 samples of positive weight to leave one out; got n_samples={len(samples.X)}"
            )
            raise ValueError(msg)
        system = self._equations(samples)
        if self.cv is None:
            scores = self._leave_one_out_scores(samples, system, alphas, weights, y_shape)
        else:
            splits = _splits(self.cv, X, y, samples)
            scores = self._fold_scores(samples, splits, dydx, alphas=alphas, weights=weights, y_shape=y_shape)
        # scores: (n_weights, n_alphas, n_splits). What cannot be scored (not determined without a sample) comes last.
        mean = np.where(np.isfinite(scores).all(axis=2), scores.mean(axis=2), -np.inf)
        if not np.isfinite(mean).any():
            msg = "`alphas` must hold a value whose fit is determined without a part of the samples; add a positive one"
            raise ValueError(msg)
        w, a = divmod(int(np.argmax(mean)), len(alphas))
        self.derivative_weight_, self.alpha_ = weights[w], alphas[a]
        self.best_score_ = float(mean[w, a])
        self.cv_results_ = {
            "alpha": np.tile(alphas, len(weights)),
            "derivative_weight": np.repeat(weights, len(alphas)),
            "mean_test_score": mean.ravel(),
            "rank_test_score": 1 + (mean.ravel()[:, None] < mean.ravel()).sum(axis=1),
        }
        if self.cv is not None:
            self.cv_results_["std_test_score"] = scores.std(axis=2).ravel()
        penalties = self.alpha_ * np.ones(samples.y.shape[1])
        self._solve(system, penalties, self.derivative_weight_, y_shape)
        return self

    def _equations(self, samples: Samples) -> Equations:
        return equations(samples, self.basis_, self.derivative_scale_, fit_intercept=self.fit_intercept)

    def _leave_one_out_scores(
        self,
        samples: Samples,
        system: Equations,
        alphas: Sequence[float],
        weights: Sequence[float],
        y_shape: tuple[int, ...],
    ) -> Array:
        scores = np.full((len(weights), len(alphas), 1), np.nan)
        for w, weight in enumerate(weights):
            predictions = leave_one_out(
                samples,
                self.basis_,
                self.derivative_scale_,
                system,
                alphas=alphas,
                derivative_weight=weight,
                fit_intercept=self.fit_intercept,
            )
            for a in range(len(alphas)):
                if np.isfinite(predictions[a]).all():
                    scores[w, a, 0] = self._score(samples, samples, predictions[a], y_shape)
        return scores

    def _fold_scores(
        self,
        samples: Samples,
        splits: list[tuple[Rows, Rows]],
        dydx: Derivatives,
        *,
        alphas: Sequence[float],
        weights: Sequence[float],
        y_shape: tuple[int, ...],
    ) -> Array:
        scores = np.empty((len(weights), len(alphas), len(splits)))
        for k, (train, test) in enumerate(splits):
            rest, held_out = samples.take(train), samples.take(test)
            system = self._equations(estimated(rest, dydx, y_shape) if callable(dydx) else rest)
            fold = GradientEnhancedRidge(fit_intercept=self.fit_intercept)
            fold.basis_, fold.n_features_in_ = self.basis_, self.n_features_in_
            for w, weight in enumerate(weights):
                for a, alpha in enumerate(alphas):
                    penalties = alpha * np.ones(samples.y.shape[1])
                    coef = coefficients(system, alpha=penalties, derivative_weight=weight)
                    fold.coef_, fold.intercept_ = coef, system.level - coef @ system.center
                    scores[w, a, k] = self._score(samples, held_out, fold.predict(held_out.X), y_shape)
        return scores

    def _score(self, samples: Samples, held_out: Samples, predictions: Array, y_shape: tuple[int, ...]) -> float:
        weight = held_out.weight
        if self.scoring is not None:
            scorer = cast("Callable[..., Any]", check_scoring)(_Given(), scoring=self.scoring)
            shape = (-1, *y_shape)
            uniform = bool((weight == weight[0]).all())  # not every scorer takes weights
            weighted: dict[str, Any] = {} if uniform else {"sample_weight": weight}
            return float(scorer(_Given(), predictions.reshape(shape), held_out.y.reshape(shape), **weighted))
        mean = weighted_mean(samples.y, samples.weight)
        variance: Array = samples.weight @ np.square(samples.y - mean) / samples.weight.sum()
        error: Array = weight @ np.square(held_out.y - predictions) / weight.sum()
        unexplained: Array = error / np.where(variance > 0, variance, 1.0)
        return 1 - float(unexplained.mean())


class _Given(RegressorMixin, BaseEstimator):
    """Predictions in the place of inputs, for scorers."""

    def fit(self, X: Any, y: Any) -> Self:  # noqa: ARG002 - what scikit-learn calls an estimator
        return self

    def predict(self, X: Any) -> Any:
        return X


def _splits(cv: Any, X: Any, y: Any, samples: Samples) -> list[tuple[Rows, Rows]]:
    """Folds of the user's rows, as rows of `samples`, which lack those of weight zero."""
    splitter: Any = check_cv(cv)
    inputs, values = np.asarray(X), np.asarray(y)
    position = np.full(len(inputs), -1, dtype=np.intp)
    kept = np.arange(len(inputs)) if samples.kept is None else samples.kept
    position[kept] = np.arange(len(kept))
    folds = [(position[train], position[test]) for train, test in splitter.split(inputs, values)]
    folds = [(train[train >= 0], test[test >= 0]) for train, test in folds]
    return [(train, test) for train, test in folds if len(train) and len(test)]


def _candidates(name: str, values: Any) -> list[float]:
    candidates = [check_non_negative(name, float(value)) for value in np.atleast_1d(values)]
    if not candidates:
        msg = f"`{name}` must hold at least one candidate; got {values!r}"
        raise ValueError(msg)
    return candidates
