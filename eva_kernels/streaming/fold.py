"""The fold: take the sums of a step into the state, for many layer inputs at once.

The derivation is in this folder's README. Shapes have a leading batch axis L: layer inputs of equal
(D, Q). Everything here is small, (L, Q, D) at most, and runs in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._basis import complete_basis, orthonormalise
from .state import GramState, SketchState, StepSums

__all__ = ["FoldReport", "fold", "fold_gram", "scatter_about_mean"]

# Squares below this share of the largest are rounding noise (singular values below 1e-6 of it).
NOISE = 1e-12
# Directions of the scaled (Q, Q) matrix below this eigenvalue carry no information about C.
CUT = 1e-6
# Eigenvalues below this share of the largest leave rows that need a second orthogonalisation.
UNEVEN = 1e-6
# Layers are folded together in chunks whose float64 copies stay below this many bytes: what the
# cache of a CPU holds, and enough to fill a GPU.
CHUNK_BYTES = {"cpu": 1 << 20}
CHUNK_BYTES_ACCELERATOR = 64 << 20


@dataclass(frozen=True)
class FoldReport:
    """What the fold saw of one layer input.

    Attributes:
        captured: (Q,) float64: variance of the updated C along each row of the basis *before* the
            fold. Against ``s^2`` after it this tells how much the step has still gained.
    """

    captured: Tensor


def fold(
    states: Sequence[SketchState], sums: Sequence[StepSums]
) -> list[tuple[SketchState, FoldReport]]:
    """Fold one step into the states of layer inputs of equal shape.

    Args:
        states: one a layer input, all of the same (Q, D), dtype and device; unchanged.
        sums: the sums about each state's mean; every count at least 1.

    Returns:
        New states with reports, in the same order.

    Numerics: float64 throughout; the basis is rounded to its own dtype at the end. Orthonormal to
        rounding, whatever the rank of the data; never divides by zero.
    Cost: ``6 D Q^2 + O(Q^3)`` flops a layer input.
    """
    results: list[tuple[SketchState, FoldReport]] = []
    if not states:
        return results
    budget = CHUNK_BYTES.get(states[0].basis.device.type, CHUNK_BYTES_ACCELERATOR)
    size = max(1, budget // (states[0].basis.numel() * 8))
    for begin in range(0, len(states), size):
        results += _fold_chunk(states[begin : begin + size], sums[begin : begin + size])
    return results


def _fold_chunk(
    states: Sequence[SketchState], sums: Sequence[StepSums]
) -> list[tuple[SketchState, FoldReport]]:
    basis = torch.stack([s.basis for s in states])
    dtype, wide = basis.dtype, basis.double()
    seen = torch.stack([s.count for s in states])
    added = torch.stack([s.count for s in sums])
    delta = torch.stack([s.shift for s in sums]) / added[:, None]
    weight = added**2 / (seen + added)

    # Y = C_new V^T for the C that the state represents, exact; stored as rows, (L, Q, D)
    image = torch.stack([s.products for s in sums]).double()
    values = torch.stack([s.singular_values for s in states])
    along = (wide @ delta[:, :, None]) * weight[:, None, None]
    image.baddbmm_(along, delta[:, None, :], alpha=-1)
    image.addcmul_(wide, values.square()[:, :, None])
    square = torch.stack([s.square for s in sums]) - weight * delta.square().sum(1)
    total = torch.stack([s.total for s in states]) + square.clamp_min(0)
    count = seen + added
    mean = torch.stack([s.mean for s in states]) + (added / count)[:, None] * delta

    new_basis, squares, rank, captured = nystrom(image, wide, count)
    new_basis, mean, new_values = new_basis.to(dtype), mean.to(dtype), squares.sqrt()
    return [
        (
            SketchState(count[i], mean[i], new_basis[i], new_values[i], total[i], rank[i]),
            FoldReport(captured[i]),
        )
        for i in range(len(states))
    ]


def nystrom(image: Tensor, basis: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the leading eigenpairs of a positive matrix C from its image of a basis.

    ``C ~ Y B^-1 Y^T`` with ``Y = C V^T`` and ``B = V Y``, and B^-1 truncated where the scaled
    matrix is singular (Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1706.05736).

    Args:
        image: Y^T, float64 (L, Q, D).
        basis: V, float64 (L, Q, D), orthonormal rows.
        count: tokens behind C, (L,): the rank is at most one less.

    Returns:
        Basis (L, Q, D), eigenvalues (L, Q) descending with 0 beyond the rank, rank (L,), and the
        diagonal of B (L, Q).
    """
    core = image @ basis.mT
    captured = core.diagonal(dim1=1, dim2=2).clamp(min=0)
    floor = captured.amax(1, keepdim=True) * NOISE
    # Entries are graded (activations of language models have outlier features), so scale to a
    # unit diagonal before judging what is singular.
    scale = torch.where(captured > floor, captured.rsqrt(), 0.0)
    outer = scale[:, :, None] * scale[:, None, :]
    # Symmetric but for rounding: the factorisations below read the lower triangle only.
    whitener = _whitener(core.mul_(outer))
    metric = (image @ image.mT).mul_(outer)
    squares, rotation = torch.linalg.eigh(whitener.mT @ metric @ whitener)
    squares, rotation = squares.flip(1).clamp_min(0), rotation.flip(2)

    rank = (squares > NOISE * squares[:, :1]).sum(1)
    rank = torch.minimum(rank, (count - 1).clamp_min(0).to(rank.dtype))
    alive = torch.arange(squares.shape[1], device=squares.device) < rank[:, None]
    squares = torch.where(alive, squares, 0.0)
    inverse = torch.where(alive, squares.rsqrt(), 0.0)
    mixing = scale[:, :, None] * (whitener @ rotation) * inverse[:, None, :]
    new_basis = mixing.mT @ image
    # A row is orthogonal to the others only to eps times (largest / its own eigenvalue).
    least = torch.where(alive, squares, squares[:, :1]).amin(1)
    uneven = (rank < squares.shape[1]) | (least < UNEVEN * squares[:, 0])
    for i in torch.nonzero(uneven).flatten().tolist():
        kept = int(rank[i])
        new_basis[i, :kept] = orthonormalise(new_basis[i, :kept])
        new_basis[i] = complete_basis(new_basis[i], kept)
    return new_basis, squares, rank, captured


