"""The size of a measured step, and the least time that the machine's ceilings allow for it.

One step of L layer inputs of width D on N tokens each, with K = r rho components and a sketch of
Q rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from eva_kernels.streaming import StreamPlan, plan_streams, stream_bytes

from ..kernels._case import SKETCH_PASSES

OUTPUTS = 3  # query, key and value: linear layers (D to D) that read one layer input
AXES = {
    "D": "width D",
    "N": "tokens N a step",
    "L": "layer inputs L",
    "K": "components K = r rho",
}


@dataclass(frozen=True)
class Point:
    """The size of a step: width, tokens, layer inputs, components."""

    D: int
    N: int
    L: int
    K: int

    def plan(self, method: str = "sketch") -> StreamPlan:
        """Return the plan of one of its layer inputs, with the default sketch width."""
        return plan_streams([self.D], [self.K], method=method)[0]

    def state_bytes(self, method: str) -> int:
        """Return the bytes of state kept between steps for all layer inputs together."""
        return self.L * stream_bytes(self.plan(method))


@dataclass(frozen=True)
class Ceilings:
    """Peak rates measured on this machine.

    Attributes:
        bytes_per_second: of a large copy, read plus written.
        flops_per_second: of a large matrix product in the dtype of the tokens.
        wide_flops_per_second: of a large float64 matrix product, as in folds.
    """

    bytes_per_second: float
    flops_per_second: float
    wide_flops_per_second: float


def points(base: Point, axes: Mapping[str, Sequence[int]]) -> list[Point]:
    """Return the base and all points that differ from it in a single size."""
    found = {base: None}
    for axis, values in axes.items():
        found |= {replace(base, **{axis: value}): None for value in values}
    return list(found)


def rows_along(
    axis: str, base: Point, rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return the rows that differ from the base at most in size ``axis``, sorted by it."""
    other_sizes = {key: value for key, value in asdict(base).items() if key != axis}
    chosen = [row for row in rows if all(row[key] == value for key, value in other_sizes.items())]
    return sorted(chosen, key=lambda row: row[axis])


def floors(
    point: Point, device: torch.device, dtype: torch.dtype, ceilings: Ceilings
) -> dict[str, Any]:
    """Return the least milliseconds of a step by the machine's ceilings, and the binding ceiling.

    Accumulating takes ``4 N D Q`` flops per tensor-core pass (one on a CPU), reads X and V once,
    and reads and writes the products; folding takes ``6 D Q^2`` flops in float64, reads V and
    the products, writes V, clears the products, and copies and compares K rows. The (Q, Q) algebra
    is neglected.
    """
    d, n, k, q = point.D, point.N, point.K, point.plan().width
    flops = 4.0 * sketch_passes(device, dtype) * n * d * q
    terms = {
        "accumulate, arithmetic": flops / ceilings.flops_per_second,
        "accumulate, memory": (n * d * dtype.itemsize + 12 * q * d) / ceilings.bytes_per_second,
        "fold, arithmetic": 6.0 * d * q * q / ceilings.wide_flops_per_second,
        "fold, memory": (16 * q * d + 16 * k * d) / ceilings.bytes_per_second,
    }
    terms = {name: 1e3 * point.L * seconds for name, seconds in terms.items()}
    accumulate = max(terms["accumulate, arithmetic"], terms["accumulate, memory"])
    fold = max(terms["fold, arithmetic"], terms["fold, memory"])
    return {
        "accumulate_ms": accumulate,
        "fold_ms": fold,
        "step_ms": accumulate + fold,
        "limited_by": max(terms, key=lambda name: terms[name]),
        "terms_ms": terms,
    }


def sketch_passes(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of tensor-core products per matrix product; 1 on a CPU."""
    return SKETCH_PASSES.get(("high", dtype), 1) if device.type == "cuda" else 1


def forward_flops(point: Point) -> float:
    """Return the flops of the linear layers that read the layer inputs, ``2 N D (3 D) L``."""
    return 2.0 * point.N * point.D * OUTPUTS * point.D * point.L


def gram_flops(point: Point) -> float:
    """Return the flops of an exact step: ``2 N D^2`` to accumulate, ``2 Q D^2`` to check."""
    return 2.0 * (point.N + point.plan().width) * point.D**2 * point.L
