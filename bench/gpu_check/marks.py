"""A pytest plugin: marks ``gpu`` tests in the report, and writes failures to a file at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Variable with the path of that file, which remains if the suite is killed before its report.
FAILURES = "EVA_GPU_CHECK_FAILURES"


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep the order of files, and not start with those with the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add a property to every test with the mark."""
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.user_properties.append(("gpu", "yes"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the name and the message of a failed test to the file."""
    _write(report, str(report.when))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write the name of a test file that cannot be collected, and the reason."""
    _write(report, "collection")


def _write(report: pytest.TestReport | pytest.CollectReport, when: str) -> None:
    path = os.environ.get(FAILURES)
    # Workers of pytest-xdist report to their controller, which writes.
    if not report.failed or not path or "PYTEST_XDIST_WORKER" in os.environ:
        return
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{report.nodeid} ({when})\n{report.longreprtext[-3000:]}\n\n")
