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
        out: need not exist; what else is in it stays.
        force: also if there is something in it, of which files of the same names are replaced.
        besides: a path that may lie in ``out`` all the same.

    Raises:
        EvaValueError: ``out`` is a file, or not empty.
    """
    target = out.resolve()
    if target.exists() and not target.is_dir():
        raise EvaValueError(f"--out {out} is a file, a folder is needed")
    own = None if besides is None else besides.resolve()
    filled = target.is_dir() and any(path != own for path in target.iterdir())
    if filled and not force:
        raise EvaValueError(f"--out {out} is not empty; --force replaces the files in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        # One level down, because the outer folder is closed to other users.
        stage = Path(scratch) / target.name
        stage.mkdir()
        yield stage
        _open_to_readers(stage)
        if target.is_dir() and any(target.iterdir()):
            for path in stage.iterdir():
                os.replace(path, target / path.name)
        else:
            if target.is_dir():
                target.rmdir()
            stage.rename(target)


def _open_to_readers(folder: Path) -> None:
    """Give every file the mode of a new file; some writers leave theirs closed to other users."""
    sample = folder / ".mode"
    sample.touch()
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.iterdir():
        path.chmod(mode)
