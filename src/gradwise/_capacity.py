"""How wide a network should be: trainings with and without derivatives over a grid of capacities."""

import hashlib
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, cast

import joblib  # pyright: ignore[reportMissingTypeStubs] - joblib ships no types
import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning  # pyright: ignore[reportMissingTypeStubs] - nor does scikit-learn
from sklearn.model_selection import KFold  # pyright: ignore[reportMissingTypeStubs] - the same

from gradwise._capacity_estimators import as_fit
from gradwise._capacity_journal import Journal
from gradwise._capacity_study import CapacityStudy
from gradwise._capacity_training import Job, Samples, Split, Training, train
from gradwise._matching_scale import positive_or_one, standard_deviation
from gradwise._scaling import DerivativeScaler

__all__ = ["CapacityStudy", "capacity_study"]

NETWORKS = {"both": (False, True), "with": (True,), "without": (False,)}


def capacity_study(
    fit: Any,
    capacities: Iterable[float],
    X: ArrayLike,
    y: ArrayLike,
    dydx: ArrayLike,
    *,
    networks: str = "both",
    cv: Any = 5,
    n_seeds: int | None = None,
    random_state: int = 0,
    capacity_parameter: str | Callable[[Any], dict[str, Any]] = "hidden_layer_sizes",
    n_jobs: int | None = None,
    resume: Any = None,
    progress: bool = False,
) -> CapacityStudy:
    r"""Train with and without derivatives over a grid of capacities, and say which capacity to take.

    With e0(h) and e1(h) the held-out value errors without and with derivatives, for the same initial weights and the
    same rows (a unit: seed and fold):

    * ``G(h) = mean over units of log e0(h) - log e1(h)``, the gap;
    * `need`: the smallest h whose mean e1 is within one standard error of the least mean e1;
    * `upper_bound`: the last h before the simultaneous 95 % lower band of ``G(h) - min_{h' < h} G(h')`` exceeds
      log 1.5; None if it never does. The band is a studentised bootstrap over the units of the largest of all pairs of
      capacities, exactly defined in `gradwise._capacity_statistics.rise_band`; it wants ten units or more;
    * ``recommended_with = need`` and ``recommended_without = min(need, upper_bound)``.

    Why the gap bounds capacity: a network too small for the target is wrong by the same bias with derivatives and
    without, so G is about 0. Once it is large enough to bend between the samples, n values no longer hold it, while
    n (1 + n_inputs) equations still do: G jumps where the network trained on values begins to over-fit. The idea is
    that of McDonagh & Chen (arXiv 2112.00094), who call it an indicator of an upper bound; their formula is not known
    to us, this one is ours.

    Better in our measurements (docs/capacity.md), from the same trainings: the h of least *unseen error*, the
    geometric mean of the held-out value error and of the error of derivatives that the training did not see (at the
    training points without derivatives, at the held-out points with them). Values carry noise and are few; exact
    derivatives are many and say more about what lies between the samples. These are `best_with` and `best_without`.
    ``networks="without"`` needs no folds and no training with derivatives: networks of values only, trained on all
    rows, are judged by their derivative error, a fraction of the trainings; its `upper_bound` is where that error,
    instead of the gap, rises by a factor of 1.5. ``networks="with"`` leaves the networks of values out.

    When not to use it: the gap also opens, without any over-fitting, where derivatives merely help more from some width
    on, and the bound is then too low. On 41 of 70 measured data sets that showed a bound the best network of values was
    wider; read it as the width from which derivatives pay. Networks stopped early, or strongly penalised, hardly
    over-fit at any width. With derivatives a generous width costs time rather than accuracy.

    Parameters
    ----------
    fit : callable or estimator
        ``fit(X, y, dydx, capacity=h, seed=s)`` returns a fitted model; dydx is None for training on values. The same
        seed must give the same initial weights with and without. The model has ``predict(X)``, returning the
        shape of y; where it has ``predict_jacobian(X)`` that is used, else central differences of ``predict``; where
        it has ``converged_``, False is reported. With ``fit.many(data, capacity=h, seeds=[...])``, data a list of
        (X, y, dydx), returning a list of models, all units of a capacity are trained in one call.
        Or an estimator with ``fit(X, y, dydx)``, for example `gradwise.torch.GradientEnhancedMLPRegressor`: a clone is
        trained for every unit, with `capacity_parameter` set and ``random_state`` the seed. The seeds of this
        regressor that share their rows (with ``networks="without"``, or folds that `cv` gives) are the members of one
        ensemble, trained as one program: five took 0.35 to 0.6 of the time of five trainings. The ensemble says only
        whether all its members converged.
    capacities : iterable of numbers
        At least two, ascending: numbers of hidden nodes, say.
    X : array of shape (n, n_inputs)
    y : array of shape (n,) or (n, n_outputs)
    dydx : array of shape (n, n_inputs) for one output, or (n, n_outputs, n_inputs)
        Derivatives, in units of y per unit of x; NaN means unknown.
    networks : {"both", "with", "without"}, default "both"
        What is trained, see above.
    cv : int, scikit-learn splitter, or iterable of (train, test) rows, default 5
        Folds. An int shuffles anew for every seed. Not used by ``networks="without"``.
    n_seeds : int, optional
        Default 2, and 5 for ``networks="without"``; the seeds are ``random_state + i``.
    random_state : int, default 0
        The first seed, and that of the bootstrap.
    capacity_parameter : str or callable, default "hidden_layer_sizes"
        For an estimator: the parameter, which for "hidden_layer_sizes" is set to ``(h,)``; or a function from h to a
        dict of parameters.
    n_jobs : int, optional
        Processes, as in joblib; 1 by default. Worth it for trainings of a second or so: each process imports anew.
    resume : path-like, optional
        File of JSON lines that trainings are added to and, in a later call, read from. More seeds or capacities may be
        asked for later. A function `fit` is known by its name (and what `functools.partial` binds) only: take another
        file when you change it.
    progress : bool, default False
        Show a progress bar, which needs rich.

    Returns
    -------
    CapacityStudy
        With `gap`, `need`, `upper_bound`, `recommended_with`, `recommended_without`, `best_with`, `best_without`,
        `to_frame()`, `plot()`.

    Raises
    ------
    ValueError
        If capacities do not ascend, shapes do not belong together, an option is none of the above, or `resume` is a
        file of other data or settings.
    TypeError
        If `fit` is neither a function nor an estimator.

    Warns
    -----
    ConvergenceWarning
        If trainings did not converge. They count all the same, and are marked in `to_frame` and `plot`. Units with a
        prediction that is not finite are left out of all means.

    Examples
    --------
    Polynomials of x, whose capacity is their degree, through 12 noisy samples of a cubic with exact slopes:

    >>> import numpy as np
    >>> from gradwise import capacity_study
    >>> class Polynomial:
    ...     def __init__(self, coefficients):
    ...         self.coefficients = coefficients
    ...
    ...     def predict(self, X):
    ...         return np.polyval(self.coefficients, X[:, 0])
    >>> def fit(X, y, dydx, *, capacity, seed):
    ...     powers = np.arange(capacity, -1, -1)
    ...     rows, right = X ** powers, y
    ...     if dydx is not None:
    ...         slopes = powers * X ** np.maximum(powers - 1, 0)
    ...         rows, right = np.concatenate([rows, slopes]), np.concatenate([y, dydx[:, 0]])
    ...     return Polynomial(np.linalg.lstsq(rows, right, rcond=None)[0])
    >>> X = np.linspace(-1, 1, 12)[:, None]
    >>> y = X[:, 0] ** 3 - X[:, 0] + 0.05 * np.random.default_rng(0).normal(size=12)
    >>> study = capacity_study(fit, range(1, 8), X, y, 3 * X**2 - 1)
    >>> study.best_with, study.best_without
    (3, 3)
    """
    samples = _samples(X, y, dydx)
    grid = tuple(_plain(capacity) for capacity in capacities)
    if len(grid) < 2 or any(b <= a for a, b in pairwise(grid)):
        msg = f"`capacities` must be at least two ascending numbers; got {list(grid)}"
        raise ValueError(msg)
    if networks not in NETWORKS:
        msg = f"`networks` must be one of {list(NETWORKS)}; got {networks!r}"
        raise ValueError(msg)
    count = (5 if networks == "without" else 2) if n_seeds is None else n_seeds
    if count < 1:
        msg = f"`n_seeds` must be at least 1; got {count}"
        raise ValueError(msg)
    seeds = range(random_state, random_state + count)
    function = as_fit(fit, capacity_parameter)
    splits = _splits(samples, cv if networks != "without" else None, seeds)
    journal = Journal(resume, _fingerprint(fit, capacity_parameter, samples, splits, random_state))
    jobs = [Job(h, *unit, derivatives) for h in grid for derivatives in NETWORKS[networks] for unit in splits]
    missing = [job for job in jobs if job not in journal.trainings]
    groups = _groups(missing, splits, function)
    parallel: Any = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    with _progress(len(jobs), len(jobs) - len(missing), progress) as advance:
        for group, trained in parallel(
            (_work, (function, samples, group, [splits[job.seed, job.fold] for job in group]), {}) for group in groups
        ):
            journal.add(zip(group, trained, strict=True))
            advance(len(group))
    study = CapacityStudy(grid, {job: journal.trainings[job] for job in jobs}, random_state)
    _warn(study)
    return study


