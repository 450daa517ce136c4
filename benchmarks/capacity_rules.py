"""Ways to choose a width, with what each spends: `capacity_study`, cross-validation, Optuna, and no trainings."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import optuna
from capacity_functions import Data
from capacity_network import Network
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold

from gradwise import CapacityStudy, capacity_study

__all__ = ["Choice", "Fit", "choices", "optuna_width", "studies"]

Array = npt.NDArray[np.float64]
Fit = Callable[..., Network]
FOLDS, SEEDS, WHOLE_SEEDS = 5, 2, 5


@dataclass(frozen=True)
class Choice:
    """A width, and the number of trainings it took."""

    width: int
    trainings: int


@dataclass
class Studies:
    """What the rules choose by: networks in folds with and without derivatives, and of values on all rows."""

    both: CapacityStudy
    whole: CapacityStudy
    optuna: dict[bool, Choice] = field(default_factory=dict)


def studies(fit: Fit, grid: list[int], data: Data, seed: int) -> Studies:
    """All trainings of a data set, but for those that measure the result."""
    arguments = (fit, grid, data.X, data.y, data.dydx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted in the table
        both = capacity_study(*arguments, cv=FOLDS, n_seeds=SEEDS, random_state=seed)
        whole = capacity_study(*arguments, networks="without", n_seeds=WHOLE_SEEDS, random_state=seed + 100)
    result = Studies(both, whole)
    trials = len(grid) * SEEDS  # of all folds: together the trainings of `both`
    for derivatives in (False, True):
        result.optuna[derivatives] = optuna_width(fit, grid[-1], data, derivatives, trials, seed)
    return result


def optuna_width(fit: Fit, widest: int, data: Data, derivatives: bool, trials: int, seed: int) -> Choice:
    """Optuna's tree-structured Parzen estimator over all widths up to the widest, by cross-validation of values."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        width = trial.suggest_int("width", 1, widest, log=True)
        errors: list[float] = []
        for rows, test in KFold(FOLDS, shuffle=True, random_state=seed + trial.number).split(data.X):
            slopes = data.dydx[rows] if derivatives else None
            model = fit(data.X[rows], data.y[rows], slopes, capacity=width, seed=seed + trial.number)
            errors.append(float(np.sqrt(np.mean((model.predict(data.X[test]) - data.y[test]) ** 2))))
        return float(np.mean(errors))

    search = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    search.optimize(objective, n_trials=trials)
    return Choice(int(search.best_params["width"]), trials * FOLDS)


def choices(found: Studies) -> dict[bool, dict[str, Choice]]:
    """By whether derivatives are trained on: what each rule chooses from one data set."""
    both, whole = found.both, found.whole
    grid = np.array(both.capacities)
    folds = len(grid) * FOLDS * SEEDS
    result: dict[bool, dict[str, Choice]] = {}
    for derivatives in (False, True):
        errors, unseen = both.errors(derivatives=derivatives), both.derivative_errors(derivatives=derivatives)
        assert errors is not None
        assert unseen is not None
        result[derivatives] = {
            "cross-validation, values": _choice(grid, errors.mean(axis=0), folds),
            "cross-validation, values, one seed": _choice(grid, errors[:FOLDS].mean(axis=0), folds // SEEDS),
            "cross-validation, unseen derivatives": _choice(grid, _log_mean(unseen), folds),
            "Optuna TPE, values held out": found.optuna[derivatives],
            "widest, always": Choice(int(grid[-1]), 0),
        }
    without, with_ = result[False], result[True]
    assert both.best_without is not None
    assert both.best_with is not None
    assert both.need is not None
    assert both.recommended_without is not None
    bound = grid[-1] if both.upper_bound is None else both.upper_bound
    without["gap: min(need, upper bound)"] = Choice(int(both.recommended_without), 2 * folds)
    without["gap: upper bound alone"] = Choice(int(bound), 2 * folds)
    without["best_without: unseen values and derivatives"] = Choice(int(both.best_without), folds)
    on_all = whole.derivative_errors(derivatives=False)
    assert on_all is not None
    for seeds in (3, WHOLE_SEEDS):
        name = f"derivative error at the training points, {seeds} seeds"
        without[name] = _choice(grid, _log_mean(on_all[:seeds]), len(grid) * seeds)
    with_["need: one standard error"] = Choice(int(both.need), folds)
    with_["best_with: unseen values and derivatives"] = Choice(int(both.best_with), folds)
    return result


def _choice(grid: Array, criterion: Array, trainings: int) -> Choice:
    return Choice(int(grid[int(criterion.argmin())]), trainings)


def _log_mean(errors: Array) -> Array:
    return np.log(errors).mean(axis=0)
