"""examples/ddp.py as its users start it: two processes under torchrun, and resumed from an early checkpoint."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun_cells import succeeded

ROOT = Path(__file__).parent.parent
EPOCHS = 12


def start(checkpoint: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = [str(ROOT / "examples" / "ddp.py"), "--epochs", str(EPOCHS), "--checkpoint", str(checkpoint), *options]
    return subprocess.Popen(
        command + example,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,  # so that no process of a test that fails is left
    )


def finish(run: subprocess.Popen[str]) -> str:
    try:
        output, _ = run.communicate(timeout=180)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert succeeded(run.returncode, output), output
    return output


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole, early = tmp_path / "whole.pt", tmp_path / "early.pt"
    run = start(whole, "--members", "2")
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("epoch   2"):  # the checkpoint of an epoch is written before its line
            shutil.copyfile(whole, early)
            break
    output = finish(run)
    assert "replicas agree to the bit: True" in output
    accuracy = re.search(r"test accuracy ([\d.]+) %   the 2 replicas", output)
    assert accuracy is not None
    assert float(accuracy[1]) > 85

    resumed = finish(start(early, "--members", "2", "--resume"))
    epochs = re.search(r"resumed after epoch (\d+)", resumed)
    assert epochs is not None
    assert 2 <= int(epochs[1]) < EPOCHS
    assert "replicas agree to the bit: True" in resumed
    assert_same(torch.load(whole, weights_only=True), torch.load(early, weights_only=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["early.pt", "whole.pt"]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_same(value, b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    import ddp

    path = tmp_path / "checkpoint.pt"
    ddp.save({"epochs": 1}, path)

    class Unwritable:
        def __reduce__(self) -> Any:
            msg = "no space left on device"
            raise OSError(msg)

    with pytest.raises(OSError, match="no space"):
        ddp.save({"weights": torch.zeros(1000), "more": Unwritable()}, path)
    assert torch.load(path, weights_only=True) == {"epochs": 1}
