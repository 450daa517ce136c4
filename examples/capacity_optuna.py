"""Where the width range of a hyper-parameter search should end: `capacity_study` before Optuna.

A network is to be trained on 40 noisy values of ``sin(3a) b + a^2``. Derivatives are known while the model is being
chosen (an adjoint run, say), but the network itself is trained on values only. Optuna tunes width and penalty;
`capacity_study` first says where the range of widths should end. For comparison the same search without it goes up to
32 nodes, and gets the trainings of the study as further trials. One data set is an anecdote: docs/capacity.md has the
evidence on widths alone, where the bound is often too low.
Run: ``python examples/capacity_optuna.py``.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import optuna
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score

from gradwise import capacity_study
from gradwise.torch import GradientEnhancedMLPRegressor

Array = npt.NDArray[np.float64]
WIDTHS = [1, 2, 4, 8, 16, 32]
FOLDS = 3


@dataclass(frozen=True)
class Result:
    """What a search found, and the error of networks so trained on 2,000 fresh points, relative to the spread of y."""

    widest: int
    width: int
    alpha: float
    trainings: int
    error: float


def target(x: Array) -> tuple[Array, Array]:
    """Values of shape (n,) and derivatives of shape (n, 2)."""
    a, b = x.T
    return np.sin(3 * a) * b + a**2, np.stack([3 * np.cos(3 * a) * b + 2 * a, np.sin(3 * a)], axis=1)


def sample(count: int, seed: int, noise: float = 0.1) -> tuple[Array, Array, Array]:
    """Points in the square from -1 to 1, values with noise relative to their spread, exact derivatives."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (count, 2))
    y, dydx = target(x)
    return x, y + noise * y.std() * rng.normal(size=count), dydx


def network(width: int, alpha: float, seed: int) -> GradientEnhancedMLPRegressor:
    """An unfitted network of one hidden layer."""
    return GradientEnhancedMLPRegressor((width,), alpha=alpha, random_state=seed, max_iter=300)


def search(x: Array, y: Array, widest: int, trials: int, seed: int = 0) -> optuna.Study:
    """Optuna over width and penalty, by cross-validated error of the values."""

    def objective(trial: optuna.Trial) -> float:
        width = trial.suggest_int("width", 1, widest, log=True)
        alpha = trial.suggest_float("alpha", 1e-5, 1e-1, log=True)
        scores = cross_val_score(
            network(width, alpha, trial.number), x, y, cv=FOLDS, scoring="neg_root_mean_squared_error"
        )
        return -float(np.mean(scores))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    found.optimize(objective, n_trials=trials)
    return found


def run(seed: int, trials: int, widths: list[int], seeds: int) -> tuple[Result, Result]:
    """The search up to the widest width of all, and up to that of the study, with as many trainings."""
    x, y, dydx = sample(40, seed)
    fresh, truth, _ = sample(2000, 10_000, noise=0.0)
    results: list[Result] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the study counts them
        study = capacity_study(network(1, 1e-4, 0), widths, x, y, dydx, n_seeds=seeds)
        print(study)
        end = widths[-1] if study.upper_bound is None else int(study.upper_bound)
        spent = len(study.trainings)
        for widest, count, before in ((widths[-1], trials + spent // FOLDS, 0), (end, trials, spent)):
            best = search(x, y, widest, count, seed).best_params
            models = [network(best["width"], best["alpha"], 100 + s).fit(x, y) for s in range(3)]
            errors = [np.sqrt(np.mean((model.predict(fresh) - truth) ** 2)) / truth.std() for model in models]
            error = float(np.exp(np.mean(np.log(errors))))
            results.append(Result(widest, best["width"], best["alpha"], count * FOLDS + before, error))
    return results[0], results[1]


def main() -> None:
    """One data set, in half a minute on a free core."""
    for name, result in zip(("without the study", "with it"), run(0, 20, WIDTHS, 1), strict=True):
        print(
            f"  {name:18s} widths 1 to {result.widest:2d}, {result.trainings} trainings: took {result.width:2d} "
            f"(alpha {result.alpha:.1e}), test error {result.error:.3f}"
        )


if __name__ == "__main__":
    main()
