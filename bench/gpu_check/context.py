"""The context passed to a stage, and the exceptions by which it reports faults or missing parts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_json
from .record import FILE

if TYPE_CHECKING:
    import torch

__all__ = ["Context", "StageFailed", "StageSkipped", "result_path"]


class StageFailed(Exception):
    """The stage found something wrong; the message says what."""


class StageSkipped(Exception):
    """The machine lacks what the stage needs; the message says what."""


@dataclass
class Context:
    """The input of a stage.

    Attributes:
        stage: its name.
        out: folder of the results.
        dry_run: a rehearsal on the CPU.
        seconds: time limit from its start, after which it is killed.
    """

    stage: str
    out: Path
    dry_run: bool
    seconds: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """A folder for files of this stage."""
        folder = self.out / self.stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def remaining(self) -> float:
        """Seconds left, minus what an orderly shutdown takes."""
        return self.seconds - (time.monotonic() - self.begin) - 2.0

    def device(self) -> torch.device:
        """Return the GPU, or the CPU in a rehearsal without one.

        Raises:
            StageFailed: torch sees no GPU.
        """
        from ..common import default_device  # imports torch

        device = default_device()
        if device.type == "cpu" and not self.dry_run:
            raise StageFailed("torch sees no CUDA device")
        return device

    def save(self, results: dict[str, Any], status: str = "running", reason: str = "") -> None:
        """Write the results so far."""
        found = {"status": status, "reason": reason, "results": results}
        write_json(result_path(self.out, self.stage), found)

    def saved(self) -> dict[str, Any]:
        """Return the results saved so far."""
        return (read_json(result_path(self.out, self.stage)) or {}).get("results", {})

    def results_of(self, stage: str) -> dict[str, Any]:
        """Return the results of an earlier stage, if it passed."""
        record = read_json(self.out / FILE) or {}
        found = record.get("stages", {}).get(stage, {})
        return found.get("results", {}) if found.get("status") == "passed" else {}


def result_path(out: Path, stage: str) -> Path:
    """Return the path of a stage's result file."""
    return out / stage / "result.json"
