"""The union of two streams over the same features."""

from __future__ import annotations

import numpy as np
import torch

from ._basis import complete_basis
from ._host import read, upload
from .nystrom import NOISE
from .state import GramState, SketchState, StepSums

__all__ = ["merge_gram", "merge_sketch"]


def merge_sketch(left: SketchState, right: SketchState) -> SketchState:
    """Return the state of both streams together; commutative, and associative within truncation.

    ``C = C_1 + C_2 + n_1 n_2 / (n_1 + n_2) d d^T`` with ``d = mu_1 - mu_2``, cut to rank Q.
    """
    count = left.count + right.count
    delta = (left.mean - right.mean).double()
    weight = left.count * right.count / count
    scaled = [
        upload(state.singular_values, state.basis.device)[:, None] * state.basis
        for state in (left, right)
    ]
    rows = torch.cat([*scaled, weight**0.5 * delta[None]])
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    width = len(left.basis)
    share = right.count / count
    mean = torch.lerp(left.mean.double(), right.mean.double(), share).to(left.mean.dtype)
    norm = torch.linalg.vector_norm(mean, dtype=torch.float64)
    host_values, squared_distance, host_norm = read([values[:width], delta.square().sum(), norm])
    squares = host_values**2
    rank = int((squares > NOISE * squares[0]).sum())
    basis = vectors[:width].contiguous()  # LAPACK's result is column-major
    if rank < width:
        basis = complete_basis(basis, rank)
        squares = np.where(np.arange(width) < rank, squares, 0.0)
    return SketchState(
        count=count,
        mean=mean,
        basis=basis.to(left.basis.dtype),
        values=np.sqrt(squares),
        total=left.total + right.total + weight * float(squared_distance),
        rank=rank,
        mean_norm=float(host_norm),
    )


def merge_gram(left: GramState, right: GramState) -> GramState:
    """Return the exact sums of both streams about the left one's pivot; the basis stays left's."""
    count = right.sums.count
    delta = (right.pivot - left.pivot).double()
    cross = torch.outer(delta, right.sums.shift)
    shifted_products = right.sums.products + cross + cross.mT + count * torch.outer(delta, delta)
    square = right.sums.square + 2 * delta @ right.sums.shift + count * delta.square().sum()
    sums = StepSums(
        count=left.sums.count + count,
        shift=left.sums.shift + right.sums.shift + count * delta,
        square=left.sums.square + square,
        products=left.sums.products + shifted_products.to(left.sums.products.dtype),
    )
    return GramState(sums, left.pivot, left.sketch)
