"""What a capacity study has trained so far, in a file of JSON lines: a study that was broken off goes on from there."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradwise._capacity_training import Job, Training
from gradwise._files import append_whole, written_whole

__all__ = ["Journal"]

HEADER = "gradwise.capacity_study"


class Journal:
    """Trainings by job, kept in a file if there is one.

    The first line says which data and settings the file belongs to, each other line is one training. A last line
    without its end, which a killed process leaves, is cut off. A full disk leaves whole lines only.

    Parameters
    ----------
    path : path-like or None
        Made if it does not exist.
    fingerprint : str
        Of data and settings.

    Attributes
    ----------
    trainings : dict
        Training by Job.

    Raises
    ------
    ValueError
        If the file is of other data or settings, or no such file at all.
    """

    def __init__(self, path: Any, fingerprint: str) -> None:
        self.trainings: dict[Job, Training] = {}
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        text = self._path.read_bytes() if self._path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        header = {HEADER: 1, "fingerprint": fingerprint}
        if not whole:
            if text and not json.dumps({HEADER: 1}).encode().startswith(text[:20]):
                msg = f"`resume` must be a new file or one of a capacity study; got {str(path)!r}, which is another"
                raise ValueError(msg)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self._path) as file:
                file.write(json.dumps(header).encode() + b"\n")
            return
        lines = whole.splitlines()
        first = _parsed(lines[0], path)
        if HEADER not in first:
            msg = f"`resume` must be a new file or one of a capacity study; got {str(path)!r}, which is another"
            raise ValueError(msg)
        if first != header:
            msg = (
                f"`resume` must be of the same data, folds and `fit`; got {str(path)!r}, which is of others. "
                "Give another path, or delete the file"
            )
            raise ValueError(msg)
        for line in lines[1:]:
            entry = _parsed(line, path)
            job = Job(entry["capacity"], entry["seed"], entry["fold"], entry["derivatives"])
            self.trainings[job] = Training(
                _number(entry["error"]), _number(entry["derivative_error"]), entry["converged"], entry["seconds"]
            )
        if whole != text:
            with self._path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, entries: Iterable[tuple[Job, Training]]) -> None:
        """Note trainings, in memory and at once in the file."""
        entries = list(entries)
        self.trainings.update(entries)
        if self._path is not None:
            append_whole(self._path, "".join(_line(job, training) for job, training in entries).encode())


def _line(job: Job, training: Training) -> str:
    values = asdict(job) | asdict(training)
    for name in ("error", "derivative_error"):  # JSON knows neither infinity nor NaN
        values[name] = values[name] if math.isfinite(values[name]) else repr(values[name])
    return json.dumps(values) + "\n"


def _parsed(line: bytes, path: Any) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        msg = f"`resume` must be a file of JSON lines; got {str(path)!r}, with the line {line[:80]!r}"
        raise ValueError(msg)
    return entry  # pyright: ignore[reportUnknownVariableType] - JSON


def _number(value: Any) -> float:
    return float(value)  # "inf" and "nan" too
