"""What the benchmarks print and write: tables of ratios for the console and for Markdown, JSON with everything."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import Timing

__all__ = ["Comparison", "environment", "markdown", "path_taken", "print_table", "write_json"]


@dataclass
class Comparison:
    """Ways (rows) to step several models (columns).

    Attributes
    ----------
    title : str
        Says what they share: optimizer and threads.
    reference : str
        The row that the ratios are to.
    columns : dict
        Timing by column and row.
    notes : dict
        What to say of a row of a column: the path that really ran.
    absent : dict
        Rows that could not be run, and why.
    absolute : bool
        Whether cells show milliseconds as well.
    """

    title: str
    reference: str
    columns: dict[str, dict[str, Timing]] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    absolute: bool = False

    def ratios(self) -> dict[str, dict[str, float]]:
        """Medians as ratios to the reference of the same column."""
        return {
            column: {row: timing.median / timings[self.reference].median for row, timing in timings.items()}
            for column, timings in self.columns.items()
        }

    def header(self) -> list[str]:
        """Of `rows`."""
        return [self.title, *self.columns]

    def rows(self) -> list[list[str]]:
        """As text: the reference in milliseconds, the others as ratios; a star where a warning was recorded."""
        ratios = self.ratios()
        names = dict.fromkeys(row for timings in self.columns.values() for row in timings)
        table = [[name, *(self._cell(column, name, ratios) for column in self.columns)] for name in names]
        return table + [[name, *([why] * len(self.columns))] for name, why in self.absent.items()]

    def _cell(self, column: str, row: str, ratios: Mapping[str, Mapping[str, float]]) -> str:
        timing = self.columns[column].get(row)
        if timing is None:
            return ""
        milliseconds = f"{1000 * timing.median:.3g} ms"
        if row == self.reference:
            return milliseconds
        note = self.notes.get(column, {}).get(row)
        return (
            f"{ratios[column][row]:.2f}x"
            + (f" ({milliseconds})" if self.absolute else "")
            + (f" {note}" if note else "")
            + ("*" if timing.messages else "")
        )

    def messages(self) -> list[str]:
        """What was recorded, by column and row."""
        return [
            f"{column}, {row}: {message}"
            for column, timings in self.columns.items()
            for row, timing in timings.items()
            for message in timing.messages
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "reference": self.reference,
            "seconds": {
                column: {row: timing.as_dict() for row, timing in timings.items()}
                for column, timings in self.columns.items()
            },
            "ratios": self.ratios(),
            "notes": self.notes,
            "absent": self.absent,
        }


def path_taken(asked: str, messages: Iterable[str]) -> str:
    """The path that ran, when this one was asked for and these warnings came."""
    text = " ".join(messages)
    for path in {"compile": ("compile", "vmap"), "vmap": ("vmap",)}.get(asked, ()):
        if f'vectorize="{path}" is not possible' not in text:
            return path
    return "loop"


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, and an empty line after it."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines) + "\n"


def print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The same on a console."""
    table = Table(header[0], *header[1:])
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_json(path: Path, content: Any) -> None:
    """Pretty, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
