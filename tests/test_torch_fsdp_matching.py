"""Gradient matching through models sharded by FSDP2: what several processes do is what one does with all rows."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch_fsdp_cells import CASES, Whole

PAIR = list(CASES)
FOUR = ["training", "accumulation-hsdp", "second_order-hsdp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    for world, names in ((2, PAIR), (4, FOUR)):
        worker = Path(__file__).with_name("torch_fsdp_cells.py")
        (path / str(world)).mkdir()
        workers = [
            subprocess.Popen(
                [sys.executable, str(worker), str(path / str(world)), str(rank), str(world), *names],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        errors = [worker.communicate(timeout=180)[1] for worker in workers]
        assert not any(worker.returncode for worker in workers), "\n".join(errors)
    return path


@pytest.fixture(scope="module")
def alone() -> Callable[[str], dict[str, torch.Tensor]]:
    results: dict[str, dict[str, torch.Tensor]] = {}

    def expected(name: str) -> dict[str, torch.Tensor]:
        if name not in results:
            results[name] = CASES[name](Whole())
        return results[name]

    return expected


@pytest.mark.parametrize(("world", "name"), [(2, name) for name in PAIR] + [(4, name) for name in FOUR])
def test_processes_equal_one(
    folder: Path, alone: Callable[[str], dict[str, torch.Tensor]], world: int, name: str
) -> None:
    case = name.partition("-")[0]
    expected, got = alone(case), torch.load(folder / str(world) / f"{name}.pt", weights_only=True)
    assert got.keys() == expected.keys()
    # Rounding in double precision, or of float32 parameters.
    rtol, atol = (1e-5, 1e-7) if case == "precision" else (1e-9, 1e-13)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, msg=lambda text, key=key: f"{key}: {text}", rtol=rtol, atol=atol)
