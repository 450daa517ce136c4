"""What the population gradient costs in N processes under DistributedDataParallel and FSDP2: measured, and worked out.

One, two and four processes (gloo, CPU, one thread each) take the same steps in turns: plain DDP, one member per rank in
the unchanged loop, four members per rank in ``step(closure)``, four members on shards of the batch, FSDP2 without and
with members. For each: wall seconds, processor seconds per rank (where there are fewer cores than processes, that is
the number to look at), collectives and their bytes, and peak memory of tensors; and what a bare all-reduce takes, which
gives the constants of `scaling_model`, by which more processes are extrapolated.

``python benchmarks/scaling.py [--repeats N] [--ranks 1,2,4] [--out FILE]`` writes JSON with all samples; a few minutes
on two cores. ``--table`` prints the tables of a file that is there as Markdown and measures nothing; ``--page FILE``
puts them between the two marks in that page.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import MODELS, Problem, cross_entropy, mlp
from reports import environment, markdown, write_json
from scaling_model import (
    ASSUMED,
    Link,
    all_reduce_seconds,
    extrapolated,
    fitted_link,
    median_ratio,
    medians,
    texts,
)
from timing import Step
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from gradwise.torch import PopulationGradient

PLAIN, LOOP, PASSES = "plain DDP", "unchanged loop, 1 member", "plain DDP, 4 passes in no_sync"
CLOSURE, SHARDED = "step(closure), 4 members", "sharded backward, 4 members"
FSDP, FSDP_LOOP = "plain FSDP2", "unchanged loop, FSDP2"
MEMBERS = 4
CHOSEN = ("MLP 256-1024-1024-10, batch 64", "CNN 28x28, batch 64", "transformer, batch 32")
PROBLEMS = {name: MODELS[name] for name in CHOSEN} | {"tiny": Problem(lambda: mlp(4, 8, 10), (16, 4))}
SIZES = (4, 2**14, 2**18, 2**20, 2**22, 2**23)  # bytes of bare reductions
MARKS = ("<!-- tables of benchmarks/scaling.py -->", "<!-- end of the tables -->")


# -- ways --------------------------------------------------------------------------------------------------------------


def ddp(problem: Problem) -> tuple[nn.Module, Tensor, Tensor, torch.optim.Optimizer]:
    model, x, y = problem.model_and_batch()
    wrapped = DistributedDataParallel(model)
    return wrapped, x, y, torch.optim.SGD(wrapped.parameters(), lr=1e-3, momentum=0.9)


def fsdp(problem: Problem) -> tuple[nn.Module, Tensor, Tensor, torch.optim.Optimizer]:
    """Every dense, convolutional or encoder layer is a unit."""
    from torch.distributed.fsdp import fully_shard

    model, x, y = problem.model_and_batch()

    def shard(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.TransformerEncoderLayer):
            fully_shard(module)
        else:
            for child in module.children():
                shard(child)

    shard(model)
    fully_shard(model)
    return model, x, y, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


Parts = Callable[[Problem], tuple[nn.Module, Tensor, Tensor, torch.optim.Optimizer]]


def plain(problem: Problem, *, parts: Parts = ddp, passes: int = 1, members: bool = False) -> Step:
    """Forward, backward, step; several passes over the batch; or one at a member."""
    model, x, y, inner = parts(problem)
    optimizer = PopulationGradient(inner, model, sigma=0.1, seed=0) if members else inner

    def step() -> None:
        optimizer.zero_grad()
        if passes > 1:
            assert isinstance(model, DistributedDataParallel)
            with model.no_sync():
                for _ in range(passes - 1):
                    (cross_entropy(model, x, y) / passes).backward()
        (cross_entropy(model, x, y) / passes).backward()
        optimizer.step()

    return step


def population(problem: Problem, *, sharded: bool) -> Step:
    """Four members per rank: in a closure, or each with rows of its own."""
    model, x, y, inner = ddp(problem)
    optimizer = PopulationGradient(inner, model, sigma=0.1, population_size=MEMBERS, seed=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model, x, y)
        loss.backward()
        return loss

    def on_shards() -> None:
        optimizer.zero_grad()
        optimizer.step_batch(cross_entropy, x, y, sharded=True, vectorize="loop")  # the only way under DDP

    return on_shards if sharded else lambda: optimizer.step(closure)


WAYS: dict[str, Callable[[Problem], Step]] = {
    PLAIN: plain,
    LOOP: partial(plain, members=True),
    PASSES: partial(plain, passes=MEMBERS),
    CLOSURE: partial(population, sharded=False),
    SHARDED: partial(population, sharded=True),
    FSDP: partial(plain, parts=fsdp),
    FSDP_LOOP: partial(plain, parts=fsdp, members=True),
}
REFERENCES = {LOOP: PLAIN, PASSES: PLAIN, CLOSURE: PLAIN, SHARDED: PLAIN, FSDP: PLAIN, FSDP_LOOP: FSDP}
OVERLAPS = {LOOP: True, CLOSURE: False, SHARDED: False}  # of what is extrapolated


# -- in one process ----------------------------------------------------------------------------------------------------


def communication(step: Step) -> dict[str, list[int]]:
    """Collectives of one step by kind: how many, and bytes of what they reduce or gather."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        step()
    found: dict[str, list[int]] = {}
    kind = ""
    for event in profiler.events() or ():
        if event.name.startswith("c10d::"):
            kind = event.name.removeprefix("c10d::").strip("_")
            found.setdefault(kind, [0, 0])[0] += 1
        elif not event.name.startswith("gloo:") or not kind:
            continue
        # A list of tensors has no shape where it is called for, only where it is sent.
        if event.name.startswith("c10d::") or kind == "allreduce":
            found[kind][1] += 4 * _largest(event.input_shapes)  # float32
    return found


