"""Layer inputs of one shape on their way through a fold.

A fold is three passes. ``measure``, over (Q, D): the image Y and its products with the basis and
with itself. ``decompose``, over (Q, Q), for all layers at once whatever their D. ``rows``, over
(Q, D) again: the new basis. If all layers fit in one chunk, Y is kept from the first pass to the
last; otherwise it is computed twice, which costs less than the memory to keep it.

On a GPU native code does both (Q, D) passes of a sketch without ever storing Y, and without chunks,
see ``native_batch.py``.

Nothing here reads from the device, except for a repair where reads are free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.fold import HEADER_SIZE
from . import _host
from ._basis import repair_basis
from ._host import Array
from .nystrom import Nystrom, nystrom
from .state import GramState, SketchState, StepSums

__all__ = [
    "Batch",
    "GramBatch",
    "HostNumbers",
    "SketchBatch",
    "chunk_bytes",
    "decompose",
    "fold_numbers",
    "stacked",
]

# Layers go through a pass in chunks whose float64 bases together stay below this many bytes. On a
# CPU a chunk should fit the cache. On a GPU a pass holds at most three such arrays, so this bounds
# the memory of a fold to about 100 MB; half of it would still be 8 layers of 4096 x 64, enough to
# fill the device, but twice the launches (some 20 per chunk).
CHUNK_BYTES = 1 << 20
CHUNK_BYTES_ACCELERATOR = 32 << 20


def chunk_bytes(reads_are_free: bool) -> int:
    """Return the most bytes of float64 bases in a chunk, see :func:`._host.reads_are_free`."""
    return CHUNK_BYTES if reads_are_free else CHUNK_BYTES_ACCELERATOR


class HostNumbers(NamedTuple):
    """The numbers that the host reads for each layer, see :class:`Batch` and :class:`Nystrom`."""

    check: Array
    gain: Array
    mean_norm: Array
    rank: Array
    uneven: Array
    squares: Array
    captured: Array

    @classmethod
    def from_columns(cls, scalars: Array, summary: Array) -> HostNumbers:
        """Split :attr:`Batch.scalars` and :attr:`Nystrom.summary` into named columns."""
        width = summary.shape[1] // 2 - 1
        check, gain, norm = scalars.T
        squares, captured = summary[:, 2 : 2 + width], summary[:, 2 + width :]
        return cls(check, gain, norm, summary[:, 0], summary[:, 1], squares, captured)

    @property
    def is_finite(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether all numbers of a layer are finite, (L,); the device decides by the same test."""
        scalars = self.check + self.gain + self.mean_norm
        return np.isfinite(scalars + self.squares.sum(1) + self.captured.sum(1))


