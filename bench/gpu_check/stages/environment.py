"""Description of the machine: device, driver, clocks, versions, and the backend of every op."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...files import cpu_name
from ..context import Context, StageFailed

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "pybind11", "pytest")
QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
)


def run(context: Context) -> None:
    """Describe the machine; on a GPU every op must have its fast path."""
    import torch

    from eva_kernels import ops

    cuda = torch.cuda.is_available()
    machine = {
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }
    if cuda:
        found = torch.cuda.get_device_properties(0)
        machine["multiprocessors"] = found.multi_processor_count
        machine["l2_bytes"] = getattr(found, "L2_cache_size", None)
        machine.update(smi())
    backends = {op: {"backend": name, "reason": why} for op, name, why in ops.backend_report()}
    results: dict[str, Any] = {
        "machine": machine,
        "versions": versions(),
        "backends": backends,
    }
    context.save(results)
    if context.dry_run:
        return
    if not cuda:
        raise StageFailed("torch sees no CUDA device")
    slow = [f"{op} ({b['reason']})" for op, b in backends.items() if b["backend"] == "torch"]
    if slow:
        raise StageFailed(f"no fast path for {', '.join(slow)}")


def versions() -> dict[str, str | None]:
    """Return the versions of everything that the numbers depend on."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none" if importlib.util.find_spec(name) is None else "unknown"
    return {**found, "cuda": torch.version.cuda}


def smi() -> dict[str, str]:
    """Return driver, clocks and limits as reported by ``nvidia-smi``; nothing is changed."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    return parse_smi(output)


def parse_smi(output: str) -> dict[str, str]:
    """Return the fields of the first device."""
    first_device = output.splitlines()[0].split(",") if output.strip() else []
    return dict(zip(QUERY.split(","), (part.strip() for part in first_device), strict=False))
