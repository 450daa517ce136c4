"""Distributed checkpoints of sharded models: resumed by as many processes bit for bit, by fewer up to rounding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_shard_cells import run

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run("torch_dcp_cells.py", tmp_path_factory.mktemp("four"), 4, "save", str(checkpoint))


@pytest.fixture(scope="module")
def on_two(saved: Results, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    del saved
    return run("torch_dcp_cells.py", tmp_path_factory.mktemp("two"), 2, "load", str(checkpoint))


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_checkpoint_between_forward_and_step_holds_the_mean(saved: Results, on_two: Results) -> None:
    for result in saved:
        assert result["member_in_place"]
        assert equal(result["resumed"]["loaded"], result["mean"])
    assert equal(on_two[0]["loaded"], saved[0]["mean"])


def test_resuming_is_exact(saved: Results) -> None:
    for result in saved:
        assert equal(result["resumed"]["weights"], result["weights"])
        assert equal(result["resumed"]["moments"], result["moments"])


def test_half_as_many_processes_go_on_with_the_same_members(saved: Results, on_two: Results) -> None:
    for result in on_two:
        for name in ("weights", "moments"):
            for got, expected in zip(result[name], saved[0][name], strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)  # sums in another order


def test_asking_for_a_state_before_the_first_step_changes_no_member(saved: Results) -> None:
    for result in saved:
        assert equal(result["untouched"]["asked"], result["untouched"]["not asked"])
