"""The population gradient of sharded models (FSDP2, HSDP, tensor parallelism): what one process would do."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch_shard_cells import (
    SAME,
    Whole,
    block_of_one_process,
    first_member,
    replicas_by_hand,
    run,
    sequence_of_one_process,
)
from torchrun_cells import succeeded

TWO = (*SAME, "plain", "options", "mean_weights", "errors", "one_reads", "sequence_parallel")
FOUR = ("unchanged_loop", "options", "mean_weights", "replicas", "tensor_parallel", "only_tensor_parallel")
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by four processes, loaded by two."""
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def four(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(tmp_path_factory.mktemp("four"), 4, *FOUR, f"save:{checkpoint}")


@pytest.fixture(scope="module")
def two(four: Results, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    del four
    return run(tmp_path_factory.mktemp("two"), 2, *TWO, f"load:{checkpoint}")


def assert_close(got: Any, expected: Any) -> None:
    """Up to the order of sums, which AdamW's first steps multiply where a gradient is nearly zero."""
    got, expected = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("case", SAME)
def test_two_processes_do_what_one_does(case: str, two: Results) -> None:
    expected = SAME[case](Whole(2))
    for rank in range(2):
        got = two[rank][case]
        for name in expected.keys() - {"agreement", "sharpness"}:
            assert_close(got[name], expected[name])
    assert equal(two[0][case]["weights"], two[1][case]["weights"])


@pytest.mark.parametrize("case", [case for case in FOUR if case in SAME])
def test_four_processes_with_empty_shards_do_what_one_does(case: str, four: Results) -> None:
    expected = SAME[case](Whole(4))
    for name in expected.keys() - {"agreement"}:
        assert_close(four[3][case][name], expected[name])


def test_sharpness_is_that_of_the_whole_in_the_mean_over_the_processes(two: Results) -> None:
    expected = SAME["by_hand"](Whole(2))["sharpness"]
    parts = torch.stack([two[rank]["by_hand"]["sharpness"] for rank in range(2)])
    assert not torch.allclose(parts[0], parts[1])  # nothing is sent when statistics are read
    torch.testing.assert_close(parts.mean(0), expected, rtol=1e-4, atol=1e-6)


def test_agreement_is_that_of_the_own_shards(two: Results) -> None:
    for rank in range(2):
        agreement = two[rank]["closures"]["agreement"]
        assert bool(((agreement > 1 / 4 - 1e-6) & (agreement <= 1 + 1e-6)).all())


def test_without_noise_it_is_fsdp2_bit_for_bit(two: Results) -> None:
    for rank in range(2):
        weights = two[rank]["plain"]
        for way in ("loop", "closure", "batch"):
            assert equal(weights[way], weights["plain"]), way


@pytest.mark.parametrize("number", ["two", "four"])
def test_a_member_under_every_option_is_fsdp2_at_weights_moved_by_hand(
    number: str, request: pytest.FixtureRequest
) -> None:
    results: Results = request.getfixturevalue(number)
    names = {"bfloat16 rms", "offload rms", "columns rms", "columns filter"}
    names |= {"pairs rms"} if number == "four" else set()
    for result in results:
        assert result["options"].keys() == names
        for name, of_option in result["options"].items():
            by_optimizer, by_hand = of_option["grads"]
            assert equal(by_optimizer, by_hand), name
            assert any(bool(gradient.any()) for gradient in by_optimizer)
            assert_close(of_option["member"], first_member(name.split()[1]))


@pytest.mark.parametrize("number", ["two", "four"])
def test_weights_are_the_mean_and_state_dicts_too(number: str, request: pytest.FixtureRequest) -> None:
    for result in request.getfixturevalue(number):
        assert all(result["mean_weights"].values()), result["mean_weights"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no model", "ValueError: `model` must be given to PopulationGradient where parameters are DTensors"),
        ("flat False", "TypeError: `model` must not be a FullyShardedDataParallel"),
        ("flat True", "TypeError: `model` must not be a FullyShardedDataParallel"),
        ("flat without model False", "TypeError: `model` must not be a FullyShardedDataParallel"),
        ("flat without model True", "TypeError: `model` must not be a FullyShardedDataParallel"),
        ("stale backward", "RuntimeError: one of the variables needed for gradient computation has been modified"),
        ("closure without sync", "RuntimeError: gradients must be reduced in every backward"),
        ("backward without sync", "RuntimeError: gradients must be reduced in every backward"),
        ("sharded later", "RuntimeError: `fully_shard` must be called before PopulationGradient"),
        ("inner module", "RuntimeError: `model` must contain the FSDP module that gathers its parameter"),
        ("written", "RuntimeError: A parameter was written to while a member"),
    ],
)
def test_what_cannot_work_is_refused_in_all_processes(case: str, message: str, two: Results) -> None:
    for rank in range(2):
        assert two[rank]["errors"][case].startswith(message)


def test_reading_statistics_in_one_process_changes_nothing(two: Results) -> None:
    assert equal(two[0]["one_reads"]["weights"], two[1]["one_reads"]["weights"])


def test_each_replica_of_hsdp_is_a_member(four: Results) -> None:
    members = [result["replicas"]["members"] for result in four]
    for rank, other in ((0, 1), (2, 3)):
        assert all(equal(a, b) for a, b in zip(members[rank], members[other], strict=True))
    matrices = [[weight for weight in step if weight.ndim > 1] for step in (members[0][0], members[2][0])]
    assert not any(map(torch.equal, *matrices))
    for result in four:
        assert equal(result["replicas"]["weights"], four[0]["replicas"]["weights"])
    assert_close(four[0]["replicas"]["weights"], replicas_by_hand())


def test_seeds_that_differ_along_one_axis_of_the_mesh_are_refused_in_all_processes(four: Results) -> None:
    for result in four:
        assert "`seed` must be the same in all processes" in result["replicas"]["refused"]
        assert "[1, 2, 3]" in result["replicas"]["refused"]


def test_tensor_parallel_processes_share_a_member(four: Results) -> None:
    expected = block_of_one_process()
    for rank in range(4):
        assert four[rank]["tensor_parallel"]["word"] == 0
        assert_close(four[rank]["tensor_parallel"]["members"], expected["members"])
        assert_close(four[rank]["tensor_parallel"]["weights"], expected["weights"])
        assert four[rank]["only_tensor_parallel"]["word"] == rank // 2
    alone = [result["only_tensor_parallel"]["members"][0] for result in four]
    assert equal(alone[0], alone[1])
    assert equal(alone[2], alone[3])
    assert not torch.equal(alone[0][0], alone[2][0])
    assert_close(alone[0], expected["members"][0])  # the member of one process is that of the first pair


def test_sequence_parallel_gradients_are_added_up_for_every_member(two: Results) -> None:
    expected = sequence_of_one_process()
    for rank in range(2):
        assert_close(two[rank]["sequence_parallel"]["weights"], expected["weights"])


def test_a_checkpoint_between_forward_and_step_holds_the_mean(four: Results, two: Results) -> None:
    for result in (each["save"] for each in four):
        assert result["member_in_place"]
        assert equal(result["resumed"]["loaded"], result["mean"])
    assert equal(two[0]["load"]["loaded"], four[0]["save"]["mean"])


def test_resuming_a_checkpoint_is_exact(four: Results) -> None:
    for result in (each["save"] for each in four):
        assert equal(result["resumed"]["weights"], result["weights"])
        assert equal(result["resumed"]["moments"], result["moments"])


def test_half_as_many_processes_go_on_from_a_checkpoint_with_the_same_members(four: Results, two: Results) -> None:
    for result in (each["load"] for each in two):
        for name in ("weights", "moments"):
            for got, expected in zip(result[name], four[0]["save"][name], strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)  # sums in another order


def test_asking_for_a_state_before_the_first_step_changes_no_member(four: Results) -> None:
    for result in (each["save"] for each in four):
        assert equal(result["untouched"]["asked"], result["untouched"]["not asked"])


def test_the_example_resumes_bit_for_bit() -> None:
    example = Path(__file__).parents[1] / "examples" / "fsdp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert succeeded(done.returncode, done.stderr), done.stderr
    assert "resumed from the checkpoint: the same weights, bit for bit" in done.stdout
