"""Parameters of the MLP regressor: every rule and its message."""

from numbers import Integral, Real
from typing import Any

from gradwise._matching import LOSSES, check_choice, check_non_negative
from gradwise._matching_scale import SCALES
from gradwise_torch._mlp_activations import ACTIVATIONS

__all__ = ["check_parameters"]

_CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "solver": ("lbfgs", "adam"),
    "scale": SCALES,
    "derivative_loss": LOSSES,
    "dydx_layout": ("sklearn", "jenn"),
    "dtype": ("float64", "float32"),
}


def check_parameters(estimator: Any) -> tuple[int, ...]:
    """Raise ValueError if a parameter of `estimator` breaks a rule; return the sizes of the hidden layers."""
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(estimator, name), choices)
    for name in ("alpha", "tol", *(() if estimator.derivative_weight == "auto" else ("derivative_weight",))):
        value = getattr(estimator, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            alternative = ' or "auto"' if name == "derivative_weight" else ""
            msg = f"`{name}` must be a number{alternative}; got {value!r}"
            raise ValueError(msg)
        check_non_negative(name, float(value))
    for name in ("max_iter", "n_iter_no_change", "n_restarts", "n_estimators"):
        _check_count(name, getattr(estimator, name))
    if estimator.batch_size != "auto":
        _check_count("batch_size", estimator.batch_size, ' or "auto"')
    for name, limit in (("learning_rate_init", float("inf")), ("validation_fraction", 1.0)):
        value = getattr(estimator, name)
        if not (isinstance(value, Real) and 0 < float(value) < limit):
            msg = f"`{name}` must be between 0 and {limit:g}; got {value!r}"
            raise ValueError(msg)
    sizes: Any = estimator.hidden_layer_sizes
    hidden: tuple[Any, ...] = (sizes,) if isinstance(sizes, Integral) else tuple(sizes)
    for size in hidden:
        _check_count("hidden_layer_sizes", size)
    return tuple(int(size) for size in hidden)


def _check_count(name: str, value: Any, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        msg = f"`{name}` must be a positive whole number{alternative}; got {value!r}"
        raise ValueError(msg)
