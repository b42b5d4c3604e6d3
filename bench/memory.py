"""Peak resident memory of a pass above the plain forward, each in a fresh process."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from statistics import median
from typing import Any

from .common import save

LENGTH = 128
# Freed blocks go back to the system at once, so that the high-water mark is of live memory.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def child(mode: str) -> None:
    """Run one pass and print the peak of this process, in bytes."""
    from . import initialize, minilm

    batches = minilm.load_batches(initialize.FORWARDS, initialize.BATCH, LENGTH)
    initialize.run_plain(batches[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    {
        "plain": initialize.run_plain,
        "ours": initialize.run_ours,
        "peft": initialize.run_peft,
    }[mode](batches)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.write(json.dumps({"peak": 1024 * after, "before": 1024 * before}) + "\n")


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
