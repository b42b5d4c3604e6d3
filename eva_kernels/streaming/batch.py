"""Layer inputs of one shape on their way through a fold.

A fold is three passes. ``measure``, over (Q, D): the image Y and its products with the basis and
with itself. ``decompose``, over (Q, Q), for all layers at once whatever their D. ``rows``, over
(Q, D) again: the new basis. Where all layers fit one chunk, Y is kept from the first pass to the
last; otherwise it is built twice, which costs less than the memory to keep it.

On a GPU native code does both passes of a sketch without ever storing Y, and there are no chunks.

Nothing here asks the device for a number, except for a repair where reads are free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.fold import fold_measure, fold_rows, runs_natively
from . import _host
from ._basis import repair
from ._host import Array
from .nystrom import Nystrom, nystrom
from .state import GramState, SketchState, StepSums

__all__ = ["Batch", "GramBatch", "Numbers", "SketchBatch", "chunk_bytes", "decompose"]

# Layers go through a pass in chunks whose float64 basis stays below this many bytes. On a CPU the
# cache should hold a chunk. On a GPU a pass holds three such arrays at its worst, so this bounds
# the memory of a fold to about 100 MB; half of it would still be 8 layers of 4096 x 64, enough to
# fill the device, but twice the launches (some 20 a chunk).
CHUNK_BYTES = 1 << 20
CHUNK_BYTES_ACCELERATOR = 32 << 20


def chunk_bytes(free: bool) -> int:
    """Return how many bytes of float64 basis go through a pass together, if reads are free."""
    return CHUNK_BYTES if free else CHUNK_BYTES_ACCELERATOR


class Numbers(NamedTuple):
    """What the host reads of a batch, by layer: see :class:`Batch` and :class:`Nystrom`."""

    check: Array
    gain: Array
    mean_norm: Array
    rank: Array
    uneven: Array
    squares: Array
    captured: Array

    @property
    def sound(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """As :attr:`Batch.sound`."""
        return np.isfinite(self.check + self.captured.sum(1))


class Batch:
    """What the two kinds of layer inputs have in common.

    Args:
        sketches: of equal (Q, D), dtype and device.
        size: bytes of the largest float64 array of one layer.

    Attributes:
        mean: the new ones, (L, D), dtype of the basis.
        check: float64 (L,), not finite where the sums of a layer are of no use.
        gain: float64 (L,), what the step adds to ``total``.
        ceiling: float64 (L,), the most that the rank can be.
        starts: tokens after the fold, and ``total`` before it, of each layer.
        found: set by :func:`decompose`.
    """

    mean: Tensor
    check: Tensor
    gain: Tensor
    ceiling: Tensor
    starts: list[tuple[int, float]]
    found: Nystrom

    def __init__(self, sketches: Sequence[SketchState], size: int) -> None:
        self.sketches = list(sketches)
        basis = sketches[0].basis
        self.device, self.dtype, self.width = basis.device, basis.dtype, len(basis)
        self.free = _host.reads_are_free(self.device)
        layers = max(1, chunk_bytes(self.free) // size)
        edges = [*range(0, len(sketches), layers), len(sketches)]
        self.chunks = [slice(a, b) for a, b in pairwise(edges)]
        self._kept: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.sketches)

    def image(self, chunk: slice, basis: Tensor, wide: Tensor | None = None) -> Tensor:
        """Return ``Y = V C`` as rows, float64 (l, Q, D).

        Args:
            chunk: which layers.
            basis: their bases, (l, Q, D), in their own dtype.
            wide: the same in float64, at the first call for a chunk.
        """
        raise NotImplementedError

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return ``Y V^T`` and ``Y Y^T``, (L, Q, Q)."""
        cores, metrics = zip(*map(self._measure, self.chunks), strict=True)
        return joined(cores), joined(metrics)

    # A chunk has a function of its own, so that nothing of it outlives it.
    def _measure(self, chunk: slice) -> tuple[Tensor, Tensor]:
        basis = stacked([s.basis for s in self.sketches[chunk]])
        wide = basis.double()
        image = self.image(chunk, basis, wide)
        if len(self.chunks) == 1:
            self._kept = basis, image
        return image @ wide.mT, image @ image.mT

    def renew(self, sound: Tensor, kept: Sequence[int]) -> list[Tensor]:
        """Put the new rows in place of the old, if ``sound``, a () bool.

        Args:
            sound: whether the sums of all layers are finite.
            kept: how many leading rows before to return, by layer.

        Returns:
            Copies of the rows before, (K_i, D) each.
        """
        before: list[Tensor] = []
        for chunk in self.chunks:
            before += self._renew(chunk, sound, kept[chunk])
        return before

    def _renew(self, chunk: slice, sound: Tensor, kept: Sequence[int]) -> list[Tensor]:
        basis, rows = self.rows(chunk)
        # A copy: a view would keep all rows, or be those that are written below.
        leading = basis[:, : max(kept)].clone().unbind(0)
        rows = torch.where(sound, rows.to(self.dtype), basis)
        torch._foreach_copy_([s.basis for s in self.sketches[chunk]], list(rows.unbind(0)))
        return [part[:count] for part, count in zip(leading, kept, strict=True)]

    def rows(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return the old rows of a chunk and, float64, the new ones, (l, Q, D)."""
        if self._kept is not None:
            (basis, image), self._kept = self._kept, None
        else:
            basis = stacked([s.basis for s in self.sketches[chunk]])
            image = self.image(chunk, basis)
        rows = self.found.mixing[chunk].mT @ image
        if self.free:
            for i in torch.nonzero(self.found.uneven[chunk]).flatten().tolist():
                rows[i] = repair(rows[i], int(self.found.rank[chunk][i]))
        return basis, rows

    @property
    def sound(self) -> Tensor:
        """Whether the sums of each layer are finite, (L,) bool."""
        return (self.check + self.found.captured.sum(1)).isfinite()

    @property
    def numbers(self) -> list[Tensor]:
        """What the host wants to know; see :class:`Numbers`."""
        norm = torch.linalg.vector_norm(self.mean, dim=1, dtype=torch.float64)
        found = self.found
        scalars = [self.check, self.gain, norm, found.rank, found.uneven]
        return [*scalars, found.squares, found.captured]

    def results(
        self, numbers: Numbers, bases: Sequence[Tensor], means: Sequence[Tensor]
    ) -> list[tuple[SketchState, Array]]:
        """Return the new states, each with the variance captured by its old basis, (Q,).

        Args:
            numbers: as read.
            bases, means: where the new ones are.
        """
        values, found = np.sqrt(numbers.squares), []
        scalars = numbers.gain.tolist(), numbers.rank.tolist(), numbers.mean_norm.tolist()
        for i, (gain, rank, norm) in enumerate(zip(*scalars, strict=True)):
            count, start = self.starts[i]
            state = SketchState(count, means[i], bases[i], values[i], start + gain, int(rank), norm)
            found.append((state, numbers.captured[i]))
        return found


class SketchBatch(Batch):
    """Sketched layer inputs.

    Args:
        states: what the sums are to be folded into; unchanged.
        sums: about each state's mean; every count at least 1.
    """

    def __init__(self, states: Sequence[SketchState], sums: Sequence[StepSums]) -> None:
        super().__init__(states, states[0].basis.numel() * 8)
        self.sums = list(sums)
        self.starts = []
        self._native = runs_natively(states[0].basis)
        host = np.empty((len(states), 4 + self.width))
        for row, state, step in zip(host, states, sums, strict=True):
            seen, added = float(state.count), float(step.count)
            count = seen + added
            self.starts.append((state.count + step.count, state.total))
            row[:4] = added, added / count, max(count - 1, 0), added**2 / count
            np.square(state.values, out=row[4:])
        table = _host.upload(torch.from_numpy(host), self.device)
        added_, share, ceiling, weight, squares = table.split([1, 1, 1, 1, self.width], 1)
        delta = stacked([s.shift for s in sums]) / added_
        self.check, self.ceiling = stacked([s.square for s in sums]), ceiling.squeeze(1)
        away = (weight * delta.square().sum(1, keepdim=True)).squeeze(1)
        self.gain = (self.check - away).clamp_min(0)
        mean = stacked([s.mean for s in states])
        self.mean = torch.addcmul(mean, share, delta).to(self.dtype)
        self._delta, self._numbers = delta.unsqueeze(1), table[:, 3:]
        self._weight, self._squares = weight.unsqueeze(2), squares.unsqueeze(2)
        self._along = delta.new_empty(len(states), self.width, 1)

    def measure(self) -> tuple[Tensor, Tensor]:
        """See :class:`Batch`."""
        if not self._native:
            return super().measure()
        along, core, metric = fold_measure(*self._native_inputs())
        self._along = along.unsqueeze(2)
        return core, metric

    def renew(self, sound: Tensor, kept: Sequence[int]) -> list[Tensor]:
        """See :class:`Batch`."""
        if not self._native:
            return super().renew(sound, kept)
        inputs = self._native_inputs()
        rows = inputs[0][0].new_empty(sum(kept), self._delta.shape[2])
        before = list(rows.split(list(kept)))
        fold_rows(*inputs, self._along.squeeze(2), self.found.mixing, sound, before)
        return before

    def _native_inputs(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        bases, products = [s.basis for s in self.sketches], [s.products for s in self.sums]
        return bases, products, self._delta.squeeze(1), self._numbers

    def image(self, chunk: slice, basis: Tensor, wide: Tensor | None = None) -> Tensor:
        """See :class:`Batch`; exact for the C that the state represents."""
        products = stacked([s.products for s in self.sums[chunk]])
        delta, squares = self._delta[chunk], self._squares[chunk]
        if wide is not None:
            torch.mul(wide @ delta.mT, self._weight[chunk], out=self._along[chunk])
        if self.free and wide is not None:  # faster on a CPU, same bits
            image = products.to(torch.float64, copy=True).addcmul_(wide, squares)
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
        self.starts = [(s.count, 0.0) for s in self.sums]
        count = np.array([float(max(s.count, 1)) for s in self.sums])
        table = _host.upload(
            torch.from_numpy(np.stack([count, -1 / count, count - 1], 1)), self.device
        )
        count_, self._share, self.ceiling = table.unbind(1)
        self._shift = stacked([s.shift for s in self.sums])
        diagonal = stacked([s.products.diagonal() for s in self.sums])
        self.gain = self._about_mean(diagonal, self._shift, self._shift, slice(None))
        self.gain = self.gain.sum(1).clamp_min(0)
        pivot = stacked([s.pivot for s in states])
        self.mean = (pivot + self._shift / count_[:, None]).to(self.dtype)
        self.check = torch.zeros_like(self.gain)
        if any(s.bad is not None for s in self.sums):
            none = self.check[0]
            bad = stacked([none if s.bad is None else s.bad for s in self.sums])
            self.check = torch.where(bad > 0, torch.inf, 0.0)

    def _about_mean(self, scatter: Tensor, left: Tensor, right: Tensor, chunk: slice) -> Tensor:
        share = self._share[chunk].reshape(-1, *[1] * (right.dim() - 1))
        return torch.addcmul(scatter, left, right * share)

    def image(self, chunk: slice, basis: Tensor, wide: Tensor | None = None) -> Tensor:
        """See :class:`Batch`; for the exact C."""
        products, shift = stacked([s.products for s in self.sums[chunk]]), self._shift[chunk]
        scatter = self._about_mean(products, shift[:, :, None], shift[:, None, :], chunk)
        return (basis.double() if wide is None else wide) @ scatter


def decompose(batches: Sequence[Batch]) -> None:
    """Do the (Q, Q) part of all layers of equal Q at once, whatever their D; sets ``found``."""
    groups: dict[tuple[object, ...], list[Batch]] = defaultdict(list)
    for batch in batches:
        groups[batch.device, batch.width, batch.dtype].append(batch)
    for group in groups.values():
        cores, metrics = zip(*(batch.measure() for batch in group), strict=True)
        ceiling = joined([batch.ceiling for batch in group])
        found = nystrom(joined(cores), joined(metrics), ceiling, group[0].dtype)
        if len(group) == 1:
            group[0].found = found
            continue
        sizes = [len(batch) for batch in group]
        parts = [getattr(found, f.name).split(sizes) for f in fields(Nystrom)]
        for batch, *own in zip(group, *parts, strict=True):
            batch.found = Nystrom(*own)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack; of one tensor a view."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate; one tensor as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
