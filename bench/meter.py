"""Seconds and peak memory of the phases of a run, on the CPU or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .common import synchronized_now


def resident_bytes(field: str = "VmRSS") -> int:
    """Return the resident set of this process, or with ``"VmHWM"`` its high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def reset_resident_peak() -> None:
    """Set the high-water mark of the resident set to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Meter:
    """Measures phases; a phase that begins within another interrupts it.

    Memory is counted above its level when the meter was made: tensors on a GPU, the resident set
    of the process on the CPU.

    Args:
        device: that is measured, and waited for at the ends of phases.

    Attributes:
        seconds: by phase.
        peaks: the most bytes in use by phase.
        reserved: the most bytes that the allocator held by phase; on the CPU as ``peaks``.
        forwards: forward passes, counted by whoever makes them.
        tokens: in those, padding included.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.forwards = self.tokens = 0
        self._running: list[str] = []
        self._phase_begin = 0.0
        self._base_bytes = self._bytes_in_use()
        self._reset_peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block."""
        self._record_phase()
        self._running.append(name)
        try:
            yield
        finally:
            self._record_phase()
            self._running.pop()

    def move_seconds(self, source: str, target: str, seconds: float) -> None:
        """Count seconds of one phase, measured otherwise, for another."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    @property
    def peak(self) -> int:
        """The most bytes in use in any phase."""
        return max(self.peaks.values(), default=0)

    def _record_phase(self) -> None:
        now = synchronized_now(self.device)
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._phase_begin
            for store, peak, base_bytes in zip(
                (self.peaks, self.reserved), self._peak_bytes(), self._base_bytes, strict=True
            ):
                store[name] = max(store.get(name, 0), peak - base_bytes)
        self._reset_peak()
        self._phase_begin = time.perf_counter()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_resident_peak()

    def _bytes_in_use(self) -> tuple[int, int]:
        if self.device.type == "cuda":
            allocated = torch.cuda.memory_allocated(self.device)
            return allocated, torch.cuda.memory_reserved(self.device)
        return (resident_bytes(),) * 2

    def _peak_bytes(self) -> tuple[int, int]:
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device)
            return allocated, torch.cuda.max_memory_reserved(self.device)
        return (resident_bytes("VmHWM"),) * 2
