"""Launch parameters of every kernel by architecture, and the limits of each architecture.

Unless noted otherwise, they were chosen from compiled code and not timed: tiles as large as fit
without spilling registers (larger tiles read V and P less often through the L2 cache), then as many
stages as fit in shared memory. ``bench kernel-report`` prints the evidence for each of them.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from triton.language.extra import cuda
from triton.runtime import driver

__all__ = [
    "GRAM_TILES",
    "HAS_DEPENDENT_LAUNCH",
    "SKETCH_TILES",
    "Arch",
    "GramTiles",
    "SketchTiles",
    "Tile",
    "arch_of",
    "ceil_div",
    "compile_options",
    "lay_out_workspace",
    "pipeline_stages",
    "rows_per_thread",
    "splits_to_fill",
]


ALIGNMENT = 256  # bytes, of the parts of a workspace


@dataclass(frozen=True)
class Tile:
    """Tile of the tokens that one program streams, with its warps and stages.

    Attributes:
        block_n: tokens.
        block_d: features.
        num_warps: warps of a program.
        num_stages: of the software pipeline: tiles in flight.
    """

    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def divides(self, n: int, d: int) -> bool:
        """Tell whether tiles divide (n, d) tokens, so that none needs a mask."""
        return n % self.block_n == 0 and d % self.block_d == 0


@dataclass(frozen=True)
class SketchTiles:
    """Tiles of the two kernels that stream tokens, at one width of the sketch.

    Attributes:
        project, back: for bfloat16 tokens, which the tensor cores take as they are.
        project_centred, back_centred: for float16 and float32 tokens, centred in registers.
    """

    project: Tile
    back: Tile
    project_centred: Tile
    back_centred: Tile

    def project_and_back(self, centred: bool) -> tuple[Tile, Tile]:
        """Return the tiles of project and back."""
        if centred:
            return self.project_centred, self.back_centred
        return self.project, self.back


@dataclass(frozen=True)
class GramTiles:
    """Tiles of the Gram kernel: block_d by block_d outputs, block_n tokens at a time.

    Attributes:
        bits16: for tokens of 16 bits.
        bits32: for tokens of 32 bits.
    """

    bits16: Tile
    bits32: Tile

    def for_itemsize(self, itemsize: int) -> Tile:
        """Return the tile for tokens of ``itemsize`` bytes per entry."""
        return self.bits16 if itemsize == 2 else self.bits32


@dataclass(frozen=True)
class Arch:
    """Properties of a chip that the launchers depend on.

    Attributes:
        name: ``"sm_90"``, ``"gfx942"``, ...
        processors: multiprocessors of the device (of the family's largest, if none is present).
        shared_bytes: largest shared memory of one program.
        min_q: narrowest tile of Q that the tensor cores multiply at full rate.
        indirect_stages: additional stages of a loop that also loads the addresses of its tokens.
            On NVIDIA this chain of loads is spread over the pipeline: two more stages prefetch the
            tokens equally far ahead, at the cost of shared memory for the indices only.
        dependent_launch: whether a kernel can be launched before its predecessor has finished.
    """

    name: str
    processors: int
    shared_bytes: int
    min_q: int
    indirect_stages: int = 2
    dependent_launch: bool = False


def _can_compile_wait() -> bool:
    """Tell whether this Triton can compile a wait for the preceding kernel (3.4 has it, broken)."""
    wait = getattr(cuda, "gdc_wait", None)
    return wait is not None and "_semantic" in inspect.signature(wait).parameters


HAS_DEPENDENT_LAUNCH = _can_compile_wait()

# The largest chip of each family: only the number of splits depends on it.
ARCHS: Mapping[str, Arch] = MappingProxyType(
    {
        "sm_80": Arch("sm_80", 108, 166_912, 16),
        "sm_86": Arch("sm_86", 84, 101_376, 16),
        "sm_89": Arch("sm_89", 142, 101_376, 16),
        # wgmma has 64 rows, and so has tcgen05.mma
        # On an H200 a sketch with programmatic dependent launch takes 0.95 of the time without it
        # at N = 2048 and D = 4096, 0.93 at D = 11008, 0.97 at N = 8192 (2026-11-26,
        # bench/results/h200/third); 1.22 at N = 2048 if the next kernel may start before the loop.
        "sm_90": Arch("sm_90", 132, 232_448, 64, dependent_launch=HAS_DEPENDENT_LAUNCH),
        "sm_100": Arch("sm_100", 148, 232_448, 64, dependent_launch=HAS_DEPENDENT_LAUNCH),
        "sm_120": Arch("sm_120", 188, 101_376, 16, dependent_launch=HAS_DEPENDENT_LAUNCH),
        "gfx942": Arch("gfx942", 304, 65_536, 16, indirect_stages=0),
    }
)

# Order in each entry: project, back, project_centred, back_centred. Where two tiles compile without
# spilling, the larger one is taken, then the deeper one.
#
# A warpgroup multiplies 64 rows of V or P at once. At Q = 64 project and back use one of them, and
# several programs share a multiprocessor. Timed on an H200 (bench/results/h200/second, N = 8192,
# D = 4096): with 256 tokens and 8 warps in project, which reads V a quarter as often, a sketch took
# 1.05 of this time; at Q = 128 with three stages 1.03. The tiles of back were the best tried.
# Q = 128 is two warpgroups. 256 rows leave registers for 64 columns only.
_HOPPER = {
    64: SketchTiles(
        Tile(64, 64, 4, 4), Tile(64, 128, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)
    ),
    128: SketchTiles(
        Tile(128, 64, 8, 4), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)
    ),
    256: SketchTiles(
        Tile(64, 64, 8, 3), Tile(32, 64, 8, 3), Tile(32, 64, 8, 3), Tile(32, 64, 8, 3)
    ),
}
# Accumulators are in tensor memory, not in registers: wider tiles than Hopper's at Q = 64.
_BLACKWELL = {
    **_HOPPER,
    64: SketchTiles(
        Tile(256, 64, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)
    ),
    128: SketchTiles(
        Tile(128, 64, 8, 3), Tile(64, 64, 8, 4), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)
    ),
    256: SketchTiles(
        Tile(64, 64, 8, 3), Tile(16, 64, 8, 3), Tile(32, 64, 8, 3), Tile(64, 64, 8, 2)
    ),
}
# mma.sync takes both operands from registers: from 128 rows of V or P on, four warps would spill
# what eight can hold.
_AMPERE = {
    64: SketchTiles(
        Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)
    ),
    128: SketchTiles(
        Tile(64, 64, 8, 3), Tile(64, 64, 8, 3), Tile(64, 64, 8, 3), Tile(64, 64, 8, 3)
    ),
    256: SketchTiles(
        Tile(32, 64, 8, 3), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)
    ),
}
# 99 KiB of shared memory: two stages, and narrow tiles at Q = 256.
_SMALL = {
    64: SketchTiles(
        Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 8, 2)
    ),
    128: SketchTiles(
        Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)
    ),
    256: SketchTiles(
        Tile(32, 64, 8, 2), Tile(16, 64, 8, 2), Tile(16, 64, 8, 2), Tile(32, 64, 8, 2)
    ),
}
# 64 KiB of local memory and 512 registers a lane.
_CDNA = {
    64: SketchTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: SketchTiles(
        Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)
    ),
    256: SketchTiles(
        Tile(32, 64, 8, 1), Tile(32, 64, 8, 2), Tile(32, 64, 8, 1), Tile(32, 64, 8, 2)
    ),
}
# By architecture, then by the largest Q that the tiles are for.
SKETCH_TILES: Mapping[str, Mapping[int, SketchTiles]] = MappingProxyType(
    {
        "sm_80": _AMPERE,
        "sm_86": _SMALL,
        "sm_89": _SMALL,
        "sm_90": _HOPPER,
        "sm_100": _BLACKWELL,
        "sm_120": _SMALL,
        "gfx942": _CDNA,
    }
)
_GRAM_SMALL = GramTiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2))
GRAM_TILES: Mapping[str, GramTiles] = MappingProxyType(
    {
        "sm_80": _GRAM_SMALL,
        "sm_86": _GRAM_SMALL,
        "sm_89": _GRAM_SMALL,
        "sm_90": GramTiles(Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        "sm_100": GramTiles(Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        "sm_120": _GRAM_SMALL,
        "gfx942": _GRAM_SMALL,
    }
)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; triton.cdiv would cost the host microseconds."""
    return -(-a // b)


def lay_out_workspace(parts: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return the offset of each part of a workspace, given their bytes, and the total bytes."""
    offsets, end = {}, 0
    for name, nbytes in parts.items():
        offsets[name], end = end, end + ceil_div(nbytes, ALIGNMENT) * ALIGNMENT
    return offsets, end


def pipeline_stages(tile: Tile, indirect: bool, arch: Arch) -> int:
    """Return the stages of a loop over tokens; ``indirect``: it loads their addresses, too."""
    return tile.num_stages + (arch.indirect_stages if indirect else 0)


def compile_options(
    arch: Arch, num_warps: int, num_stages: int | None = None
) -> dict[str, int | bool]:
    """Return the compiler's options for a kernel."""
    options: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if arch.dependent_launch:
        options["launch_pdl"] = True
    return options


def splits_to_fill(
    num_programs: int, iterations: int, max_splits: int, tile: Tile, arch: Arch
) -> int:
    """Return into how many parts to split the loop of a kernel that streams tokens.

    Args:
        num_programs: number of programs of the kernel without splits.
        iterations: iterations of its loop without splits.
        max_splits: upper limit of the splits.
        tile: of the kernel.
        arch: of the device.

    Returns:
        The smallest number of splits that takes at most a tenth longer than the best, so that no
        split is empty; at least 1.
    """
    # A thread uses more than 128 registers: eight warps fill a multiprocessor.
    concurrent_programs = arch.processors * max(1, 8 // tile.num_warps)

    def duration(splits: int) -> int:
        waves = math.ceil(num_programs * splits / concurrent_programs)
        return waves * math.ceil(iterations / splits)

    candidates = range(1, max(1, min(max_splits, iterations)) + 1)
    shortest = min(map(duration, candidates))
    return next(splits for splits in candidates if duration(splits) <= 1.1 * shortest)


def rows_per_thread(tile: Tile, itemsize: int) -> int:
    """Return how many rows of a tile of tokens one thread loads, 16 bytes at a time."""
    rows_per_load = tile.num_warps * 32 * (16 // itemsize) // tile.block_d
    return max(1, tile.block_n // max(1, rows_per_load))


@functools.cache
def _launch_failure_reason() -> str | None:
    """Return why Triton cannot launch kernels, or None.

    On first use it compiles its launcher with a C compiler, which some container images lack.
    """
    try:
        driver.active.get_current_target()
    except Exception as error:  # a compiler that is missing or fails, no folder for the cache, ...
        return f"Triton, which needs a C compiler and Python's headers, cannot launch ({error})"
    return None


@functools.cache
def _device_arch(index: int) -> Arch | str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(index)
        name = f"sm_{major}{minor}"
        if name not in ARCHS and major >= 8:
            # Code for a chip runs on later ones of its family: 10.3 runs code for 10.0.
            name = {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")
    if name not in ARCHS:
        return f"there are no launch parameters for {name}; known are {', '.join(ARCHS)}"
    arch = replace(ARCHS[name], processors=properties.multi_processor_count)
    return _launch_failure_reason() or arch


def arch_of(device: torch.device) -> Arch | str:
    """Return the architecture of a device, or the reason why there is none.

    Without a driver (Triton's interpreter, or fake tensors) it is the family's largest chip.
    """
    # A device in the cache has a driver: every sketch comes here, and asking torch is slow.
    has_driver = _device_arch.cache_info().currsize > 0 or torch.cuda.is_available()
    if device.type == "cpu" or not has_driver:
        return ARCHS["sm_90"]
    return _device_arch(torch.cuda.current_device() if device.index is None else device.index)
