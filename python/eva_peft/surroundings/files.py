"""Files that are written completely or not at all, even if the power fails."""

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

__all__ = ["atomic_write", "fsync_file", "scratch_folder_beside", "scratch_folders_beside"]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a file to write to, which replaces another atomically if all goes well.

    Args:
        path: holds the old file or the new one at any time. The new one has the default mode of a
            new file, whatever its writer sets. Links are followed; what is not a regular file, such
            as a device, is written to and not replaced.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            with temporary.open("rb") as written, path.open("wb") as device:
                shutil.copyfileobj(written, device)
        return
    with scratch_folder_beside(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)
        fsync_file(temporary)
        os.replace(temporary, path)


@contextmanager
def scratch_folder_beside(path: Path) -> Iterator[Path]:
    """Yield a folder in which to write the replacement of a file, and remove it afterwards.

    Its name is unique, since several processes may write to one path. safetensors writes to
    another file next to the one that it is given, which remains if it is killed.
    """
    folder = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_folders_beside(path: Path) -> list[Path]:
    """Return the folders next to a file that are in use by writers, or left by killed ones."""
    return [*path.parent.glob(glob.escape(f".{path.name}.") + 12 * "[0-9a-f]" + ".partial")]


def fsync_file(path: Path) -> None:
    """Flush a file to disk; else a power cut could leave its new name without the contents."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
