"""compute-sanitizer over the tests of the native kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...files import ROOT
from ..context import Context, StageFailed, StageSkipped

OPS = ("convergence", "eigh", "fold_passes", "nystrom", "start")
TESTS = tuple(f"tests/ops/test_{name}.py" for name in OPS)
NATIVE = "native or graded"  # selects the tests that launch the native kernels
# racecheck, which tracks every shared memory access, is by far the slowest: only small widths.
SMALL_NATIVE = (
    f"({NATIVE}) and not (64 or 100 or 128 or shape4 or shape5 or bad_input or simulated)"
)
SELECTIONS = {"memcheck": NATIVE, "racecheck": SMALL_NATIVE, "synccheck": NATIVE}
TOOLS = tuple(SELECTIONS)
# The tools instrument only our kernels: instrumenting torch's as well would take minutes.
KERNEL_FILTER = "kns=eva_kernels"  # a substring of the mangled names: the namespace
FALLBACK_PATHS = ("/usr/local/cuda/bin/compute-sanitizer",)
UNSUPPORTED = ("Device not supported", "Unsupported device", "not supported on this")


def run(context: Context) -> None:
    """Run all tools; the stage fails if any of them finds an error."""
    tool_path = next(filter(None, map(shutil.which, ("compute-sanitizer", *FALLBACK_PATHS))), None)
    if tool_path is None:
        raise StageSkipped("compute-sanitizer is not installed")
    if context.dry_run:
        raise StageSkipped("a dry run has no device to check")
    # In parallel: most of the time is spent loading torch under the tool.
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        jobs = {tool: pool.submit(_run_tool, tool_path, tool, context) for tool in TOOLS}
        results = {tool: job.result() for tool, job in jobs.items()}
    context.save({"tools": results})
    if all(result["reason"].startswith("unsupported") for result in results.values()):
        raise StageSkipped("compute-sanitizer does not support this device")
    bad = [f"{tool}: {result['reason']}" for tool, result in results.items() if result["reason"]]
    if bad:
        raise StageFailed("; ".join(bad))


def _run_tool(path: str, tool: str, context: Context) -> dict[str, Any]:
    seconds = context.remaining
    tests = [name for name in TESTS if (ROOT / name).exists()]
    command = [path, "--tool", tool, "--kernel-name", KERNEL_FILTER, "--target-processes", "all"]
    command += ["--error-exitcode", "99", sys.executable, "-m", "pytest", "-q", *tests]
    command += ["-k", SELECTIONS[tool], "-p", "no:cacheprovider", "-p", "no:benchmark"]
    # With torch's caching allocator, accesses past a tensor's end can stay within an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = context.folder / f"{tool}.txt"
    with log.open("w", encoding="utf-8") as file:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            return {"reason": f"not done after {seconds:.0f} s", "log": log.name}
    output = log.read_text(encoding="utf-8", errors="replace")
    return {"summary": summaries(output), "reason": failure_reason(output, status), "log": log.name}


def summaries(output: str) -> list[str]:
    """Return the tool's summary lines."""
    return re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)


def failure_reason(output: str, status: int) -> str:
    """Return what is wrong, or an empty string; a missing summary or test run is wrong, too."""
    if any(words in output for words in UNSUPPORTED):
        return "unsupported device"
    found = summaries(output)
    bad = [line for line in found if not re.search(r"SUMMARY: 0 (?:error|hazard)", line)]
    if bad:
        return bad[0]
    if status:
        return f"ended with status {status}"
    if not found:
        return "no summary in the output"
    return "" if re.search(r"\b[1-9]\d* passed", output) else "no test ran"
