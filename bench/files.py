"""Result files and their metadata; does not import torch."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def write_json(path: Path, value: Any) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_json(path: Path) -> Any:
    """Return what a file holds, or ``None`` if there is none, or none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def commit() -> str:
    """Return the commit, marked if the tree has changes; CI's where the checkout has no history."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return os.environ.get("GITHUB_SHA", "unknown")
    return completed.stdout.strip() or os.environ.get("GITHUB_SHA", "unknown")


def cpu_name() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
