"""Sketched layer inputs of one shape on their way through a fold of native code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from ..ops.fold import FoldLayers, fold_layers, fold_measure, fold_prepare, fold_rows
from . import _host
from .batch import Batch, head_of
from .nystrom import orthogonalisation, whitening
from .state import SketchState, StepSums, clear_sums

__all__ = ["NativeSketchBatch", "WarmUp", "start_rows", "warm_up"]


class NativeSketchBatch(Batch):
    """As :class:`.batch.SketchBatch`, in six launches whatever the number of layers.

    Args:
        states: what the sums are to be folded into.
        sums: about each state's mean; every count at least 1.
        kept: how many leading rows of each basis :meth:`renew` will be asked to return.
    """

    def __init__(
        self, states: Sequence[SketchState], sums: Sequence[StepSums], kept: Sequence[int]
    ) -> None:
        super().__init__(states, states[0].basis.numel() * 8)
        self.numbers, self.starts = head_of(states, sums)
        self.ceiling = self.numbers[:, 2]
        self._layers = _layers_of(states, sums, kept)
        self._delta, self.mean, self.scalars = fold_prepare(self._layers, self.numbers)

    def measure(self) -> tuple[Tensor, Tensor]:
        """See :class:`Batch`."""
        self._along, core, metric = fold_measure(self._layers, self.numbers, self._delta)
        return core, metric

    def renew(self, sound: Tensor, kept: Sequence[int]) -> Tensor:
        """See :class:`Batch`."""
        fold_rows(
            self._layers,
            self.numbers,
            self._delta,
            self._along,
            self.mean,
            self.found.mixing,
            self.found.told,
            sound,
        )
        return self._layers.saved


@dataclass(eq=False)
class WarmUp:
    """What layer inputs of one width and so many tokens share, on their device, to begin with.

    Attributes:
        tokens: numbers of a fold of the tokens into a state that has seen none, see
            :func:`.batch.head_of`, float64 (1, 4 + Q).
        unit: those of a fold of one token at the mean, where C is ``V^T V``.
        sound: () bool, true.
    """

    tokens: Tensor
    unit: Tensor
    sound: Tensor


# Alive as long as someone holds them.
_warm_ups: WeakValueDictionary[tuple[object, ...], WarmUp] = WeakValueDictionary()


def warm_up(count: int, width: int, device: torch.device) -> WarmUp:
    """Return what layer inputs with ``count`` tokens of a warm-up share, to be held meanwhile.

    Whoever holds it spares the others two copies to the device.
    """
    found = _warm_ups.get((count, width, device))
    if found is None:
        host = np.zeros((2, 4 + width))
        host[0, :4] = count, 1, count - 1, count
        host[1] = 1
        tokens, unit = _host.upload(torch.from_numpy(host), device).split(1)
        sound = torch.ones((), dtype=torch.bool, device=device)
        found = _warm_ups[count, width, device] = WarmUp(tokens, unit, sound)
    return found


def start_rows(blank: SketchState, sums: StepSums, shared: WarmUp) -> None:
    """Put mean and rows of a first basis into a state that has seen nothing; clears the sums.

    See :func:`.fold.first_basis`.
    """
    layers = _layers_of([blank], [sums], [0])
    delta, mean, _ = fold_prepare(layers, shared.tokens)
    along, core, _ = fold_measure(layers, shared.tokens, delta)
    found = whitening(core, shared.tokens[:, 2])
    mixed = found.mixing, found.told, shared.sound
    fold_rows(layers, shared.tokens, delta, along, mean, *mixed)
    # One token at the mean, on a C that is V^T V: the image is the basis itself.
    clear_sums([sums])
    delta.zero_()
    along, overlaps, _ = fold_measure(layers, shared.unit, delta)
    found = orthogonalisation(overlaps)
    mixed = found.mixing, found.told, shared.sound
    fold_rows(layers, shared.unit, delta, along, mean, *mixed)


def _layers_of(
    states: Sequence[SketchState], sums: Sequence[StepSums], kept: Sequence[int]
) -> FoldLayers:
    return fold_layers(
        [s.basis for s in states],
        [s.products for s in sums],
        [s.shift for s in sums],
        [s.square for s in sums],
        [s.mean for s in states],
        kept,
    )
