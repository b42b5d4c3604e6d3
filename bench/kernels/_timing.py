"""Timing on a device with cold caches, the machine's ceilings, and counts of a step's launches.

On a GPU times come from CUDA events; on the CPU, only used for rehearsals, from a clock.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..common import spread

Run = Callable[[], Any]
# Written between repetitions: several times the last-level cache of any GPU.
FLUSH_BYTES = 256 << 20
MAX_FLUSHES = 40
COUNTS = ("launches", "kernels", "host_waits", "copies_to_host", "sync_warnings")
LAUNCH_CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperative")
WAIT_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of this machine, reached by library calls.

    Attributes:
        bytes_per_second: of a large copy on the device, bytes read plus bytes written.
        flops_per_second: of a large bfloat16 matrix product on random data.
    """

    bytes_per_second: float
    flops_per_second: float


class CpuTimer:
    """Time calls with a clock, without flushing caches."""

    name = "cpu clock"

    def sample(self, run: Run) -> tuple[float, float]:
        """Return the seconds of a call twice, as device and as host time."""
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        return seconds, seconds


class CudaTimer:
    """Time calls with CUDA events, the L2 cache overwritten before each.

    Overwriting also keeps the device busy while the host enqueues the call, so that the events
    measure device work and not host overhead, unless the call itself synchronises.
    """

    name = "cuda events"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._flush(3)
        self.flush_seconds = self._timed(lambda: self._flush(10)) / 10

    def _flush(self, count: int) -> None:
        for _ in range(count):
            self.buffer.zero_()

    def _timed(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def sample(self, run: Run) -> tuple[float, float]:
        """Run twice: return the device's seconds, and the host's seconds to enqueue the call."""
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        torch.cuda.synchronize(self.device)
        self._flush(min(MAX_FLUSHES, 2 + math.ceil(1.5 * host / self.flush_seconds)))
        return self._timed(run), host


def timer_for(device: torch.device) -> CpuTimer | CudaTimer:
    """Return the timer for a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def repetitions(first_seconds: float, budget: float, min_rounds: int, max_rounds: int) -> int:
    """Return how many rounds fit the budget, clamped to ``min_rounds`` and ``max_rounds``."""
    return max(min_rounds, min(max_rounds, int(budget / max(first_seconds, 1e-9))))


def time_together(
    competitors: Mapping[str, Run],
    timer: CpuTimer | CudaTimer,
    *,
    budget: float = 0.5,
    min_rounds: int = 5,
    max_rounds: int = 50,
) -> dict[str, dict[str, Any]]:
    """Time competitors alternately, A B A B ..., after a warm-up that includes compilation.

    Args:
        competitors: name -> call.
        timer: see :func:`timer_for`.
        budget: seconds for all rounds together; at least ``min_rounds`` rounds are run.
        min_rounds, max_rounds: minimum and maximum number of rounds.

    Returns:
        name -> ``ms`` and ``host_ms`` (median, p20, p80) and ``repetitions``.
    """
    for run in competitors.values():
        timer.sample(run)
    begin = time.perf_counter()
    for run in competitors.values():
        timer.sample(run)
    rounds = repetitions(time.perf_counter() - begin, budget, min_rounds, max_rounds)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, run in competitors.items():
            samples[name].append(timer.sample(run))
    return {
        name: {
            "ms": spread([1e3 * seconds for seconds, _ in values]),
            "host_ms": spread([1e3 * host for _, host in values]),
            "repetitions": rounds,
        }
        for name, values in samples.items()
    }


def rates_and_share(
    seconds: float, flops: float, nbytes: float, ceilings: Ceilings | None
) -> dict[str, Any]:
    """Return rates, and the share of the roofline: the larger of its two least times over ours."""
    rates: dict[str, Any] = {"gb_s": nbytes / seconds / 1e9, "tflop_s": flops / seconds / 1e12}
    if ceilings is not None:
        memory_seconds = nbytes / ceilings.bytes_per_second
        arithmetic_seconds = flops / ceilings.flops_per_second
        rates["floor_ms"] = 1e3 * max(memory_seconds, arithmetic_seconds)
        rates["limited_by"] = "memory" if memory_seconds >= arithmetic_seconds else "arithmetic"
        rates["share_of_ceiling"] = max(memory_seconds, arithmetic_seconds) / seconds
    return rates


def measure_ceilings(device: torch.device, small: bool = False) -> dict[str, Any]:
    """Measure a large copy and a large bfloat16 matrix product on random data."""
    timer = timer_for(device)
    size, side = (1 << 22, 256) if small else (1 << 31, 8192)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(left, right, out=product),
    }
    times = time_together(
        runs, timer, min_rounds=3 if small else 10, max_rounds=10 if small else 40
    )
    found = Ceilings(
        bytes_per_second=2 * size / (times["copy"]["ms"]["median"] / 1e3),
        flops_per_second=2 * side**3 / (times["matmul"]["ms"]["median"] / 1e3),
    )
    shapes = {"copy_bytes": size, "matmul_side": side, "timer": timer.name}
    return {**asdict(found), **shapes, "times": times}


def count_device_calls(run: Run, device: torch.device) -> dict[str, int | None]:
    """Count kernel launches, waits of the host and copies to the host of one call.

    The profiler's own calls are counted on an empty call and subtracted. On the CPU there is
    nothing to count, and every number is ``None``.
    """
    if device.type != "cuda":
        return dict.fromkeys(COUNTS)
    run()  # compiles and allocates before anything is counted
    counted, empty = _profile_counts(run), _profile_counts(lambda: None)
    counts: dict[str, int | None] = {key: counted[key] - empty[key] for key in counted}
    counts["sync_warnings"] = _sync_warnings(run)
    return counts


def _profile_counts(run: Run) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    return count_events(Counter((e.name, e.device_type == on_device) for e in profile.events()))


def count_events(events: Mapping[tuple[str, bool], int]) -> dict[str, int]:
    """Sort profiled events into launches, kernels, waits and copies to the host.

    Args:
        events: (name, whether the device ran it) -> count.
    """
    host = {name: n for (name, on_device), n in events.items() if not on_device}
    device = {name: n for (name, on_device), n in events.items() if on_device}
    not_kernels = ("Memcpy", "Memset")
    return {
        "launches": sum(n for name, n in host.items() if name.startswith(LAUNCH_CALLS)),
        "kernels": sum(n for name, n in device.items() if not name.startswith(not_kernels)),
        "host_waits": sum(n for name, n in host.items() if name.startswith(WAIT_CALLS)),
        "copies_to_host": sum(n for name, n in device.items() if name.startswith("Memcpy DtoH")),
    }


def _sync_warnings(run: Run) -> int:
    """Count the synchronising calls that PyTorch itself reports."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative error of some tensors in Frobenius norm; NaN stays NaN."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max())
