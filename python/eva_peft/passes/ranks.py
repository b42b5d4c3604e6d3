"""Rank redistribution: from explained variance to the rank of every layer, within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from eva_kernels.streaming import Array, allocate_ranks, as_array, leading_ratios

from .._peft_compat import LoraConfig
from ..model.targets import Target

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["Budget", "allocate", "scaled_alpha"]


def allocate(run: CalibrationPass) -> dict[int, int]:
    """Return the rank of every layer called so far, by its index."""
    slots, slot_of = run.collector.slots, run.collector.slot_of
    indices = tuple(sorted(slot_of))
    if run.budget is None or run.budget_layers != indices:
        targets = [run.targets[i] for i in indices]
        run.budget = Budget(targets, run.options.budget, run.options.min_rank)
        run.budget_layers = indices
    row_of = {id(slot): row for row, slot in enumerate(slots)}
    ratios = leading_ratios([s.stream for s in slots])[[row_of[id(slot_of[i])] for i in indices]]
    limits = np.array([run.max_components[i] for i in indices])
    ratios[np.arange(ratios.shape[1]) >= limits[:, None]] = 0.0  # no component of that layer
    return dict(zip(indices, run.budget.ranks_for(ratios), strict=True))


def scaled_alpha(config: LoraConfig, alpha: float, rank: int, new_rank: int) -> float:
    """Return the alpha that keeps the LoRA scaling at another rank.

    The scaling is alpha / r, or alpha / sqrt(r) with rsLoRA.
    """
    if new_rank == rank:
        return alpha
    ratio = new_rank / rank
    scaled = alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
    return int(scaled) if scaled == int(scaled) else scaled


class Budget:
    """The sum of the layers' initial ranks or parameters, to be redistributed among them.

    Args:
        targets: the layers that take part.
        budget: ``"rank"``: the sum of ranks is kept; ``"params"``: the number of parameters.
        min_rank: every layer keeps at least this rank, as far as its inputs have that many
            directions (none if they never vary).
    """

    def __init__(self, targets: Sequence[Target], budget: str, min_rank: int) -> None:
        groups = _groups_of_common_rank(targets)
        first = [targets[members[0]] for members in groups]
        # cost of a rank in rows of lora_A: one per expert
        rank_prices = [t.owner_parts for t in first]
        if budget == "params":
            rank_prices = [_parameters_per_rank([targets[i] for i in group]) for group in groups]
        prices = [t.rank_multiple * price for t, price in zip(first, rank_prices, strict=True)]
        self._groups = [
            (members, t.rank_multiple) for members, t in zip(groups, first, strict=True)
        ]
        self._total = sum(t.rank * price for t, price in zip(first, rank_prices, strict=True))
        self._prices = None if set(prices) <= {1} else prices
        # rank at least 1: PEFT cannot remove the adapter of one of several parameters of a module,
        # or of projections
        self._min_if_owned = [int(bool(t.owner)) for t in first]
        self._is_plain = not any(self._min_if_owned) and all(t.rank_multiple == 1 for t in first)
        pairs = zip(self._min_if_owned, first, strict=True)
        self._min_counts = [max(-(-min_rank // t.rank_multiple), owned) for owned, t in pairs]

    def ranks_for(self, ratios: Sequence[Tensor | Array] | Array) -> list[int]:
        """Return the rank of every layer.

        Args:
            ratios: the layers' explained-variance ratios, descending; as ``allocate_ranks``.
        """
        pooled: Sequence[Tensor | Array] | Array = ratios
        if not self._is_plain:
            pooled = [_ratios_by_step([ratios[i] for i in m], step) for m, step in self._groups]
        counts = allocate_ranks(pooled, self._total, costs=self._prices, min_rank=self._min_counts)
        if self._is_plain:
            return counts
        ranks = [0] * len(ratios)
        minima = self._min_if_owned
        for (members, step), least, count in zip(self._groups, minima, counts, strict=True):
            for i in members:  # at least one if owned, even if no expert's tokens vary
                ranks[i] = max(count, least) * step
        return ranks


def _groups_of_common_rank(targets: Sequence[Target]) -> list[list[int]]:
    """Group layers whose adapters have a common rank (experts of a parameter); others are alone."""
    groups: dict[Any, list[int]] = {}
    for i, target in enumerate(targets):
        groups.setdefault(target.owner or i, []).append(i)
    return list(groups.values())


def _parameters_per_rank(members: Sequence[Target]) -> int:
    """Return the parameters per rank over all layers of an owner, called or not."""
    return (
        members[0].owner_parts
        * sum(t.in_features + t.out_features for t in members)
        // len(members)
    )


def _ratios_by_step(ratios: Sequence[Tensor | Array], step: int) -> Tensor | Array:
    """Return the ratio explained by each ``step`` components, summed over layers of common rank."""
    arrays = [as_array(r) for r in ratios]
    length = max(map(len, arrays))
    total = np.zeros(length)
    for array in arrays:
        total[: len(array)] += np.nan_to_num(array)
    return total[: length // step * step].reshape(-1, step).sum(1)
