"""Peak resident memory of a pass above the plain forward, each in a fresh process."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from .common import save

LENGTH = 128
# Freed blocks go back to the system at once, so that the high-water mark is of live memory.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def child(mode: str) -> None:
    """Run one pass and print what it added to the resident set at its peak, in bytes."""
    from . import initialize, minilm

    batches = minilm.load_batches(initialize.FORWARDS, initialize.BATCH, LENGTH)
    run_pass = initialize.PASSES[mode]
    # All code is loaded and every library has its buffers before the mark is set: what counts is
    # the pass.
    run_pass(initialize.adapted(), minilm.load_batches(2, 2, 64))
    model = initialize.adapted()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    run_pass(model, batches)
    sys.stdout.write(json.dumps({"peak": _resident("VmHWM") - before}) + "\n")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(repeats: int = 3) -> dict[str, Any]:
    """Return the medians of the peaks and the overheads above the plain pass."""
    peaks: dict[str, list[int]] = {"plain": [], "ours": [], "peft": []}
    for _ in range(repeats):
        for mode, values in peaks.items():
            out = subprocess.run(
                [sys.executable, "-m", "bench", "memory", "--child", mode],
                env={**os.environ, **ALLOCATOR},
                capture_output=True,
                text=True,
                check=True,
            )
            values.append(json.loads(out.stdout.splitlines()[-1])["peak"])
    middle = {mode: median(values) for mode, values in peaks.items()}
    ours, peft = (middle[m] - middle["plain"] for m in ("ours", "peft"))
    return {
        "peaks": peaks,
        "ours_over_plain": ours,
        "peft_over_plain": peft,
        "share": max(ours, 0) / peft,
    }


def run(repeats: int = 3) -> None:
    """Measure and save."""
    save("memory", measure(repeats), repeats=repeats, padded_to=LENGTH)
