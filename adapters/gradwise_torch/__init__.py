"""The PyTorch side of gradwise; import it as `gradwise.torch`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradwise_torch._derivatives import jvp, teacher_jacobian, value_and_jacobian, vjp
from gradwise_torch._matching import GradientMatching
from gradwise_torch._population import PopulationGradient

if TYPE_CHECKING:
    from gradwise_torch._mlp_regressor import GradientEnhancedMLPRegressor
    from gradwise_torch._smt import SMTSurrogate

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

for _public in (GradientMatching, PopulationGradient, jvp, teacher_jacobian, value_and_jacobian, vjp):
    _public.__module__ = "gradwise.torch"  # where users find it: in reprs and pickles too

# Estimators need scikit-learn, whose import takes over a second that a training loop need not pay.
_LATER = {"GradientEnhancedMLPRegressor": "_mlp_regressor", "SMTSurrogate": "_smt"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        public = getattr(import_module(f"gradwise_torch.{_LATER[name]}"), name)
        public.__module__ = "gradwise.torch"
        globals()[name] = public
        return public
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
