"""gradwise for PyTorch: wrap an optimizer, or add a loss term."""

from typing import TYPE_CHECKING, Any

try:
    import gradwise_torch
    from gradwise_torch import (
        GradientMatching,
        PopulationGradient,
        jvp,
        teacher_jacobian,
        value_and_jacobian,
        vjp,
    )
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    msg = 'gradwise.torch needs PyTorch; install it with: pip install "gradwise[torch]"'
    raise ModuleNotFoundError(msg, name="torch") from error

if TYPE_CHECKING:
    from gradwise_torch import GradientEnhancedMLPRegressor, SMTSurrogate

__all__ = [
    "GradientEnhancedMLPRegressor",
    "GradientMatching",
    "PopulationGradient",
    "SMTSurrogate",
    "jvp",
    "teacher_jacobian",
    "value_and_jacobian",
    "vjp",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # an estimator, see gradwise_torch
        return getattr(gradwise_torch, name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
