"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["make_file", "replacing", "sync"]


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Give a file to write to that takes the place of another, if all goes well.

    Args:
        path: holds the old file or the new one at any time. The new one has the mode of a new file,
            whatever its writer gives it.
        temporary: in the same folder, does not outlive the block; by default of a name of its own,
            since several processes may write to one path. A link is followed then, and what is no
            file, such as a device, is written to as it is.
    """
    if temporary is None:
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            yield path
            return
        temporary = path.with_name(f".{uuid4().hex[:12]}.{path.name}")
    try:
        mode = make_file(temporary)
        yield temporary
        os.chmod(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_file(path: Path) -> int:
    """Make an empty file in place of any old one, and return the mode that the umask gives it."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Have the contents of a file on the disk; a power cut could leave a new name without them."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