def _largest(shapes: Any) -> int:
    return max((int(torch.Size(shape).numel()) for shape in shapes if shape), default=0)


def peak_bytes(step: Step) -> int:
    """Most bytes of tensors that a step had beyond those before it."""
    from memory import peak_live_bytes

    return peak_live_bytes(step)


def measure(names: list[str], repeats: int, floor: float) -> dict[str, Any]:
    """All ways on all models, in turns, in this process and the others; the same on every rank."""
    cells: dict[str, Any] = {}
    for name in names:
        problem = PROBLEMS[name]
        cell: dict[str, Any] = {}
        steps: dict[str, Step] = {}
        loops: dict[str, int] = {}
        for way, build in WAYS.items():
            step = steps[way] = build(problem)
            peak = peak_bytes(step)  # of the first step: gradients, buckets, momentum, the mean
            step()
            once = _seconds(step, 1)[0]
            step()
            loops[way] = max(1, round(floor / _agreed(once)))
            cell[way] = {"wall": [], "cpu": [], "peak": peak, "collectives": communication(step)}
        for _ in range(repeats):
            for way, step in steps.items():
                step()  # the others have emptied the caches
                wall, cpu = _seconds(step, loops[way])
                cell[way]["wall"].append(_agreed(wall, dist.ReduceOp.MAX))
                cell[way]["cpu"].append(_agreed(cpu))
        weights = [parameter.numel() * parameter.element_size() for parameter in problem.make().parameters()]
        cells[name] = {"weights": sum(weights), "ways": cell}
    return cells


def _seconds(step: Step, loops: int) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(loops):
        step()
    return (time.perf_counter() - wall) / loops, (time.process_time() - cpu) / loops


