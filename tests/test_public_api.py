"""The public names, which users and other tests rely on."""

import pickle

import pytest

import gradwise
import gradwise.torch

CORE = {"DerivativeScaler", "Population", "__version__", "gradient_matching_loss"}
TORCH = {"GradientMatching", "PopulationGradient", "jvp", "teacher_jacobian", "value_and_jacobian", "vjp"}


def test_names() -> None:
    assert set(gradwise.__all__) == CORE
    assert set(gradwise.torch.__all__) == TORCH


@pytest.mark.parametrize("name", sorted(TORCH))
def test_torch_names_live_where_users_import_them(name: str) -> None:
    public = getattr(gradwise.torch, name)
    assert public.__module__ == "gradwise.torch"
    assert public.__doc__
    assert pickle.loads(pickle.dumps(public)) is public