def _work(fit: Any, samples: Samples, jobs: list[Job], splits: list[Split]) -> tuple[list[Job], list[Training]]:
    return jobs, train(fit, samples, jobs, splits)


def _samples(X: ArrayLike, y: ArrayLike, dydx: ArrayLike) -> Samples:
    inputs, outputs, slopes = (np.asarray(array, dtype=np.float64) for array in (X, y, dydx))
    DerivativeScaler().fit(inputs, outputs, slopes)  # checks shapes and finiteness
    spread = positive_or_one(standard_deviation(outputs.reshape(len(outputs), -1), xp=np), np)
    x_scale = positive_or_one(standard_deviation(inputs, xp=np), np)
    return Samples(inputs, outputs, slopes, x_scale, spread if outputs.ndim == 2 else spread[0])


def _splits(samples: Samples, cv: Any, seeds: Sequence[int]) -> dict[tuple[int, int], Split]:
    """Rows to train on and rows held out, by seed and fold; fold -1 holds out nothing."""
    n = len(samples.X)
    if cv is None:
        return {(seed, -1): (np.arange(n), np.arange(0)) for seed in seeds}
    pairs = list(cv) if not isinstance(cv, int) and not hasattr(cv, "split") else None
    result: dict[tuple[int, int], Split] = {}
    for seed in seeds:
        if pairs is not None:
            found: Any = pairs
        else:
            splitter: Any = KFold(cv, shuffle=True, random_state=seed) if isinstance(cv, int) else cv
            found = splitter.split(samples.X, samples.y)
        for fold, (rows, test) in enumerate(found):
            result[seed, fold] = np.asarray(rows), np.asarray(test)
    return result


