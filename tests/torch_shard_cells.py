"""What runs twice in the tests of sharded models: whole in one process (the oracle), and in each process of several.

``python torch_shard_cells.py FOLDER RANK WORLD CASE...`` runs cases in one process of several. ``save:CHECKPOINT`` and
``load:CHECKPOINT`` are those of torch_dcp_cells.py.
"""

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_cells import perturb_by_hand, put
from torchrun_cells import leave

from gradwise import Population
from gradwise.torch import PopulationGradient

ROWS, STEPS, SIGMA, SEED = 4, 20, 0.3, 5
mse = nn.functional.mse_loss


class Net(nn.Module):
    """Odd sizes: over two or four processes, shards are uneven, and some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.middle = nn.Linear(7, 3)  # of the root's own, which keeps it gathered after the forward
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


class Whole:
    """One process with the rows of all."""

    def __init__(self, world: int) -> None:
        self.world = self.parts = world

    def net(self, seed: int = 0, **options: Any) -> Any:
        del options
        torch.manual_seed(seed)
        return Net()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        batches = [batch(step, part) for part in range(self.parts)]
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def of(self, model: nn.Module, setter: str, *args: Any) -> None:
        """Call a method that FSDP2 gives to models."""


class Sharded(Whole):
    """One process with its rows and its shards."""

    def __init__(self, rank: int, world: int, mesh: Any = None) -> None:
        super().__init__(world)
        self.rank, self.mesh = rank, mesh

    def net(self, seed: int = 0, **options: Any) -> Any:
        model = super().net(seed)
        return self.shard(model, **options)

    def shard(self, model: Any, **options: Any) -> Any:
        from torch.distributed.fsdp import fully_shard

        for module in (model.first, model.last, model):
            fully_shard(module, mesh=self.mesh, **options)
        return model

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return batch(step, self.rank)

    def of(self, model: Any, setter: str, *args: Any) -> None:
        getattr(model, setter)(*args)


def run(folder: Path, world: int, *args: str) -> list[dict[str, Any]]:
    """What each of several processes saved."""
    command = [sys.executable, __file__, str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank), str(world), *args], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        said = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + part)
    return torch.randn(ROWS, 6, generator=generator), torch.randn(ROWS, 1, generator=generator)


def wrapped(model: nn.Module, inner: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> PopulationGradient:
    settings: dict[str, Any] = {"sigma": SIGMA, "seed": SEED, "perturb": lambda name, p: True} | options
    return PopulationGradient(inner(model.parameters(), lr=0.02), model, **settings)


def whole(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [whole(value) for value in model.state_dict().values()]  # the mean, whatever is in place


def moved(optimizer: PopulationGradient) -> list[Tensor]:
    return [whole(p) for group in optimizer.param_groups for p in group["params"]]


def gradients(optimizer: PopulationGradient) -> list[Tensor]:
    return [whole(p.grad) for group in optimizer.param_groups for p in group["params"]]


def closure_of(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        return loss

    return closure


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse(model(x), y)


# -- as one process ----------------------------------------------------------------------------------------------------


def unchanged_loop(here: Whole, steps: int = STEPS, **options: Any) -> dict[str, Any]:
    model = here.net()
    optimizer = wrapped(model, **options)
    members: list[list[Tensor]] = []
    for step in range(steps):
        x, y = here.batch(step)
        loss = mse(model(x), y)
        members.append(moved(optimizer))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"members": members, "weights": weights(model)}


def closures(here: Whole) -> dict[str, Any]:
    model = here.net()
    optimizer = wrapped(model, population_size=4)
    agreement: list[float] = []
    for step in range(STEPS):
        with torch.no_grad():
            model(here.batch(99)[0])  # leaves the root's weights gathered
        optimizer.step(closure_of(optimizer, model, *here.batch(step)))
        agreement.append(optimizer.statistics.agreement)
    return {"weights": weights(model), "agreement": torch.tensor(agreement)}


def batches(here: Whole) -> dict[str, Any]:
    """Two calls of backward for every step, clipped together; momentum."""
    model = here.net()
    optimizer = wrapped(model, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), population_size=4)
    norms: list[Tensor] = []
    for step in range(STEPS // 2):
        for micro in range(2):
            optimizer.backward(loss_fn, *here.batch(2 * step + micro), vectorize="auto" if micro else "loop")
        norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(model), "norms": torch.stack(norms)}


def by_hand(here: Whole) -> dict[str, Any]:
    """``with optimizer.member(i)``, and the sharpness that the members show."""
    model = here.net()
    optimizer = wrapped(model, population_size=4)
    sharpness: list[float] = []
    for step in range(5):
        x, y = here.batch(step)
        for member in range(4):
            with optimizer.member(member):
                (mse(model(x), y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step(closure_of(optimizer, model, x, y))
        sharpness.append(optimizer.statistics.sharpness)
    return {"weights": weights(model), "sharpness": torch.tensor(sharpness)}


def micro_batches(here: Whole, prepare: Callable[[Any], Any] | None = None, **options: Any) -> dict[str, Any]:
    """Three members for every step, whose weights FSDP2 is asked to keep."""
    model = here.net(**options)
    optimizer = wrapped(model)
    here.of(model, "set_reshard_after_backward", False)
    grads: list[list[Tensor]] = []
    for step in range(4):
        for micro in range(3):
            if prepare is not None and isinstance(here, Sharded):
                prepare(model)
            x, y = here.batch(3 * step + micro)
            (mse(model(x), y) / 3).backward()
        grads.append(gradients(optimizer))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()
            grads.append([model(batch(77, 0)[0])])
            model.train()
    return {"grads": grads, "weights": weights(model)}


def scaled(here: Whole, inner: Any = torch.optim.AdamW) -> dict[str, Any]:
    """A GradScaler; the second step overflows in one process and is skipped in all."""
    model = here.net()
    optimizer = wrapped(model, inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(5):
        x, y = here.batch(step)
        loss = mse(model(x), y)
        if step == 1 and getattr(here, "rank", 0) == 0:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if step == 3:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {"weights": weights(model), "scale": torch.tensor(scaler.get_scale())}


SAME: dict[str, Callable[[Whole], dict[str, Any]]] = {
    "unchanged_loop": unchanged_loop,
    "filter": lambda here: unchanged_loop(here, 5, scale="filter"),
    "absolute": lambda here: unchanged_loop(here, 5, scale="absolute", noise="rademacher", sigma=0.05),
    "closures": closures,
    "batches": batches,
    "by_hand": by_hand,
    "kept_after_backward": micro_batches,
    "kept_after_forward": lambda here: micro_batches(here, reshard_after_forward=False),
    "gathered_before": lambda here: micro_batches(here, lambda model: model.unshard()),
    "being_gathered": lambda here: micro_batches(here, lambda model: model.unshard(async_op=True)),
    "scaled": scaled,
    "scaled_fused": lambda here: scaled(here, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)),
    "foreach": lambda here: scaled(here, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, foreach=True)),
}
"""Cases in which several processes should do what one does."""


# -- as FSDP2 without us -----------------------------------------------------------------------------------------------


def plain(here: Sharded) -> dict[str, Any]:
    """Noise of size 0 is FSDP2 without the wrapper, bit for bit."""
    result: dict[str, Any] = {}
    for name, wrap in {"plain": None, "loop": "loop", "closure": "closure", "batch": "batch"}.items():
        model = here.net()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.02)
        if wrap:
            optimizer = PopulationGradient(optimizer, model, sigma=0.0, population_size=4)
        for step in range(5):
            x, y = here.batch(step)
            if wrap == "batch":
                optimizer.step_batch(loss_fn, x, y, vectorize="loop")
            elif wrap == "closure":
                optimizer.step(closure_of(optimizer, model, x, y))
            else:
                closure_of(optimizer, model, x, y)()
                optimizer.step()
            optimizer.zero_grad()
        result[name] = weights(model)
    return result


def options(here: Sharded) -> dict[str, Any]:
    """A member's gradient is that of FSDP2 without us at weights that were moved by hand, whatever its options."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.tensor import Shard

    several: dict[str, dict[str, Any]] = {
        "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "columns": {"shard_placement_fn": lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % here.world == 0 else None},
    }
    if here.world == 4:
        several["pairs"] = {"reshard_after_forward": 2}
    result: dict[str, Any] = {}
    for name, chosen in several.items():
        for scale in ("rms", "filter") if name == "columns" else ("rms",):
            model = here.net(**chosen)
            optimizer = wrapped(model, scale=scale)
            x, y = here.batch(0)
            mse(model(x), y).backward()
            member, grads = moved(optimizer), gradients(optimizer)
            plain = here.net(**chosen)
            _put(plain, member)
            mse(plain(x), y).backward()
            of_plain = [whole(parameter.grad) for parameter in plain.parameters()]
            result[f"{name} {scale}"] = {"grads": [grads, of_plain], "member": member}
    return result


