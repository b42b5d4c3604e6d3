"""Output folders that are written completely or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from ..errors import EvaValueError
from .files import fsync_file, scratch_folders_beside

__all__ = ["ADAPTER_CONFIG", "naming_folder_in_errors", "staged_folder"]

# Without it the folder is not recognised as an adapter: removed first, and written last.
ADAPTER_CONFIG = "adapter_config.json"
# In the staged folder, while files are replaced: the old ones.
BACKUP = ".before"


@contextmanager
def staged_folder(out: Path, force: bool, allowed: Path | None) -> Iterator[Path]:
    """Yield a folder to write files to, which becomes ``out`` if all goes well.

    Args:
        out: need not exist. An existing folder is kept, with its mode, its owner and its other
            contents; it may be a mount point.
        force: accept files in ``out``, of which those of the same names are replaced.
        allowed: a path that may be in ``out`` even without ``force``.

    Raises:
        EvaValueError: ``out`` is a file, holds files, or cannot be written to. If that is found
            only at the end, what was written is kept in the staged folder.
    """
    target = out.resolve()
    if target.exists() and not target.is_dir():
        raise EvaValueError(f"--out {out} is a file; give a folder")
    allowed_path = None if allowed is None else allowed.resolve()
    if not force and _has_other_files(target, allowed_path):
        raise EvaValueError(f"--out {out} is not empty; pass --force to replace files in it")
    stage = _make_stage(target, out)
    try:
        yield stage
        for path in stage.iterdir():
            path.chmod(0o666 & stage.stat().st_mode)  # some writers make theirs private
            fsync_file(path)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    try:
        if not force and _has_other_files(target, allowed_path):
            raise EvaValueError("in the meantime, another program has written files to it")
        if target.is_dir():  # may have been made since, for a checkpoint
            _move_files_into(stage, target)
        else:
            stage.rename(target)
    except (OSError, EvaValueError) as error:
        hint = f"the files that were to be written are in {stage}"
        raise EvaValueError(f"--out {out}: {error}; {hint}") from error
    except BaseException:
        if not (stage / BACKUP).exists():  # which has the only copies of replaced files
            shutil.rmtree(stage, ignore_errors=True)
        raise


@contextmanager
def naming_folder_in_errors(out: Path) -> Iterator[None]:
    """Name the folder in errors of writing: that of a full disk does not.

    Raises:
        EvaValueError: they cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise EvaValueError(
            f"--out {out} cannot be written ({error}); nothing in it was changed"
        ) from error


def _has_other_files(target: Path, allowed_path: Path | None) -> bool:
    """Tell whether there are files that are neither allowed nor staged by a killed run."""
    staged = re.compile("^" + re.escape(f".{target.name}.") + "[0-9a-f]{12}/")
    ignored = set()
    if allowed_path is not None:
        ignored = {allowed_path, *scratch_folders_beside(allowed_path)}
    return target.is_dir() and any(
        not path.is_dir()
        and ignored.isdisjoint([path, *path.parents])
        and not staged.search(str(path.relative_to(target)))
        for path in target.rglob("*")
    )


def _make_stage(target: Path, out: Path) -> Path:
    """Make a folder on the file system of the target: in it, or in its parent."""
    parent = target if target.is_dir() else target.parent
    stage = parent / f".{target.name}.{uuid4().hex[:12]}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    except OSError as error:
        raise EvaValueError(f"--out {out}: cannot write in {parent}: {error.strerror}") from error
    return stage


def _move_files_into(stage: Path, target: Path) -> None:
    """Replace files, all or none."""
    names = sorted(path.name for path in stage.iterdir())
    names.sort(key=lambda name: name == ADAPTER_CONFIG)  # last
    for name in names:
        if (target / name).is_dir():
            raise EvaValueError(
                f"it has a folder named {name}, which is the name of a file to be written"
            )
    backup = stage / BACKUP
    backup.mkdir()
    replaced = [name for name in names if (target / name).exists()]
    try:
        for name in replaced:
            shutil.copy2(target / name, backup / name)
        if ADAPTER_CONFIG in replaced:
            (target / ADAPTER_CONFIG).unlink()
        for name in names:
            os.replace(stage / name, target / name)
    except BaseException:
        for name in names:
            if not (stage / name).exists():
                os.replace(target / name, stage / name)
        for name in replaced:
            if not (target / name).exists():
                os.replace(backup / name, target / name)
        shutil.rmtree(backup)
        raise
    shutil.rmtree(stage)
