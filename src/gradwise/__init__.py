"""Better gradients for models people already have.

Gradient matching (`gradient_matching_loss`, `DerivativeScaler`): input derivatives as training targets, also known as
Sobolev training. Population gradient (`Population`): the mean gradient over perturbed copies of the weights. This
package holds the mathematics and imports no framework; `gradwise.torch` plugs it into training loops.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradwise._matching import gradient_matching_loss
from gradwise._population import Population

if TYPE_CHECKING:
    from gradwise._capacity import CapacityStudy, capacity_study
    from gradwise._check_derivatives import check_derivatives
    from gradwise._derivative_report import DerivativeReport
    from gradwise._ridge import GradientEnhancedRidge
    from gradwise._ridge_cv import GradientEnhancedRidgeCV
    from gradwise._scaling import DerivativeScaler
    from gradwise._targets import estimate_gradients
    from gradwise._targets_differences import finite_difference_jacobian

__version__ = "0.1.0"

__all__ = [
    "CapacityStudy",
    "DerivativeReport",
    "DerivativeScaler",
    "GradientEnhancedRidge",
    "GradientEnhancedRidgeCV",
    "Population",
    "__version__",
    "capacity_study",
    "check_derivatives",
    "estimate_gradients",
    "finite_difference_jacobian",
    "gradient_matching_loss",
]

# Looked up when first used: an estimator needs scikit-learn, whose import takes over a second that a torch training
# loop need not pay.
_LAZY = {
    "DerivativeReport": "gradwise._derivative_report",
    "CapacityStudy": "gradwise._capacity",
    "DerivativeScaler": "gradwise._scaling",
    "GradientEnhancedRidge": "gradwise._ridge",
    "GradientEnhancedRidgeCV": "gradwise._ridge_cv",
    "capacity_study": "gradwise._capacity",
    "check_derivatives": "gradwise._check_derivatives",
    "estimate_gradients": "gradwise._targets",
    "finite_difference_jacobian": "gradwise._targets_differences",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
