"""Measure the cost of a step at every point, and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..common import RESULTS, default_device
from ..kernels._timing import measure_ceilings, time_together, timer_for
from ..rows import Rows
from .measure import measure
from .memory import simulated
from .work import Ceilings, Point, points

COPY_BYTES, MATMUL_SIDE = 1 << 28, 2048


@dataclass(frozen=True)
class Preset:
    """The points to measure.

    Attributes:
        base: the point around which the sizes are varied.
        axes: size -> its values.
        seconds: the ``limit`` of ``measure``.
    """

    base: Point
    axes: Mapping[str, Sequence[int]]
    seconds: float


PRESETS = {
    "quick": Preset(
        Point(D=1024, N=1024, L=4, K=32),
        {
            "D": (256, 512, 1024, 2048, 4096),
            "N": (128, 256, 512, 1024, 2048, 4096),
            "L": (1, 2, 4, 8, 16),
            "K": (8, 16, 32, 64, 128),
        },
        1.5,
    ),
    "full": Preset(
        Point(D=1024, N=1024, L=4, K=32),
        {
            "D": (128, 256, 512, 1024, 2048, 4096, 8192),
            "N": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
            "L": (1, 2, 4, 8, 16, 32, 64),
            "K": (4, 8, 16, 32, 64, 128, 256),
        },
        3.0,
    ),
}
# The shapes of language models: those for a CPU are too small to keep a GPU busy.
CUDA_PRESETS = {
    "quick": Preset(
        Point(D=4096, N=2048, L=16, K=32),
        {
            "D": (1024, 2048, 4096, 8192),
            "N": (256, 512, 1024, 2048, 4096, 8192),
            "L": (1, 4, 16, 64),
            "K": (8, 16, 32, 64, 128),
        },
        2.0,
    ),
    "full": Preset(
        Point(D=4096, N=2048, L=16, K=32),
        {
            "D": (512, 1024, 2048, 4096, 8192, 14336),
            "N": (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
            "L": (1, 2, 4, 8, 16, 32, 64, 128),
            "K": (4, 8, 16, 32, 64, 128, 256),
        },
        4.0,
    ),
}


def run(preset: str = "quick", out: Path = RESULTS, quiet: bool = False) -> Path:
    """Measure and save ``scale.json``.

    Args:
        preset: ``"quick"`` (three minutes) or ``"full"`` (eight) on two cores.
        out: folder of the results; a ``simulated_memory.json`` there is preferred to the committed
            one.
        quiet: show no progress bar.
    """
    device = default_device()
    presets = CUDA_PRESETS if device.type == "cuda" else PRESETS
    if preset not in presets:
        raise ValueError(f"preset={preset!r} is unknown; choose one of {', '.join(presets)}")
    chosen = presets[preset]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = {
        "preset": preset,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "base": asdict(chosen.base),
        "axes": chosen.axes,
        "seconds": chosen.seconds,
    }
    memory = simulated(out)  # before minutes of measuring, to report a broken file at once
    rows = Rows("scale", settings, out, quiet)
    (ceilings,) = rows.make(
        [{"ceilings": device.type}], lambda key: asdict(machine_ceilings(device))
    )
    if "error" in ceilings:
        raise RuntimeError(
            f"the peak rates of this machine cannot be measured: {ceilings['error']}"
        )
    del ceilings["ceilings"]
    ceilings_found = Ceilings(**ceilings)

    def measure_point(key: Mapping[str, Any]) -> dict[str, Any]:
        row = measure(Point(**key), device, dtype, ceilings_found, chosen.seconds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    keys = [asdict(point) for point in points(chosen.base, chosen.axes)]
    measured = rows.make(keys, measure_point)
    return rows.finish({"ceilings": ceilings, "points": measured, "memory": memory})


def machine_ceilings(device: torch.device) -> Ceilings:
    """Measure a large copy and large matrix products: on a GPU in bfloat16, on a CPU in float32.

    The fast rounds (p20) count: a ceiling is what is possible, and a CPU may be shared.
    """
    timer = timer_for(device)
    matrices = [torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device) for _ in range(2)]
    runs: dict[str, Any] = {"wide": _product(matrices, torch.float64)}
    if device.type == "cpu":
        source = torch.ones(COPY_BYTES, dtype=torch.uint8)
        target = torch.empty_like(source)
        runs |= {
            "copy": lambda: target.copy_(source),
            "narrow": _product(matrices, torch.float32),
        }
    times = time_together(runs, timer, budget=2.0, min_rounds=3)
    seconds = {name: found["ms"]["p20"] / 1e3 for name, found in times.items()}
    flops = 2.0 * MATMUL_SIDE**3
    if device.type == "cpu":
        bytes_per_second = 2 * COPY_BYTES / seconds["copy"]
        flops_per_second = flops / seconds["narrow"]
    else:
        library_ceilings = measure_ceilings(device)
        bytes_per_second = library_ceilings["bytes_per_second"]
        flops_per_second = library_ceilings["flops_per_second"]
    return Ceilings(bytes_per_second, flops_per_second, flops / seconds["wide"])


def _product(pair: Sequence[torch.Tensor], dtype: torch.dtype) -> Any:
    left, right = (one.to(dtype) for one in pair)
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product)
