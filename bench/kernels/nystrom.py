"""The ``nystrom`` op: the (Q, Q) part of a fold for all layer inputs in one launch."""

from __future__ import annotations

import math

import torch

from eva_kernels import ops
from eva_kernels.streaming.nystrom import OVERLAP_TOLERANCE, Nystrom, nystrom_plain

from ._case import Case, Prepared, matrix_cases

SHAPES = [("Llama-2-7B", 128, 64), ("Llama-2-7B", 128, 128)]
LIMIT = 1e-9
DTYPE = torch.float32


def cases(small: bool = False) -> list[Case]:
    """Return the cases for a GPU, or small ones for a rehearsal."""
    return matrix_cases("nystrom", SHAPES, _make, small)


def _make(count: int, q: int, device: torch.device) -> Prepared:
    core, metric = _converged_matrices(count, q, device)
    ceiling, trace = core.new_full((count,), 1e6), core.new_full((count,), math.inf)

    def native() -> Nystrom:
        tolerance = OVERLAP_TOLERANCE[DTYPE]
        return Nystrom(*ops.nystrom(core, metric, ceiling, tolerance, trace=trace))

    def plain() -> Nystrom:
        return nystrom_plain(core, metric, ceiling, trace, DTYPE)

    found, expected = native().squares, plain().squares
    return Prepared(
        competitors={"native": native, "torch": plain},
        errors={"native": float((found - expected).abs().max() / expected.max())},
        limit=LIMIT,
        flops=0.0,  # iterative: the number of operations is not known in advance
        nbytes=3.0 * core.nbytes,
    )


def _converged_matrices(
    count: int, q: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return core and metric of a basis close to the eigenvectors of C, as after a few steps."""
    features = 4 * q
    draw = torch.randn(count, features, features, dtype=torch.float64, device=device)
    near = torch.eye(features, dtype=torch.float64, device=device) + 0.05 * draw / features**0.5
    vectors = torch.linalg.qr(near).Q
    spectrum = torch.logspace(0, -4, features, dtype=torch.float64, device=device)
    image = (vectors[:, :q] * spectrum) @ vectors.mT
    return image[:, :, :q].contiguous(), image @ image.mT
