"""Sketched layer inputs of one shape on their way through a fold by native code."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops.fold import fold_layers, fold_measure, fold_prepare, fold_rows
from .batch import Batch, fold_numbers
from .state import SketchState, StepSums

__all__ = ["NativeSketchBatch"]


class NativeSketchBatch(Batch):
    """As :class:`.batch.SketchBatch`, in five or six launches whatever the number of layers.

    Args:
        states: that the sums are folded into.
        sums: about each state's mean; every count at least 1.
        num_saved: how many leading rows of each basis :meth:`write_rows` will be asked to return.
    """

    def __init__(
        self, states: Sequence[SketchState], sums: Sequence[StepSums], num_saved: Sequence[int]
    ) -> None:
        super().__init__(states, states[0].basis.numel() * 8)
        self.numbers, self.counts_and_totals = fold_numbers(states, sums)
        self.ceiling = self.numbers[:, 2]
        self._layers = fold_layers(
            [s.basis for s in states],
            [s.products for s in sums],
            [s.shift for s in sums],
            [s.square for s in sums],
            [s.mean for s in states],
            num_saved,
        )
        self._delta, self.mean, self.scalars = fold_prepare(self._layers, self.numbers)

    def measure(self) -> tuple[Tensor, Tensor]:
        """See :class:`Batch`."""
        self._along, core, metric = fold_measure(self._layers, self.numbers, self._delta)
        return core, metric

    def write_rows(self, all_finite: Tensor, num_saved: Sequence[int]) -> Tensor:
        """See :class:`Batch`."""
        fold_rows(
            self._layers,
            self.numbers,
            self._delta,
            self._along,
            self.mean,
            self.decomposition.mixing,
            self.decomposition.summary,
            all_finite,
        )
        return self._layers.saved