def _part_of(value: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements).to_local()


def first_member(scale: Any) -> list[Tensor]:
    """The member that `options` should see, in one process."""
    here = Whole(1)
    model = here.net()
    optimizer = wrapped(model, scale=scale)
    model(here.batch(0)[0])
    return moved(optimizer)


# -- the mean, and what must be an error -------------------------------------------------------------------------------


def mean_weights(here: Sharded) -> dict[str, Any]:
    """When the weights are the mean, and what state dicts hold meanwhile."""
    model = here.net()
    optimizer = wrapped(model)
    x, y = here.batch(0)
    before = moved(optimizer)

    def mean_is_back(reference: list[Tensor] = before) -> bool:
        with torch.no_grad():
            fresh = here.shard(_filled(reference)).eval()(x)
            seen = model.eval()(x)
            model.train()
        return bool(torch.equal(fresh, seen)) and all(map(torch.equal, moved(optimizer), reference))

    result: dict[str, Any] = {}
    loss = mse(model(x), y)
    state = model.state_dict()
    result["state_is_mean"] = all(map(torch.equal, map(whole, state.values()), before))
    result["state_is_sharded"] = all(
        value.placements == p.placements and value.shape == p.shape and value.stride() == p.stride()
        for value, p in zip(state.values(), model.parameters(), strict=True)
    )
    result["member_stays"] = not any(map(torch.equal, moved(optimizer), before))
    held = moved(optimizer)
    loss.backward()  # the shards were shown meanwhile, and are gathered again
    by_member = gradients(optimizer)
    with optimizer.mean():
        _put(model, held)
        optimizer.zero_grad()
        mse(model(x), y).backward()
        result["backward_at_member"] = all(map(torch.equal, gradients(optimizer), by_member))
        _put(model, before)
    optimizer.zero_grad()
    mse(model(x), y)
    result["after_evaluation"] = mean_is_back()
    mse(model(x), y)
    optimizer.state_dict()
    result["after_optimizer_state"] = mean_is_back()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.middle.register_forward_hook(fail)
    with contextlib.suppress(ZeroDivisionError):
        model(x)
    handle.remove()
    result["after_exception"] = mean_is_back()
    mse(model(x), y).backward()
    optimizer.zero_grad()
    result["after_zero_grad"] = mean_is_back()
    mse(model(x), y).backward()
    optimizer.step()
    result["after_step"] = mean_is_back(moved(optimizer))
    return result


