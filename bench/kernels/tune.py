"""Search for fast launch parameters: the sketch of bfloat16 tokens, one parameter varied at a time.

On a GPU its results are the source of the tables in `kernels/launch.py`; on the CPU it is only a
rehearsal.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from eva_kernels import ops
from eva_kernels.kernels import sketch_plan
from eva_kernels.kernels.launch import SKETCH_TILES, Arch, Tile, arch_of

from . import sketch as cases
from ._case import ERROR_LIMITS
from ._timing import CpuTimer, CudaTimer, relative_error, time_together, timer_for

Rows = list[dict[str, Any]]
Sums = tuple[torch.Tensor, ...]
# N, D, Q; the most informative first, as time may run out
SHAPES = ((8192, 4096, 64), (2048, 4096, 64), (8192, 11008, 64), (8192, 4096, 128))
# Width -> kernel -> tiles that compile for Hopper with no or almost no spilling.
CANDIDATES: dict[int, dict[str, tuple[Tile, ...]]] = {
    64: {
        "project": (
            Tile(128, 64, 4, 3), Tile(256, 64, 8, 3), Tile(256, 64, 8, 4), Tile(128, 64, 4, 4),
            Tile(128, 64, 8, 3), Tile(64, 64, 4, 4),
        ),
        "back": (
            Tile(64, 128, 4, 3), Tile(64, 128, 8, 3), Tile(64, 128, 4, 4), Tile(128, 128, 8, 2),
            Tile(64, 256, 8, 3), Tile(32, 128, 4, 4), Tile(64, 64, 4, 4),
        ),
    },
    128: {
        "project": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 4), Tile(64, 64, 4, 3)),
        "back": (Tile(64, 128, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 8, 3)),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A single difference from the launch table.

    Attributes:
        label: for tables.
        arch: passed to the launchers, which look up its tiles by its name.
    """

    label: str
    arch: Arch


def candidate_changes(arch: Arch, width: int, tiles: dict[str, Any]) -> Iterator[Change]:
    """Yield the changes to try on a chip at a sketch width, and put their tiles into ``tiles``."""
    current_tiles = tiles[arch.name]
    if arch.dependent_launch:
        yield Change("kernels one after another", replace(arch, dependent_launch=False))
    for kernel, candidates in CANDIDATES[width].items():
        for tile in candidates:
            if tile == getattr(current_tiles[width], kernel):
                continue
            size = f"{tile.block_n} x {tile.block_d}"
            label = f"{kernel} {size}, {tile.num_warps} warps, {tile.num_stages} stages"
            tiles[label] = {**current_tiles, width: replace(current_tiles[width], **{kernel: tile})}
            yield Change(label, replace(arch, name=label))


@contextlib.contextmanager
def launch_parameters(arch: Arch) -> Iterator[None]:
    """Make the sketch op use the launch parameters of ``arch``."""
    # not by attribute: `eva_kernels.ops.sketch` is the function
    module = importlib.import_module("eva_kernels.ops.sketch")
    with mock.patch.object(module, "device_arch", return_value=arch):
        yield


