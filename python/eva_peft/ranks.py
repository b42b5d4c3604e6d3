"""Spend the budget: from explained variance to the rank of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from eva_kernels.streaming import Array, allocate_ranks, as_array, leading_ratios

from .targets import Target

if TYPE_CHECKING:
    from .calibrate import CalibrationPass

__all__ = ["Budget", "allocate"]


def allocate(run: CalibrationPass) -> dict[int, int]:
    """Return the rank of every layer that was called so far, by its index."""
    slots, slot_of = run.collector.slots, run.collector.slot_of
    indices = tuple(sorted(slot_of))
    if run.budget is None or run.budget_of != indices:
        targets = [run.targets[i] for i in indices]
        run.budget = Budget(targets, run.options.budget, run.options.min_rank)
        run.budget_of = indices
    spectra = dict(zip(map(id, slots), leading_ratios([s.stream for s in slots]), strict=True))
    ranks = run.budget.spend([spectra[id(slot_of[i])][: run.limits[i]] for i in indices])
    return dict(zip(indices, ranks, strict=True))


class Budget:
    """The layers' own budget, to be distributed among them.

    Args:
        targets: the layers that take part.
        budget: ``"rank"``: the sum of ranks stays; ``"params"``: the number of parameters.
        min_rank: every layer keeps at least this rank.
    """

    def __init__(self, targets: Sequence[Target], budget: str, min_rank: int) -> None:
        layers = _with_common_rank(targets)
        first = [targets[members[0]] for members in layers]
        # rows of lora_A are what a rank costs: of each expert one
        each = [t.experts for t in first]
        if budget == "params":
            each = [n * (t.in_features + t.out_features) for n, t in zip(each, first, strict=True)]
        prices = [t.step * price for t, price in zip(first, each, strict=True)]
        self._layers = [(members, t.step) for members, t in zip(layers, first, strict=True)]
        self._total = sum(t.rank * price for t, price in zip(first, each, strict=True))
        self._prices = None if set(prices) <= {1} else prices
        # PEFT cannot take the adapter off one of several parameters of a module
        self._owned = [int(bool(t.owner)) for t in first]
        least = zip(self._owned, first, strict=True)
        self._least = [max(-(-min_rank // t.step), owned) for owned, t in least]

    def spend(self, ratios: Sequence[Tensor | Array]) -> list[int]:
        """Return the rank of every layer.

        Args:
            ratios: the layers' explained-variance ratios, descending.
        """
        counts = allocate_ranks(
            [_by_step([ratios[i] for i in members], step) for members, step in self._layers],
            self._total,
            costs=self._prices,
            min_rank=self._least,
        )
        ranks = [0] * len(ratios)
        for (members, step), owned, count in zip(self._layers, self._owned, counts, strict=True):
            for i in members:  # one, too, where no expert's tokens differ
                ranks[i] = max(count, owned) * step
        return ranks


def _with_common_rank(targets: Sequence[Target]) -> list[list[int]]:
    """Group the experts of a parameter, whose adapters have one rank; any other layer is alone."""
    groups: dict[Any, list[int]] = {}
    for i, target in enumerate(targets):
        groups.setdefault(target.owner or i, []).append(i)
    return list(groups.values())


def _by_step(ratios: Sequence[Tensor | Array], step: int) -> Tensor | Array:
    """Return what each further ``step`` components explain, in sum over layers of common rank."""
    if len(ratios) == step == 1:
        return ratios[0]
    arrays = [as_array(r) for r in ratios]
    length = max(map(len, arrays))
    total = np.zeros(length)
    for array in arrays:
        total[: len(array)] += np.nan_to_num(array)
    return total[: length // step * step].reshape(-1, step).sum(1)
