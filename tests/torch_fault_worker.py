"""Trainings that are killed, and go on from their last checkpoint: what `test_torch_faults.py` starts.

``python torch_fault_worker.py FOLDER`` runs all scenarios, each in processes forked from this one, which has torch
imported already; ``torchrun ... torch_fault_worker.py FOLDER`` runs one, whose second rank dies at the first attempt.
"""

import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchrun_cells import leave

from gradwise._noise import noise_table
from gradwise.torch import GradientEnhancedMLPRegressor, PopulationGradient

STEPS, EVERY, DEATH = 10, 4, 5  # steps in all, steps from one checkpoint to the next, step in which processes die
ROWS, BATCH = 24, 4
PLACES = ("between forward and backward", "in backward", "in the inner step", "in the save")


@dataclass
class Job:
    """One training: which loop, where its files are, and where which ranks die."""

    way: str
    folder: Path
    world: int = 1
    place: str = ""
    victims: tuple[int, ...] = (0,)

    def dies(self, place: str, rank: int) -> bool:
        return self.place == place and rank in self.victims


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError  # not reached


class DyingFile(io.RawIOBase):
    """Dies in the middle of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.room = 3000

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            self.file.write(bytes(data)[: self.room])
            self.file.flush()
            die()
        self.room -= len(data)
        return self.file.write(data)


def save(path: Path, content: Any, *, dying: bool) -> None:
    """The pattern of the documentation: whole, on the disk, and only then under its name."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        to: Any = DyingFile(file) if dying else file
        torch.save(content, to)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Order:
    """Shuffled rows whose position can be saved."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)
        self.start_epoch()

    def start_epoch(self) -> None:
        self.at_start, self.position = self.generator.get_state(), 0
        self.rows = torch.randperm(ROWS, generator=self.generator)

    def draw(self, rank: int, world: int) -> Tensor:
        if self.position + BATCH * world > ROWS:
            self.start_epoch()
        mine = self.position + BATCH * rank
        self.position += BATCH * world
        return self.rows[mine : mine + BATCH]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.at_start, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.start_epoch()
        self.position = state["position"]


class Training:
    """Model, optimizer, scheduler, data and random streams of one rank, from the last checkpoint or from the start."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank = job, rank
        torch.manual_seed(0)
        self.plain = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))
        self.model = DistributedDataParallel(self.plain) if job.world > 1 else self.plain
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.optimizer = PopulationGradient(inner, self.model, sigma=0.2, population_size=4, seed=5)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.order = Order()
        self.x, self.y = torch.randn(ROWS, 6), torch.randn(ROWS, 2)
        torch.manual_seed(100 + rank)  # every rank has dropout masks of its own
        self.step = self.evaluations = 0
        self.history: list[dict[str, Tensor]] = []
        inner.register_step_post_hook(lambda *_: self.maybe_die("in the inner step"))
        self.path = job.folder / "checkpoint.pt"
        if self.path.exists():
            self.load()

    def load(self) -> None:
        checkpoint = torch.load(self.path, weights_only=True)
        self.plain.load_state_dict(checkpoint["model"])
        for name in ("optimizer", "scheduler", "order"):
            getattr(self, name).load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["streams"][self.rank])
        self.step = checkpoint["step"]

    def save(self) -> None:
        streams = [torch.get_rng_state()]
        if self.job.world > 1:
            streams = [torch.get_rng_state() for _ in range(self.job.world)]
            dist.all_gather_object(streams, torch.get_rng_state())
        names = ("optimizer", "scheduler", "order")
        content = {name: getattr(self, name).state_dict() for name in names}
        content |= {"model": self.plain.state_dict(), "streams": streams, "step": self.step}
        if self.rank == 0:
            save(self.path, content, dying=self.step > EVERY and self.job.dies("in the save", 0))

    def maybe_die(self, place: str) -> None:
        if self.step == DEATH and self.job.dies(place, self.rank):
            die()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        self.evaluations += 1
        if self.evaluations == (3 if self.job.way in ("closure", "backward") else 1):  # in the middle of the population
            self.maybe_die("between forward and backward")
            loss.register_hook(lambda _: self.maybe_die("in backward"))
        return loss

    def one_step(self, x: Tensor, y: Tensor) -> None:
        self.evaluations = 0
        if self.job.way == "closure":

            def closure() -> Tensor:
                self.optimizer.zero_grad()
                loss = self.loss(self.model, x, y)
                loss.backward()
                return loss

            self.optimizer.step(closure)
        elif self.job.way == "backward":
            self.optimizer.step_batch(self.loss, x, y, vectorize="loop")
        else:
            self.loss(self.model, x, y).backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def run(self) -> None:
        while self.step < STEPS:
            self.history.append({name: value.clone() for name, value in self.plain.state_dict().items()})
            rows = self.order.draw(self.rank, self.job.world)
            self.one_step(self.x[rows], self.y[rows])
            self.step += 1
            if self.step % EVERY == 0:
                self.save()