class Problem:
    """Tokens and basis of one shape, exact sums, and the sketch with any launch parameters."""

    def __init__(self, n: int, d: int, q: int, device: torch.device) -> None:
        self.x = cases.tokens(n, d, torch.bfloat16, device)
        self.pivot = self.x[: n // 4].float().mean(0)
        self.basis = torch.linalg.qr(torch.randn(d, q, device=device)).Q.mT.contiguous()
        self.truth = cases.truth(self.x, self.basis, self.pivot)

    def run(self, arch: Arch, sums: Sums) -> Sums:
        """Add the batch to the sums with the Triton kernels."""
        with launch_parameters(arch):
            ops.sketch(self.x, self.basis, self.pivot, *sums, backend="triton")
        return sums

    def failure_reason(self, arch: Arch) -> str:
        """Return what is wrong with the result on ``arch``, or an empty string."""
        first, second = (self.run(arch, self.sums()) for _ in range(2))
        error = relative_error(first, self.truth)
        if not error <= ERROR_LIMITS["high"]:
            return f"relative error {error:.1e}"
        same = all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        return "" if same else "two runs differ in their bits"

    def sums(self) -> Sums:
        """Return zero sums in the dtypes of the state."""
        products, shift, square = (torch.zeros_like(t) for t in self.truth)
        return products.float(), shift, square


def breakdown(run: Callable[[], Any], device: torch.device, count: int = 10) -> dict[str, float]:
    """Return the median microseconds of every kernel of a call, cold caches; empty on the CPU."""
    if device.type != "cuda":
        return {}
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(count):
            flush.zero_()
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.name.endswith("_kernel"):
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return {name: sorted(times)[len(times) // 2] for name, times in found.items()}


def _kernel_times(problem: Problem, arch: Arch) -> dict[str, float]:
    # with dependent launch a kernel's time would overlap the end of its predecessor
    without_overlap = replace(arch, dependent_launch=False)
    try:
        return breakdown(
            functools.partial(problem.run, without_overlap, problem.sums()), problem.x.device
        )
    except RuntimeError:  # of the profiler; the total times matter more
        return {}


def measure(
    make_problem: Callable[[], Problem],
    change: Change,
    arch: Arch,
    timer: CpuTimer | CudaTimer,
    budget: float,
) -> dict[str, Any]:
    """Return a row: time with a change and ratio to that without; for no change also by kernel."""
    row: dict[str, Any] = {"change": change.label}
    try:
        problem = make_problem()
        reason = problem.failure_reason(change.arch)
        if reason:
            return {**row, "status": "incorrect", "reason": reason}
        runs = {
            name: functools.partial(problem.run, run_arch, problem.sums())
            for name, run_arch in (("changed", change.arch), ("as is", arch))
        }
        min_rounds = 2 if isinstance(timer, CpuTimer) else 5
        times = time_together(runs, timer, budget=budget, min_rounds=min_rounds, max_rounds=30)
        if change.arch == arch:
            row["kernels_us"] = _kernel_times(problem, arch)
    except Exception as error:  # the other changes are still worth measuring
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    medians = {name: found["ms"]["median"] for name, found in times.items()}
    ratio = medians["changed"] / medians["as is"]
    return {**row, "status": "timed", "ms": times["changed"]["ms"], "over_as_is": ratio}


def run(
    device: torch.device,
    *,
    small: bool = False,
    seconds: float = 200.0,
    save: Callable[[Rows], None] = lambda rows: None,
) -> Rows:
    """Measure shape by shape, change by change, while time is left.

    Args:
        device: where to measure.
        small: only one small shape, for a rehearsal.
        seconds: no measurement starts later than this.
        save: called after each row with all rows so far.

    Raises:
        RuntimeError: there are no launch parameters for the device.
    """
    deadline, timer, rows = time.monotonic() + seconds, timer_for(device), []
    arch = arch_of(device)
    if isinstance(arch, str):
        raise RuntimeError(arch)
    tiles: dict[str, Any] = dict(SKETCH_TILES)
    with mock.patch.object(sketch_plan, "SKETCH_TILES", tiles):
        for n, d, q in [(64, 96, 16)] if small else SHAPES:
            width = min(width for width in CANDIDATES if width >= q)
            # created on first use
            problem = functools.cache(functools.partial(Problem, n, d, q, device))
            for change in (Change("as is", arch), *candidate_changes(arch, width, tiles)):
                if time.monotonic() > deadline:
                    row: dict[str, Any] = {"change": change.label, "status": "not reached"}
                else:
                    row = measure(problem, change, arch, timer, 0.02 if small else 0.3)
                rows.append({"shape": {"N": n, "D": d, "Q": q}, **row})
                save(rows)
    return rows


def table(rows: Rows) -> str:
    """Return the rows as text: microseconds, and the ratio to the time with the launch table."""
    lines = []
    for row in rows:
        shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        outcome = row["status"] if row["status"] == "not reached" else f"{row.get('reason', '')}"
        if row["status"] == "timed":
            outcome = f"{1e3 * row['ms']['median']:9.1f} us {row['over_as_is']:7.3f}"
        lines.append(f"{shape:24} {row['change']:38} {outcome}")
        lines += [f"{'':24} {k:38} {us:9.1f} us" for k, us in row.get("kernels_us", {}).items()]
    return "\n".join(lines)
