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
from ._basis import repair
from ._host import Array
from .batch import Batch, GramBatch, Numbers, decompose
from .fold import fold, fold_gram, lost_shares, sketch_batch
from .state import GramState, SketchState, StepSums, clear_sums, sketch_of, tensors_of

if TYPE_CHECKING:
    from .stream import InputStream

__all__ = [
    "Fold",
    "NonFiniteStepError",
    "begin_fold",
    "by_device",
    "fold_streams",
    "read_cosines",
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
    away: list[list[InputStream]] = []
    here: list[list[InputStream]] = []
    groups = _groups(due)
    for group in groups:
        (here if _host.reads_are_free(group[0].device) else away).append(group)
    return Fold(groups, here, _Queued(away, due) if away else None)


class Fold:
    """A fold that has begun.

    Args:
        groups: all streams that are due, grouped by shape.
        here: the groups on the CPU, not folded yet.
        away: the queued fold of the others, on accelerators.
    """

    def __init__(
        self,
        groups: Sequence[list[InputStream]],
        here: Sequence[Sequence[InputStream]],
        away: _Queued | None,
    ) -> None:
        self._groups, self._here, self._away = groups, here, away

    @property
    def queued(self) -> bool:
        """Whether work is queued on an accelerator, so that the host is free."""
        return self._away is not None

    @without_autocast
    def finish(self) -> list[InputStream]:
        """Wait for the accelerators, return the streams as :func:`fold_streams`; call it once."""
        away, self._away = self._away, None  # release its memory afterwards
        if away is not None:  # first, since it may raise
            away.take_over()
        for group in self._here:
            _fold_here(group)
        return [stream for group in self._groups for stream in group]


def _groups(streams: Sequence[InputStream]) -> list[list[InputStream]]:
    groups: dict[tuple[object, ...], list[InputStream]] = defaultdict(list)
    for s in streams:
        groups[type(s.state), s.features, s.width, s.device, s.dtype].append(s)
    return list(groups.values())


def _fold_here(group: Sequence[InputStream]) -> None:
    before = [stream.sketch for stream in group]
    if isinstance(group[0].state, GramState):
        found = [fold_gram(s.state) for s in group if isinstance(s.state, GramState)]
        results: list[tuple[SketchState | GramState, Array]] = list(found)
    else:
        states = [s.state for s in group if isinstance(s.state, SketchState)]
        results = list(fold(states, [s.sums for s in group if s.sums is not None]))
    squares = np.square([sketch_of(state).values for state, _ in results])
    captured = np.stack([part for _, part in results])
    lost = lost_shares(squares, captured, [s.components for s in group])
    for stream, old, (state, _), share in zip(group, before, results, lost, strict=True):
        # The first fold starts from the warm-up, which is no step to compare with.
        rows = old.basis[: stream.components] if stream.folds and old is not None else None
        stream.close_step(state, share, rows)
    clear_sums(_step_sums(group))


class _Queued:
    """A queued fold of streams on accelerators, and the numbers that the host will read.

    Args:
        groups: streams, grouped by shape.
        due: all streams that are to be folded.
    """

    def __init__(self, groups: Sequence[Sequence[InputStream]], due: Sequence[InputStream]) -> None:
        self._groups, self._due = groups, due
        # The first fold starts from the warm-up, which is no step to compare with.
        kept = [[s.components if s.folds else 0 for s in group] for group in groups]
        batches = [_batch_of(group, counts) for group, counts in zip(groups, kept, strict=True)]
        decompose(batches)
        sound = _sound(batches)
        saved = [b.renew(sound[b.device], counts) for b, counts in zip(batches, kept, strict=True)]
        self._turned = _compare(batches, saved, kept)
        self._cleared = _step_sums([s for group in groups for s in group])
        _clear_where(sound, self._cleared)
        # The device has work queued: what the host does from here to the read is hidden behind it.
        self._previous = [rows.split(counts) for rows, counts in zip(saved, kept, strict=True)]
        self._batches = batches

    def take_over(self) -> None:
        """Read the numbers, and update the streams with the results of the devices."""
        groups, batches = self._groups, self._batches
        wanted = [part for batch in batches for part in (batch.scalars, batch.found.told)]
        arrays = iter(_host.read([*wanted, *self._turned.values()]))
        numbers = [Numbers.of(*islice(arrays, 2)) for _ in batches]
        told_cosines = dict(zip(self._turned, arrays, strict=True))
        _refuse(groups, numbers, self._due)

        for group, batch, told, rows in zip(groups, batches, numbers, self._previous, strict=True):
            _take_over(group, batch, told, rows)
        for sums in self._cleared:
            sums.count = 0
        for device, array in told_cosines.items():
            pairs = zip(groups, batches, strict=True)
            here = [s for group, batch in pairs if batch.device == device for s in group]
            _keep_cosines([s for s in here if s.previous is not None], array)
        uneven = [told.uneven.nonzero()[0].tolist() for told in numbers]
        _repair([group[i] for group, which in zip(groups, uneven, strict=True) for i in which])


def _take_over(
    group: Sequence[InputStream], batch: Batch, told: Numbers, before: Sequence[Tensor]
) -> None:
    """Update streams with the results of the device and their saved old rows."""
    bases, means = [s.basis for s in batch.sketches], [s.mean for s in batch.sketches]
    results = batch.results(told, bases, means)
    lost = lost_shares(told.squares, told.captured, [s.components for s in group])
    for stream, (sketch, _), share, rows in zip(group, results, lost, before, strict=True):
        state: SketchState | GramState = sketch
        if isinstance(stream.state, GramState):
            state = GramState(stream.state.sums, stream.state.pivot, sketch)
        stream.close_step(state, share, rows if stream.folds else None)


def _batch_of(group: Sequence[InputStream], kept: Sequence[int]) -> Batch:
    if isinstance(group[0].state, GramState):
        return GramBatch([s.state for s in group if isinstance(s.state, GramState)])
    states = [s.state for s in group if isinstance(s.state, SketchState)]
    return sketch_batch(states, [s.sums for s in group if s.sums is not None], kept)


def _sound(batches: Sequence[Batch]) -> dict[torch.device, Tensor]:
    """Return, on every device, whether the sums of all streams on all devices are finite."""
    sums: dict[torch.device, list[Tensor]] = defaultdict(list)
    for batch in batches:
        sums[batch.device] += [batch.scalars.sum(), batch.found.told.sum()]
    total = {device: torch.stack(parts).sum() for device, parts in sums.items()}
    found = {}
    for device in total:
        every = [t.to(device, non_blocking=True) for t in total.values()]
        of_all = every[0] if len(every) == 1 else torch.stack(every).sum()
        found[device] = of_all - of_all == 0  # two launches, where isfinite takes four
    return found


def _compare(
    batches: Sequence[Batch], saved: Sequence[Tensor], kept: Sequence[Sequence[int]]
) -> dict[torch.device, Tensor]:
    """Launch the comparison of all rows saved; returns the cosines by device."""
    parts: dict[torch.device, list[tuple[Tensor, list[Tensor], Sequence[int]]]] = defaultdict(list)
    for batch, rows, counts in zip(batches, saved, kept, strict=True):
        if not len(rows):
            continue
        bases = [sketch.basis for sketch in batch.sketches]
        if batch.dtype != torch.float32:
            most = max(counts)  # also for the first stream, which may have kept none
            bases = [basis[:most].float() for basis in bases]
        parts[batch.device].append((rows.float(), bases, counts))
    return {device: cosines(*zip(*groups, strict=True)) for device, groups in parts.items()}


def read_cosines(streams: Sequence[InputStream]) -> None:
    """Compare the saved old rows of each stream, ``previous``, with its new ones; one read."""
    parts = by_device([s for s in streams if s.previous is not None])
    launched = []
    for part in parts:
        before = [s.previous.float() for s in part if s.previous is not None]
        now = [s.sketch.basis[: s.components].float() for s in part if s.sketch is not None]
        launched.append(convergence(before, now, [0] * len(part), 0.0)[0])
    for part, array in zip(parts, _host.read(launched), strict=True):
        _keep_cosines(part, array)


def by_device(streams: Sequence[InputStream]) -> list[list[InputStream]]:
    """Split streams by their device, in order."""
    parts: dict[torch.device, list[InputStream]] = defaultdict(list)
    for stream in streams:
        parts[stream.device].append(stream)
    return list(parts.values())


def _keep_cosines(streams: Sequence[InputStream], cosines: Array) -> None:
    begin = 0
    for stream in streams:
        stream.turned = cosines[begin : begin + stream.components]
        begin += stream.components


def _step_sums(streams: Sequence[InputStream]) -> list[StepSums]:
    # The sums of an exact stream are its state.
    return [s.sums for s in streams if s.sums is not None and not isinstance(s.state, GramState)]


def _clear_where(sound: dict[torch.device, Tensor], sums: Sequence[StepSums]) -> None:
    """Clear sums on the device if they were folded, before the host knows whether they were."""
    for (device, dtype), tensors in tensors_of(sums).items():
        # sums that were folded are finite, so times 0 they are 0
        torch._foreach_mul_(tensors, sound[device].logical_not().to(dtype))


def _repair(streams: Sequence[InputStream]) -> None:
    """Complete bases of deficient rank, and orthonormalise uneven ones; the ranks are known."""
    for stream in streams:
        sketch = stream.sketch
        assert sketch is not None
        sketch.basis.copy_(repair(sketch.basis.double(), sketch.rank))
    read_cosines(streams)


def _refuse(
    groups: Sequence[Sequence[InputStream]], numbers: Sequence[Numbers], due: Sequence[InputStream]
) -> None:
    """If the sums of a stream are not finite, drop them and raise; reads only in that case."""
    bad = set()
    for group, told in zip(groups, numbers, strict=True):
        bad |= {id(s) for s, sound in zip(group, told.sound.tolist(), strict=True) if not sound}
    faults = [(s, s.drop_pending()) for s in due if id(s) in bad]
    if faults:
        raise NonFiniteStepError(faults[0][1], faults[0][0])