class Batch:
    """The common part of sketched and exactly tracked layer inputs.

    Args:
        sketches: of equal (Q, D), dtype and device.
        layer_bytes: of the largest float64 array of one layer.

    Attributes:
        numbers: of sketches, see :func:`fold_numbers`.
        mean: the new means, (L, D), dtype of the basis.
        scalars: float64 (L, 3): a number that is not finite if the sums of a layer are unusable,
            how much the step increases ``total``, and the norm of the new mean.
        ceiling: float64 (L,), upper bound of the rank.
        counts_and_totals: per layer, tokens after the fold and ``total`` before it.
        decomposition: result of :func:`decompose`.
    """

    numbers: Tensor
    mean: Tensor
    scalars: Tensor
    ceiling: Tensor
    counts_and_totals: list[tuple[int, float]]
    decomposition: Nystrom

    def __init__(self, sketches: Sequence[SketchState], layer_bytes: int) -> None:
        self.sketches = list(sketches)
        basis = sketches[0].basis
        self.device, self.dtype, self.width = basis.device, basis.dtype, len(basis)
        self.reads_are_free = _host.reads_are_free(self.device)
        layers = max(1, chunk_bytes(self.reads_are_free) // layer_bytes)
        edges = [*range(0, len(sketches), layers), len(sketches)]
        self.chunks = [slice(a, b) for a, b in pairwise(edges)]
        self._cached_image: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.sketches)

    @property
    def trace(self) -> Tensor:
        """The trace of the C that :meth:`image` multiplies, float64 (L,)."""
        return self.numbers[:, HEADER_SIZE:].sum(1) + self.scalars[:, 1]

    def image(self, chunk: slice, basis: Tensor, basis64: Tensor | None = None) -> Tensor:
        """Return ``Y = V C`` as rows, float64 (l, Q, D).

        Args:
            chunk: which layers.
            basis: their bases, (l, Q, D), in their own dtype.
            basis64: the same in float64; given at the first call for a chunk.
        """
        raise NotImplementedError

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return ``Y V^T`` and ``Y Y^T``, (L, Q, Q)."""
        cores, metrics = zip(*map(self._measure_chunk, self.chunks), strict=True)
        return joined(cores), joined(metrics)

    # A separate function per chunk, so that its temporaries are freed.
    def _measure_chunk(self, chunk: slice) -> tuple[Tensor, Tensor]:
        basis = stacked([s.basis for s in self.sketches[chunk]])
        basis64 = basis.double()
        image = self.image(chunk, basis, basis64)
        if len(self.chunks) == 1:
            self._cached_image = basis, image
        return image @ basis64.mT, image @ image.mT

    def write_rows(self, all_finite: Tensor, num_saved: Sequence[int]) -> Tensor:
        """Overwrite rows and means with the new ones, if ``all_finite``, a () bool.

        Rows from the rank on are not written.

        Args:
            all_finite: whether the sums of all layers are finite.
            num_saved: per layer, how many leading old rows to return.

        Returns:
            Copies of the old rows, (sum of num_saved, D).
        """
        saved = self.sketches[0].basis.new_empty(sum(num_saved), self.mean.shape[1])
        for chunk in self.chunks:
            self._write_chunk(
                chunk, all_finite, num_saved[chunk], saved[sum(num_saved[: chunk.start]) :]
            )
        means = [s.mean for s in self.sketches]
        new = torch.where(all_finite, self.mean, torch.stack(means))
        torch._foreach_copy_(means, list(new.unbind(0)))
        return saved

    def _write_chunk(
        self, chunk: slice, all_finite: Tensor, num_saved: Sequence[int], saved: Tensor
    ) -> None:
        basis, rows = self.old_and_new_rows(chunk)
        leading = [old[:count] for old, count in zip(basis, num_saved, strict=True)]
        torch.cat(leading, out=saved[: sum(num_saved)])
        rank = self.decomposition.rank[chunk, None]
        in_rank = torch.arange(self.width, device=self.device) < rank
        rows = torch.where((all_finite & in_rank)[:, :, None], rows.to(self.dtype), basis)
        torch._foreach_copy_([s.basis for s in self.sketches[chunk]], list(rows.unbind(0)))

    def old_and_new_rows(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return the old rows of a chunk and, float64, the new ones, (l, Q, D)."""
        if self._cached_image is not None:
            (basis, image), self._cached_image = self._cached_image, None
        else:
            basis = stacked([s.basis for s in self.sketches[chunk]])
            image = self.image(chunk, basis)
        rows = self.decomposition.mixing[chunk].mT @ image
        if self.reads_are_free:
            for i in torch.nonzero(self.decomposition.uneven[chunk]).flatten().tolist():
                rows[i] = repair_basis(rows[i], int(self.decomposition.rank[chunk][i]))
        return basis, rows

    def new_states(
        self, numbers: HostNumbers, bases: Sequence[Tensor], means: Sequence[Tensor]
    ) -> list[tuple[SketchState, Array]]:
        """Return the new states, each with the variance captured by its old basis, (Q,).

        Args:
            numbers: as read by the host.
            bases, means: the new ones.
        """
        values, new_states = np.sqrt(numbers.squares), []
        scalars = numbers.gain.tolist(), numbers.rank.tolist(), numbers.mean_norm.tolist()
        for i, (gain, rank, norm) in enumerate(zip(*scalars, strict=True)):
            count, start = self.counts_and_totals[i]
            state = SketchState(count, means[i], bases[i], values[i], start + gain, int(rank), norm)
            new_states.append((state, numbers.captured[i]))
        return new_states


def fold_numbers(
    states: Sequence[SketchState], sums: Sequence[StepSums]
) -> tuple[Tensor, list[tuple[int, float]]]:
    """Return what the host knows of sketches before a fold.

    Returns:
        On their device, float64 (L, 4 + Q): ``added``, the tokens of the step; ``added / count``;
        an upper bound of the rank; ``added^2 / count``; the squares s^2. And
        :attr:`Batch.counts_and_totals`.
    """
    basis = states[0].basis
    rows, counts_and_totals = np.empty((len(states), HEADER_SIZE + len(basis))), []
    for row, state, step in zip(rows, states, sums, strict=True):
        added, count = float(step.count), float(state.count + step.count)
        counts_and_totals.append((state.count + step.count, state.total))
        row[:HEADER_SIZE] = added, added / count, count - 1, added**2 / count
        np.square(state.values, out=row[HEADER_SIZE:])
    return _host.upload(torch.from_numpy(rows), basis.device), counts_and_totals


