"""A pytest plugin: the report names the tests marked ``gpu``, and failures are written at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Names a file. A suite that is killed for its time leaves no report, but it leaves this.
FAILURES = "EVA_GPU_CHECK_FAILURES"


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist begin with the files that come first, not with those of most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add a property to every test with the mark."""
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.user_properties.append(("gpu", "yes"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the name of a test that failed, and what it says, to the file."""
    _write(report, str(report.when))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write the name of a file whose tests cannot be collected, and why."""
    _write(report, "collection")


def _write(report: pytest.TestReport | pytest.CollectReport, when: str) -> None:
    path = os.environ.get(FAILURES)
    # Processes of pytest-xdist report to the one that started them, which writes.
    if not report.failed or not path or "PYTEST_XDIST_WORKER" in os.environ:
        return
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{report.nodeid} ({when})\n{report.longreprtext[-3000:]}\n\n")
