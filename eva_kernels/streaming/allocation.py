"""Rank allocation: give a budget to the layers where a component explains most variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import EvaValueError
from ._host import Array, as_array

__all__ = ["allocate_ranks"]


def allocate_ranks(
    ratios: Sequence[Tensor | Array] | Array,
    budget: int,
    *,
    costs: Sequence[int] | None = None,
    min_rank: int | Sequence[int] = 0,
) -> list[int]:
    """Pool the explained-variance ratios of all layers and spend the budget on the largest.

    Args:
        ratios: one vector per layer, descending, or all as rows of an array; entries that are 0 or
            NaN are not components and get no budget. Equal ratios are ranked by layer order.
        budget: sum of the ranks, or of the costs of the ranks if ``costs`` is given.
        costs: cost of one rank of each layer (for example its parameters); then the order is by
            ratio per cost, and a component that no longer fits is skipped.
        min_rank: every layer keeps at least this many of its components; one number, or one per
            layer.

    Returns:
        The rank of each layer, at most the number of its components.

    Raises:
        EvaValueError: ``min_rank`` alone costs more than the budget, or is of another length.

    Reference: arXiv 2410.07170, section 3; PEFT ``_get_rank_distribution``.
    """
    pooled = _padded_ratios(ratios)
    layers, length = pooled.shape
    prices = np.ones(layers, np.int64) if costs is None else np.array(costs)
    max_ranks = np.count_nonzero(pooled, axis=1)
    floors = np.array(min_rank, np.int64)
    if floors.ndim and len(floors) != layers:
        raise EvaValueError(f"min_rank has {len(floors)} entries for {layers} layers")
    min_ranks = np.minimum(floors, max_ranks)
    remaining = budget - (min_ranks @ prices).item()
    if remaining < 0:
        raise EvaValueError(
            f"min_rank={floors.max()} for {layers} layers costs {budget - remaining}, more than "
            f"the budget of {budget}; lower min_rank or raise r"
        )
    index = np.arange(length)
    candidates = np.flatnonzero((index >= min_ranks[:, None]) & (index < max_ranks[:, None]))
    layer_of_candidate = candidates // length
    if costs is None:
        winners = layer_of_candidate[_largest(pooled.reshape(-1)[candidates], remaining)]
        return (min_ranks + np.bincount(winners, minlength=layers)).tolist()
    density = pooled.reshape(-1)[candidates] / prices[layer_of_candidate]
    ranks, price = min_ranks.tolist(), prices.tolist()
    for i in layer_of_candidate[np.argsort(-density, kind="stable")].tolist():
        if price[i] <= remaining:
            ranks[i], remaining = ranks[i] + 1, remaining - price[i]
    return ranks


def _padded_ratios(ratios: Sequence[Tensor | Array] | Array) -> Array:
    """Return the ratios as rows of one array, 0 where there is no component."""
    if not isinstance(ratios, np.ndarray):
        parts = [as_array(r) for r in ratios]
        ratios = np.zeros((len(parts), max(map(len, parts), default=0)))
        for row, part in zip(ratios, parts, strict=True):
            row[: len(part)] = part
    return np.where(ratios > 0, ratios, 0.0)  # false for NaN


def _largest(values: Array, count: int) -> np.ndarray[Any, Any]:
    """Return the indices of the largest values, unordered; of equal ones the first are taken."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.arange(0)
    threshold = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > threshold)
    return np.concatenate([above, np.flatnonzero(values == threshold)[: count - len(above)]])