def _whitener(core: Tensor) -> Tensor:
    """Return T with ``T T^T = core^-1`` (pseudo-inverse below CUT), (L, Q, Q).

    A triangular factor does where the matrix is well away from singular, which is the normal case
    (the basis is nearly that of the step before) and ten times cheaper than eigenvectors:
    ``|L^-1|_F^2`` is the trace of the inverse and bounds its largest eigenvalue.
    """
    lower, info = torch.linalg.cholesky_ex(core)
    identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device).expand_as(core)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    regular = (info == 0) & (inverse.square().sum((1, 2)) < 1 / CUT)
    whitener = inverse.mT
    singular = torch.nonzero(~regular).flatten()
    if singular.numel():
        values, vectors = torch.linalg.eigh(core[singular])
        inverse_root = torch.where(values > CUT, values.rsqrt(), 0.0)
        whitener = whitener.clone()
        whitener[singular] = vectors * inverse_root[:, None, :]
    return whitener


def scatter_about_mean(state: GramState) -> Tensor:
    """Return the exact centred scatter matrix C, float64 (D, D)."""
    shift = state.sums.shift
    share = -1 / state.sums.count.clamp_min(1)
    return torch.addcmul(state.sums.products.double(), shift[:, None], shift[None, :] * share)


def fold_gram(state: GramState) -> tuple[GramState, FoldReport]:
    """Refresh the leading components of an exactly tracked layer input.

    Returns:
        The state with ``sketch`` advanced by one subspace iteration on the exact scatter matrix.
    """
    scatter, old = scatter_about_mean(state), state.sketch
    sums, basis = state.sums, old.basis.double()
    new_basis, squares, rank, captured = nystrom(
        (basis @ scatter)[None], basis[None], sums.count[None]
    )
    sketch = SketchState(
        count=sums.count.clone(),
        mean=(state.pivot + sums.shift / sums.count.clamp_min(1)).to(state.pivot.dtype),
        basis=new_basis[0].to(old.basis.dtype),
        singular_values=squares[0].sqrt(),
        total=scatter.diagonal().sum().clamp_min(0),
        rank=rank[0],
    )
    return GramState(sums, state.pivot, sketch), FoldReport(captured[0])
