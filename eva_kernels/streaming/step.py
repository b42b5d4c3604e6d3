"""The step: fold all streams that are due, and compare each with what it was, by one read.

On an accelerator the host only fills the queue: fold, comparison, then one read for everything
that it decides on. The new bases are written in place of the old ones, chunk by chunk, so that the
step takes no second set of them, under the condition, known to the device alone, that the sums of
all streams are finite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..ops import convergence
from . import _host
from ._autocast import without_autocast
from ._basis import repair
from ._host import Array
from .batch import Batch, GramBatch, Numbers, SketchBatch, decompose
from .fold import fold, fold_gram
from .state import GramState, SketchState, clear_sums

if TYPE_CHECKING:
    from .stream import InputStream

__all__ = ["NonFiniteStepError", "by_device", "cosines_of", "fold_streams"]


class NonFiniteStepError(NonFiniteError):
    """The tokens of a step hold NaN or infinity, found when the step was folded.

    Attributes:
        stream: the first stream that is concerned.
    """

    def __init__(self, message: str, stream: InputStream) -> None:
        super().__init__(message)
        self.stream = stream


@without_autocast
def fold_streams(streams: Iterable[InputStream], *, final: bool = False) -> list[InputStream]:
    """Fold every stream that has a full step.

    Args:
        streams: of any shapes and devices; those of equal shape are folded as one batch.
        final: fold whatever is pending, however few tokens.

    Returns:
        The streams that were folded. A step is at least Q tokens; fewer stay pending.

    Raises:
        NonFiniteStepError: on an accelerator, where ``add`` does not look at the tokens. No stream
            is folded then. The streams concerned have lost their pending tokens (exact ones only
            those that are not finite), the others keep theirs: the next step goes on from there.
    Cost: on an accelerator one read for all streams; a second one where data are of deficient rank
        or so unevenly graded that a basis has to be repaired.
    """
    due = []
    for stream in streams:
        if stream.state is not None and stream.pending >= (1 if final else stream.width):
            due.append(stream)
    groups = _groups(due)
    away: list[list[InputStream]] = []
    here: list[list[InputStream]] = []
    for group in groups:
        (here if _host.reads_are_free(group[0].device) else away).append(group)
    if away:  # first, since it may refuse
        _fold_away(away, due)
    for group in here:
        _fold_here(group)
    return [stream for group in groups for stream in group]


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
    for stream, old, (state, captured) in zip(group, before, results, strict=True):
        # The first fold starts from the warm-up, which is no step to compare with.
        rows = old.basis[: stream.components] if stream.folds and old is not None else None
        stream.close_step(state, captured, rows)
    _clear(group)


def _fold_away(groups: Sequence[Sequence[InputStream]], due: Sequence[InputStream]) -> None:
    batches = [_batch_of(group) for group in groups]
    decompose(batches)
    sound = _sound(batches)
    old = {}
    for group, batch in zip(groups, batches, strict=True):
        old.update(_renew(group, batch, sound[batch.device]))
    streams = [s for group in groups for s in group]
    compared = [s for s in streams if id(s) in old]
    launched = _compare(compared, old)
    wanted = [batch.numbers for batch in batches]
    arrays = iter(_host.read([*chain.from_iterable(wanted), *launched]))
    numbers = [Numbers(*islice(arrays, len(Numbers._fields))) for _ in batches]
    cosines = list(arrays)
    _refuse(groups, numbers, due)

    uneven = []
    for group, batch, told in zip(groups, batches, numbers, strict=True):
        bases, means = [s.basis for s in batch.sketches], [s.mean for s in batch.sketches]
        results = batch.results(told, bases, means)
        for stream, (sketch, captured) in zip(group, results, strict=True):
            state: SketchState | GramState = sketch
            if isinstance(stream.state, GramState):
                state = GramState(stream.state.sums, stream.state.pivot, sketch)
            stream.close_step(state, captured, old.get(id(stream)))
        uneven += [group[i] for i in told.uneven.nonzero()[0].tolist()]
    _clear(streams)
    _keep_cosines(compared, cosines)
    _repair(uneven)


def _batch_of(group: Sequence[InputStream]) -> Batch:
    if isinstance(group[0].state, GramState):
        return GramBatch([s.state for s in group if isinstance(s.state, GramState)])
    states = [s.state for s in group if isinstance(s.state, SketchState)]
    return SketchBatch(states, [s.sums for s in group if s.sums is not None])


def _sound(batches: Sequence[Batch]) -> dict[torch.device, Tensor]:
    """Return, on every device, whether the sums of all streams on all devices are finite."""
    flags: dict[torch.device, list[Tensor]] = defaultdict(list)
    for batch in batches:
        flags[batch.device].append(batch.sound)
    every = {device: torch.cat(parts).all() for device, parts in flags.items()}
    return {
        device: torch.stack([f.to(device, non_blocking=True) for f in every.values()]).all()
        for device in every
    }


def _renew(group: Sequence[InputStream], batch: Batch, sound: Tensor) -> dict[int, Tensor]:
    """Put the new rows and means in place of the old, if ``sound``.

    Returns:
        By id of its stream, a copy of the K leading rows before; not for a stream's first fold,
        which starts from the warm-up, no step to compare with.
    """
    kept = [s.components if s.folds else 0 for s in group]
    before = zip(group, batch.renew(sound, kept), strict=True)
    means = [s.mean for s in batch.sketches]
    new = torch.where(sound, batch.mean, torch.stack(means))
    torch._foreach_copy_(means, list(new.unbind(0)))
    return {id(s): rows for s, rows in before if s.folds}


def _compare(streams: Sequence[InputStream], old: dict[int, Tensor]) -> list[Tensor]:
    """Launch the comparison of all streams; returns the cosines, one tensor a device."""
    cosines = []
    for part in by_device(streams):
        pairs = [(old[id(s)], s.sketch.basis[: s.components]) for s in part if s.sketch is not None]
        cosines.append(cosines_of(pairs))
    return cosines


def cosines_of(pairs: Sequence[tuple[Tensor, Tensor]], backend: str = "auto") -> Tensor:
    """Launch the comparison of rows before with rows after; returns |cos| of all rows, (sum K,)."""
    before, after = [p[0].float() for p in pairs], [p[1].float() for p in pairs]
    return convergence(before, after, [0] * len(pairs), 0.0, backend=backend)[0]


def by_device(streams: Sequence[InputStream]) -> list[list[InputStream]]:
    """Split streams by their device, in order."""
    parts: dict[torch.device, list[InputStream]] = defaultdict(list)
    for stream in streams:
        parts[stream.device].append(stream)
    return list(parts.values())


def _keep_cosines(streams: Sequence[InputStream], cosines: Sequence[Array]) -> None:
    for part, array in zip(by_device(streams), cosines, strict=True):
        begin = 0
        for stream in part:
            stream.turned = array[begin : begin + stream.components]
            begin += stream.components


def _clear(streams: Sequence[InputStream]) -> None:
    # The sums of an exact stream are its state.
    open_ = [s.sums for s in streams if s.sums is not None and not isinstance(s.state, GramState)]
    clear_sums(open_)


def _repair(streams: Sequence[InputStream]) -> None:
    """Complete bases of deficient rank, and orthonormalise uneven ones; the ranks are known."""
    for stream in streams:
        sketch = stream.sketch
        assert sketch is not None
        sketch.basis.copy_(repair(sketch.basis.double(), sketch.rank))
    again = [s for s in streams if s.previous is not None]
    if again:
        old = {id(s): s.previous for s in again if s.previous is not None}
        _keep_cosines(again, _host.read(_compare(again, old)))


def _refuse(
    groups: Sequence[Sequence[InputStream]], numbers: Sequence[Numbers], due: Sequence[InputStream]
) -> None:
    """Raise, if the sums of a stream are not finite, after dropping them; reads only then."""
    bad = set()
    for group, told in zip(groups, numbers, strict=True):
        bad |= {id(s) for s, sound in zip(group, told.sound.tolist(), strict=True) if not sound}
    faults = [(s, s.drop_pending()) for s in due if id(s) in bad]
    if faults:
        raise NonFiniteStepError(faults[0][1], faults[0][0])
