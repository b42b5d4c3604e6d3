"""Orthonormal rows: a seeded random start, and the completion of a basis of deficient rank."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def _gaussian(rows: int, features: int, seed: int) -> Tensor:
    # By the CPU generator, so that all devices and processes start from the same numbers.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64, device="cpu")


@functools.lru_cache(maxsize=4)  # layers of one shape start with the same basis
def random_basis(rows: int, features: int, seed: int) -> Tensor:
    """Return ``rows`` orthonormal rows, float64 (rows, features), rows <= features.

    The tensor is shared between calls and must not be written to.
    """
    return torch.linalg.qr(_gaussian(rows, features, seed).mT).Q.mT.contiguous()


def orthonormalise(rows: Tensor) -> Tensor:
    """Orthonormalise rows (r, D) that are nearly orthonormal.

    The first j rows keep their span, for every j (a QR by the Cholesky factor of the Gram matrix).
    A row that is only rounding error is still normalised to unit length.
    """
    lower, info = torch.linalg.cholesky_ex(rows @ rows.mT)
    # If the core is nearly singular, rounding noise can pass for an eigenvalue. Its row is then far
    # from unit length, and its Cholesky factor would be noise, too.
    if info or (lower.diagonal() < 0.5).any():
        return torch.linalg.qr(rows.mT).Q.mT
    return torch.linalg.solve_triangular(lower, rows, upper=False)


def cholesky_correction(error: Tensor) -> Tensor:
    """Return C such that ``(1 - C) V`` is orthonormal up to the square of the error of V.

    It is the first-order Cholesky factor: triangular, so that the first j rows keep their span.

    Args:
        error: ``V V^T - 1``, (..., Q, Q).
    """
    return error.tril(-1) + 0.5 * torch.diag_embed(error.diagonal(dim1=-2, dim2=-1))


def repair_basis(rows: Tensor, rank: int) -> Tensor:
    """Orthonormalise the first ``rank`` rows, float64 (Q, D), and replace the others."""
    return complete_basis(torch.cat([orthonormalise(rows[:rank]), rows[rank:]]), rank)


def complete_basis(basis: Tensor, rank: int) -> Tensor:
    """Replace the rows from ``rank`` on by seeded random directions orthogonal to all others.

    Args:
        basis: float64 (Q, D); the first ``rank`` rows are orthonormal.
        rank: rows to keep.

    Returns:
        (Q, D) with orthonormal rows, the first ``rank`` unchanged.
    """
    leading = basis[:rank]
    fresh = _gaussian(basis.shape[0] - rank, basis.shape[1], 0).to(basis.device)
    for _ in range(2):  # the second pass removes the rounding error of the first
        fresh = fresh - (fresh @ leading.mT) @ leading
        fresh = torch.linalg.qr(fresh.mT).Q.mT
    return torch.cat([leading, fresh])