def _agreed(value: float, how: Any = None) -> float:
    """The mean over the ranks, or the largest."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM if how is None else how)
    return float(tensor) / (dist.get_world_size() if how is None else 1)


def bare_reductions(repeats: int) -> dict[int, float]:
    """Median wall seconds of an all-reduce, by bytes."""
    result: dict[int, float] = {}
    for size in SIZES:
        tensor = torch.zeros(max(1, size // 4))
        once = _agreed(_seconds(lambda t=tensor: dist.all_reduce(t), 3)[0])
        loops = max(3, round(0.01 / once))
        samples = [_seconds(lambda t=tensor: dist.all_reduce(t), loops)[0] for _ in range(repeats)]
        result[size] = _agreed(statistics.median(samples))
    return result


def work(options: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    rank, ranks, meeting = int(options.worker[0]), int(options.worker[1]), options.worker[2]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    cells = measure(options.models.split(";"), options.repeats, options.floor)
    result = {"cells": cells, "reductions": bare_reductions(options.repeats)}
    if rank == 0:
        write_json(options.out, result)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # past Python's end, where gloo's threads may still ask for the GIL and abort (pytorch issue 190489)


# -- all of it ---------------------------------------------------------------------------------------------------------


@contextmanager
def started(commands: list[list[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive the block."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = [subprocess.Popen(c, env=environ, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(ranks: int, models: str, repeats: int, floor: float) -> dict[str, Any]:
    """The measurements in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        settings = ["--models", models, "--repeats", str(repeats), "--floor", str(floor), "--out", str(out)]
        commands = [
            [sys.executable, __file__, "--worker", str(rank), str(ranks), f"{folder}/meeting", *settings]
            for rank in range(ranks)
        ]
        with started(commands) as processes:
            errors = [process.communicate(timeout=900)[1] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError("\n".join(errors))
        return json.loads(out.read_text())


def tables(results: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    by_ranks: dict[str, Any] = results["ranks"]
    text = ""
    for name in by_ranks[next(iter(by_ranks))]["cells"]:
        header = [name, *(f"N = {ranks}, {what}" for ranks in by_ranks for what in ("wall", "processor"))]
        rows = [
            [way, *(_timed(at["cells"][name]["ways"], way, key) for at in by_ranks.values() for key in ("wall", "cpu"))]
            for way in WAYS
        ]
        text += markdown(header, rows)
    text += _communication_table(by_ranks)
    if {"1", "2"} <= by_ranks.keys():
        text += _extrapolation(by_ranks, results["environment"]["cores"])
    return text


def _timed(cell: Mapping[str, Any], way: str, key: str) -> str:
    milliseconds = f"{1000 * medians(cell, key)[way]:.3g} ms"
    reference = REFERENCES.get(way)
    return milliseconds if reference is None else f"{milliseconds}, {median_ratio(cell, key, way, reference):.2f}x"


def _communication_table(by_ranks: Mapping[str, Any]) -> str:
    ranks = "2" if "2" in by_ranks else next(iter(by_ranks))
    cells: dict[str, Any] = by_ranks[ranks]["cells"]
    header = [f"one step, N = {ranks}", *(f"{name}: collectives; peak memory" for name in cells)]
    rows: list[list[str]] = []
    for way in WAYS:
        row = [way]
        for cell in cells.values():
            kinds = cell["ways"][way]["collectives"]
            said = ", ".join(f"{count} {kind} ({_size(size)})" for kind, (count, size) in kinds.items())
            reference = REFERENCES.get(way)
            before = 0 if reference is None else cell["ways"][reference]["peak"]
            peak = (cell["ways"][way]["peak"] - before) / cell["weights"]
            row.append(f"{said or 'none'}; {peak:.2f}" if reference is None else f"{said or 'none'}; {peak:+.2f}")
        rows.append(row)
    return markdown(header, rows)


def _size(size: float) -> str:
    return f"{size} B" if size < 1024 else f"{size / 2**10:.0f} KiB" if size < 2**20 else f"{size / 2**20:.2f} MiB"


def _extrapolation(by_ranks: Mapping[str, Any], cores: int) -> str:
    reductions = by_ranks["2"]["reductions"]
    here = fitted_link("this machine, 2 processes", [float(size) for size in reductions], list(reductions.values()))
    rows = [
        ["measured", *(f"{1e6 * seconds:.0f} us" for seconds in reductions.values())],
        ["fitted", *(f"{1e6 * all_reduce_seconds(2, int(size), here):.0f} us" for size in reductions)],
    ]
    text = markdown(["a bare all-reduce, N = 2", *(_size(int(size)) for size in reductions)], rows)
    cells: dict[str, Any] = by_ranks["1"]["cells"]
    buckets = {
        name: by_ranks["2"]["cells"][name]["ways"][PLAIN]["collectives"].get("allreduce", [1])[0] for name in cells
    }

    def ratios(name: str, ranks: tuple[int, ...], link: Link, share: float = 1.0) -> dict[str, list[list[float]]]:
        """From processor seconds of one process, each of which may have to wait for a share of a core."""
        compute = {way: seconds / share for way, seconds in medians(cells[name]["ways"], "cpu").items()}
        return extrapolated(compute, PLAIN, OVERLAPS, ranks, link, cells[name]["weights"], buckets[name])

    checked = [ranks for ranks in by_ranks if ranks != "1"]
    rows = []
    for name in cells:
        predicted = [ratios(name, (int(ranks),), here, min(1.0, cores / int(ranks))) for ranks in checked]
        for way in OVERLAPS:
            row = [f"{name}: {way}"]
            for ranks, table in zip(checked, predicted, strict=True):
                found = median_ratio(by_ranks[ranks]["cells"][name]["ways"], "wall", way, PLAIN)
                row += [texts({way: table[way]})[0][1], f"{found:.2f}"]
            rows.append(row)
    header = ["ratio to plain DDP", *(f"N = {r}, {what}" for r in checked for what in ("worked out", "measured"))]
    text += markdown(header, rows)
    for link in (here, *ASSUMED):
        rows = [[f"{name}: {row[0]}", *row[1:]] for name in cells for row in texts(ratios(name, (1, 8, 64, 512), link))]
        numbers = f"{link.bandwidth / 1e9:.3g} GB/s, {1e6 * link.latency:.0f} us"
        text += markdown([f"{link.name} ({numbers})", *(f"N = {n}" for n in (1, 8, 64, 512))], rows)
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--models", default=";".join(CHOSEN), help="names, separated by semicolons")
    parser.add_argument("--floor", type=float, default=0.05, help="seconds that a sample lasts at least")
    parser.add_argument("--out", type=Path, default=Path("out/scaling.json"))
    parser.add_argument("--table", action="store_true", help="print the tables of the file; measure nothing")
    parser.add_argument("--page", type=Path, help="put the tables into this page; measure nothing")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options)
        return
    if not (options.table or options.page):
        counts = options.ranks.split(",")
        measured = {ranks: run(int(ranks), options.models, options.repeats, options.floor) for ranks in counts}
        write_json(options.out, {"environment": environment("cpu"), "repeats": options.repeats, "ranks": measured})
    text = tables(json.loads(options.out.read_text()))
    if options.page:
        before, _, rest = options.page.read_text().partition(MARKS[0])
        options.page.write_text(f"{before}{MARKS[0]}\n\n{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    else:
        print(text)


if __name__ == "__main__":
    main()