def _filled(values: list[Tensor]) -> Net:
    model = Net()
    put(list(model.parameters()), values)
    return model


def _put(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter._local_tensor.copy_(_part_of(value, parameter))  # type: ignore[reportAttributeAccessIssue] - DTensor


def errors(here: Sharded) -> dict[str, Any]:
    """Messages of the errors, which come in all processes alike."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def message(function: Callable[[], Any]) -> str:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - whichever it is, it is what the test looks at
            return f"{type(error).__name__}: {error}"
        return "none"

    x, y = here.batch(0)
    model = here.net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    result = {"no model": message(lambda: PopulationGradient(inner))}
    for original in (False, True):
        flat = FullyShardedDataParallel(Net(), use_orig_params=original, device_id=torch.device("cpu"))
        of_flat = torch.optim.SGD(flat.parameters(), lr=0.1)
        result[f"flat {original}"] = message(partial(PopulationGradient, of_flat, flat))
        result[f"flat without model {original}"] = message(partial(PopulationGradient, of_flat))

    optimizer = wrapped(model)
    loss = mse(model(x), y)
    optimizer.state_dict()  # ends the member
    result["stale backward"] = message(loss.backward)

    model = here.net()
    optimizer = wrapped(model)
    model.set_requires_gradient_sync(False)
    result["closure without sync"] = message(lambda: optimizer.step(closure_of(optimizer, model, x, y)))
    result["backward without sync"] = message(lambda: optimizer.backward(loss_fn, x, y, vectorize="loop"))

    late = Net()
    optimizer = wrapped(late)
    here.shard(late)
    optimizer.param_groups[0]["params"] = list(late.parameters())  # as trainers do that shard later
    result["sharded later"] = message(lambda: late(x))

    from torch.distributed.fsdp import fully_shard

    outer = nn.Sequential(Net())
    fully_shard(outer)
    optimizer = wrapped(outer[0])
    result["inner module"] = message(lambda: outer(x))

    model = here.net()
    optimizer = wrapped(model)
    model(x)
    with torch.no_grad():
        next(iter(model.last.parameters())).mul_(2)
    result["written"] = message(optimizer.step)
    return result


def one_reads(here: Sharded) -> dict[str, Any]:
    """Statistics are read by one process only."""
    model = here.net()
    optimizer = wrapped(model)
    for step in range(2):
        optimizer.step(closure_of(optimizer, model, *here.batch(step)))
        if here.rank == 0:
            assert optimizer.statistics.relative_sigma > 0
    return {"weights": weights(model)}


# -- several members ---------------------------------------------------------------------------------------------------


def replicas(here: Sharded) -> dict[str, Any]:
    """HSDP: two by two."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    hsdp = Sharded(here.rank, here.world, mesh)
    refused = ""
    try:
        wrapped(hsdp.net(), seed=(1, 2, 1, 3)[here.rank])  # along its first axis, process 0 meets no other seed
    except ValueError as error:
        refused = str(error)
    return unchanged_loop(hsdp, perturb=None) | {"refused": refused}


def replicas_by_hand() -> list[Tensor]:
    """The mean over the members of two replicas, each with the rows of its two processes."""
    torch.manual_seed(0)
    model = Net()
    inner = torch.optim.AdamW(model.parameters(), lr=0.02)
    parameters = list(model.parameters())
    population = Population(sigma=SIGMA, seed=SEED)
    for step in range(STEPS):
        for replica in range(2):
            mean = perturb_by_hand(parameters, population, step=step, member=0, paired=False, rank=replica)
            x, y = (torch.cat(both) for both in zip(*(batch(step, 2 * replica + i) for i in range(2)), strict=True))
            (mse(model(x), y) / 2).backward()
            put(parameters, mean)
        inner.step()
        inner.zero_grad()
    return [parameter.detach() for parameter in parameters]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x)))).mean(1, keepdim=True)


