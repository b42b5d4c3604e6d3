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

from .common import RESULTS, save
from .meter import reset_resident_peak, resident_bytes
from .processes import ALLOCATOR

LENGTH = 128


def child(mode: str) -> None:
    """Run one pass and print what it added to the resident set at its peak, in bytes."""
    from . import initialize, minilm

    batches = minilm.load_batches(initialize.FORWARDS, initialize.BATCH, LENGTH)
    run_pass = initialize.PASSES[mode]
    # Before the mark is reset, all code is loaded and every library has allocated its buffers, so
    # that only the pass counts.
    run_pass(initialize.make_adapted_model(), minilm.load_batches(2, 2, 64))
    model = initialize.make_adapted_model()
    gc.collect()
    reset_resident_peak()
    before = resident_bytes()
    run_pass(model, batches)
    sys.stdout.write(json.dumps({"peak": resident_bytes("VmHWM") - before}) + "\n")


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
    medians = {mode: median(values) for mode, values in peaks.items()}
    ours, peft = (medians[m] - medians["plain"] for m in ("ours", "peft"))
    return {
        "peaks": peaks,
        "ours_over_plain": ours,
        "peft_over_plain": peft,
        "share": max(ours, 0) / peft,
    }


def run(repeats: int = 3, out: Path = RESULTS) -> None:
    """Measure and save."""
    save("memory", measure(repeats), repeats=repeats, padded_to=LENGTH, out=out)
