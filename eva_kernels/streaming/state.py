"""What is kept of one layer input between steps: data only, the mathematics is in ``fold``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._basis import random_basis

__all__ = ["GramState", "SketchState", "StepSums", "clear_sums", "empty_sketch", "zero_sums"]


@dataclass(frozen=True)
class SketchState:
    """A truncated, mean-centred PCA of all tokens folded so far: ``C ~ V^T diag(s^2) V``.

    Attributes:
        count: tokens seen, float64 ().
        mean: (D,), dtype of ``basis``.
        basis: V, (Q, D), orthonormal rows, by descending singular value.
        singular_values: s, (Q,), float64; 0 beyond the numerical rank.
        total: centred sum of squares over all directions, float64 ().
        rank: numerical rank, int64 ().
    """

    count: Tensor
    mean: Tensor
    basis: Tensor
    singular_values: Tensor
    total: Tensor
    rank: Tensor


@dataclass(frozen=True)
class StepSums:
    """The additive sums of one step about the pivot p; see ``reference.sketch``.

    Attributes:
        count: tokens, float64 ().
        shift: sum of (x - p), float64 (D,).
        square: sum of |x - p|^2, float64 ().
        products: sum of (V (x - p)) (x - p)^T, (Q, D), dtype of the basis.
    """

    count: Tensor
    shift: Tensor
    square: Tensor
    products: Tensor


@dataclass(frozen=True)
class GramState:
    """The exact second moment of all tokens about a pivot that never changes.

    Attributes:
        sums: count, shift and square about ``pivot`` over the whole stream; ``products`` is the
            scatter matrix (D, D).
        pivot: (D,).
        sketch: the leading components by one warm-started subspace iteration a step, which is what
            the convergence test looks at; the final answer is an eigen-decomposition.
    """

    sums: StepSums
    pivot: Tensor
    sketch: SketchState


def zero_sums(rows: int, features: int, dtype: torch.dtype, device: torch.device) -> StepSums:
    """Return empty sums with ``products`` of shape (rows, features)."""
    wide = torch.float64
    return StepSums(
        count=torch.zeros((), dtype=wide, device=device),
        shift=torch.zeros(features, dtype=wide, device=device),
        square=torch.zeros((), dtype=wide, device=device),
        products=torch.zeros(rows, features, dtype=dtype, device=device),
    )


def clear_sums(sums: StepSums) -> None:
    """Set sums back to those of no token, in place."""
    for part in (sums.count, sums.shift, sums.square, sums.products):
        part.zero_()


def empty_sketch(
    width: int, features: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> SketchState:
    """Return a state that has seen nothing, with a random orthonormal basis (width, features)."""
    return SketchState(
        count=torch.zeros((), dtype=torch.float64, device=device),
        mean=torch.zeros(features, dtype=dtype, device=device),
        basis=random_basis(width, features, seed).to(device=device, dtype=dtype, copy=True),
        singular_values=torch.zeros(width, dtype=torch.float64, device=device),
        total=torch.zeros((), dtype=torch.float64, device=device),
        rank=torch.zeros((), dtype=torch.int64, device=device),
    )
