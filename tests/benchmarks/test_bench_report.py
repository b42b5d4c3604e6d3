"""The HTML report, which is self-contained, and tables made from JSON files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench import report
from bench.common import RESULTS
from bench.sections import Section

RECORD = {
    "date": "2026-01-02",
    "commit": "abc1234",
    "machine": {
        "cpu": "A CPU",
        "threads": 2,
        "gpu": None,
        "torch": "2.0",
        "transformers": "5.0",
        "peft": "0.2",
    },
    "settings": {},
    "rows": [{"x": 1.5}, {"x": 2.5}],
}


def draw() -> Figure:
    figure = Figure()
    figure.set_label("A line")
    figure.subplots().plot([1, 2])
    return figure


def show(record: dict[str, Any]) -> list[Section]:
    rows = [[str(row["x"]), "a < b"] for row in record["rows"]]
    text = "Words with `code`.\n\n- a point\n- another"
    return [Section("Made up", text, ["x", "y"], rows, {"line": draw}, "A *note*.")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "shows_made_up", SimpleNamespace(sections=show))
    monkeypatch.setattr(report, "PARTS", {"made-*": "shows_made_up"})
    monkeypatch.setattr(report, "OTHERS", {})
    (tmp_path / "made-up.json").write_text(json.dumps(RECORD))
    return tmp_path


def test_report_page_and_readme_tables(folder: Path) -> None:
    page = report.run(folder).read_text()
    assert "<h2>Made up</h2>" in page
    assert "<code>code</code>" in page
    assert "<li>a point</li>" in page
    assert "<td>a &lt; b</td>" in page
    assert "<em>note</em>" in page
    assert "2026-01-02, commit abc1234, A CPU, 2 threads, torch 2.0" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # no external resources
    text = (folder / "README.md").read_text()
    assert "| 1.5 | a < b |" in text
    assert "![line](plots/line.png)" in text
    assert (folder / "plots" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "plots" / "line.svg").read_text()


def test_tables_follow_the_result_file(folder: Path) -> None:
    (folder / "made-up.json").write_text(json.dumps({**RECORD, "rows": [{"x": 9.75}]}))
    assert "9.75" in report.html_page(folder)
    assert "9.75" in report.markdown_page(folder)


def test_empty_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no result files in"):
        report.run(tmp_path)


def test_committed_tables_match_the_committed_results() -> None:
    assert (RESULTS / "README.md").read_text() == report.markdown_page(RESULTS)
