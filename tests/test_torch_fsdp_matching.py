"""Gradient matching through models sharded by FSDP2: what several processes do is what one does with all rows."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch_fsdp_cells import CASES, Whole

WORKER = Path(__file__).with_name("torch_fsdp_cells.py")
ON_GPU = [name for name in CASES if name != "flattened"]
GROUPS = {
    "2-cpu": list(CASES),
    "4-cpu": ["training", "accumulation-hsdp", "second_order-hsdp"],
    "1-cuda": ON_GPU,
    "2-cuda": ON_GPU,
}


def possible(group: str) -> bool:
    world, _, device = group.partition("-")
    return device == "cpu" or torch.cuda.device_count() >= int(world)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, torch.Tensor]]:
    """What a group of processes has saved for a case; the group runs all its cases at once."""

    @cache
    def run(group: str) -> tuple[Path, str]:
        path = tmp_path_factory.mktemp("processes") / group
        path.mkdir()
        world = group.partition("-")[0]
        workers = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(path), str(rank), world, *GROUPS[group]],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(int(world))
        ]
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
        return path, "\n".join(e for e, worker in zip(errors, workers, strict=True) if worker.returncode)

    def result(group: str, name: str) -> dict[str, torch.Tensor]:
        path, errors = run(group)
        file = path / f"{name}.pt"
        assert file.exists(), errors
        return torch.load(file, weights_only=True)

    return result


@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, marks=pytest.mark.skipif(not possible(group), reason=f"needs {group[0]} GPU(s)"))
        for group, names in GROUPS.items()
        for name in (names if possible(group) else names[:1])
    ],
)
def test_processes_equal_one(saved: Callable[[str, str], dict[str, torch.Tensor]], group: str, name: str) -> None:
    case = name.partition("-")[0]
    expected, got = CASES[case](Whole()), saved(group, name)
    assert got.keys() == expected.keys()
    # Rounding in double precision, or of float32 parameters.
    rtol, atol = (1e-5, 1e-7) if case == "precision" else (1e-9, 1e-13)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