def _groups(jobs: list[Job], splits: dict[tuple[int, int], Split], fit: Any) -> list[list[Job]]:
    """Jobs that are trained in one call: all of a capacity, or those of them with the same rows, or one by one."""
    if not hasattr(fit, "many"):
        return [[job] for job in jobs]
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        rows = splits[job.seed, job.fold][0].tobytes() if getattr(fit, "same_rows", False) else b""
        groups.setdefault((job.capacity, job.derivatives, rows), []).append(job)
    return list(groups.values())


def _fingerprint(fit: Any, parameter: Any, samples: Samples, splits: dict[Any, Split], first: int) -> str:
    """Of the data, the folds of the first seed and what is known of `fit`; not of capacities and numbers of seeds."""
    digest = hashlib.sha256()
    for array in (samples.X, samples.y, samples.dydx):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    for (seed, fold), (rows, test) in splits.items():
        if seed == first:
            digest.update(repr((fold, rows.tolist(), test.tolist())).encode())
    if hasattr(fit, "get_params"):
        named = parameter if isinstance(parameter, str) else getattr(parameter, "__qualname__", "")
        settings = {name: value for name, value in fit.get_params().items() if name not in {named, "random_state"}}
        digest.update(f"{type(fit).__module__}.{type(fit).__qualname__} {named} {sorted(settings.items())!r}".encode())
    else:
        while isinstance(fit, partial):  # the settings that it binds are part of the study
            bound = cast("partial[Any]", fit)
            digest.update(f"{bound.args!r} {sorted(bound.keywords.items())!r}".encode())
            fit = bound.func
        known = getattr(fit, "__qualname__", type(fit).__qualname__)
        digest.update(f"{getattr(fit, '__module__', '')}.{known}".encode())
    return digest.hexdigest()


@contextmanager
def _progress(total: int, done: int, shown: bool) -> Generator[Callable[[int], None]]:
    if not shown:
        yield lambda _: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        msg = '`progress=True` needs rich: pip install "gradwise[plot]"'
        raise ImportError(msg) from error
    columns = (TextColumn("capacity study"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _warn(study: CapacityStudy) -> None:
    failed = study.not_converged
    if failed:
        at = sorted({job.capacity for job, training in study.trainings.items() if training.converged is False})
        infinite = sum(np.inf in {t.error, t.derivative_error} for t in study.trainings.values())
        msg = (
            f"{failed} of {len(study.trainings)} trainings did not converge (capacities {', '.join(map(repr, at))}); "
            "they count all the same, see `to_frame()`. More iterations would let them over-fit further"
        )
        if infinite:
            msg += f". {infinite} predicted values that are not finite: their seed and fold is left out of the means"
        warnings.warn(msg, ConvergenceWarning, stacklevel=3)


def _plain(capacity: Any) -> float:
    """A Python number, so that it can be a key in a file of JSON lines; numpy's are none."""
    value: Any = capacity.item() if hasattr(capacity, "item") else capacity
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        msg = f"`capacities` must be at least two ascending numbers; got {capacity!r}"
        raise ValueError(msg)
    return value
