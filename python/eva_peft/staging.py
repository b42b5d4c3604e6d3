"""Output folders that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import EvaValueError

__all__ = ["staged_folder"]


@contextmanager
def staged_folder(out: Path, force: bool, besides: Path | None) -> Iterator[Path]:
    """Give a folder to write to, which becomes ``out`` if all goes well.

    Args:
        out: need not exist. A folder that does stays the same one, with its mode, its owner and
            what else is in it; it may be a mount point.
        force: also if there are files in it, of which those of the same names are replaced.
        besides: a path that may lie in ``out`` all the same.

    Raises:
        EvaValueError: ``out`` is a file, holds files, or cannot be written to.
    """
    target = out.resolve()
    if target.exists() and not target.is_dir():
        raise EvaValueError(f"--out {out} is a file, a folder is needed")
    own = None if besides is None else besides.resolve()
    if (
        not force
        and target.is_dir()
        and any(not p.is_dir() and p != own for p in target.rglob("*"))
    ):
        raise EvaValueError(f"--out {out} is not empty; --force replaces the files in it")
    with _scratch(target, out) as scratch:
        # One level down, because the outer folder is closed to other users.
        stage = Path(scratch) / target.name
        stage.mkdir()
        yield stage
        _open_to_readers(stage)
        if target.is_dir():  # by now, it may be for a checkpoint
            _move_into(stage, target, out)
        else:
            stage.rename(target)


def _scratch(target: Path, out: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a folder on the file system of the target: in it, or where it will be."""
    home = target if target.is_dir() else target.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=home)
    except OSError as error:
        raise EvaValueError(f"--out {out}: cannot write in {home}: {error.strerror}") from error


def _move_into(stage: Path, target: Path, out: Path) -> None:
    """Replace files; where one cannot be, none is."""
    taken = sorted(path.name for path in stage.iterdir() if (target / path.name).is_dir())
    if taken:
        raise EvaValueError(f"--out {out} has a folder {taken[0]} where a file is to be written")
    for path in stage.iterdir():
        os.replace(path, target / path.name)


def _open_to_readers(folder: Path) -> None:
    """Give every file the mode of a new file; some writers leave theirs closed to other users."""
    sample = folder / ".mode"
    sample.touch()
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.iterdir():
        path.chmod(mode)
