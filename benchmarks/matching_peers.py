"""What the matching study fits: ours with and without derivatives, jenn, and of smt GENN, kriging and GEKPLS.

Each `Method` has a small grid of settings, of four for ours, jenn, GENN and GEKPLS, of which the study chooses by
problem on seeds that it does not report.
"""

import ast
import hashlib
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matching_problems import Array, Problem, Sample
from sklearn.model_selection import KFold

__all__ = ["ALPHAS", "METHODS", "Fitted", "Method", "own_version"]

ALPHAS = (1e-3, 3e-2, 1.0)  # of which cross-validation chooses for networks without derivatives
UNUSED = {"_mlp_adam", "_mlp_progress", "_mlp_save", "_mlp_smt"}  # of our files: the study does not run them
FOLDS = 3
FOLD_STEPS = 120  # of a fit that only ranks penalties
Settings = Mapping[str, Any]


class Fitted(NamedTuple):
    """A model: values (n, n_outputs) and derivatives (n, n_outputs, d) at x, and what fitting it took."""

    values: Callable[[Array], Array]
    jacobian: Callable[[Array], Array]
    seconds: float
    n_iter: int = 0


@dataclass(frozen=True)
class Method:
    """A column of the tables.

    Attributes
    ----------
    name : str
    fit : callable
        `fit(sample, problem, seed, settings)`.
    derivatives : bool
        Whether it uses those of the sample.
    grid : tuple of mappings
        Settings to choose from, the anchors' or the library's first.
    iterations : str
        Name of the setting that bounds the iterations, or "".
    own : bool
        Whether it is ours, and to be run again when our code has changed.
    """

    name: str
    fit: Callable[[Sample, Problem, int, Settings], Fitted]
    derivatives: bool
    grid: tuple[Settings, ...] = field(default=({},))
    iterations: str = ""
    own: bool = False


class _Clock:
    """Processor seconds of this process: the machine is shared, and there is one thread."""

    def __enter__(self) -> "_Clock":
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._start


# -- ours --------------------------------------------------------------------------------------------------------------


def _regressor(settings: Settings, seed: int) -> Any:
    from gradwise.torch import GradientEnhancedMLPRegressor

    return GradientEnhancedMLPRegressor(random_state=seed, **settings)


def _jacobian_of(model: Any, sample: Sample) -> Callable[[Array], Array]:
    return lambda x: np.reshape(model.predict_jacobian(x), (len(x), *sample.dydx.shape[1:]))


def _flat(y: Array) -> Array:
    """One output as users have it, shape (n,)."""
    return y[:, 0] if y.shape[1] == 1 else y


def _own(sample: Sample, problem: Problem, seed: int, settings: Settings) -> Fitted:
    del problem
    model = _regressor(settings, seed)
    with _Clock() as clock:
        model.fit(sample.x, _flat(sample.y), sample.dydx)
    shape = sample.y.shape[1]
    values = lambda x: np.reshape(model.predict(x), (len(x), shape))  # noqa: E731
    return Fitted(values, _jacobian_of(model, sample), clock.seconds, int(model.n_iter_))


def _without(sample: Sample, problem: Problem, seed: int, settings: Settings) -> Fitted:
    """Without derivatives; the penalty by cross-validation over whole rows, of the squared error of the values."""
    del problem
    x, y = sample.x, _flat(sample.y)
    steps = min(FOLD_STEPS, settings.get("max_iter", FOLD_STEPS))
    with _Clock() as clock:
        folds = list(KFold(min(FOLDS, len(x)), shuffle=True, random_state=seed).split(x))

        def error(alpha: float) -> float:
            squares = 0.0
            for train, held_out in folds:
                model = _regressor({**settings, "alpha": alpha, "max_iter": steps}, seed).fit(x[train], y[train])
                squares += float(np.sum(((model.predict(x[held_out]) - y[held_out]) / y.std(axis=0)) ** 2))
            return squares

        model = _regressor({**settings, "alpha": min(ALPHAS, key=error)}, seed).fit(x, y)
    shape = sample.y.shape[1]
    values = lambda x: np.reshape(model.predict(x), (len(x), shape))  # noqa: E731
    return Fitted(values, _jacobian_of(model, sample), clock.seconds, int(model.n_iter_))


@cache
def own_version() -> str:
    """A name for the code of our regressor and its settings; comments, docstrings and layout do not change it."""
    import gradwise_torch

    digest = hashlib.sha256(repr((OWN_GRID, ALPHAS, FOLDS, FOLD_STEPS)).encode())
    for path in sorted(Path(str(gradwise_torch.__file__)).parent.glob("_mlp_*.py")):
        if path.stem in UNUSED:
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:8]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# -- peers -------------------------------------------------------------------------------------------------------------


