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
from eva_kernels.streaming.parallel import add_counts, adopt_basis, clear_pending, pending_sums

from .cells import (
    Cell,
    ForwardReport,
    RenewedCell,
    basis_tensors,
    merge_stream,
    renewed_cell,
    slot_for,
)
from .peers import Peers

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["Exchange"]


class Exchange:
    """Combines the streams of processes; calls are collective unless stated otherwise.

    Args:
        peers: the processes.

    Attributes:
        in_sync: layers whose basis is the leader's in every process.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers, self._channel = peers, peers.channel
        self.in_sync: set[int] = set()

    def collect(
        self, run: CalibrationPass, reports: Sequence[ForwardReport], cells: Sequence[Cell]
    ) -> list[InputStream]:
        """Collect all pending tokens on the leader; returns the streams that were merged there."""
        slot_of = run.collector.slot_of
        pending_cells = [cell for cell in cells if any(report.pending(cell) for report in reports)]
        known_cells = [cell for cell in pending_cells if cell[0] in self.in_sync]
        streams = [slot_of[cell[0]].stream for cell in known_cells]
        self._channel.sum_on_leader([part for stream in streams for part in pending_sums(stream)])
        for cell, stream in zip(known_cells, streams, strict=True):
            if not self._channel.is_leader:
                clear_pending(stream)
                continue
            slots = [report.pending_by_layer.get(cell[0]) for report in reports[1:]]
            others = [slot for slot in slots if slot is not None]
            add_counts(stream, sum(s.pending for s in others), sum(s.skipped for s in others))
        new_cells = [cell for cell in pending_cells if cell[0] not in self.in_sync]
        return self._merge(run, reports, new_cells) if new_cells else []

    def _merge(
        self, run: CalibrationPass, reports: Sequence[ForwardReport], new_cells: Sequence[Cell]
    ) -> list[InputStream]:
        merged: dict[int, InputStream] = {}
        for rank in range(1, self._channel.size):
            sent_cells = [cell for cell in new_cells if reports[rank].pending(cell)]
            if not sent_cells:
                continue
            if self._channel.rank == rank:
                self._channel.send(self._folded_states(run, sent_cells))
            elif self._channel.is_leader:
                parcel = self._channel.receive(rank)
                # an error reaches the others with the decision, for which they wait
                streams = self._peers.attempt(self._merge_received, run, rank, sent_cells, parcel)
                merged |= {id(stream): stream for stream in streams or ()}
        return list(merged.values())

    def _merge_received(
        self, run: CalibrationPass, rank: int, cells: Sequence[Cell], parcel: Any
    ) -> list[InputStream]:
        """Merge, on the leader, the streams that another process has sent."""
        self._peers.raise_if_failed(parcel if isinstance(parcel, str) else None, rank)
        with run.collector.locating_errors():  # merging folds what is pending here, too
            pairs = zip(cells, parcel, strict=True)
            return [merge_stream(run, cell, *state) for cell, state in pairs]

    def _folded_states(self, run: CalibrationPass, cells: Sequence[Cell]) -> Any:
        """Return the streams of cells, folded, as plain data on the host; or the error as text."""
        streams = [run.collector.slot_of[cell[0]].stream for cell in cells]

        def make() -> list[Any]:
            with run.collector.locating_errors():
                fold_streams(streams, final=True)
            states = map(export_stream, streams)
            return [(record, {k: t.cpu() for k, t in parts.items()}) for record, parts in states]

        found = self._peers.attempt(make)
        return self._peers.failure_report() or found

    def renewed_cells(
        self, run: CalibrationPass, folded: Sequence[InputStream]
    ) -> tuple[RenewedCell, ...]:
        """Return, on the leader, the cells that get a new basis in all processes."""
        folded_ids = {id(stream) for stream in folded}
        slots = [slot for slot in run.collector.slots if id(slot.stream) in folded_ids]
        # The pivot of an exact stream, about which others accumulate, never changes.
        renewals = map(renewed_cell, slots)
        return tuple(r for r in renewals if not (r[2] and r[0][0] in self.in_sync))

    def broadcast_bases(self, run: CalibrationPass, renewed_cells: Sequence[RenewedCell]) -> None:
        """Broadcast the new bases and means from the leader."""
        slots = [slot_for(run, cell, dtype) for cell, dtype, _ in renewed_cells]
        is_exact = [gram for _, _, gram in renewed_cells]
        parts = [basis_tensors(s.stream, gram) for s, gram in zip(slots, is_exact, strict=True)]
        self._channel.broadcast_tensors([part for tensors in parts for part in tensors])
        for (cell, _, _), slot, tensors in zip(renewed_cells, slots, parts, strict=True):
            self.in_sync |= set(cell)
            if not self._channel.is_leader:
                basis, mean, *pivot = tensors
                adopt_basis(slot.stream, basis, mean, pivot[0] if pivot else None)
