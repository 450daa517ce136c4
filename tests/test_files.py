"""Files of the core: whole, or as before, when there is an error or no room."""

import json
import os
from pathlib import Path

import pytest
from full_disk import room_for

from gradwise._capacity_journal import Journal
from gradwise._capacity_training import Job, Training
from gradwise._files import append_whole, written_whole

OLD, NEW = b"old" * 500, b"new" * 1000


def write(path: Path, data: bytes) -> None:
    with written_whole(path) as file:
        file.write(data[:1000])
        file.write(data[1000:])


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("room", [0, 1000, 2999])
def test_no_room_leaves_what_was_there(existing: bool, room: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if existing:
        path.write_bytes(OLD)
    with room_for(room), pytest.raises(OSError, match="File too large"):
        write(path, NEW)
    assert os.listdir(tmp_path) == ["file"] * existing
    assert not existing or path.read_bytes() == OLD
    with room_for(len(NEW)):
        write(path, NEW)
    assert path.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["file"]


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    error = KeyboardInterrupt()

    def interrupt() -> None:
        raise error

    with pytest.raises(KeyboardInterrupt), written_whole(path):
        interrupt()
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


def test_links_permissions_and_devices(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    write(path, OLD)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # what any new file gets here
    path.chmod(0o640)
    link.symlink_to(path)
    write(link, NEW)
    assert link.is_symlink()
    assert path.read_bytes() == NEW
    assert path.stat().st_mode & 0o777 == 0o640
    with written_whole("/dev/null") as file:
        file.write(NEW)
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match="No space left"), written_whole("/dev/full") as file:
        file.write(NEW)


def test_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    append_whole(path, OLD)
    with room_for(len(OLD) + 10), pytest.raises(OSError, match="File too large"):
        append_whole(path, NEW)
    assert path.read_bytes() == OLD
    append_whole(path, NEW)
    assert path.read_bytes() == OLD + NEW


def test_a_study_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    with room_for(20), pytest.raises(OSError, match="File too large"):
        Journal(path, "data")
    assert not path.exists()
    journal = Journal(path, "data")
    trainings = {Job(capacity, 0, 0, True): Training(0.5, 0.1, True, 1.0) for capacity in range(30)}
    first, *others = trainings.items()
    journal.add([first])
    size = path.stat().st_size
    with room_for(size + 200), pytest.raises(OSError, match="File too large"):
        journal.add(others)
    assert Journal(path, "data").trainings == dict([first])
    journal.add(others)
    assert Journal(path, "data").trainings == trainings
    assert all(json.loads(line) for line in path.read_text().splitlines())