def _jenn(sample: Sample, problem: Problem, seed: int, settings: Settings) -> Fitted:
    import jenn

    options = dict(settings)
    model = jenn.NeuralNet([problem.dim, *options.pop("hidden"), problem.n_outputs])
    x, y, dydx = sample.x.T.copy(), sample.y.T.copy(), np.ascontiguousarray(sample.dydx.transpose(1, 2, 0))
    with _Clock() as clock:
        model.fit(x, y, dydx, is_normalize=True, random_state=seed, **options)
    return Fitted(
        lambda x: model.predict(x.T).T, lambda x: model.predict_partials(x.T).transpose(2, 0, 1), clock.seconds
    )


def _genn(sample: Sample, problem: Problem, seed: int, settings: Settings) -> Fitted:
    from smt.surrogate_models.genn import GENN

    model = GENN(print_global=False, seed=seed, **settings)
    model.load_data(sample.x, sample.y, sample.dydx[:, 0])
    return _train(model, problem)


def _kriging(sample: Sample, problem: Problem, seed: int, settings: Settings) -> Fitted:
    from smt.surrogate_models import KRG

    model = KRG(print_global=False, n_start=3, seed=seed, eval_noise=problem.noisy_values, **settings)
    model.set_training_values(sample.x, sample.y)
    return _train(model, problem)


def _gekpls(sample: Sample, problem: Problem, seed: int, settings: Settings) -> Fitted:
    from smt.surrogate_models import GEKPLS

    limits = np.stack([sample.x.min(axis=0), sample.x.max(axis=0)], axis=1)
    options = {
        **settings,
        "n_comp": min(settings["n_comp"], problem.dim),
        "extra_points": min(settings["extra_points"], problem.dim),
    }
    model = GEKPLS(print_global=False, n_start=3, seed=seed, xlimits=limits, **options)
    model.set_training_values(sample.x, sample.y)
    for j in range(problem.dim):
        model.set_training_derivatives(sample.x, sample.dydx[:, 0, j : j + 1], j)
    return _train(model, problem)


def _train(model: Any, problem: Problem) -> Fitted:
    """Of smt: one output."""
    with _Clock() as clock, warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")  # "y residual is constant": fewer components suffice
        model.train()  # prints whole spectra of matrices that are not positive definite

    def jacobian(x: Array) -> Array:
        columns = [model.predict_derivatives(x, j) for j in range(problem.dim)]
        return np.stack(columns, axis=-1).reshape(len(x), 1, problem.dim)

    return Fitted(model.predict_values, jacobian, clock.seconds)


# -- their settings ----------------------------------------------------------------------------------------------------

OWN_GRID: tuple[Settings, ...] = (
    {},
    {"max_iter": 1500, "tol": 1e-5},
    {"activation": "tanh", "alpha": 1e-2},
    {"alpha": 1.0},
)
JENN_GRID: tuple[Settings, ...] = (
    {"hidden": (24, 24), "alpha": 3e-3, "lambd": 1e-3, "max_iter": 2000},
    {"hidden": (24, 24), "alpha": 1e-2, "lambd": 1e-2, "max_iter": 2000},
    {"hidden": (24, 24), "alpha": 3e-3, "lambd": 1.0, "max_iter": 2000},
    {"hidden": (24, 24), "alpha": 3e-3, "lambd": 1e-4, "max_iter": 4000},
)
GENN_GRID: tuple[Settings, ...] = (
    {"hidden_layer_sizes": [12, 12], "alpha": 0.01, "lambd": 0.01, "num_iterations": 2000},
    {"hidden_layer_sizes": [12, 12], "alpha": 0.05, "lambd": 0.01, "num_iterations": 2000},
    {"hidden_layer_sizes": [12, 12], "alpha": 0.01, "lambd": 1e-4, "num_iterations": 2000},
    {"hidden_layer_sizes": [12, 12], "alpha": 0.01, "lambd": 1.0, "num_iterations": 2000},
)
GEKPLS_GRID: tuple[Settings, ...] = (
    {"n_comp": 3, "extra_points": 4, "delta_x": 1e-2},
    {"n_comp": 3, "extra_points": 5, "delta_x": 1e-3},
    {"n_comp": 2, "extra_points": 2, "delta_x": 1e-4},
    {"n_comp": 3, "extra_points": 4, "delta_x": 1e-2, "eval_noise": True},
)

METHODS = {
    method.name: method
    for method in (
        Method("GI", _own, True, OWN_GRID, "max_iter", own=True),
        Method("GI, defaults", _own, True, own=True),
        Method("GI, auto weight", _own, True, OWN_GRID, own=True),
        Method("without GI", _without, False, OWN_GRID, "max_iter", own=True),
        Method("jenn", _jenn, True, JENN_GRID, "max_iter"),
        Method("GENN", _genn, True, GENN_GRID, "num_iterations"),
        Method("GEKPLS", _gekpls, True, GEKPLS_GRID),
        Method("KRG", _kriging, False),
    )
}
