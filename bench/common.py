"""Shared by all benchmarks: the device and its clock, the machine, spreads, result files."""

from __future__ import annotations

import functools
import os
import platform
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from .files import commit, cpu_name, write_json

RESULTS = Path(__file__).parent / "results"


def default_device() -> torch.device:
    """Return the GPU, or the CPU if torch sees none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronized_now(device: torch.device) -> float:
    """Wait until a device is idle, and return the time of the host's clock in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that a number was measured with."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


@functools.cache  # a benchmark saves after every row, and must not wait for git each time
def header() -> dict[str, Any]:
    """Return what every result file begins with: the day, the commit and the machine."""
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"date": today, "commit": commit(), "machine": machine()}


def save(name: str, rows: Any, *, out: Path = RESULTS, **settings: Any) -> Path:
    """Write one result file."""
    path = out / f"{name}.json"
    write_json(path, {**header(), "settings": settings, "rows": rows})
    return path


def spread(values: list[float]) -> dict[str, float]:
    """Return median, p20 and p80."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p20", "p80"), values[0])
    parts = quantiles(values, n=10, method="inclusive")
    return {"median": parts[4], "p20": parts[1], "p80": parts[7]}
