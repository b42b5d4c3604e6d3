"""Collect on the leader what several processes have accumulated, and distribute its new bases.

1. Sums about a common basis and mean are additive, so those of layers whose basis all processes
   know are added up on the leader. New layers were begun by each process from its own tokens:
   these streams are folded locally, sent to the leader, and merged (once per layer).
2. After the leader has folded, all receive the new bases and means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eva_kernels.streaming import InputStream, export_stream, fold_streams
from eva_kernels.streaming.parallel import absorb, follow, hand_over, pending_sums

from .cells import Cell, Renewal, Report, anchors, merge_stream, renewal, slot_for
from .together import Together

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["Exchange"]


class Exchange:
    """Combines the streams of processes; calls are collective unless stated otherwise.

    Args:
        together: the processes.

    Attributes:
        known: layers whose basis is the leader's in every process.
    """

    def __init__(self, together: Together) -> None:
        self._together, self._channel = together, together.channel
        self.known: set[int] = set()

    def collect(
        self, run: CalibrationPass, reports: Sequence[Report], cells: Sequence[Cell]
    ) -> list[InputStream]:
        """Collect all pending tokens on the leader; returns the streams that were merged there."""
        slot_of = run.collector.slot_of
        waiting = [cell for cell in cells if any(report.pending(cell) for report in reports)]
        known = [cell for cell in waiting if cell[0] in self.known]
        streams = [slot_of[cell[0]].stream for cell in known]
        self._channel.add_up([part for stream in streams for part in pending_sums(stream)])
        for cell, stream in zip(known, streams, strict=True):
            if not self._channel.leads:
                hand_over(stream)
                continue
            others = [r.of_layer[cell[0]] for r in reports[1:] if cell[0] in r.of_layer]
            absorb(stream, sum(w.pending for w in others), sum(w.skipped for w in others))
        fresh = [cell for cell in waiting if cell[0] not in self.known]
        return self._merge(run, reports, fresh) if fresh else []

    def _merge(
        self, run: CalibrationPass, reports: Sequence[Report], fresh: Sequence[Cell]
    ) -> list[InputStream]:
        merged: dict[int, InputStream] = {}
        for rank in range(1, self._channel.size):
            own = [cell for cell in fresh if reports[rank].pending(cell)]
            if not own:
                continue
            if self._channel.rank == rank:
                self._channel.send(self._folded(run, own))
            elif self._channel.leads:
                parcel = self._channel.receive(rank)
                # an error reaches the others with the decision, for which they wait
                streams = self._together.attempt(self._unpacked, run, rank, own, parcel) or []
                merged |= {id(stream): stream for stream in streams}
        return list(merged.values())

    def _unpacked(
        self, run: CalibrationPass, rank: int, cells: Sequence[Cell], parcel: Any
    ) -> list[InputStream]:
        """Merge, on the leader, the streams that another process has sent."""
        self._together.raise_if(parcel if isinstance(parcel, str) else None, rank)
        with run.collector.locating_errors():  # merging folds what is pending here, too
            pairs = zip(cells, parcel, strict=True)
            return [merge_stream(run, cell, *state) for cell, state in pairs]

    def _folded(self, run: CalibrationPass, cells: Sequence[Cell]) -> Any:
        """Return the streams of cells, folded, as plain data on the host; or the error as text."""
        streams = [run.collector.slot_of[cell[0]].stream for cell in cells]

        def make() -> list[Any]:
            with run.collector.locating_errors():
                fold_streams(streams, final=True)
            states = map(export_stream, streams)
            return [(record, {k: t.cpu() for k, t in parts.items()}) for record, parts in states]

        found = self._together.attempt(make)
        return self._together.told() or found

    def renewed(self, run: CalibrationPass, folded: Sequence[InputStream]) -> tuple[Renewal, ...]:
        """Return, on the leader, the cells that get a new basis in all processes."""
        new = {id(stream) for stream in folded}
        renewals = [renewal(slot) for slot in run.collector.slots if id(slot.stream) in new]
        # The pivot of an exact stream, about which others accumulate, never changes.
        return tuple(r for r in renewals if not (r[2] and r[0][0] in self.known))

    def share(self, run: CalibrationPass, renewed: Sequence[Renewal]) -> None:
        """Broadcast the new bases and means from the leader."""
        slots = [slot_for(run, cell, dtype) for cell, dtype, _ in renewed]
        exact = [gram for _, _, gram in renewed]
        parts = [anchors(s.stream, gram) for s, gram in zip(slots, exact, strict=True)]
        self._channel.send_out([part for own in parts for part in own])
        for (cell, _, _), slot, own in zip(renewed, slots, parts, strict=True):
            self.known |= set(cell)
            if not self._channel.leads:
                basis, mean, *pivot = own
                follow(slot.stream, basis, mean, pivot[0] if pivot else None)
