"""The peak memory of a block of code, and errors that mean that memory ran out."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

import torch

from ..errors import EvaRuntimeError

if sys.platform != "win32":
    import resource

__all__ = ["OutOfMemoryError", "PeakMemory", "is_out_of_memory", "peak_resident_bytes"]


class PeakMemory(AbstractContextManager["PeakMemory"]):
    """Measure the peak above the level at entry.

    Args:
        device: CUDA devices count allocated bytes; on others, the growth of the process's
            high-water mark of resident memory (0 if it had been higher before).

    Attributes:
        peak_bytes: valid after the block.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak_bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            self._start = peak_resident_bytes()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self.peak_bytes = peak_resident_bytes() - self._start


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process in bytes, 0 if the system has no count."""
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class OutOfMemoryError(EvaRuntimeError, torch.OutOfMemoryError, MemoryError):
    """The device, or the host, ran out of memory in a calibration pass."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on whatever device."""
    if isinstance(error, OutOfMemoryError):
        return False  # reported already
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
