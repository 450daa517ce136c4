"""Derivatives through a scikit-learn pipeline and a grid search, and the chain rule where inputs are standardised.

A pipeline hands ``step__dydx`` to a step's `fit` as it is. A StandardScaler before that step changes the inputs,
``z = (x - mean) / scale``, and nobody tells the derivatives, which are then wrong by the factor `scale` of each input:
dy/dz is ``dy/dx * scale``. Three ways, on a beam's deflection, whose inputs differ in size by ten orders:

* right: no scaler. `GradientEnhancedMLPRegressor` standardises X, y and derivatives itself, by the chain rule;
* right: the scaler within. `GradientEnhancedRidge` takes transformers as `basis` and does the chain rule through them,
  with the statistics of the rows it is fitted on, so it is right within cross-validation too;
* wrong: a scaler before the estimator. The error shows it, and so does `check_derivatives`, before any training.

Run: ``python examples/sklearn_pipeline.py``; takes a few seconds.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from gradwise import DerivativeReport, GradientEnhancedRidge, check_derivatives
from gradwise.torch import GradientEnhancedMLPRegressor

Array = npt.NDArray[np.float64]

# Force in N, length in m, modulus of elasticity in Pa, side of the square cross-section in m.
LOWER = np.array([500.0, 1.0, 6e10, 0.04])
UPPER = np.array([1500.0, 3.0, 2.2e11, 0.06])
EXPONENTS = np.array([1.0, 3.0, -1.0, -4.0])


def beam(rows: int, seed: int) -> tuple[Array, Array, Array]:
    """Inputs, deflection of a cantilever's end in mm, and its derivatives in mm per unit of each input."""
    x = np.random.default_rng(seed).uniform(LOWER, UPPER, (rows, 4))
    y = 4e3 * np.prod(x**EXPONENTS, axis=1)  # F L^3 / (3 E I), I = a^4 / 12
    return x, y, y[:, None] * EXPONENTS / x


def network() -> GradientEnhancedMLPRegressor:
    """The regressor of all three ways."""
    return GradientEnhancedMLPRegressor((16,), max_iter=1000, random_state=0)


def error(model: Any) -> float:
    """Relative error at new points."""
    x, y, _ = beam(1000, seed=1)
    return float(np.linalg.norm(model.predict(x) - y) / np.linalg.norm(y))


def pipelines(rows: int = 20) -> dict[str, Pipeline]:
    """A pipeline for each way, fitted."""
    x, y, dydx = beam(rows, seed=0)
    plain = Pipeline([("model", network())])
    right = Pipeline([("model", network())])
    scaled = Pipeline([("scaler", StandardScaler()), ("model", network())])
    return {
        "values alone": plain.fit(x, y),
        "no scaler": right.fit(x, y, model__dydx=dydx),
        "scaler, wrong derivatives": scaled.fit(x, y, model__dydx=dydx),
    }


def report(rows: int = 20) -> dict[str, DerivativeReport]:
    """What `check_derivatives` says of the derivatives that the estimator gets."""
    x, y, dydx = beam(rows, seed=0)
    z: Any = StandardScaler().fit_transform(x)
    return {"no scaler": check_derivatives(x, y, dydx), "scaler, wrong derivatives": check_derivatives(z, y, dydx)}


def search(rows: int = 20) -> GridSearchCV:
    """Choose the weight of the derivatives of a ridge regression; every fold has its own statistics."""
    x, y, dydx = beam(rows, seed=0)
    basis = make_pipeline(StandardScaler(), PolynomialFeatures(3, include_bias=False))
    model = Pipeline([("model", GradientEnhancedRidge(alpha=1e-3, basis=basis))])
    grid = {"model__derivative_weight": [0.0, 0.1, 1.0]}
    return GridSearchCV(model, grid, cv=4).fit(x, y, model__dydx=dydx)


if __name__ == "__main__":
    for name, pipeline in pipelines().items():
        print(f"{name}: relative error {error(pipeline):.4f}")
    for name, said in report().items():
        print(f"check_derivatives, {name}: {said.verdict}")
    found = search()
    print(f"ridge regression, {found.best_params_}: relative error {error(found):.4f}")