def tensor_parallel(here: Sharded) -> dict[str, Any]:
    """FSDP2 over pairs of processes that share every layer between them: one member."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model: Any = Block()
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    result = _few_steps(model, [batch(step, here.rank // 2) for step in range(5)])
    return result | {"word": _word(model)}


def only_tensor_parallel(here: Sharded) -> dict[str, Any]:
    """Two pairs of processes, each with a copy of the model (as under DDP): two members. All have the norm."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    del here
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = Block()
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return {"word": _word(model), "members": _few_steps(model, [batch(0, 0)])["members"]}


def sequence_parallel(here: Sharded) -> dict[str, Any]:
    """Each process has rows of its own for the norm, whose gradients are then terms of sums over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    model = Block()
    plan: Any = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    return _members_after_the_mean(model, [(batch(s, here.rank)[0], _rows_of_both(s)[1]) for s in range(3)])


def _rows_of_both(step: int) -> list[Tensor]:
    return [torch.cat(both) for both in zip(batch(step, 0), batch(step, 1), strict=True)]


def _members_after_the_mean(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Four members add their gradient to that of the mean weights."""
    optimizer = wrapped(model, population_size=4)
    for x, y in data:
        optimizer.zero_grad()
        with optimizer.mean():
            mse(model(x), y).backward()
        optimizer.backward(lambda model, x, y: mse(model(x), y), x, y, vectorize="loop")
        optimizer.step()
    return {"weights": weights(model)}


def sequence_of_one_process() -> dict[str, Any]:
    torch.manual_seed(0)
    return _members_after_the_mean(Block(), [(x, y) for x, y in map(_rows_of_both, range(3))])


def _word(model: nn.Module) -> int:
    return wrapped(model)._selection.rank


def _few_steps(model: nn.Module, data: list[tuple[Tensor, Tensor]], scale: Any = "filter") -> dict[str, Any]:
    optimizer = wrapped(model, scale=scale)
    members: list[list[Tensor]] = []
    for x, y in data:
        loss = mse(model(x), y)
        members.append(moved(optimizer))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"members": members, "weights": weights(model)}


def block_of_one_process() -> dict[str, Any]:
    torch.manual_seed(0)
    return _few_steps(Block(), [(x, y) for x, y in map(_rows_of_both, range(5))])


CASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    **SAME,
    "plain": plain,
    "options": options,
    "mean_weights": mean_weights,
    "errors": errors,
    "one_reads": one_reads,
    "replicas": replicas,
    "tensor_parallel": tensor_parallel,
    "only_tensor_parallel": only_tensor_parallel,
    "sequence_parallel": sequence_parallel,
}


def main() -> None:
    import torch_dcp_cells  # which imports this file
    from torch import distributed as dist

    folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("default", module="torch")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    here = Sharded(rank, world)
    checkpoints = {"save": torch_dcp_cells.save, "load": torch_dcp_cells.load}
    result: dict[str, Any] = {}
    for case in sys.argv[4:]:
        name, _, checkpoint = case.partition(":")
        result[name] = checkpoints[name](here, checkpoint) if checkpoint else CASES[name](here)
    torch.save(result, f"{folder}/{rank}.pt")
    leave()


if __name__ == "__main__":
    main()
