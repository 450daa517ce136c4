"""How the cost of a step grows: with the parameters, the members, the batch, and the outputs of gradient matching.

Each curve is fitted by a power law over the upper half of its range, where fixed costs count least, and its exponent
stands next to the one that counting operations gives. One thread. Sharded members share one pass, so its cost does not
grow with their number (exponent 0), but noise and gradients are those of each member (1).
Run: ``python benchmarks/growth.py [--repeats N] [--quick]``; draws ``docs/growth.png``, writes ``out/growth.json``.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matching_ways import Regression, matching_step, values_only
from models import Problem, mlp
from population_ways import Task, batch_step, plain, unchanged_loop
from reports import environment, print_table, write_json
from rich.console import Console
from rich.progress import Progress
from timing import Step, interleaved

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

__all__ = ["Curve", "Panel", "draw", "fitted_slope", "measure", "panels"]

COLOURS = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: distinct without colour vision too


@dataclass(frozen=True)
class Curve:
    """A way to step, and the exponent with which its time should grow.

    Attributes
    ----------
    step : callable
        ``step(size) -> step``.
    expected : float
        Exponent of the passes.
    overhead : float, optional
        Exponent of what is done once for each member (noise, gradients), where it differs.
    """

    step: Callable[[int], Step]
    expected: float
    overhead: float | None = None

    @property
    def counted(self) -> str:
        """The exponents in words."""
        return f"{self.expected:g}" if self.overhead is None else f"{self.expected:g} to {self.overhead:g}"


@dataclass
class Panel:
    """Curves over one size.

    Attributes
    ----------
    title, axis : str
        Of the picture.
    sizes : sequence of int
        Passed to the curves.
    at : callable
        What a size is called on the axis: the number of weights of a width, for example.
    seconds : dict
        Medians, one for each size, by curve.
    """

    title: str
    axis: str
    sizes: Sequence[int]
    curves: Mapping[str, Curve]
    at: Callable[[int], float] = float
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def slopes(self) -> dict[str, float]:
        """Fitted exponents."""
        x = [self.at(size) for size in self.sizes]
        return {name: fitted_slope(x, seconds) for name, seconds in self.seconds.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds."""
        slopes = self.slopes()
        return {
            "title": self.title,
            "axis": self.axis,
            "x": [self.at(size) for size in self.sizes],
            "curves": {
                name: {"seconds": self.seconds[name], "slope": slopes[name], "counted": curve.counted}
                for name, curve in self.curves.items()
            },
        }


