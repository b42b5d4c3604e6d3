"""Benchmark rows are kept over interruptions and failures; child processes and their errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import processes
from bench.processes import ChildFailedError, ask_child
from bench.rows import Rows

KEYS = [{"method": name, "batch": size} for name in ("a", "b") for size in (1, 2)]


def rows(out: Path, **settings: Any) -> Rows:
    return Rows("part", {"r": 16, **settings}, out, quiet=True)


def numbers(key: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": f"{key['method']}{key['batch']}"}


def test_rows_are_written_to_the_file(tmp_path: Path) -> None:
    part = rows(tmp_path)
    made = part.make(KEYS, numbers)
    assert made[2] == {"method": "b", "batch": 1, "value": "b1"}
    record = json.loads(part.finish(made).read_text())
    assert record["rows"] == made
    assert record["settings"] == {"r": 16}
    assert {"date", "commit", "machine"} <= record.keys()
    assert not list(tmp_path.glob(".unfinished/*"))


def test_interrupted_run_resumes_at_the_missing_row(tmp_path: Path) -> None:
    calls: list[str] = []

    def run(key: Mapping[str, Any]) -> dict[str, Any]:
        calls.append(numbers(key)["value"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return numbers(key)

    with pytest.raises(KeyboardInterrupt):
        rows(tmp_path).make(KEYS, run)
    assert rows(tmp_path).make(KEYS, run) == [{**key, **numbers(key)} for key in KEYS]
    assert calls == ["a1", "a2", "b1", "b1", "b2"]


def test_changed_settings_discard_old_rows(tmp_path: Path) -> None:
    rows(tmp_path).make(KEYS, numbers)
    again = rows(tmp_path, rho=2.0).make(KEYS[:1], lambda key: {"value": "new"})
    assert again[0]["value"] == "new"


def test_truncated_line_is_computed_again(tmp_path: Path) -> None:
    part = rows(tmp_path)
    part.make(KEYS, numbers)
    text = part.path.read_text()
    part.path.write_text(text[:-9])
    calls = []
    rows(tmp_path).make(KEYS, lambda key: calls.append(key) or {})  # type: ignore[func-returns-value]
    assert calls == KEYS[3:]


def test_failure_becomes_a_row_and_others_run(tmp_path: Path) -> None:
    def run(key: Mapping[str, Any]) -> dict[str, Any]:
        if key["method"] == "a":
            raise ValueError("no such thing\nand more")
        return numbers(key)

    made = rows(tmp_path).make(KEYS, run)
    assert [row.get("error") for row in made] == ["ValueError: no such thing"] * 2 + [None] * 2


def child(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / "child_of_a_test.py").write_text(f"import sys, json, os, time\n{code}\n")
    monkeypatch.setattr(processes, "ROOT", folder)
    return "child_of_a_test"


def test_child_process_returns_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('noise'); print(json.dumps({'got': json.loads(sys.argv[1])}))"
    module = child(tmp_path, code, monkeypatch)
    assert ask_child(module, {"x": [1, None]}, 20.0) == {"got": {"x": [1, None]}}


@pytest.mark.parametrize(
    ("code", "seconds", "message"),
    [
        ("raise SystemExit('out of luck')", 20.0, "^out of luck$"),
        ("os._exit(3)", 20.0, "ended with status 3"),
        ("time.sleep(60)", 0.5, "no answer within"),
    ],
)
def test_child_process_without_a_result_raises(
    code: str, seconds: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = child(tmp_path, code, monkeypatch)
    with pytest.raises(ChildFailedError, match=message):
        ask_child(module, {}, seconds)


def test_child_process_uses_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = child(tmp_path, "print(json.dumps({'python': sys.executable}))", monkeypatch)
    found = ask_child(module, {}, 20.0)["python"]
    assert os.path.normpath(found) == os.path.normpath(sys.executable)