class SketchBatch(Batch):
    """Sketched layer inputs.

    Args:
        states: that the sums are folded into; not modified.
        sums: about each state's mean; every count at least 1.
    """

    def __init__(self, states: Sequence[SketchState], sums: Sequence[StepSums]) -> None:
        super().__init__(states, states[0].basis.numel() * 8)
        self.sums = list(sums)
        self.numbers, self.counts_and_totals = fold_numbers(states, sums)
        self.ceiling = self.numbers[:, 2]
        added, share, _, weight = self.numbers[:, :HEADER_SIZE].split(1, dim=1)
        delta, square = stacked([s.shift for s in sums]) / added, stacked([s.square for s in sums])
        mean = stacked([s.mean for s in states])
        self.mean = torch.addcmul(mean, share, delta).to(self.dtype)
        gain = square - (weight * delta.square().sum(1, keepdim=True)).squeeze(1)
        norm = torch.linalg.vector_norm(self.mean, dim=1, dtype=torch.float64)
        self.scalars = torch.stack([square, gain.clamp_min(0), norm], 1)
        self._delta = delta.unsqueeze(1)
        self._weight, self._squares = weight.unsqueeze(2), self.numbers[:, HEADER_SIZE:, None]
        self._along = delta.new_empty(len(states), self.width, 1)

    def image(self, chunk: slice, basis: Tensor, basis64: Tensor | None = None) -> Tensor:
        """See :class:`Batch`; exact for the C that the state represents."""
        products = stacked([s.products for s in self.sums[chunk]])
        delta, squares = self._delta[chunk], self._squares[chunk]
        if basis64 is not None:
            torch.mul(basis64 @ delta.mT, self._weight[chunk], out=self._along[chunk])
        if self.reads_are_free and basis64 is not None:  # faster on a CPU, bitwise the same
            image = products.to(torch.float64, copy=True).addcmul_(basis64, squares)
        else:  # promoted to float64 on the way, in one kernel
            image = torch.addcmul(products, basis, squares)
        return image.baddbmm_(self._along[chunk], delta, alpha=-1)


class GramBatch(Batch):
    """Exactly tracked layer inputs, whose sketches advance by one step on the exact scatter."""

    def __init__(self, states: Sequence[GramState]) -> None:
        features = len(states[0].pivot)
        super().__init__([s.sketch for s in states], features * features * 8)
        self.sums = [s.sums for s in states]
        # The trace of the exact scatter is the whole total.
        self.counts_and_totals = [(s.count, 0.0) for s in self.sums]
        count = np.array([float(max(s.count, 1)) for s in self.sums])
        table = _host.upload(
            torch.from_numpy(np.stack([count, -1 / count, count - 1], 1)), self.device
        )
        device_count, self._share, self.ceiling = table.unbind(1)
        self._shift = stacked([s.shift for s in self.sums])
        diagonal = stacked([s.products.diagonal() for s in self.sums])
        gain = self._about_mean(diagonal, self._shift, self._shift, slice(None)).sum(1)
        pivot = stacked([s.pivot for s in states])
        self.mean = (pivot + self._shift / device_count[:, None]).to(self.dtype)
        check = torch.zeros_like(gain)
        if any(s.bad is not None for s in self.sums):
            bad = stacked([check[0] if s.bad is None else s.bad for s in self.sums])
            check = torch.where(bad > 0, torch.inf, 0.0)
        norm = torch.linalg.vector_norm(self.mean, dim=1, dtype=torch.float64)
        self.scalars = torch.stack([check, gain.clamp_min(0), norm], 1)

    def _about_mean(self, scatter: Tensor, left: Tensor, right: Tensor, chunk: slice) -> Tensor:
        share = self._share[chunk].reshape(-1, *[1] * (right.dim() - 1))
        return torch.addcmul(scatter, left, right * share)

    @property
    def trace(self) -> Tensor:
        """See :class:`Batch`."""
        return self.scalars[:, 1]

    def image(self, chunk: slice, basis: Tensor, basis64: Tensor | None = None) -> Tensor:
        """See :class:`Batch`; for the exact C."""
        products, shift = stacked([s.products for s in self.sums[chunk]]), self._shift[chunk]
        scatter = self._about_mean(products, shift[:, :, None], shift[:, None, :], chunk)
        return (basis.double() if basis64 is None else basis64) @ scatter


def decompose(batches: Sequence[Batch]) -> None:
    """Set ``decomposition``: the (Q, Q) part for all layers of equal Q at once, for any D."""
    groups: dict[tuple[object, ...], list[Batch]] = defaultdict(list)
    for batch in batches:
        groups[batch.device, batch.width, batch.dtype].append(batch)
    for group in groups.values():
        cores, metrics = zip(*(batch.measure() for batch in group), strict=True)
        ceiling = joined([batch.ceiling for batch in group])
        trace = joined([batch.trace for batch in group])
        decomposition = nystrom(joined(cores), joined(metrics), ceiling, trace, group[0].dtype)
        sizes = [len(batch) for batch in group]
        parts = zip(
            group,
            decomposition.mixing.split(sizes),
            decomposition.summary.split(sizes),
            strict=True,
        )
        for batch, mixing, summary in parts:
            batch.decomposition = Nystrom(mixing, summary)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors; a single one is returned as a view."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors; a single one is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
