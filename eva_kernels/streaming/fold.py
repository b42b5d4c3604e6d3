"""The fold as a function: the sums of a step into states, without touching either.

The steps of a stream take the same way in place, see ``step.py``. The derivation is in this
folder's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..ops.eigh import eigh
from . import _host
from ._basis import cholesky_qr, repair
from ._host import Array
from .batch import Batch, GramBatch, Numbers, SketchBatch, chunk_bytes, decompose
from .nystrom import CUT, graded_scale, whiten
from .state import GramState, SketchState, StepSums

__all__ = ["first_basis", "fold", "fold_gram", "scatter_about_mean"]


def fold(
    states: Sequence[SketchState], sums: Sequence[StepSums]
) -> list[tuple[SketchState, Array]]:
    """Fold one step into the states of layer inputs of equal shape.

    Args:
        states: one a layer input, all of the same (Q, D), dtype and device; unchanged.
        sums: the sums about each state's mean; every count at least 1.

    Returns:
        New states in the same order, each with the variance of the updated C along each row of the
        basis *before* the fold, (Q,): against ``s^2`` after it this tells how much the step has
        still gained.

    Numerics: float64 throughout; the basis is rounded to its own dtype at the end. Orthonormal to
        rounding, whatever the rank of the data; never divides by zero.
    Cost: ``6 D Q^2 + O(Q^3)`` flops a layer input.
    """
    results: list[tuple[SketchState, Array]] = []
    if not states:
        return results
    free = _host.reads_are_free(states[0].basis.device)
    size = max(1, chunk_bytes(free) // (states[0].basis.numel() * 8))
    for begin in range(0, len(states), size):
        part = slice(begin, begin + size)
        results += _fold_batch(SketchBatch(states[part], sums[part]))
    return results


def fold_gram(state: GramState) -> tuple[GramState, Array]:
    """Refresh the leading components of an exactly tracked layer input.

    Returns:
        The state with ``sketch`` advanced by one subspace iteration on the exact scatter matrix,
        and the captured variance as in :func:`fold`.
    """
    sketch, captured = _fold_batch(GramBatch([state]))[0]
    return GramState(state.sums, state.pivot, sketch), captured


def _fold_batch(batch: Batch) -> list[tuple[SketchState, Array]]:
    decompose([batch])
    bases: list[Tensor] = []
    for chunk in batch.chunks:
        bases += batch.rows(chunk)[1].to(batch.dtype).unbind(0)
    numbers = Numbers(*_host.read(batch.numbers))
    if not batch.free:  # where they are, this was done before rounding
        for i in numbers.uneven.nonzero()[0].tolist():
            bases[i] = repair(bases[i].double(), int(numbers.rank[i])).to(batch.dtype)
    return batch.results(numbers, bases, batch.mean.unbind(0))


def first_basis(blank: SketchState, sums: StepSums) -> SketchState:
    """Return ``blank`` with basis and mean after a fold of ``sums``; it has seen no token.

    What matters of a first basis is its span. So where a read is not free, and every layer input
    goes through here by itself, it is what :func:`.nystrom.nystrom` would span, orthonormalised as
    it stands: one eigen-decomposition, no decision of the host.
    """
    if _host.reads_are_free(blank.basis.device):
        warm = fold([blank], [sums])[0][0]
        return replace(blank, mean=warm.mean, basis=warm.basis)
    batch = SketchBatch([blank], [sums])
    wide = blank.basis.double()
    image = batch.image(batch.chunks[0], blank.basis[None], wide[None])[0]
    basis = _spanning(image, wide, sums.count - 1).to(batch.dtype)
    return replace(blank, mean=batch.mean[0], basis=basis)


def _spanning(image: Tensor, basis: Tensor, ceiling: int) -> Tensor:
    """Return orthonormal rows for the image of a basis, filled up from the basis itself.

    Args:
        image, basis: float64 (Q, D); the rows of ``basis`` are orthonormal.
        ceiling: the rank is at most this.

    Numerics: whitening by B as in a fold squares the grading of the rows away, so that the Cholesky
        factor of their overlaps exists (once for the grading, once more for what that leaves).
        Where it does not, or the image is not finite, it is ``basis``.
    """
    core = image @ basis.mT
    scale = graded_scale(core[None])[0]
    scaled = core * torch.outer(scale, scale)
    values, vectors = (found.flip(-1) for found in eigh(scaled[None]))
    index = torch.arange(len(image), device=image.device)
    alive = (values[0] > CUT) & (index < ceiling)
    mixing = scale[:, None] * whiten(values, vectors)[0]
    rows = torch.where(alive[:, None], mixing.mT @ image, basis)
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    for _ in range(2):
        rows, _ = cholesky_qr(rows)
    return torch.where(rows.isfinite().all(), rows, basis).contiguous()


def scatter_about_mean(state: GramState) -> Tensor:
    """Return the exact centred scatter matrix C, float64 (D, D)."""
    shift = state.sums.shift
    share = -1 / max(state.sums.count, 1)
    return torch.addcmul(state.sums.products.double(), shift[:, None], shift[None, :] * share)
