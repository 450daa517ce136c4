"""Files that are whole or not there at all, whatever happens while they are written."""

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["append_whole", "written_whole"]


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Generator[IO[bytes], None, None]:
    """A file to write to, which takes the place of `path` when the ``with`` ends without an exception.

    Until then it is another one in the same folder, named ``<name>.<random>.tmp``: removed after an exception, and left
    behind by a process that is killed. The bytes are on the disk before the name changes, so that a crash of the
    machine does not leave the new name on an empty file. What is no regular file (a device, a pipe) is written to
    directly.

    Parameters
    ----------
    path : path-like
        Links are followed. A file that exists keeps its permissions.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp()) / "numbers"
    >>> with written_whole(path) as file:
    ...     _ = file.write(b"123")
    ...     path.exists()
    False
    >>> path.read_bytes()
    b'123'
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_whole(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file, all of it or, where that fails with an exception, nothing.

    A process that is killed meanwhile may leave the beginning of `data`: readers must know its end, such as a newline.
    """
    with path.open("ab", buffering=0) as file:  # a buffer would try once more when it is closed
        before = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise
