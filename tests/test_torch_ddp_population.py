"""DistributedDataParallel in two and four processes: one reduction a step, the same weights everywhere, to the bit."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_cells import perturb_by_hand, put
from torch_ddp_cells import Branches, batch, mse, mse_of_both, small

from gradwise import Population

ROOT = Path(__file__).parent
KINDS = ("plain", "gradient_as_bucket_view", "find_unused_parameters", "static_graph")
MEMBERS = 4


def run_workers(folder: Path, processes: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "error", str(ROOT / "torch_ddp_worker.py"), str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank), str(processes)], stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()  # does nothing to those that have ended
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_workers(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if request.param == 2:
        return request.getfixturevalue("two")
    return run_workers(tmp_path_factory.mktemp("four"), 4)


def equal(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def member_gradients(
    model: nn.Module,
    member: int,
    rank: int,
    x: Tensor,
    y: Tensor,
    *,
    step: int = 0,
    paired: bool = True,
    antithetic: bool = True,
    loss_fn: Callable[..., Tensor] = mse,
) -> list[Tensor]:
    """One member's gradients, by the formula; zero where it has none."""
    parameters = list(model.parameters())
    population = Population(size=MEMBERS, sigma=0.3, seed=5, antithetic=antithetic)
    mean = perturb_by_hand(parameters, population, step=step, member=member, paired=paired, rank=rank)
    gradients = torch.autograd.grad(loss_fn(model, x, y), parameters, allow_unused=True)
    put(parameters, mean)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def mean_of(members: Sequence[list[Tensor]], sizes: Sequence[int] | None = None) -> list[Tensor]:
    sizes = sizes or [1] * len(members)
    columns = zip(*members, strict=True)
    return [sum((n * g for n, g in zip(sizes, c, strict=True)), torch.zeros(())) / sum(sizes) for c in columns]


def check_close(got: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-6)  # float32, summed in another order


def train_by_hand(
    model: nn.Module, ranks_of_steps: Sequence[Sequence[int]], loss_fn: Callable[..., Tensor] = mse
) -> Sequence[Tensor]:
    """SGD with two members in each process that still has batches, whose sum DDP divides by two processes."""
    parameters = list(model.parameters())
    for step, ranks in enumerate(ranks_of_steps):
        members = [
            member_gradients(model, i, rank, *batch(step, rank), step=step, loss_fn=loss_fn)
            for rank in ranks
            for i in range(2)
        ]
        with torch.no_grad():
            for parameter, mean in zip(parameters, mean_of(members), strict=True):
                parameter -= 0.1 * mean * len(ranks) / 2
    return parameters


@pytest.mark.parametrize("way", ["unchanged loop", "four members"])
def test_replicas_stay_bit_identical(ranks: list[dict[str, Any]], way: str) -> None:
    first, *others = [rank[way] for rank in ranks]
    assert len(first["weights"]) == 10  # at every 100th step of 1,000, with four processes at every 5th of 50
    for other in others:
        assert all(equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))
        assert equal(first["optimizer"], other["optimizer"])
        assert torch.equal(first["var"], other["var"])
    assert not equal(first["weights"][0], first["weights"][-1])
    for at_step in zip(*(rank[way]["members"] for rank in ranks), strict=True):  # nobody sees another's member
        members = [member for of_rank in at_step for member in of_rank]
        assert len(members) == len(ranks) * (1 if way == "unchanged loop" else MEMBERS)
        assert not any(torch.equal(a, b) for i, a in enumerate(members) for b in members[:i])


@pytest.mark.parametrize("way", ["closure", "backward", "sharded"])
def test_one_reduction_is_the_mean_over_members_and_processes(ranks: list[dict[str, Any]], way: str) -> None:
    model = small()
    means: list[list[Tensor]] = []
    for rank, result in enumerate(ranks):
        x, y = batch(0, rank)
        shards, sizes = [(x, y)] * MEMBERS, [1] * MEMBERS
        if way == "sharded":  # process 0 has three rows for its four members: there are three of them
            rows = torch.arange(3 + 2 * rank).tensor_split(min(MEMBERS, 3 + 2 * rank))
            shards, sizes = [(x[r], y[r]) for r in rows], [len(r) for r in rows]
        members = [member_gradients(model, i, rank, *shard, paired=way != "sharded") for i, shard in enumerate(shards)]
        means.append(mean_of(members, sizes))
        norms = [float(sum(g.square().sum() for g in gradients)) for gradients in (means[-1], *members)]
        agreement = norms[0] * sum(sizes) / sum(n * norm for n, norm in zip(sizes, norms[1:], strict=True))
        assert result["one step"][f"{way} members"] == len(members)  # statistics are of this process's own members
        assert result["one step"][f"{way} agreement"] == pytest.approx(agreement, rel=1e-4)
        assert equal(result["one step"][way], ranks[0]["one step"][way])
    check_close(ranks[0]["one step"][way], mean_of(means))


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_bare_optimizer(ranks: list[dict[str, Any]], kind: str) -> None:
    for result in ranks:
        bare, members = result["no noise"][kind]["bare"], result["no noise"][kind]["members"]
        # In the first step with a static graph every member is reduced, and of those only the first one as a bare
        # optimizer's gradient is, in buckets of another order: four processes then sum in another order.
        assert equal(bare, members) or (len(ranks) > 2 and kind == "static_graph")
        assert equal(members[:-1], ranks[0]["no noise"][kind]["members"][:-1])  # all but the random streams


