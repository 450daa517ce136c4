"""Ways to step with a population of eight: the library's, a loop written by hand, IVON, and SAM beside them."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from models import Problem, cross_entropy
from timing import Step
from torch import Tensor, nn

from gradwise.torch import PopulationGradient

__all__ = ["INNERS", "MEMBERS", "PLAIN", "Task", "Way", "ways"]

MEMBERS = 8
PLAIN = "plain step"
UNTYPED: Any = torch  # its foreach functions
INNERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
}


@dataclass(frozen=True)
class Task:
    """What is stepped: a problem, on a device, with an inner optimizer."""

    problem: Problem
    inner: str = "SGD"
    device: str = "cpu"

    def parts(self) -> tuple[nn.Module, Tensor, Tensor, torch.optim.Optimizer]:
        """Model, inputs, labels and inner optimizer, of its own for every way."""
        model, x, y = self.problem.model_and_batch(self.device)
        kind, options = INNERS[self.inner]
        return model, x, y, kind(model.parameters(), **options)


@dataclass(frozen=True)
class Way:
    """How to make the step, the package that it needs, and how many steps one call makes."""

    build: Callable[[Any], Step]
    needs: str | None = None
    count: int = 1

    @property
    def installed(self) -> bool:
        """Whether it can be built here."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def ways(*, compiled: bool, cuda: bool) -> dict[str, Way]:
    """All rows of the table, by name; the first is the plain step.

    Parameters
    ----------
    compiled : bool
        Whether those that compile are among them: tens of seconds for each model.
    cuda : bool
        Whether those that only a GPU is interesting for are.
    """
    paths = ("auto", "loop", "vmap", *(["compile"] if compiled else []))
    rows = {PLAIN: Way(plain)}
    if compiled:
        mode = "reduce-overhead" if cuda else "default"
        rows[f'plain step, torch.compile, "{mode}"'] = Way(partial(plain, mode=mode))
    rows["one member, unchanged loop"] = Way(unchanged_loop)
    for sharded, where in ((False, "whole"), (True, "sharded")):
        for path in paths:
            rows[f"{path}, {where}"] = Way(partial(batch_step, sharded=sharded, path=path))
        rows[f"by hand, noise drawn beforehand, {where}"] = Way(partial(by_hand, sharded=sharded))
        rows[f"by hand, fresh noise, {where}"] = Way(partial(by_hand, sharded=sharded, fresh=True))
        rows[f"IVON, {where}"] = Way(partial(ivon, sharded=sharded), "ivon")
    rows["step(closure)"] = Way(closure_step)
    rows["noise alone: a closure that computes nothing"] = Way(noise_alone)
    rows["SAM, 2 passes"] = Way(sam, "pytorch_optimizer")
    if cuda:
        rows["plain step, bf16"] = Way(partial(plain, loss_fn=bfloat16_loss))
        for sharded, where in ((False, "whole"), (True, "sharded")):
            rows[f"auto, {where}, bf16"] = Way(partial(batch_step, sharded=sharded, path="auto", loss_fn=bfloat16_loss))
    return rows


def bfloat16_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy under autocast."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return cross_entropy(model, x, y)


def plain(task: Task, *, mode: str | None = None, loss_fn: Callable[..., Tensor] = cross_entropy) -> Step:
    """Forward, backward, step."""
    model, x, y, optimizer = task.parts()
    called: Any = model if mode is None else torch.compile(model, mode=mode)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(called, x, y).backward()
        optimizer.step()

    return step


def unchanged_loop(task: Task) -> Step:
    """The plain step with a wrapped optimizer: one member."""
    model, x, y, inner = task.parts()
    optimizer = PopulationGradient(inner, model)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model, x, y).backward()
        optimizer.step()

    return step


def batch_step(
    task: Task,
    *,
    sharded: bool,
    path: Any,
    members: int = MEMBERS,
    loss_fn: Callable[..., Tensor] = cross_entropy,
) -> Step:
    """``step_batch``."""
    model, x, y, inner = task.parts()
    optimizer = PopulationGradient(inner, model, population_size=members, antithetic=members % 2 == 0)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.step_batch(loss_fn, x, y, sharded=sharded, vectorize=path)

    return step


def closure_step(task: Task, *, members: int = MEMBERS) -> Step:
    """``step(closure)``."""
    model, x, y, inner = task.parts()
    optimizer = PopulationGradient(inner, model, population_size=members, antithetic=members % 2 == 0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model, x, y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def noise_alone(task: Task) -> Step:
    """What moving the weights costs, and keeping books of members that have no gradients."""
    model, _, _, inner = task.parts()
    optimizer = PopulationGradient(inner, model, population_size=MEMBERS)
    return lambda: optimizer.step(lambda: 0.0)


def by_hand(task: Task, *, sharded: bool, fresh: bool = False) -> Step:
    """The loop that one would write: perturb in place, add up the gradients, restore by copy, one step.

    Without antithetic pairs, weighting of unequal shards, statistics or exception safety, and with the scales of the
    first step: the least that any such loop can cost.
    """
    model, x, y, optimizer = task.parts()
    weights = [weight for weight in model.parameters() if weight.ndim >= 2]
    scales = [0.1 * float(weight.detach().square().mean().sqrt()) for weight in weights]
    shards = list(zip(x.chunk(MEMBERS), y.chunk(MEMBERS), strict=True)) if sharded else [(x, y)] * MEMBERS

    def draw() -> list[Tensor]:
        return [torch.randn_like(weight) * scale for weight, scale in zip(weights, scales, strict=True)]

    noise = [draw() for _ in shards]

    def step() -> None:
        optimizer.zero_grad()
        mean = [weight.detach().clone() for weight in weights]
        for shard, drawn in zip(shards, noise, strict=True):
            with torch.no_grad():
                UNTYPED._foreach_add_(weights, draw() if fresh else drawn)
            (cross_entropy(model, *shard) / len(shards)).backward()
            with torch.no_grad():
                UNTYPED._foreach_copy_(weights, mean)
        optimizer.step()

    return step


def ivon(task: Task, *, sharded: bool) -> Step:
    """Variational learning with as many samples; an optimizer of its own, whatever the inner one."""
    model, x, y, _ = task.parts()
    optimizer = importlib.import_module("ivon").IVON(model.parameters(), lr=1e-3, ess=1e4)
    shards = list(zip(x.chunk(MEMBERS), y.chunk(MEMBERS), strict=True)) if sharded else [(x, y)] * MEMBERS

    def step() -> None:
        for shard in shards:
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                cross_entropy(model, *shard).backward()
        optimizer.step()

    return step


def sam(task: Task) -> Step:
    """Sharpness-aware minimization around the inner optimizer."""
    model, x, y, _ = task.parts()
    kind, options = INNERS[task.inner]
    optimizer = importlib.import_module("pytorch_optimizer").SAM(model.parameters(), kind, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model, x, y)
        loss.backward()
        return loss

    def step() -> None:
        closure()
        optimizer.step(closure)

    return step
