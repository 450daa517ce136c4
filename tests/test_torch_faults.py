"""Killed processes, full disks, damaged checkpoints and interrupts: nothing wrong is ever taken for right."""

import errno
import gc
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import room_for
from torch import Tensor, nn
from torch_cells import assert_same, batches, loss_of, snapshot
from torch_fault_worker import DEATH, EVERY, STEPS, Job, scenarios
from torchrun_cells import succeeded

from gradwise.torch import GradientEnhancedMLPRegressor, PopulationGradient

WORKER = Path(__file__).with_name("torch_fault_worker.py")
(X, Y), *_ = batches(1)
KILLED = [job for job in scenarios(Path()) if job.place]


# -- kill -9 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Files and exit codes of all trainings: one interpreter, which forks."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-W", "ignore::sklearn.exceptions.ConvergenceWarning", str(WORKER), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert succeeded(run.returncode, run.stderr), run.stderr
    return folder, json.loads((folder / "report.json").read_text())


def result(folder: Path, name: str, attempt: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / name / f"{attempt}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("job", KILLED, ids=lambda job: str(job.folder))
def test_a_killed_training_resumes_bit_for_bit(job: Job, killed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = killed
    name, ranks = str(job.folder), range(job.world)
    # The victims died of SIGKILL, the others of the error that gloo raises when a peer is gone; then all went well.
    assert report[name]["first"] == [-9 if rank in job.victims else 1 for rank in ranks]
    assert report[name]["second"] == [0] * job.world
    for rank in ranks:
        resumed, whole = result(folder, name, "second", rank), result(folder, job.way, "first", rank)
        assert whole["step"] == resumed["step"] == STEPS
        assert len(resumed["history"]) == STEPS - EVERY  # it began at the checkpoint
        for key in ("mean", "optimizer", "stream"):
            assert_alike(resumed[key], whole[key])
        assert_alike(resumed["history"], whole["history"][EVERY:])
    for rank in ranks[1:]:
        assert_alike(result(folder, name, "second", rank)["mean"], result(folder, name, "second", 0)["mean"])


@pytest.mark.parametrize(
    "job", [job for job in KILLED if job.world > len(job.victims)], ids=lambda job: str(job.folder)
)
def test_ranks_whose_peer_is_gone_stop_soon_at_the_mean(job: Job, killed: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = killed
    (survivor,) = set(range(job.world)) - set(job.victims)
    stopped, whole = (result(folder, name, "first", survivor) for name in (str(job.folder), job.way))
    assert "peer" in stopped["error"] or "reset" in stopped["error"]
    assert stopped["seconds"] < 30  # of the 60 after which a collective times out
    # Which step: the victim had reduced its gradients already, or had stepped and was saving.
    later = {"in the inner step": DEATH + 1, "in the save": 2 * EVERY}
    assert stopped["step"] == later.get(job.place, DEATH)
    assert_alike(stopped["mean"], whole["history"][stopped["step"]])
    assert not torch.equal(stopped["raw"][0], stopped["mean"]["0.weight"])  # the member is still there; it is not shown


def assert_alike(left: Any, right: Any) -> None:
    """Equal bit for bit, in nested containers."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_alike(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_alike(a, b)
    else:
        assert_same(left, right)


def test_torchrun_restarts_from_the_checkpoint(killed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    settings = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *settings, str(WORKER), str(tmp_path)]
    # Without it the second attempt finds the addresses of the first one in the agent's store, more often than not.
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)
    assert succeeded(run.returncode, run.stderr), run.stderr
    for rank in range(2):
        ended = torch.load(tmp_path / f"torchrun-{rank}.pt", weights_only=True)
        assert ended["resumed"]
        assert_alike(ended["mean"], result(killed[0], "ddp", "first", rank)["mean"])


@pytest.mark.parametrize("way", ["ddp", "closure", "backward"])
def test_a_killed_save_leaves_the_checkpoint_before(way: str, killed: tuple[Path, dict[str, Any]]) -> None:
    """The pattern of the documentation, seen between the two attempts."""
    folder = killed[0] / f"{way}, in the save"
    checkpoint = torch.load(folder / "left.pt", weights_only=True)
    assert checkpoint["step"] == EVERY
    assert_alike(checkpoint["model"], result(killed[0], way, "first", 0)["history"][EVERY])
    assert (folder / "left.tmp").stat().st_size > 1000
    with pytest.raises(RuntimeError, match="zip archive"):
        torch.load(folder / "left.tmp", weights_only=True)


def test_a_killed_save_leaves_the_estimator_before(killed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = killed
    assert report["estimator"] == {"first": [0], "second": [-9]}
    assert GradientEnhancedMLPRegressor.load(folder / "model.pt").max_iter == 1
    (torn,) = folder.glob("model.pt.*.tmp")
    with pytest.raises(RuntimeError, match="zip archive"):
        GradientEnhancedMLPRegressor.load(torn)


# -- files on a full disk ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("room", [0, 700, 3000])
def test_an_estimator_is_saved_whole_or_not_at_all(room: int, existing: bool, tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 8)[:, None]
    first, second = (
        GradientEnhancedMLPRegressor((32,), max_iter=3, random_state=seed).fit(x, x[:, 0] ** 2, 2 * x)
        for seed in (0, 1)
    )
    path = tmp_path / "model.pt"
    if existing:
        first.save(path)
        path.chmod(0o640)
    with room_for(room), pytest.raises((OSError, RuntimeError)):
        second.save(path)
    assert os.listdir(tmp_path) == (["model.pt"] if existing else [])
    if existing:
        np.testing.assert_array_equal(GradientEnhancedMLPRegressor.load(path).predict(x), first.predict(x))
    second.save(path)
    np.testing.assert_array_equal(GradientEnhancedMLPRegressor.load(path).predict(x), second.predict(x))
    if existing:
        assert path.stat().st_mode & 0o777 == 0o640


# -- damaged states ----------------------------------------------------------------------------------------------------


def setup(**options: Any) -> tuple[nn.Module, PopulationGradient]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))
    inner = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
    return model, PopulationGradient(inner, model, **{"sigma": 0.2, "population_size": 2, "seed": 3} | options)


def unchanged(model: nn.Module, optimizer: PopulationGradient) -> None:
    loss_of(model, (X, Y)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_torn_checkpoint_is_never_read() -> None:
    model, optimizer = setup()
    unchanged(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = file.getvalue()
    for length in [0, 1, *range(64, len(whole), 331), *range(len(whole) - 24, len(whole))]:
        with pytest.raises((RuntimeError, EOFError, ValueError, pickle.UnpicklingError)):
            torch.load(io.BytesIO(whole[:length]), weights_only=True)
    torch.load(io.BytesIO(whole), weights_only=True)


def damaged(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A state of another optimizer after a step, with a change of its first group."""
    model, optimizer = setup(seed=8)
    unchanged(model, optimizer)
    optimizer.param_groups[0]["lr"] = 9.0
    state = optimizer.state_dict()
    change(state["param_groups"][0])
    return state


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda group: group.update(gradwise_step=-1), "`gradwise_step` .* integer from 0.*got -1"),
        (lambda group: group.update(gradwise_member=1.0), "`gradwise_member` .* got 1.0"),
        (lambda group: group.update(gradwise_skipped=True), "`gradwise_skipped` .* got True"),
        (lambda group: group.update(gradwise_seed=2**64), "`gradwise_seed` .* got 1844"),
        (lambda group: group.update(gradwise_step=torch.tensor(3)), "`gradwise_step`"),
        (lambda group: group.pop("gradwise_seed"), "must have .*'gradwise_seed'.* or none of them; got"),
        (lambda group: group.update(gradwise_future=3), "another version of gradwise"),
        (lambda group: group["params"].pop(), "doesn't match the size"),  # torch's own words
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change: Callable[[dict[str, Any]], object], match: str) -> None:
    state = damaged(change)
    model, optimizer = setup()
    unchanged(model, optimizer)
    before, counters = snapshot(model, optimizer), optimizer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.state_dict()["param_groups"] == counters
    unchanged(model, optimizer)


def test_what_is_given_at_construction_is_in_no_state() -> None:
    """Sigma, size and distribution stay those of the resumed optimizer; step and seed are the checkpoint's."""
    model, optimizer = setup()
    unchanged(model, optimizer)
    state, weights = optimizer.state_dict(), model.state_dict()
    assert not any("sigma" in key or "size" in key for key in state["param_groups"][0])
    other_model, other = setup(sigma=0.5, population_size=6, noise="rademacher", seed=9)
    other_model.load_state_dict(weights)
    other.load_state_dict(state)
    assert other.population.sigma == 0.5
    assert (other.population.size, other.population.noise, other.population.seed) == (6, "rademacher", 3)
    assert other.state_dict() == state


def test_a_seed_of_numpy_can_be_read_back() -> None:
    model, optimizer = setup(seed=np.int64(7))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["param_groups"][0]["gradwise_seed"] == 7
    del model


# -- interrupts --------------------------------------------------------------------------------------------------------


class Interrupt:
    """A profiling function that raises KeyboardInterrupt at the n-th place where Python itself would.

    CPython looks for signals when it enters a function and after a call of C. Only places in gradwise and in
    contextlib count here; what torch does with an interrupt of its own code is torch's.
    """

    def __init__(self, place: int) -> None:
        self.left = place
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or code.co_name == "<genexpr>":  # closing those tells nobody
            return
        if "gradwise_torch" not in code.co_filename and "contextlib" not in code.co_filename:
            return
        if self.left == 0:
            sys.setprofile(None)
            self.where = f"{event} in {code.co_name}, {Path(code.co_filename).name}:{frame.f_lineno}"
            raise KeyboardInterrupt
        self.left -= 1


def closure_step(model: nn.Module, optimizer: PopulationGradient) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, (X, Y))
        loss.backward()
        return loss

    optimizer.step(closure)