def test_no_more_communication_than_the_bare_optimizer(two: list[dict[str, Any]]) -> None:
    for result in two:
        counts = result["counts"]
        assert counts["bare"]["c10d::allreduce_"] == 2  # buckets
        assert counts["bare"] == counts["loop"] == counts["closure"] == counts["batch"]


def test_the_unchanged_loop_is_the_mean_over_processes(two: list[dict[str, Any]]) -> None:
    model = small()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(20):
        members = [member_gradients(model, 0, rank, *batch(step, rank), step=step, paired=False) for rank in range(2)]
        for parameter, mean in zip(model.parameters(), mean_of(members), strict=True):
            parameter.grad = mean
        inner.step()
    first, second = (rank["plain loop"]["weights"] for rank in two)
    assert equal(first, second)
    check_close(first, list(model.parameters()))


def test_a_member_that_is_not_finite_in_one_process_is_dropped_in_all(two: list[dict[str, Any]]) -> None:
    model = small()
    members = [member_gradients(model, i, rank, *batch(0, rank)) for rank in range(2) for i in (0, 2, 3)]
    first, second = (rank["skipping"] for rank in two)
    assert first["skipped"] == second["skipped"] == 1
    assert equal(first["weights"], second["weights"])
    check_close(first["weights"], [p - 0.1 * g for p, g in zip(model.parameters(), mean_of(members), strict=True)])


@pytest.mark.parametrize("name", ["accumulation", "accumulation in buckets"])
def test_accumulated_gradients_are_reduced_too(two: list[dict[str, Any]], name: str) -> None:
    model = small()
    sums = [  # every batch has members of its own within a step: the next antithetic pair
        [member_gradients(model, 2 * micro + i, rank, *batch(micro, rank)) for micro in range(2) for i in range(2)]
        for rank in range(2)
    ]
    assert equal(two[0][name], two[1][name])
    check_close(two[0][name], [2 * mean for mean in mean_of([gradients for of_rank in sums for gradients in of_rank])])


def test_a_parameter_that_only_some_members_use(two: list[dict[str, Any]]) -> None:
    members = []
    for rank in range(2):
        model = Branches(calls=rank)
        members += [member_gradients(model, i, rank, *batch(0, rank), antithetic=False) for i in range(MEMBERS)]
    first, second = (rank["branches"] for rank in two)
    assert equal(first["gradients"], second["gradients"])
    assert equal(first["weights"], second["weights"])
    assert first["gradients"][4:] == [None, None]  # used by nobody
    check_close(first["gradients"][:4], mean_of(members)[:4])


def test_hooks_of_the_users_run_once_per_member(two: list[dict[str, Any]]) -> None:
    model = small()
    own = list(model.parameters())[:2]  # of the optimizer: the others are not perturbed
    population = Population(sigma=0.3, seed=5)
    for step in range(2):
        members = []
        for rank, i in product(range(2), range(2)):
            mean = perturb_by_hand(own, population, step=step, member=i, paired=True, rank=rank)
            members.append(list(torch.autograd.grad(mse(model, *batch(0, rank)), own)))
            put(own, mean)
        weight, bias = mean_of(members)
        put(own, [own[0] - 0.1 * 2 * weight, own[1] - 0.1 * 0.5 * bias])  # what the hooks do
    assert equal(two[0]["hooked"]["weights"], two[1]["hooked"]["weights"])
    check_close(two[0]["hooked"]["weights"], list(model.parameters()))
    assert two[0]["hooked"]["calls"] == 4  # two members, two steps
    assert two[0]["hooked"]["later calls"] == 1  # it is still there


def test_all_members_start_from_the_buffers_of_the_first_process(two: list[dict[str, Any]]) -> None:
    first, second = (rank["buffers"] for rank in two)
    assert not torch.equal(first[0], second[0])  # each process had batches of its own
    assert all(torch.equal(seen, first[0]) for seen in (*first[1:], *second[1:]))
    assert len(first) == len(second) == 3


@pytest.mark.parametrize(("vectorize", "warned"), [("auto", 0), ("vmap", 1)])
def test_members_at_once_are_refused(two: list[dict[str, Any]], vectorize: str, warned: int) -> None:
    for rank in two:
        asked = rank["at once"][vectorize]
        assert equal(asked["gradients"], rank["at once"]["loop"]["gradients"])
        assert len(asked["warnings"]) == warned  # only whoever asked for it is told
        assert all("the model is distributed" in text for text in asked["warnings"])


def test_uneven_inputs(two: list[dict[str, Any]]) -> None:
    first, second = (rank["uneven"]["weights"] for rank in two)
    assert equal(first, second)
    check_close(first, train_by_hand(small(), [(0, 1)] * 3 + [(1,)] * 2))


def test_several_wrappers(two: list[dict[str, Any]]) -> None:
    first, second = (rank["several wrappers"]["weights"] for rank in two)
    assert equal(first, second)
    model = nn.ModuleDict({"a": small(), "b": small()})
    check_close(first, train_by_hand(model, [(0, 1)] * 3, mse_of_both))
