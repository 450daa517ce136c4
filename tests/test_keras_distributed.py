"""Keras on several devices, replicas of TensorFlow or a data-parallel mesh of JAX: the numbers of one device."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

BACKEND = keras.config.backend()

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="Keras distributes it by hand-written loops only")

Trainings = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """What one process trained on one and several devices, by name."""
    where = tmp_path_factory.mktemp("devices") / "found.pickle"
    program = Path(__file__).with_name("keras_device_cells.py")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(program), str(where)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = pickle.loads(where.read_bytes())

    def training(name: str) -> dict[str, Any]:
        assert not isinstance(found[name], str), found[name]
        return found[name]

    return training


def assert_as_one(several: dict[str, Any], one: dict[str, Any]) -> None:
    for a, b in zip(several["weights"], one["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert several["history"]["loss"] == pytest.approx(one["history"]["loss"], rel=1e-5)
    if BACKEND == "jax":  # a replica of TensorFlow says how its own rows agree
        agreement = [each["history"]["population_agreement"] for each in (several, one)]
        assert agreement[0] == pytest.approx(agreement[1], rel=1e-4)


# -- PopulationCallback ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [2, 3] if BACKEND == "tensorflow" else [2])
def test_a_population_trains_as_on_one_device(devices: int, trainings: Trainings) -> None:
    """The members of all replicas have the same noise, so the mean over rows and members is that of one device."""
    several = trainings(f"population, {devices}")
    assert several["same"]
    assert_as_one(several, trainings("population, 1"))


@pytest.mark.skipif(BACKEND != "jax", reason="a mesh of JAX")
def test_shards_on_a_mesh_train_as_on_one_device(trainings: Trainings) -> None:
    assert_as_one(trainings("population of shards, 2"), trainings("population of shards, 1"))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's replicas, each of which shares out its own rows")
def test_unbuilt_models_and_shards_leave_replicas_alike(trainings: Trainings) -> None:
    assert trainings("population of an unbuilt model, 2")["same"]
    assert trainings("population of shards, 2")["same"]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's replicas")
def test_replicas_stand_at_the_mean_after_a_fault(trainings: Trainings) -> None:
    result = trainings("population that fails, 2")
    assert "on purpose" in result["raised"]
    assert result["same"]
    for weights, before in zip(result["weights"], result["before"], strict=True):
        np.testing.assert_array_equal(weights, before)


# -- PopulationGradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "name"),
    [(2, "scaled optimizer"), (3, "optimizer")] if BACKEND == "tensorflow" else [(2, "scaled optimizer")],
)
def test_an_optimizer_trains_as_on_one_device(devices: int, name: str, trainings: Trainings) -> None:
    """Losses, members and means; that replicas are alike after each step is asserted where they are."""
    several, one = trainings(f"{name}, {devices}"), trainings(f"{name}, 1")
    assert len(several) >= 10
    assert several.keys() == one.keys()
    for key, value in several.items():
        if key.startswith("exactly"):  # a member around the same mean
            np.testing.assert_array_equal(value, one[key], err_msg=key)
        else:
            np.testing.assert_allclose(value, one[key], rtol=2e-4, atol=2e-6, err_msg=key)


# -- GradientMatching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["wrapper", "attached"])
def test_gradient_matching_trains_as_on_one_device(way: str, trainings: Trainings) -> None:
    two, one = trainings(f"{way}, 2"), trainings(f"{way}, 1")
    assert len(one) == 5  # of the losses and four weights
    assert two.keys() == one.keys()
    for key, value in two.items():
        np.testing.assert_allclose(value, one[key], rtol=1e-4, atol=1e-6, err_msg=key)  # sums in another order
    np.testing.assert_allclose(one["numbers"], trainings("wrapper, 1")["numbers"], rtol=1e-5)


def test_projections_work_on_two_devices(trainings: Trainings) -> None:
    """Finite: they are not the draws of one device."""
    assert np.all(np.isfinite(trainings("projected, 2")["numbers"]))
