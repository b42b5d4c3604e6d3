"""Cells: layers that share an input in every process; their pending tokens and streams."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eva_kernels.streaming import InputStream, restore_stream
from eva_kernels.streaming.state import GramState

from ..errors import EvaValueError
from ..passes.hooks import InputCollector
from ..passes.shared_inputs import Slot

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass
    from ..resume.checkpoint import LoaderState

__all__ = [
    "Cell",
    "ForwardReport",
    "PendingSlot",
    "RenewedCell",
    "basis_tensors",
    "common_cells",
    "merge_stream",
    "renewed_cell",
    "slot_for",
    "split_into_cells",
]

Cell = tuple[int, ...]  # indices of layers
# A cell with a new basis, the dtype of its stream, and whether it is exact.
RenewedCell = tuple[Cell, torch.dtype, bool]


@dataclass(frozen=True)
class PendingSlot:
    """The pending tokens in one slot of a process.

    Attributes:
        members: the layers of the slot.
        pending, skipped: tokens since the last fold, and those left out as not finite.
        dtype: of the stream.
    """

    members: Cell
    pending: int
    skipped: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ForwardReport:
    """What a process reports to the others after its forward pass.

    Attributes:
        had_batch: it had one, and so ran a forward pass.
        tokens: of the batch.
        slots: those of the process.
        max_calls: of each layer in one forward pass, so far.
        largest_batch: size of batches that were run to the end, see
            :func:`eva_peft.inputs.batches.samples_and_elements`.
        loader_state: for a checkpoint, if one is written.
    """

    had_batch: bool
    tokens: int
    slots: tuple[PendingSlot, ...]
    max_calls: dict[int, int]
    largest_batch: tuple[int, int]
    loader_state: LoaderState | None

    @functools.cached_property
    def pending_by_layer(self) -> dict[int, PendingSlot]:
        """The pending tokens, by layer index."""
        return {i: waiting for waiting in self.slots for i in waiting.members}

    def pending(self, cell: Cell) -> int:
        """Return how many tokens are pending in a cell."""
        slot = self.pending_by_layer.get(cell[0])
        return 0 if slot is None else slot.pending


def common_cells(reports: Sequence[ForwardReport]) -> list[Cell]:
    """Group the layers that share an input in every process that called them."""
    cells: dict[tuple[PendingSlot | None, ...], list[int]] = defaultdict(list)
    for i in sorted({i for report in reports for i in report.pending_by_layer}):
        cells[tuple(report.pending_by_layer.get(i) for report in reports)].append(i)
    return [tuple(cell) for cell in cells.values()]


def split_into_cells(collector: InputCollector, cells: Sequence[Cell]) -> None:
    """Split slots whose layers do not share an input in every process."""
    cell_of = {i: cell for cell in cells for i in cell}
    for slot in list(collector.slots):
        for cell in sorted({cell_of[i] for i in slot.members})[1:]:
            collector.split_slot(slot, cell)


def slot_for(run: CalibrationPass, cell: Cell, dtype: torch.dtype) -> Slot:
    """Return the slot of a cell, a new one if its layers were not called in this process."""
    slot = run.collector.slot_of.get(cell[0])
    if slot is None:
        slot = run.collector.add_slot(run.make_stream(run.targets[cell[0]], dtype), cell)
    return slot


def merge_stream(
    run: CalibrationPass, cell: Cell, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> InputStream:
    """Merge the stream of another process into that of this one, and return it.

    Raises:
        EvaValueError: only one of them is in double precision.
    """
    dtype = getattr(torch, record["dtype"])
    stream = slot_for(run, cell, dtype).stream
    if stream.dtype != dtype:
        raise EvaValueError(
            f"layer {run.targets[cell[0]].name}: its input is accumulated in {stream.dtype} in one "
            f"process and in {dtype} in another; load the model with the same dtype in all of them"
        )
    other = run.make_stream(run.targets[cell[0]], dtype, stream.device)
    restore_stream(other, record, tensors)
    stream.merge(other)
    return stream


def renewed_cell(slot: Slot) -> RenewedCell:
    """Describe to the other processes a slot whose stream has a new basis."""
    return tuple(slot.members), slot.stream.dtype, isinstance(slot.stream.state, GramState)


def basis_tensors(stream: InputStream, exact: bool) -> list[Tensor]:
    """Return basis, mean and, if exact, pivot of a stream, or zeros to receive them into."""
    state, sketch = stream.state, stream.sketch
    if sketch is not None:
        return [sketch.basis, sketch.mean, *([state.pivot] if isinstance(state, GramState) else [])]
    shapes = [(stream.width, stream.features), *[(stream.features,)] * (2 if exact else 1)]
    return [torch.zeros(shape, dtype=stream.dtype, device=stream.device) for shape in shapes]
