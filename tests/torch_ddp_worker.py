"""What each process of test_torch_ddp_population.py does: ``python torch_ddp_worker.py folder rank size``."""

import sys
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch_ddp_cells import INPUTS, OUTPUTS, Branches, batch, mse, mse_of_both, regularised, small
from torchrun_cells import leave

from gradwise.torch import PopulationGradient

FOLDER, RANK, SIZE = (sys.argv[1], *map(int, sys.argv[2:4])) if __name__ == "__main__" else ("", 0, 1)


def closure_of(optimizer: torch.optim.Optimizer, model: nn.Module, step: int, **zero: Any) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad(**zero)
        loss = mse(model, *batch(step, RANK))
        loss.backward()
        return loss

    return closure


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def collectives(profile: Any) -> dict[str, int]:
    """How often this process talked to others, by kind, as torch's profiler saw it."""
    return dict(Counter(event.name for event in profile.events() if event.name.startswith("c10d::")))


def long_run(steps: int, members: int | None) -> dict[str, Any]:
    """AdamW with weight decay, a learning-rate schedule, batch normalisation and dropout."""
    model = regularised()
    wrapped = DistributedDataParallel(model)
    inner = torch.optim.AdamW(wrapped.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = PopulationGradient(inner, wrapped, sigma=0.2, seed=5, population_size=members or 8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(RANK)  # each process drops other units
    kept: dict[str, Any] = {"weights": [], "members": []}
    handle = model[0].register_forward_hook(lambda layer, *_: seen.append(layer.weight.detach().clone()))
    for step in range(steps):
        seen: list[Tensor] = []
        closure = closure_of(optimizer, wrapped, step)
        if members:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        schedule.step()
        if step % (steps // 10) == 0:
            kept["weights"].append(weights(model))
            kept["members"].append(seen)
    handle.remove()
    wrapped.eval()(batch(0, RANK)[0])  # DDP brings the buffers together at a forward
    return kept | {"var": model[1].running_var.clone(), "optimizer": [s["exp_avg_sq"] for s in inner.state.values()]}


def members_of_one_step() -> dict[str, Any]:
    """Gradients of four members in each process, in every way that makes them."""
    result: dict[str, Any] = {}
    for way in ("closure", "backward", "sharded"):
        model = small()
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=way == "backward")
        optimizer = PopulationGradient(
            torch.optim.SGD(wrapped.parameters(), lr=0.0), wrapped, sigma=0.3, seed=5, population_size=4
        )
        if way == "closure":
            optimizer.step(closure_of(optimizer, wrapped, 0))
        else:
            x, y = batch(0, RANK)
            rows = slice(3 + 2 * RANK if way == "sharded" else None)  # process 0 has three rows for its members
            optimizer.backward(mse, x[rows], y[rows], sharded=way == "sharded", vectorize="loop")
        statistics = optimizer.statistics
        result[way] = gradients(model)
        result[f"{way} members"] = statistics.members
        result[f"{way} agreement"] = statistics.agreement
    return result


def no_noise(kind: str) -> dict[str, Any]:
    """Three members without noise and the bare optimizer, side by side."""
    options: dict[str, Any] = {} if kind == "plain" else {kind: True}
    runs = []
    for members in (None, 3):
        model = regularised()
        if kind == "find_unused_parameters":
            model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
        wrapped = DistributedDataParallel(model, **options)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
        if members:
            optimizer = PopulationGradient(optimizer, wrapped, population_size=members, sigma=0.0, antithetic=False)
        torch.manual_seed(RANK)
        for step in range(6):
            optimizer.step(closure_of(optimizer, wrapped, step, set_to_none=step < 3))
        wrapped.eval()(batch(0, RANK)[0])
        runs.append([*weights(model), *(buffer.clone() for buffer in model.buffers()), torch.get_rng_state()])
    return {"bare": runs[0], "members": runs[1]}


def one_step(way: str, optimizer: Any, model: nn.Module, step: int) -> None:
    if way == "batch":
        optimizer.zero_grad()
        optimizer.step_batch(mse, *batch(step, RANK), vectorize="loop")
    elif way == "loop":
        closure_of(optimizer, model, step)()
        optimizer.step()
    else:
        optimizer.step(closure_of(optimizer, model, step))


def counts() -> dict[str, dict[str, int]]:
    """Collectives of one step: the bare optimizer, the unchanged loop, a closure and a batch of four members."""
    result = {}
    for way in ("bare", "loop", "closure", "batch"):
        model = nn.Sequential(nn.Linear(INPUTS, 500), nn.BatchNorm1d(500), nn.Linear(500, 500), nn.Linear(500, OUTPUTS))
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.5)  # two buckets
        optimizer: torch.optim.Optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        if way != "bare":
            optimizer = PopulationGradient(optimizer, wrapped, population_size=4, sigma=0.2, seed=5)
        one_step(way, optimizer, wrapped, 0)  # DDP makes its buckets anew after the first
        one_step(way, optimizer, wrapped, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            one_step(way, optimizer, wrapped, 2)
        result[way] = collectives(profile)
    return result


def accumulation(bucket_view: bool) -> list[Tensor | None]:
    """Two batches with two members each, of which DDP is to reduce only the second."""
    model = small()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    optimizer = PopulationGradient(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, sigma=0.3, seed=5, population_size=2
    )
    with wrapped.no_sync():
        optimizer.backward(mse, *batch(0, RANK), vectorize="loop")
    optimizer.backward(mse, *batch(1, RANK), vectorize="loop")
    return gradients(model)


def branches() -> dict[str, Any]:
    """Parameters that only some members use, in process 0 the first and third, in process 1 the second."""
    model = Branches(calls=RANK)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = PopulationGradient(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, sigma=0.3, seed=5, population_size=4, antithetic=False
    )
    optimizer.backward(mse, *batch(0, RANK), vectorize="loop")
    result = gradients(model)
    optimizer.step()
    optimizer.step_batch(mse, *batch(1, RANK), vectorize="loop")
    return {"gradients": result, "weights": weights(model)}


def hooked() -> dict[str, Any]:
    """Gradient hooks of the user's, of both kinds, and parameters of a second optimizer."""
    model = small()
    wrapped = DistributedDataParallel(model)
    calls = []

    def double(gradient: Tensor) -> Tensor:
        calls.append(1)
        return 2 * gradient

    def halve(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    model[0].weight.register_hook(double)
    model[0].bias.register_post_accumulate_grad_hook(halve)
    first = PopulationGradient(
        torch.optim.SGD([model[0].weight, model[0].bias], lr=0.1), wrapped, sigma=0.3, seed=5, population_size=2
    )
    for _ in range(2):  # without a reduction of all its parameters, DDP would refuse the second
        first.step(lambda: closure_of(first, wrapped, 0)())
    result = {"weights": weights(model), "calls": len(calls)}
    with first.mean():
        mse(wrapped, *batch(0, RANK)).backward()
    return result | {"later calls": len(calls) - result["calls"]}


def uneven() -> dict[str, Any]:
    """Process 0 runs out of batches two steps before the others."""
    model = small()
    wrapped = DistributedDataParallel(model)
    optimizer = PopulationGradient(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, sigma=0.3, seed=5, population_size=2
    )
    with Join([wrapped]):
        for step in range(3 if RANK == 0 else 5):
            optimizer.step(closure_of(optimizer, wrapped, step))
    return {"weights": weights(model)}


def plain_loop() -> dict[str, Any]:
    """The unchanged loop, in which each process sees one member."""
    model = small()
    wrapped = DistributedDataParallel(model)
    optimizer = PopulationGradient(torch.optim.AdamW(wrapped.parameters(), lr=0.01), wrapped, sigma=0.3, seed=5)
    for step in range(20):
        closure_of(optimizer, wrapped, step)()
        optimizer.step()
    return {"weights": weights(model)}


def skipping() -> dict[str, Any]:
    """The second member's loss is NaN in process 0 only."""
    model = small()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = PopulationGradient(
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        wrapped,
        sigma=0.3,
        seed=5,
        population_size=4,
        on_nonfinite="skip",
    )
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        loss = closure_of(optimizer, wrapped, 0)()
        return loss * float("nan") if RANK == 0 and calls[0] == 2 else loss

    optimizer.step(closure)
    return {"weights": weights(model), "skipped": optimizer.statistics.skipped}


def buffers() -> list[Tensor]:
    """Where batch normalisation's running mean stands when a member's forward reaches it, in the second step."""
    model = regularised()
    wrapped = DistributedDataParallel(model)
    optimizer = PopulationGradient(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, sigma=0.3, seed=5, population_size=2
    )
    optimizer.step(closure_of(optimizer, wrapped, 0))
    seen: list[Tensor] = [model[1].running_mean.clone()]
    model[1].register_forward_pre_hook(lambda layer, _: seen.append(layer.running_mean.clone()))
    optimizer.step(closure_of(optimizer, wrapped, 1))
    return seen


def at_once() -> dict[str, Any]:
    """What vmap computes is not reduced by DDP, so it must not be taken, whoever asks for it."""
    result: dict[str, Any] = {}
    for vectorize in ("auto", "vmap", "loop"):
        model = small()
        wrapped = DistributedDataParallel(model)
        optimizer = PopulationGradient(
            torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, sigma=0.3, seed=5, population_size=2
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.backward(mse, *batch(0, RANK), vectorize=vectorize)
        result[vectorize] = {"gradients": gradients(model), "warnings": [str(w.message) for w in caught]}
    return result


def several_wrappers() -> dict[str, Any]:
    model = nn.ModuleDict({"a": DistributedDataParallel(small()), "b": DistributedDataParallel(small())})
    optimizer = PopulationGradient(
        torch.optim.SGD(model.parameters(), lr=0.1), model, sigma=0.3, seed=5, population_size=2
    )

    for step in range(3):
        optimizer.zero_grad()
        optimizer.step_batch(mse_of_both, *batch(step, RANK), vectorize="loop")
    return {"weights": weights(model)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/meeting", rank=RANK, world_size=SIZE)
    kinds = ("plain", "gradient_as_bucket_view", "find_unused_parameters", "static_graph")
    steps = 1000 if SIZE == 2 else 50
    result: dict[str, Any] = {
        "unchanged loop": long_run(steps, None),
        "four members": long_run(steps, 4),
        "one step": members_of_one_step(),
        "no noise": {kind: no_noise(kind) for kind in kinds},
    }
    if SIZE == 2:
        result |= {
            "counts": counts(),
            "accumulation": accumulation(False),
            "accumulation in buckets": accumulation(True),
            "branches": branches(),
            "hooked": hooked(),
            "buffers": buffers(),
            "at once": at_once(),
            "uneven": uneven(),
            "plain loop": plain_loop(),
            "skipping": skipping(),
            "several wrappers": several_wrappers(),
        }
    torch.save(result, f"{FOLDER}/{RANK}.pt")
    leave()


if __name__ == "__main__":
    main()
