"""The union of two streams over the same features."""

from __future__ import annotations

import torch

from ._basis import complete_basis
from .fold import NOISE
from .state import GramState, SketchState, StepSums

__all__ = ["merge_gram", "merge_sketch"]


def merge_sketch(left: SketchState, right: SketchState) -> SketchState:
    """Return the state of both streams together; commutative, and associative within truncation.

    ``C = C_1 + C_2 + n_1 n_2 / (n_1 + n_2) d d^T`` with ``d = mu_1 - mu_2``, cut to rank Q.
    """
    count = left.count + right.count
    if float(count) == 0:
        return left
    delta = (left.mean - right.mean).double()
    weight = left.count * right.count / count
    rows = torch.cat(
        [
            left.singular_values[:, None] * left.basis.double(),
            right.singular_values[:, None] * right.basis.double(),
            weight.sqrt() * delta[None],
        ]
    )
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    width = left.basis.shape[0]
    squares, basis = values[:width].square(), vectors[:width]
    alive = int(min(int((squares > NOISE * squares[0]).sum()), max(int(count) - 1, 0)))
    if alive < width:
        basis = complete_basis(basis, alive)
        squares = torch.where(torch.arange(width, device=squares.device) < alive, squares, 0.0)
    share = (right.count / count).to(left.mean.dtype)
    return SketchState(
        count=count,
        mean=left.mean + share * (right.mean - left.mean),
        basis=basis.to(left.basis.dtype),
        singular_values=squares.sqrt(),
        total=left.total + right.total + weight * delta.square().sum(),
        rank=torch.tensor(alive, device=squares.device),
    )


def merge_gram(left: GramState, right: GramState) -> GramState:
    """Return the exact sums of both streams about the left one's pivot; the basis stays left's."""
    count = right.sums.count
    delta = (right.pivot - left.pivot).double()
    cross = torch.outer(delta, right.sums.shift)
    moved = right.sums.products.double() + cross + cross.mT + count * torch.outer(delta, delta)
    square = right.sums.square + 2 * delta @ right.sums.shift + count * delta.square().sum()
    sums = StepSums(
        count=left.sums.count + count,
        shift=left.sums.shift + right.sums.shift + count * delta,
        square=left.sums.square + square,
        products=left.sums.products + moved.to(left.sums.products.dtype),
    )
    return GramState(sums, left.pivot, left.sketch)
