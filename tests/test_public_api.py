"""The public names, which users and other tests rely on."""

import pickle
from types import ModuleType

import pytest

import gradwise
import gradwise.keras
import gradwise.torch
import gradwise.torch.lightning
import gradwise.torch.transformers

CORE = {
    "DerivativeReport",
    "check_derivatives",
    "CapacityStudy",
    "DerivativeScaler",
    "GradientEnhancedRidge",
    "GradientEnhancedRidgeCV",
    "Population",
    "__version__",
    "capacity_study",
    "estimate_gradients",
    "finite_difference_jacobian",
    "gradient_matching_loss",
}
KERAS = {
    "GradientMatching",
    "MeanWeights",
    "PopulationCallback",
    "PopulationGradient",
    "WithDerivatives",
    "attach_gradient_matching",
}
TORCH = {
    "GradientEnhancedMLPRegressor",
    "GradientMatching",
    "PopulationGradient",
    "SMTSurrogate",
    "jvp",
    "teacher_jacobian",
    "value_and_jacobian",
    "vjp",
}


def test_names() -> None:
    assert set(gradwise.__all__) == CORE
    assert set(gradwise.torch.__all__) == TORCH
    assert set(gradwise.keras.__all__) == KERAS
    assert gradwise.torch.lightning.__all__ == ["PopulationCallback"]
    assert gradwise.torch.transformers.__all__ == ["PopulationTrainerMixin"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((gradwise.torch, name) for name in sorted(TORCH)),
        *((gradwise.keras, name) for name in sorted(KERAS)),
        (gradwise.torch.lightning, "PopulationCallback"),
        (gradwise.torch.transformers, "PopulationTrainerMixin"),
    ],
)
def test_names_live_where_users_import_them(module: ModuleType, name: str) -> None:
    public = getattr(module, name)
    assert public.__module__ == module.__name__
    assert public.__doc__
    assert pickle.loads(pickle.dumps(public)) is public