def fitted_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent a of ``y = c x**a`` by least squares of the logarithms, over the upper half of the logarithm of x."""
    log_x, log_y = np.log(x), np.log(y)
    upper = log_x >= min(log_x[-2], (log_x[0] + log_x[-1]) / 2)
    return float(np.polyfit(log_x[upper], log_y[upper], 1)[0])


def panels(*, quick: bool = False) -> list[Panel]:
    """What is measured; `quick` for a few small sizes."""

    def sized(width: int) -> Problem:
        return Problem(lambda: mlp(64, width, width, 10), (64, 64))

    def with_rows(rows: int) -> Problem:
        return Problem(lambda: mlp(64, 256, 256, 10), (rows, 64))

    whole = partial(batch_step, sharded=False)
    sharded = partial(batch_step, sharded=True)
    medium = Task(with_rows(256))
    widths = [16, 32] if quick else [68, 160, 300, 540, 980, 1750, 3120]
    members = [1, 2] if quick else [1, 2, 4, 8, 16, 32, 64]
    rows = [16, 32] if quick else [16, 64, 256, 1024, 4096]
    outputs = [1, 2] if quick else [1, 3, 10, 30, 100]

    def over(problem: Callable[[int], Problem], build: Callable[[Task], Step]) -> Callable[[int], Step]:
        return lambda size: build(Task(problem(size)))

    by_size = {
        "plain step": plain,
        "unchanged loop": unchanged_loop,
        "8 members, whole batch, loop": partial(whole, path="loop"),
        "8 members, sharded, loop": partial(sharded, path="loop"),
    }
    one, full = (partial(matching_step, projections=count) for count in (1, None))
    return [
        Panel(
            "MLP 64-w-w-10, batch 64",
            "weights",
            widths,
            {name: Curve(over(sized, build), 1) for name, build in by_size.items()},
            lambda width: float(sum(p.numel() for p in sized(width).make().parameters())),
        ),
        Panel(
            "MLP 64-256-256-10, batch 256",
            "members",
            members,
            {
                "whole batch, loop": Curve(lambda k: whole(medium, path="loop", members=k), 1),
                "whole batch, vmap": Curve(lambda k: whole(medium, path="vmap", members=k), 1),
                "sharded, loop": Curve(lambda k: sharded(medium, path="loop", members=k), 0, 1),
                "sharded, vmap": Curve(lambda k: sharded(medium, path="vmap", members=k), 0, 1),
            },
        ),
        Panel(
            "MLP 64-256-256-10",
            "rows of a batch",
            rows,
            {name: Curve(over(with_rows, build), 1) for name, build in by_size.items()},
        ),
        Panel(
            "matching, tanh MLP 20-256-256-D, batch 256",
            "outputs D",
            outputs,
            {
                "plain step": Curve(lambda d: values_only(Regression(outputs=d)), 0),
                "one VJP": Curve(lambda d: one(Regression(outputs=d)), 0),
                "full Jacobian": Curve(lambda d: full(Regression(outputs=d)), 1),
            },
        ),
    ]


def measure(panel: Panel, repeats: int, advance: Callable[[], object] = lambda: None) -> None:
    """Fill `seconds`: for each size, the curves interleaved."""
    panel.seconds = {name: [] for name in panel.curves}
    for size in panel.sizes:
        timings = interleaved({name: curve.step(size) for name, curve in panel.curves.items()}, repeats)
        for name, timing in timings.items():
            panel.seconds[name].append(timing.median)
        advance()


def draw(done: Sequence[Panel], path: Path) -> None:
    """One picture: measured times, and lines of the expected exponent through the last of them."""
    columns = min(2, len(done))
    figure, axes = plt.subplots(
        -(-len(done) // columns), columns, figsize=(11, 8.4), layout="constrained", squeeze=False
    )
    for panel, ax in zip(done, axes.flat, strict=False):
        _draw_panel(panel, ax)
    figure.suptitle(
        "Time of a step, one thread. Dotted: the exponent from counting operations; in brackets: fitted | counted",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(panel: Panel, ax: Axes) -> None:
    x = np.array([panel.at(size) for size in panel.sizes])
    slopes = panel.slopes()
    for colour, (name, curve) in zip(COLOURS, panel.curves.items(), strict=False):
        y = 1000 * np.array(panel.seconds[name])
        ax.plot(x, y, "o-", color=colour, label=f"{name} ({slopes[name]:.2f} | {curve.counted})", markersize=4)
        upper = x[x >= np.sqrt(x[0] * x[-1])]
        exponent = curve.expected if curve.overhead is None else curve.overhead  # the end of the range is overhead's
        ax.plot(upper, y[-1] * (upper / x[-1]) ** exponent, ":", color=colour, linewidth=1.8)
    ax.set(xscale="log", yscale="log", xlabel=panel.axis, ylabel="milliseconds", title=panel.title)
    if len(x) and x[-1] < 1e4:
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9, loc="upper left")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top * (top / bottom) ** 0.35)  # room for the legend


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--figure", type=Path, default=Path("docs/growth.png"))
    parser.add_argument("--out", type=Path, default=Path("out/growth.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = panels(quick=options.quick)
    with Progress() as progress:
        bar = progress.add_task("sizes", total=sum(len(panel.sizes) for panel in done))
        for panel in done:
            measure(panel, options.repeats, partial(progress.advance, bar))
    rows = [
        [f"{panel.title}: {panel.axis}", name, f"{slope:.2f}", panel.curves[name].counted]
        for panel in done
        for name, slope in panel.slopes().items()
    ]
    print_table(Console(width=130), ["growth with", "step", "fitted exponent", "counted"], rows)
    setting = {**environment("cpu"), "threads": 1, "repeats": options.repeats}
    write_json(options.out, {"environment": setting, "panels": [panel.as_dict() for panel in done]})
    draw(done, options.figure)


if __name__ == "__main__":
    main()
