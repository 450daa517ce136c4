"""Peak memory of training against the number of members, in multiples of the weights.

Two measurements of the first two steps of a model, in a process of its own that has run the same on a tiny model
before: live bytes of tensors, from torch's profiler (exact, but blind to what torch does not allocate), and peak
resident memory (Linux). Both count what comes on top of the weights, whether it stays or not; a plain step with
momentum takes 2: the gradients and the momentum. The noise table (constant, and shared by all optimizers of a process)
is listed beside them.
Run: ``python benchmarks/memory.py``; writes ``out/memory.json`` and a Markdown table beside it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import Problem, mlp
from population_ways import PLAIN, Task, batch_step, closure_step, plain
from reports import environment, markdown, print_table, write_json
from rich.console import Console
from rich.progress import track
from timing import Step, recorded_messages
from torch.profiler import ProfilerActivity, profile

from gradwise._noise import noise_table

__all__ = ["WAYS", "measured", "peak_of_changes", "status_bytes"]

MEMBERS = (1, 2, 8, 32)
MOST = {"vmap, whole": 8}  # more only takes time: it grows as expected
WIDTH, DEPTH, ROWS = 1024, 6, 32
WAYS = {
    "loop, whole": partial(batch_step, sharded=False, path="loop"),
    "loop, sharded": partial(batch_step, sharded=True, path="loop"),
    "step(closure)": closure_step,
    "vmap, whole": partial(batch_step, sharded=False, path="vmap"),
}


def two_steps(way: str, members: int, width: int = WIDTH) -> tuple[Step, int]:
    """The first two steps of a new model, and the bytes of its weights; "plain step" is a way, too."""
    problem = Problem(lambda: mlp(*[width] * DEPTH, 10), (ROWS, width))
    weights = sum(p.numel() * p.element_size() for p in problem.make().parameters())
    step = plain(Task(problem)) if way == PLAIN else WAYS[way](Task(problem), members=members)

    def both() -> None:
        step()
        step()

    return both, weights


def peak_of_changes(changes: Iterable[int]) -> int:
    """Largest sum of the first so many changes of the allocated bytes; at least 0."""
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def peak_live_bytes(step: Step) -> int:
    """Most bytes of tensors that the step had beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    return peak_of_changes(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def status_bytes(text: str, field: str) -> int:
    """A field of ``/proc/self/status``, such as VmHWM, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, flags=re.MULTILINE)
    if found is None:
        msg = f"`text` must have a line of {field} in kB; got {text[:80]!r}"
        raise ValueError(msg)
    return 1024 * int(found[1])


def peak_resident_bytes(step: Step) -> int | None:
    """Most resident memory beyond that before the step; None where the peak cannot be reset."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the peak begins again at what is resident now
    except OSError:
        return None
    before = status_bytes(status.read_text(), "VmRSS")
    step()
    return status_bytes(status.read_text(), "VmHWM") - before


def measured(way: str, members: int, width: int = WIDTH) -> dict[str, Any]:
    """Peaks in multiples of the weights, and warnings; the resident one means something in a process of its own."""
    torch.set_num_threads(1)
    noise_table("gaussian")
    with recorded_messages() as messages:
        two_steps(way, members, 32)[0]()  # imports, and what torch sets up once
    first, weights = two_steps(way, members, width)
    resident = peak_resident_bytes(first)
    second, _ = two_steps(way, members, width)
    return {
        "tensors": peak_live_bytes(second) / weights,
        "resident": None if resident is None else resident / weights,
        "weights": weights,
        "messages": messages,
    }


def in_a_process(way: str, members: int) -> dict[str, Any]:
    """`measured`, elsewhere, with an allocator (glibc's) that gives freed blocks back at once."""
    command = [sys.executable, __file__, "--cell", way, str(members)]
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--cell", nargs=2, metavar=("WAY", "MEMBERS"), help="measure one cell and print it as JSON")
    parser.add_argument("--out", type=Path, default=Path("out/memory.json"))
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measured(options.cell[0], int(options.cell[1]))))
        return
    cells = [(PLAIN, 1), *((way, members) for way in WAYS for members in MEMBERS if members <= MOST.get(way, members))]
    results = [
        {"way": way, "members": members, **in_a_process(way, members)} for way, members in track(cells, "processes")
    ]
    header = ["peak beyond the weights", *(f"K = {members}" for members in MEMBERS)]
    rows = [[way, *(_text(r) for r in results if r["way"] == way)] for way in (PLAIN, *WAYS)]
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    table_bytes = noise_table("gaussian").nbytes
    print_table(Console(width=130), header, rows)
    unit = f"tensors (resident), in multiples of the weights: {results[0]['weights'] / 2**20:.1f} MiB"
    note = f"{unit}; the noise table is {table_bytes / 2**20:.1f} MiB, once in a process"
    print(note)
    for result in results:
        for message in result["messages"]:
            print(f"* {result['way']}, K = {result['members']}: {message}")
    write_json(options.out, {"environment": environment("cpu"), "noise_table": table_bytes, "cells": results})
    options.out.with_suffix(".md").write_text(markdown(header, rows) + note + "\n")


def _text(result: dict[str, Any]) -> str:
    resident = result["resident"]
    star = "*" if result["messages"] else ""
    return f"{result['tensors']:.2f}" + ("" if resident is None else f" ({resident:.2f})") + star


if __name__ == "__main__":
    main()
