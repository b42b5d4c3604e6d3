"""The step: fold all streams that are due, and compare each with its old basis, with one read.

On an accelerator the host only enqueues work: fold, comparison, then one read of everything that
its decisions depend on. Work that the next step needs anyway is done before the read. The new bases
overwrite the old ones, chunk by chunk, so that the step needs no second set of them. They are
written only if the sums of all streams are finite, which the device checks itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..ops.convergence import convergence, cosines
from . import _host
from ._autocast import without_autocast
from ._basis import repair_basis
from ._host import Array
from .batch import Batch, GramBatch, HostNumbers, decompose
from .fold import fold, fold_gram, lost_shares, make_sketch_batch
from .state import GramState, SketchState, StepSums, clear_sums, sketch_of, tensors_by_dtype

if TYPE_CHECKING:
    from .stream import InputStream

__all__ = [
    "Fold",
    "NonFiniteStepError",
    "begin_fold",
    "fold_streams",
    "read_cosines",
    "split_by_device",
]


class NonFiniteStepError(NonFiniteError):
    """The tokens of a step hold NaN or infinity, found when the step was folded.

    Attributes:
        stream: the first one affected.
    """

    def __init__(self, message: str, stream: InputStream) -> None:
        super().__init__(message)
        self.stream = stream


def fold_streams(streams: Iterable[InputStream], *, final: bool = False) -> list[InputStream]:
    """Fold every stream that has a full step.

    Args:
        streams: of any shapes and devices; those of equal shape are folded as one batch.
        final: fold whatever is pending, however few tokens.

    Returns:
        The streams that were folded. A step is at least Q tokens; fewer stay pending.

    Raises:
        NonFiniteStepError: on an accelerator, where ``add`` does not check the tokens. Then no
            stream is folded. The streams affected lose their pending tokens (exact ones only those
            that are not finite), the others keep theirs for the next step.
    Cost: on an accelerator one read for all streams; a second one if a basis has to be repaired,
        because the data are of deficient rank or graded too unevenly.
    """
    return begin_fold(streams, final=final).finish()


@without_autocast
def begin_fold(streams: Iterable[InputStream], *, final: bool = False) -> Fold:
    """Enqueue the accelerators' part of :func:`fold_streams` without waiting.

    Until the fold is finished the streams must not be used.
    """
    due = []
    for stream in streams:
        if stream.state is not None and stream.pending >= (1 if final else stream.width):
            due.append(stream)
    accelerator_groups: list[list[InputStream]] = []
    cpu_groups: list[list[InputStream]] = []
    groups = _group_by_shape(due)
    for group in groups:
        (cpu_groups if _host.reads_are_free(group[0].device) else accelerator_groups).append(group)
    queued = _QueuedFold(accelerator_groups, due) if accelerator_groups else None
    return Fold(groups, cpu_groups, queued)


class Fold:
    """A fold that has begun.

    Args:
        groups: all streams that are due, grouped by shape.
        cpu_groups: the groups on the CPU, not folded yet.
        queued_fold: the queued fold of the others, on accelerators.
    """

    def __init__(
        self,
        groups: Sequence[list[InputStream]],
        cpu_groups: Sequence[Sequence[InputStream]],
        queued_fold: _QueuedFold | None,
    ) -> None:
        self._groups, self._cpu_groups, self._queued_fold = groups, cpu_groups, queued_fold

    @property
    def queued(self) -> bool:
        """Whether work is queued on an accelerator, so that the host is free."""
        return self._queued_fold is not None

    @without_autocast
    def finish(self) -> list[InputStream]:
        """Wait for the accelerators, return the streams as :func:`fold_streams`; call it once."""
        queued_fold, self._queued_fold = self._queued_fold, None  # release its memory afterwards
        if queued_fold is not None:  # first, since it may raise
            queued_fold.finish()
        for group in self._cpu_groups:
            _fold_on_cpu(group)
        return [stream for group in self._groups for stream in group]


def _group_by_shape(streams: Sequence[InputStream]) -> list[list[InputStream]]:
    groups: dict[tuple[object, ...], list[InputStream]] = defaultdict(list)
    for s in streams:
        groups[type(s.state), s.features, s.width, s.device, s.dtype].append(s)
    return list(groups.values())


def _fold_on_cpu(group: Sequence[InputStream]) -> None:
    old_sketches = [stream.sketch for stream in group]
    if isinstance(group[0].state, GramState):
        folded = [fold_gram(s.state) for s in group if isinstance(s.state, GramState)]
        results: list[tuple[SketchState | GramState, Array]] = list(folded)
    else:
        states = [s.state for s in group if isinstance(s.state, SketchState)]
        results = list(fold(states, [s.sums for s in group if s.sums is not None]))
    squares = np.square([sketch_of(state).values for state, _ in results])
    captured = np.stack([part for _, part in results])
    lost = lost_shares(squares, captured, [s.components for s in group])
    for stream, old, (state, _), share in zip(group, old_sketches, results, lost, strict=True):
        # The first fold starts from the warm-up, which is no step to compare with.
        rows = old.basis[: stream.components] if stream.folds and old is not None else None
        stream.close_step(state, share, rows)
    clear_sums(_step_sums(group))


class _QueuedFold:
    """A queued fold of streams on accelerators, and the numbers that the host will read.

    Args:
        groups: streams, grouped by shape.
        due: all streams that are to be folded.
    """

    def __init__(self, groups: Sequence[Sequence[InputStream]], due: Sequence[InputStream]) -> None:
        self._groups, self._due = groups, due
        # The first fold starts from the warm-up, which is no step to compare with.
        num_saved = [[s.components if s.folds else 0 for s in group] for group in groups]
        batches = [
            _make_batch(group, counts) for group, counts in zip(groups, num_saved, strict=True)
        ]
        decompose(batches)
        all_finite = _all_finite(batches)
        saved = [
            b.write_rows(all_finite[b.device], counts)
            for b, counts in zip(batches, num_saved, strict=True)
        ]
        self._cosines = _launch_comparison(batches, saved, num_saved)
        self._cleared = _step_sums([s for group in groups for s in group])
        _clear_if_finite(all_finite, self._cleared)
        # The device has work queued: what the host does from here to the read is hidden behind it.
        self._previous = [rows.split(counts) for rows, counts in zip(saved, num_saved, strict=True)]
        self._batches = batches

    def finish(self) -> None:
        """Read the numbers, and update the streams with the results of the devices."""
        groups, batches = self._groups, self._batches
        tensors = [
            part for batch in batches for part in (batch.scalars, batch.decomposition.summary)
        ]
        arrays = iter(_host.read([*tensors, *self._cosines.values()]))
        numbers = [HostNumbers.from_columns(*islice(arrays, 2)) for _ in batches]
        host_cosines = dict(zip(self._cosines, arrays, strict=True))
        _raise_if_nonfinite(groups, numbers, self._due)

        for group, batch, host_numbers, rows in zip(
            groups, batches, numbers, self._previous, strict=True
        ):
            _update_streams(group, batch, host_numbers, rows)
        for sums in self._cleared:
            sums.count = 0
        for device, array in host_cosines.items():
            pairs = zip(groups, batches, strict=True)
            on_device = [s for group, batch in pairs if batch.device == device for s in group]
            _store_cosines([s for s in on_device if s.previous is not None], array)
        uneven = [host_numbers.uneven.nonzero()[0].tolist() for host_numbers in numbers]
        _repair_bases(
            [group[i] for group, indices in zip(groups, uneven, strict=True) for i in indices]
        )


def _update_streams(
    group: Sequence[InputStream], batch: Batch, numbers: HostNumbers, old_rows: Sequence[Tensor]
) -> None:
    """Update streams with the results of the device and their saved old rows."""
    bases, means = [s.basis for s in batch.sketches], [s.mean for s in batch.sketches]
    results = batch.new_states(numbers, bases, means)
    lost = lost_shares(numbers.squares, numbers.captured, [s.components for s in group])
    for stream, (sketch, _), share, rows in zip(group, results, lost, old_rows, strict=True):
        state: SketchState | GramState = sketch
        if isinstance(stream.state, GramState):
            state = GramState(stream.state.sums, stream.state.pivot, sketch)
        stream.close_step(state, share, rows if stream.folds else None)


def _make_batch(group: Sequence[InputStream], num_saved: Sequence[int]) -> Batch:
    if isinstance(group[0].state, GramState):
        return GramBatch([s.state for s in group if isinstance(s.state, GramState)])
    states = [s.state for s in group if isinstance(s.state, SketchState)]
    return make_sketch_batch(states, [s.sums for s in group if s.sums is not None], num_saved)


def _all_finite(batches: Sequence[Batch]) -> dict[torch.device, Tensor]:
    """Return, on every device, whether the sums of all streams on all devices are finite."""
    sums: dict[torch.device, list[Tensor]] = defaultdict(list)
    for batch in batches:
        sums[batch.device] += [batch.scalars.sum(), batch.decomposition.summary.sum()]
    total_by_device = {device: torch.stack(parts).sum() for device, parts in sums.items()}
    is_finite = {}
    for device in total_by_device:
        totals = [t.to(device, non_blocking=True) for t in total_by_device.values()]
        grand_total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        is_finite[device] = grand_total - grand_total == 0  # two launches, isfinite takes four
    return is_finite


def _launch_comparison(
    batches: Sequence[Batch], saved: Sequence[Tensor], num_saved: Sequence[Sequence[int]]
) -> dict[torch.device, Tensor]:
    """Launch the comparison of all rows saved; returns the cosines by device."""
    parts: dict[torch.device, list[tuple[Tensor, list[Tensor], Sequence[int]]]] = defaultdict(list)
    for batch, rows, counts in zip(batches, saved, num_saved, strict=True):
        if not len(rows):
            continue
        bases = [sketch.basis for sketch in batch.sketches]
        if batch.dtype != torch.float32:
            max_saved = max(counts)  # also for the first stream, which may have saved none
            bases = [basis[:max_saved].float() for basis in bases]
        parts[batch.device].append((rows.float(), bases, counts))
    return {device: cosines(*zip(*groups, strict=True)) for device, groups in parts.items()}


def read_cosines(streams: Sequence[InputStream]) -> None:
    """Compare the saved old rows of each stream, ``previous``, with its new ones; one read."""
    parts = split_by_device([s for s in streams if s.previous is not None])
    cosines_by_device = []
    for part in parts:
        previous_rows = [s.previous.float() for s in part if s.previous is not None]
        current_rows = [
            s.sketch.basis[: s.components].float() for s in part if s.sketch is not None
        ]
        cosines_by_device.append(convergence(previous_rows, current_rows, [0] * len(part), 0.0)[0])
    for part, array in zip(parts, _host.read(cosines_by_device), strict=True):
        _store_cosines(part, array)


def split_by_device(streams: Sequence[InputStream]) -> list[list[InputStream]]:
    """Split streams by their device, in order."""
    parts: dict[torch.device, list[InputStream]] = defaultdict(list)
    for stream in streams:
        parts[stream.device].append(stream)
    return list(parts.values())


def _store_cosines(streams: Sequence[InputStream], cosines: Array) -> None:
    begin = 0
    for stream in streams:
        stream.pending_cosines = cosines[begin : begin + stream.components]
        begin += stream.components


def _step_sums(streams: Sequence[InputStream]) -> list[StepSums]:
    # The sums of an exact stream are its state.
    return [s.sums for s in streams if s.sums is not None and not isinstance(s.state, GramState)]


def _clear_if_finite(all_finite: dict[torch.device, Tensor], sums: Sequence[StepSums]) -> None:
    """Clear sums on the device if they were folded, before the host knows whether they were."""
    for (device, dtype), tensors in tensors_by_dtype(sums).items():
        # sums that were folded are finite, so times 0 they are 0
        torch._foreach_mul_(tensors, all_finite[device].logical_not().to(dtype))


def _repair_bases(streams: Sequence[InputStream]) -> None:
    """Complete bases of deficient rank, and orthonormalise uneven ones; the ranks are known."""
    for stream in streams:
        sketch = stream.sketch
        assert sketch is not None
        sketch.basis.copy_(repair_basis(sketch.basis.double(), sketch.rank))
    read_cosines(streams)


def _raise_if_nonfinite(
    groups: Sequence[Sequence[InputStream]],
    numbers: Sequence[HostNumbers],
    due: Sequence[InputStream],
) -> None:
    """If the sums of a stream are not finite, drop them and raise; reads only in that case."""
    bad = set()
    for group, host_numbers in zip(groups, numbers, strict=True):
        bad |= {
            id(s)
            for s, is_finite in zip(group, host_numbers.is_finite.tolist(), strict=True)
            if not is_finite
        }
    faults = [(s, s.drop_pending()) for s in due if id(s) in bad]
    if faults:
        raise NonFiniteStepError(faults[0][1], faults[0][0])
