"""Output folders that are written whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest

from eva_peft.errors import EvaValueError
from eva_peft.surroundings.staging import ADAPTER_CONFIG, staged_folder


def write(out: Path, *names: str, force: bool = False, besides: Path | None = None) -> None:
    with staged_folder(out, force, besides) as folder:
        for name in names:
            (folder / name).write_text("new")


def write_half(out: Path) -> None:
    with staged_folder(out, False, None) as folder:
        (folder / "a").write_text("new")
        raise ZeroDivisionError


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def test_a_folder_that_is_there_stays_the_same_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o2770)
    before = out.stat()
    with staged_folder(out, force=False, allowed=None) as folder:
        # as where it is a mount point, or its parent belongs to somebody else
        assert list(tmp_path.iterdir()) == [out]
        (folder / "a").write_text("new")
    assert contents(out) == {"a": "new"}
    assert list(out.iterdir()) == [out / "a"]
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)


def test_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("."), "a")
    assert os.listdir() == ["a"]


def test_a_new_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out, force=False, allowed=None) as folder:
        (folder / "a").write_text("new")
        assert not out.exists()
    assert contents(out) == {"a": "new"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_nothing(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(ZeroDivisionError):
        write_half(out)
    assert list(tmp_path.rglob("*")) == [out] * there


def test_only_files_fill_a_folder(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write(tmp_path, "a")
    (tmp_path / "logs" / "x").write_text("mine")
    with pytest.raises(EvaValueError, match="is not empty; pass --force"):
        write(tmp_path, "b")
    write(tmp_path, "a", "b", force=True)
    assert contents(tmp_path) == {"a": "new", "b": "new"}
    assert contents(tmp_path / "logs") == {"x": "mine"}


def test_a_checkpoint_may_lie_anywhere_in_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state" / "pass.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_text("state")
    # what a run that was killed has left
    left = checkpoint.parent / ".pass.safetensors.0123456789ab.partial"
    left.mkdir()
    (left / ".tmpfnhYNo").touch()
    write(tmp_path, "a", besides=checkpoint)
    assert checkpoint.read_text() == "state"


def test_where_a_file_cannot_be_replaced_none_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(EvaValueError, match="has a folder named b, which is") as told:
        write(tmp_path, "a", "b", force=True)
    assert contents(tmp_path) == {"a": "old"}
    assert contents(kept(told)) == {"a": "new", "b": "new"}


def kept(told: pytest.ExceptionInfo[EvaValueError]) -> Path:
    """Return the folder that an error says holds what was to be written."""
    return Path(str(told.value).rpartition(" are in ")[2])


@pytest.mark.parametrize("failing", range(4))
def test_a_failure_halfway_takes_all_back(
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
            assert not (out / ADAPTER_CONFIG).exists()  # nobody takes the folder for whole
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(EvaValueError, match="No space left on device") as told:
        write(out, *names, force=True)
    assert calls[failing] == ["new", "weights", "z", ADAPTER_CONFIG][failing]
    assert contents(out) == {"weights": "old", ADAPTER_CONFIG: "old", "z": "old"}
    assert contents(kept(told)) == dict.fromkeys(names, "new")
    assert sorted(p.name for p in kept(told).iterdir()) == sorted(names)


def test_a_copy_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a", "b")

    def full(source: Path, target: Path) -> None:
        target.write_text("ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(EvaValueError, match="No space left on device") as told:
        write(tmp_path, "a", "b", force=True)
    assert contents(tmp_path) == {"a": "new", "b": "new"}
    assert sorted(path.name for path in kept(told).iterdir()) == ["a", "b"]


def test_an_interrupt_in_the_last_moment_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, "a", "b")
    assert list(tmp_path.iterdir()) == []


def test_who_interrupts_twice_keeps_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ADAPTER_CONFIG, "weights")

    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)  # in the move, and in taking it back
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, ADAPTER_CONFIG, "weights", force=True)
    old = {
        path.name for path in tmp_path.rglob("*") if path.parent.name in (".before", tmp_path.name)
    }
    assert {ADAPTER_CONFIG, "weights"} <= old


def test_a_hidden_file_of_a_like_name_is_a_file(tmp_path: Path) -> None:
    (tmp_path / f".{tmp_path.name}.notes").write_text("mine")
    with pytest.raises(EvaValueError, match="is not empty; pass --force"):
        write(tmp_path, "a")


@pytest.mark.parametrize("there", [True, False])
def test_of_two_at_once_the_first_stays(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    second = staged_folder(out, False, None)
    (second.__enter__() / "a").write_text("second")
    write(out, "a")
    with pytest.raises(EvaValueError, match="another program has written files to it") as told:
        second.__exit__(None, None, None)
    assert contents(out) == {"a": "new"}
    assert contents(kept(told)) == {"a": "second"}


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_run_left_is_no_obstacle(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    abandoned = staged_folder(out, False, None)
    (abandoned.__enter__() / "a").write_text("half")
    write(out, "a")
    assert contents(out) == {"a": "new"}


def test_files_are_open_to_readers_and_on_the_disk(
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


def test_what_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaValueError, match=f"--out out: cannot write in {tmp_path}: Permission"):
        write(Path("out"), "a")
