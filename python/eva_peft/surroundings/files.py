"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["folder_beside", "left_beside", "replacing", "sync"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write to that takes the place of another, if all goes well.

    Args:
        path: holds the old file or the new one at any time. The new one has the mode of a new file,
            whatever its writer gives it. A link is followed, and what is no file, such as a
            device, is written to and stays what it is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            with temporary.open("rb") as written, path.open("wb") as device:
                shutil.copyfileobj(written, device)
        return
    with folder_beside(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Give a folder in which to write what takes the place of a file, and remove it.

    It has a name of its own, since several processes may write to one path. safetensors writes to
    another file beside the one that it is given, which stays where it is killed.
    """
    folder = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def left_beside(path: Path) -> list[Path]:
    """Return the folders that writers that were killed, or are at work, have beside a file."""
    return [*path.parent.glob(glob.escape(f".{path.name}.") + 12 * "[0-9a-f]" + ".partial")]


def sync(path: Path) -> None:
    """Have the contents of a file on the disk; a power cut could leave a new name without them."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