def work(job: Job, rank: int, name: str) -> None:
    """One process of a job: writes what came of it to ``<name>-<rank>.pt``, also when another rank has died."""
    if job.world > 1:
        meeting = f"file://{job.folder / name}.meeting"
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=job.world, timeout=limit)
    training, error = Training(job, rank), ""
    start = time.monotonic()
    try:
        training.run()
    except RuntimeError as lost:  # gloo: another rank is gone
        error = str(lost)
    result = {
        "error": error,
        "seconds": time.monotonic() - start,
        "step": training.step,
        # Copies, before anything that ends the member.
        "mean": {name: value.clone() for name, value in training.plain.state_dict().items()},
        "raw": [parameter.detach().clone() for parameter in training.plain.parameters()],
        "optimizer": training.optimizer.state_dict(),
        "stream": torch.get_rng_state(),
        "history": training.history,
    }
    torch.save(result, job.folder / f"{name}-{rank}.pt")
    os._exit(1 if error else 0)  # gloo's threads would wait for the other rank


def forked(tasks: list[Callable[[], object]], seconds: float = 90) -> list[int | None]:
    """Exit codes (minus the signal that killed it) of processes that run the tasks; None for one that did not end."""
    children: list[int] = []
    for task in tasks:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                task()
                code = 0
            except BaseException as error:  # noqa: BLE001 - whatever it is, this process must not go on
                sys.excepthook(type(error), error, error.__traceback__)
            finally:
                os._exit(code)
        children.append(child)
    codes: list[int | None] = []
    deadline = time.monotonic() + seconds
    for child in children:
        done = status = 0
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.005)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status) if done else None)
    return codes


def scenarios(folder: Path) -> Iterator[Job]:
    """By the name of their folder; those without a place are the trainings that nobody interrupts."""
    for way, world in (("ddp", 2), ("closure", 1), ("backward", 1)):
        yield Job(way, folder / way, world)
        for place in PLACES:
            victim = 1 if way == "ddp" and place != "in the save" else 0
            yield Job(way, folder / f"{way}, {place}", world, place, (victim,))
    yield Job("ddp", folder / "ddp, all ranks", 2, "in backward", (0, 1))


def kill_and_resume(job: Job) -> dict[str, list[int | None]]:
    """Exit codes of the two attempts."""
    job.folder.mkdir()
    codes = {"first": forked([lambda rank=rank: work(job, rank, "first") for rank in range(job.world)])}
    if job.place:
        for path in list(job.folder.glob("checkpoint.*")):
            shutil.copy(path, path.with_stem("left"))
        again = Job(job.way, job.folder, job.world)
        codes["second"] = forked([lambda rank=rank: work(again, rank, "second") for rank in range(job.world)])
    return codes


# -- an estimator's file -----------------------------------------------------------------------------------------------


def save_estimator(folder: Path, *, killed: bool) -> None:
    """Save over a file that is there, and die while torch writes."""
    model = GradientEnhancedMLPRegressor(hidden_layer_sizes=(4,), max_iter=2 if killed else 1, random_state=0)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).numpy()[:, None]
    model.fit(x, x[:, 0] ** 2, 2 * x)
    write: Any = torch.save
    if killed:
        setattr(torch, "save", lambda content, file: write(content, DyingFile(file)))  # noqa: B010 - pyright
    model.save(folder / "model.pt")


# -- interrupts --------------------------------------------------------------------------------------------------------


def interrupted(folder: Path, runs: int = 60) -> None:
    """Steps with a signal at a random moment, which raises KeyboardInterrupt wherever Python is then."""

    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    def step() -> None:
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def values() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in model.parameters()]

    def load() -> None:
        model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
        optimizer.zero_grad()

    torch.manual_seed(0)
    x, y = torch.randn(16, 64), torch.randn(16, 4)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    # One addition per tensor: an interrupt in the inner optimizer may come between two tensors, not within one.
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1, foreach=False), model, sigma=0.2, seed=1)
    start = {name: value.clone() for name, value in model.state_dict().items()}, optimizer.state_dict()
    step()
    load()
    trajectory, begin = [values()], time.perf_counter()
    for _ in range(4):
        step()
        trajectory.append(values())
    duration = time.perf_counter() - begin
    signal.signal(signal.SIGALRM, handler)
    chance, faults, hits = random.Random(0), [], 0
    for run in range(runs):
        load()
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, duration))
            for _ in range(len(trajectory) - 1):
                step()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            hits += 1
        shown = list(model.state_dict().values())
        optimizer.eval()
        for kind, found in (("state_dict", shown), ("weights", values())):
            for index, tensor in enumerate(found):
                if not any(torch.equal(tensor, weights[index]) for weights in trajectory):
                    faults.append(f"run {run}: {kind} of tensor {index} are of no completed step")
        load()
        step()
        if not all(torch.equal(a, b) for a, b in zip(values(), trajectory[1], strict=True)):
            faults.append(f"run {run}: the next step is another")
    (folder / "interrupts.json").write_text(json.dumps({"hits": hits, "faults": faults}))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo")
        job = Job("ddp", folder, 2, "in backward" if first else "", (1,))
        training = Training(job, rank)
        training.run()
        torch.save({"mean": training.plain.state_dict(), "resumed": not first}, folder / f"torchrun-{rank}.pt")
        leave()
    # Once, before the forks.
    noise_table("gaussian")
    importlib.import_module("torch._dynamo")
    report = {job.folder.name: kill_and_resume(job) for job in scenarios(folder)}
    report["interrupts"] = {"first": forked([lambda: interrupted(folder)])}
    report["estimator"] = {
        name: forked([lambda killed=killed: save_estimator(folder, killed=killed)])
        for name, killed in (("first", False), ("second", True))
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
