"""The fold as a pure function of states and the sums of a step.

Streams do the same in place, see ``step.py``. The derivation is in this folder's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..ops import start
from ..ops.fold import runs_natively
from ..ops.start import runs_natively as starts_natively
from . import _host
from ._basis import repair_basis
from ._host import Array
from .batch import Batch, GramBatch, HostNumbers, SketchBatch, chunk_bytes, decompose
from .native_batch import NativeSketchBatch
from .nystrom import orthogonalisation, whitening
from .state import GramState, SketchState, StepSums, clear_sums

__all__ = ["first_basis", "fold", "fold_gram", "lost_shares", "make_sketch_batch"]


def fold(
    states: Sequence[SketchState], sums: Sequence[StepSums]
) -> list[tuple[SketchState, Array]]:
    """Fold one step into the states of layer inputs of equal shape.

    Args:
        states: one per layer input, all of the same (Q, D), dtype and device; not modified.
        sums: the sums about each state's mean; every count at least 1.

    Returns:
        New states in the same order, each with the variance of the updated C along each row of the
        basis *before* the fold, (Q,): compared with ``s^2`` after the fold, it tells how much the
        step has gained.

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


def lost_shares(squares: Array, captured: Array, components: Sequence[int]) -> list[float]:
    """Return the fraction of the variance captured after a fold that was not captured before.

    Args:
        squares: s^2 after the fold, (L, Q).
        captured: variance along each row of the basis before it, (L, Q).
        components: K of each; only the leading K rows count, before and after.
    """
    last_component = np.arange(len(components)), np.array(components) - 1
    captured_after = squares.cumsum(1)[last_component]
    captured_before = captured.cumsum(1)[last_component]
    gain = (captured_after - captured_before).clip(min=0.0)
    return (gain / np.where(captured_after > 0, captured_after, 1.0)).tolist()


def _fold_batch(batch: Batch) -> list[tuple[SketchState, Array]]:
    decompose([batch])
    bases: list[Tensor] = []
    for chunk in batch.chunks:
        # Each in memory of its own: BLAS chooses its code path, and so the bits of a product, by
        # the alignment, and a restored stream must give the same bits.
        bases += [rows.to(batch.dtype, copy=True) for rows in batch.old_and_new_rows(chunk)[1]]
    numbers = HostNumbers.from_columns(*_host.read([batch.scalars, batch.decomposition.summary]))
    if not batch.reads_are_free:  # where reads are free, this was done before rounding
        for i in numbers.uneven.nonzero()[0].tolist():
            bases[i] = repair_basis(bases[i].double(), int(numbers.rank[i])).to(batch.dtype)
    return batch.new_states(numbers, bases, batch.mean.unbind(0))


def make_sketch_batch(
    states: Sequence[SketchState], sums: Sequence[StepSums], num_saved: Sequence[int]
) -> Batch:
    """Return layer inputs of one shape as a batch, a native one if there is native code.

    Args:
        states, sums: see :class:`SketchBatch`.
        num_saved: how many leading rows of each basis its ``write_rows`` will be asked to return.
    """
    if runs_natively(states[0].basis):
        return NativeSketchBatch(states, sums, num_saved)
    return SketchBatch(states, sums)


def first_basis(empty: SketchState, sums: StepSums) -> SketchState:
    """Return ``empty`` with basis and mean after a fold of ``sums``; it has seen no token.

    The sums are cleared. Where a read is not free, basis and mean are written in place.

    Only the span of a first basis matters. So where a read is not free, and every layer input
    comes here separately, its rows are those of the image, whitened twice: by their products with
    the random basis, which gives rows of C^(1/2), then by their own Gram matrix, which makes them
    orthonormal. That needs no host decision and, in native code, no eigenvectors. Rows beyond the
    rank are random.
    """
    if _host.reads_are_free(empty.basis.device):
        folded = fold([empty], [sums])[0][0]
        clear_sums([sums])
        return replace(empty, mean=folded.mean, basis=folded.basis)
    if starts_natively(empty.basis):
        start(empty.basis, sums.products, sums.shift, sums.square, empty.mean, sums.count)
        sums.count = 0
        return empty
    all_finite = torch.ones((), dtype=torch.bool, device=empty.basis.device)
    batch = SketchBatch([empty], [sums])
    batch.decomposition = whitening(batch.measure()[0], batch.ceiling)
    batch.write_rows(all_finite, [0])
    # A fold of one token at the mean, with C = V^T V: the image is the basis itself.
    clear_sums([sums])
    sums.count = 1
    unit_spectrum = replace(empty, values=np.ones_like(empty.values))
    batch = SketchBatch([unit_spectrum], [sums])
    batch.decomposition = orthogonalisation(batch.measure()[0])
    batch.write_rows(all_finite, [0])
    sums.count = 0
    return empty
