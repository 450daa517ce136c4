"""Which weights of a model a population perturbs."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

__all__ = ["Perturb", "is_matrix", "perturbed"]

Perturb = Callable[[str, Any], bool]


def is_matrix(name: str, variable: Any) -> bool:
    """The default: weights with at least two axes, which leaves out biases and normalisation."""
    del name
    return len(variable.shape) >= 2


def perturbed(variables: Sequence[Any], perturb: Perturb | None) -> list[int]:
    """Indices of the floating-point variables that `perturb` wants, by path and variable."""
    choose = is_matrix if perturb is None else perturb
    return [
        index
        for index, variable in enumerate(variables)
        if keras.backend.is_float_dtype(variable.dtype)
        and not getattr(variable, "overwrite_with_gradient", False)  # float8 scales, which are no weights
        and choose(variable.path, variable)
    ]
