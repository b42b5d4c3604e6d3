"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["left_beside", "make_file", "replacing", "sync"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write to that takes the place of another, if all goes well.

    Args:
        path: holds the old file or the new one at any time. The new one has the mode of a new file,
            whatever its writer gives it. A link is followed, and what is no file, such as a
            device, is written to as it is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    # of a name of its own, since several processes may write to one path
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
    try:
        mode = make_file(temporary)
        yield temporary
        os.chmod(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def left_beside(path: Path) -> list[Path]:
    """Return what writers that were killed, or are still at work, have beside a file."""
    return [*path.parent.glob(glob.escape(f".{path.name}.") + 12 * "[0-9a-f]" + ".partial")]


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
