"""Output folders are written completely or not at all."""

import os
import shutil
from pathlib import Path

import pytest

from eva_peft.errors import EvaValueError
from eva_peft.surroundings.staging import ADAPTER_CONFIG, staged_folder


def write(out: Path, *names: str, force: bool = False, allowed: Path | None = None) -> None:
    with staged_folder(out, force, allowed) as folder:
        for name in names:
            (folder / name).write_text("new")


def write_half(out: Path) -> None:
    with staged_folder(out, False, None) as folder:
        (folder / "a").write_text("new")
        raise ZeroDivisionError


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def test_existing_folder_keeps_its_inode_and_mode(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o2770)
    before = out.stat()
    with staged_folder(out, force=False, allowed=None) as folder:
        # needed for mount points, and for parents that belong to another user
        assert list(tmp_path.iterdir()) == [out]
        (folder / "a").write_text("new")
    assert contents(out) == {"a": "new"}
    assert list(out.iterdir()) == [out / "a"]
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)


def test_current_folder_as_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("."), "a")
    assert os.listdir() == ["a"]


def test_new_folder_appears_once_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out, force=False, allowed=None) as folder:
        (folder / "a").write_text("new")
        assert not out.exists()
    assert contents(out) == {"a": "new"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("exists", [True, False])
def test_failure_leaves_no_files(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(ZeroDivisionError):
        write_half(out)
    assert list(tmp_path.rglob("*")) == [out] * exists


def test_subfolders_do_not_count_as_files(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write(tmp_path, "a")
    (tmp_path / "logs" / "x").write_text("mine")
    with pytest.raises(EvaValueError, match="is not empty; pass --force"):
        write(tmp_path, "b")
    write(tmp_path, "a", "b", force=True)
    assert contents(tmp_path) == {"a": "new", "b": "new"}
    assert contents(tmp_path / "logs") == {"x": "mine"}


def test_checkpoint_inside_the_folder_is_allowed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state" / "pass.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_text("state")
    # left by a killed run
    left = checkpoint.parent / ".pass.safetensors.0123456789ab.partial"
    left.mkdir()
    (left / ".tmpfnhYNo").touch()
    write(tmp_path, "a", allowed=checkpoint)
    assert checkpoint.read_text() == "state"


def test_no_file_is_replaced_if_one_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(EvaValueError, match="has a folder named b, which is") as error:
        write(tmp_path, "a", "b", force=True)
    assert contents(tmp_path) == {"a": "old"}
    assert contents(folder_with_output(error)) == {"a": "new", "b": "new"}


def folder_with_output(error: pytest.ExceptionInfo[EvaValueError]) -> Path:
    """Return the folder that an error names as holding the unwritten output."""
    return Path(str(error.value).rpartition(" are in ")[2])


@pytest.mark.parametrize("failing", range(4))
def test_failure_while_moving_files_restores_the_old_ones(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "out", ["weights", ADAPTER_CONFIG, "new", "z"]
    out.mkdir()
    for name in ("weights", ADAPTER_CONFIG, "z"):
        (out / name).write_text("old")
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target.name)
        if len(calls) == failing + 1:
            assert not (
                out / ADAPTER_CONFIG
            ).exists()  # so that the folder is not loaded as complete
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(EvaValueError, match="No space left on device") as error:
        write(out, *names, force=True)
    assert calls[failing] == ["new", "weights", "z", ADAPTER_CONFIG][failing]
    assert contents(out) == {"weights": "old", ADAPTER_CONFIG: "old", "z": "old"}
    assert contents(folder_with_output(error)) == dict.fromkeys(names, "new")
    assert sorted(p.name for p in folder_with_output(error).iterdir()) == sorted(names)


def test_failed_backup_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a", "b")

    def full(source: Path, target: Path) -> None:
        target.write_text("ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(EvaValueError, match="No space left on device") as error:
        write(tmp_path, "a", "b", force=True)
    assert contents(tmp_path) == {"a": "new", "b": "new"}
    assert sorted(path.name for path in folder_with_output(error).iterdir()) == ["a", "b"]


def test_interrupt_while_moving_files_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, "a", "b")
    assert list(tmp_path.iterdir()) == []


def test_second_interrupt_keeps_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ADAPTER_CONFIG, "weights")

    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)  # while moving, and while moving back
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, ADAPTER_CONFIG, "weights", force=True)
    old = {
        path.name for path in tmp_path.rglob("*") if path.parent.name in (".before", tmp_path.name)
    }
    assert {ADAPTER_CONFIG, "weights"} <= old


def test_hidden_file_with_a_similar_name_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / f".{tmp_path.name}.notes").write_text("mine")
    with pytest.raises(EvaValueError, match="is not empty; pass --force"):
        write(tmp_path, "a")


@pytest.mark.parametrize("exists", [True, False])
def test_first_of_two_concurrent_writers_wins(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    second = staged_folder(out, False, None)
    (second.__enter__() / "a").write_text("second")
    write(out, "a")
    with pytest.raises(EvaValueError, match="another program has written files to it") as error:
        second.__exit__(None, None, None)
    assert contents(out) == {"a": "new"}
    assert contents(folder_with_output(error)) == {"a": "second"}


@pytest.mark.parametrize("exists", [True, False])
def test_leftovers_of_a_killed_run_are_ignored(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    abandoned = staged_folder(out, False, None)
    (abandoned.__enter__() / "a").write_text("half")
    write(out, "a")
    assert contents(out) == {"a": "new"}


def test_files_have_default_modes_and_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with staged_folder(tmp_path / "out", False, None) as folder:
        (folder / "a").write_text("new")
        (folder / "a").chmod(0o600)
    (tmp_path / "usual").touch()
    assert (tmp_path / "out" / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert len(synced) == 1


def test_unwritable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaValueError, match=f"--out out: cannot write in {tmp_path}: Permission"):
        write(Path("out"), "a")