def batch_step(path: Any) -> Callable[[nn.Module, PopulationGradient], None]:
    def step(model: nn.Module, optimizer: PopulationGradient) -> None:
        optimizer.zero_grad()
        optimizer.step_batch(lambda m, x, y: loss_of(m, (x, y)), X, Y, vectorize=path)

    return step


def by_hand(model: nn.Module, optimizer: PopulationGradient) -> None:
    optimizer.zero_grad()
    for member in range(2):
        with optimizer.member(member):
            loss_of(model, (X, Y)).backward()
    with optimizer.mean():
        loss_of(model, (X, Y))
    optimizer.step()


@pytest.mark.parametrize(
    ("step", "stride"),
    [(unchanged, 1), (by_hand, 2), (closure_step, 3), (batch_step("loop"), 3), (batch_step("vmap"), 3)],
    ids=["unchanged", "by hand", "closure", "loop", "vmap"],
)
def test_an_interrupt_anywhere_leaves_the_mean(
    step: Callable[[nn.Module, PopulationGradient], None], stride: int
) -> None:
    model, optimizer = setup()
    step(model, optimizer)
    step(model, optimizer)
    weights, state = snapshot(model, optimizer)[: len(list(model.parameters()))], optimizer.state_dict()
    stream = torch.get_rng_state()

    def load() -> None:
        with optimizer.mean(), torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        torch.set_rng_state(stream)

    def values() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in model.parameters()]

    def between(found: list[Tensor]) -> bool:
        """Before or after the step: every tensor by itself, as SGD without foreach updates one after the other."""
        return all(
            torch.equal(now, old) or torch.equal(now, new) for now, old, new in zip(found, weights, after, strict=True)
        )

    step(model, optimizer)
    after = values()
    place, hits = 0, 0
    while True:
        load()
        interrupt = Interrupt(place)
        sys.setprofile(interrupt)
        try:
            step(model, optimizer)
        except KeyboardInterrupt:
            hits += 1
        finally:
            sys.setprofile(None)
        if not interrupt.where:
            break
        shown = list(model.state_dict().values())
        if step is unchanged:  # between forward and step the member is in place, as it should be
            optimizer.eval()
        assert between(values()), interrupt.where
        assert between(shown), interrupt.where
        load()
        step(model, optimizer)
        assert_same(values(), after)
        place += stride
    assert hits > 100
    gc.collect()


def test_signals_at_random_moments(killed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = killed
    assert report["interrupts"]["first"] == [0]
    found = json.loads((folder / "interrupts.json").read_text())
    assert found["faults"] == []
    assert found["hits"] > 10


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left on device")]
)
@pytest.mark.parametrize("step", [unchanged, closure_step, batch_step("loop")], ids=["unchanged", "closure", "loop"])
def test_errors_of_torch_and_of_the_inner_step(
    step: Callable[[nn.Module, PopulationGradient], None], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in a backward, or while the inner optimizer makes its state: the mean, and on it goes."""
    for place in ("backward", "inner step"):
        model, optimizer = setup()
        step(model, optimizer)
        weights = [parameter.detach().clone() for parameter in model.parameters()]

        def fail(*_: Any, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            if place == "backward":
                patch.setattr(torch.autograd, "backward", fail)
            else:
                patch.setattr(type(optimizer.inner_optimizer), "_init_group", fail)
            with pytest.raises(type(error)):
                step(model, optimizer)
        assert_same(list(model.state_dict().values()), weights)
        optimizer.zero_grad()
        optimizer.eval()
        assert_same([parameter.detach() for parameter in model.parameters()], weights)
        step(model, optimizer)
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))
