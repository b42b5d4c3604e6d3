"""``atomic_write`` replaces files completely or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from eva_peft.surroundings.files import atomic_write


def write(path: Path, text: str = "new") -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def test_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        write(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "a.txt"
    link.symlink_to(target)
    for text in ("first", "second"):  # the target need not exist
        write(link, text)
        assert link.is_symlink()
        assert target.read_text() == text


def test_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """Likewise /dev/null; also if the writer replaces the temporary file, as safetensors does."""
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    with atomic_write(pipe) as temporary:
        other = temporary.with_name("other")
        other.write_text("new")
        os.replace(other, temporary)
    reader.join(timeout=10)
    assert received == ["new"]
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
