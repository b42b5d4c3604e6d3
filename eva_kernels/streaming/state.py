"""The state of one layer input between steps: data only, the mathematics is in ``fold``.

Vectors of D numbers are on the device. Numbers that host decisions depend on (counts, singular
values, ranks) are on the host, so that reading them never waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from . import _host
from ._basis import random_basis

__all__ = [
    "GramState",
    "SketchState",
    "StepSums",
    "clear_sums",
    "empty_sketch",
    "sketch_of",
    "start_basis",
    "tensors_by_dtype",
    "zero_sums",
]


@dataclass(frozen=True)
class SketchState:
    """A truncated, mean-centred PCA of all tokens folded so far: ``C ~ V^T diag(s^2) V``.

    Attributes:
        count: tokens seen.
        mean: (D,), dtype of ``basis``.
        basis: V, (Q, D), orthonormal rows, by descending singular value.
        values: s, (Q,), float64, on the host; 0 beyond the numerical rank.
        total: centred sum of squares over all directions.
        rank: numerical rank.
        mean_norm: Euclidean norm of ``mean``.
    """

    count: int
    mean: Tensor
    basis: Tensor
    values: _host.Array
    total: float
    rank: int
    mean_norm: float

    @property
    def singular_values(self) -> Tensor:
        """The values as a tensor on the CPU; it shares their memory."""
        return torch.from_numpy(self.values)


@dataclass
class StepSums:
    """The additive sums of one step about the pivot p; see ``reference.sketch``.

    Attributes:
        count: tokens.
        shift: sum of (x - p), float64 (D,).
        square: sum of |x - p|^2, float64 ().
        products: sum of (V (x - p)) (x - p)^T, (Q, D), dtype of the basis.
        bad: tokens among ``count`` that are not finite and were replaced by the pivot, float64 ();
            ``None`` if they are not counted.
    """

    count: int
    shift: Tensor
    square: Tensor
    products: Tensor
    bad: Tensor | None = None


@dataclass(frozen=True)
class GramState:
    """The exact second moment of all tokens about a pivot that never changes.

    Attributes:
        sums: count, shift and square about ``pivot`` over the whole stream; ``products`` is the
            scatter matrix (D, D).
        pivot: (D,).
        sketch: the leading components by one warm-started subspace iteration per step, used by the
            convergence test; the final answer is an eigen-decomposition.
    """

    sums: StepSums
    pivot: Tensor
    sketch: SketchState


def sketch_of(state: SketchState | GramState) -> SketchState:
    """Return the sketch of a state of either kind."""
    return state.sketch if isinstance(state, GramState) else state


def zero_sums(rows: int, features: int, dtype: torch.dtype, device: torch.device) -> StepSums:
    """Return empty sums with ``products`` of shape (rows, features)."""
    float64 = torch.float64
    return StepSums(
        count=0,
        shift=torch.zeros(features, dtype=float64, device=device),
        square=torch.zeros((), dtype=float64, device=device),
        products=torch.zeros(rows, features, dtype=dtype, device=device),
    )


def clear_sums(sums: Sequence[StepSums]) -> None:
    """Reset sums to zero, in place; tensors of equal dtype and device in one launch."""
    for one in sums:
        one.count = 0
    for tensors in tensors_by_dtype(sums).values():
        torch._foreach_zero_(tensors)


def tensors_by_dtype(
    sums: Sequence[StepSums],
) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Return the tensors of sums by device and dtype, without the counts of bad tokens."""
    parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for one in sums:
        for part in (one.shift, one.square, one.products):
            parts[part.device, part.dtype].append(part)
    return parts


# Weak references: entries live as long as a stream holds them.
_start_bases: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()


def start_basis(
    width: int, features: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    """Return the random basis (width, features) that layers of one shape start with.

    It must not be written to. While one stream holds it, others of that shape save a conversion
    and a copy of 1 MB and more to the device.
    """
    key = width, features, dtype, device, seed
    basis = _start_bases.get(key)
    if basis is None:
        basis = _host.upload(random_basis(width, features, seed).to(dtype, copy=True), device)
        _start_bases[key] = basis
    return basis


def empty_sketch(basis: Tensor, mean: Tensor) -> SketchState:
    """Return a state that has seen nothing, with this basis (Q, D) and mean (D,); not copied."""
    zeros = np.zeros(len(basis))
    return SketchState(0, mean, basis, zeros, total=0.0, rank=0, mean_norm=0.0)
