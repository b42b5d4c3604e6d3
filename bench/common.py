"""What all benchmarks share: the machine, spreads of timings, result files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that a number was measured with."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def commit() -> str:
    """Return the commit that is measured, marked if the tree has changes."""
    root = Path(__file__).parent.parent
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return told.stdout.strip() or "unknown"


def save(name: str, rows: Any, *, out: Path = RESULTS, **settings: Any) -> Path:
    """Write one result file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    record = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "settings": settings,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def spread(values: list[float]) -> dict[str, float]:
    """Return median, p20 and p80."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p20", "p80"), values[0])
    parts = quantiles(values, n=10, method="inclusive")
    return {"median": parts[4], "p20": parts[1], "p80": parts[7]}
