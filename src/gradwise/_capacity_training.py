"""One training of a capacity study: how a model is made, and which errors are taken from it."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning  # pyright: ignore[reportMissingTypeStubs] - scikit-learn has no types

__all__ = ["Job", "Samples", "Split", "Training", "train"]

Floats = NDArray[np.float64]
Fit = Callable[..., Any]
Split = tuple[NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True)
class Samples:
    """All data of a study, and the scales that errors are relative to.

    Attributes
    ----------
    X : array of shape (n, n_inputs)
    y : array of shape (n,) or (n, n_outputs)
    dydx : array of shape (n, n_inputs) or (n, n_outputs, n_inputs)
        NaN means unknown.
    x_scale : array of shape (n_inputs,)
        Standard deviation of each input.
    y_scale : array of shape () or (n_outputs,)
        Standard deviation of each output.
    """

    X: Floats
    y: Floats
    dydx: Floats
    x_scale: Floats
    y_scale: Floats


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes
    ----------
    capacity : float
    seed : int
        Of the initial weights and of the folds.
    fold : int
        Which fold is held out; -1 for none.
    derivatives : bool
        Whether derivatives are trained on.
    """

    capacity: float
    seed: int
    fold: int
    derivatives: bool


@dataclass(frozen=True)
class Training:
    """What came of a job.

    Attributes
    ----------
    error : float
        Root mean square of the held-out value errors, relative to the standard deviation of each output; NaN without
        a fold, infinite where a prediction is not finite.
    derivative_error : float
        Root mean square error of derivatives that were not trained on, relative to their own root mean square, in
        standardised inputs: at the training points without derivatives, at the held-out points with them. NaN where
        unknown.
    converged : bool or None
        None where the model does not say.
    seconds : float
        Of the fit, by the wall clock.
    """

    error: float
    derivative_error: float
    converged: bool | None
    seconds: float


def train(fit: Fit, samples: Samples, jobs: Sequence[Job], splits: Sequence[Split]) -> list[Training]:
    """Train jobs of one capacity, all at once where `fit` has a method `many`, and take the errors.

    Parameters
    ----------
    fit : callable
        As from `gradwise._capacity_estimators.as_fit`.
    samples : Samples
    jobs : sequence of Job
        Of one capacity, all with or all without derivatives.
    splits : sequence of pairs of arrays of int
        The rows that each job trains on, and those it holds out.

    Returns
    -------
    list of Training
    """
    data = [(samples.X[at], samples.y[at], samples.dydx[at] if jobs[0].derivatives else None) for at, _ in splits]
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if len(jobs) == 1:
            models = [fit(*data[0], capacity=jobs[0].capacity, seed=jobs[0].seed)]
        else:
            models = list(fit.many(data, capacity=jobs[0].capacity, seeds=[job.seed for job in jobs]))  # type: ignore[attr-defined] - the caller has looked
    seconds = (time.perf_counter() - started) / len(jobs)
    complained = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if warning not in complained:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if len(models) != len(jobs):
        msg = f"`fit.many` must return {len(jobs)} models, one for each seed; got {len(models)}"
        raise ValueError(msg)
    results: list[Training] = []
    for model, job, (rows, test) in zip(models, jobs, splits, strict=True):
        converged = getattr(model, "converged_", False if complained else None)
        at = test if job.derivatives else rows
        results.append(
            Training(
                _value_error(model, samples, test) if len(test) else np.nan,
                _derivative_error(model, samples, at) if len(at) else np.nan,
                None if converged is None else bool(converged),
                seconds,
            )
        )
    return results


def _value_error(model: Any, samples: Samples, rows: NDArray[np.intp]) -> float:
    predicted = np.asarray(model.predict(samples.X[rows]), dtype=np.float64)
    known = samples.y[rows]
    if predicted.shape != known.shape:
        msg = f"`predict` of the fitted model must return shape {known.shape}, as `y`; got {predicted.shape}"
        raise ValueError(msg)
    # Not zero, whose logarithm is infinite: an exact fit has errors of about the rounding of y.
    tiny = np.finfo(np.float64).eps
    error = float(np.sqrt(np.mean(((predicted - known) / samples.y_scale) ** 2)))
    return max(error, tiny) if np.isfinite(error) else np.inf


def _derivative_error(model: Any, samples: Samples, rows: NDArray[np.intp]) -> float:
    X = samples.X[rows]
    if hasattr(model, "predict_jacobian"):
        predicted = np.asarray(model.predict_jacobian(X), dtype=np.float64)
    else:
        from gradwise._targets_differences import finite_difference_jacobian

        predicted = finite_difference_jacobian(model.predict, X)
    n_outputs = 1 if samples.y.ndim == 1 else samples.y.shape[1]
    shape = (len(rows), n_outputs, X.shape[1])
    if predicted.size != np.prod(shape):
        msg = f"`predict_jacobian` of the fitted model must return shape {shape}; got {predicted.shape}"
        raise ValueError(msg)
    known = samples.dydx[rows].reshape(shape)
    unknown = np.isnan(known)
    miss = np.where(unknown, 0.0, samples.x_scale * (predicted.reshape(shape) - known))
    size = np.where(unknown, 0.0, samples.x_scale * known)
    # One number for each output, as in the loss of `GradientMatching`; an output without known slopes has none.
    total = np.sum(size**2, axis=(0, 2))
    if not total.any():
        return np.nan
    ratio = np.sum(miss**2, axis=(0, 2))[total > 0] / total[total > 0]
    error = float(np.sqrt(ratio.mean()))
    return max(error, np.finfo(np.float64).eps) if np.isfinite(error) else np.inf
