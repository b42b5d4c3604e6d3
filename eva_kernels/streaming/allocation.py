"""Rank allocation: give a budget to the layers where a component explains most variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EvaValueError

__all__ = ["allocate_ranks"]


def allocate_ranks(
    ratios: Sequence[Tensor],
    budget: int,
    *,
    costs: Sequence[int] | None = None,
    min_rank: int | Sequence[int] = 0,
) -> list[int]:
    """Pool the explained-variance ratios of all layers and spend the budget on the largest.

    Args:
        ratios: one vector a layer, descending; entries that are 0 or NaN are not components and
            never win budget. Equal ratios are ranked by layer order.
        budget: sum of the ranks, or of the costs of the ranks if ``costs`` is given.
        costs: price of one rank of each layer (for example its parameters); then the order is by
            ratio per price, and a component that no longer fits is passed over.
        min_rank: every layer keeps at least this many of its components; one number, or one a
            layer.

    Returns:
        The rank of each layer, at most the number of its components.

    Raises:
        EvaValueError: ``min_rank`` alone costs more than the budget.

    Reference: arXiv 2410.07170, section 3; PEFT ``_get_rank_distribution``.
    """
    prices = list(costs) if costs is not None else [1] * len(ratios)
    sizes = torch.tensor([len(r) for r in ratios], dtype=torch.int64, device="cpu")
    layer = torch.repeat_interleave(torch.arange(len(ratios), device="cpu"), sizes)
    index = torch.arange(len(layer), device="cpu") - (sizes.cumsum(0) - sizes)[layer]
    pooled = torch.cat([torch.empty(0, device="cpu"), *(r.detach().double().cpu() for r in ratios)])
    pooled = torch.nan_to_num(pooled, nan=0.0)
    limits = torch.bincount(layer[pooled > 0], minlength=len(ratios)).tolist()
    floors = list(min_rank) if isinstance(min_rank, Sequence) else [min_rank] * len(ratios)
    ranks = [min(least, limit) for least, limit in zip(floors, limits, strict=True)]
    left = budget - sum(r * p for r, p in zip(ranks, prices, strict=True))
    if left < 0:
        raise EvaValueError(
            f"min_rank={max(floors)} for {len(ranks)} layers costs {budget - left}, more than "
            f"the budget of {budget}; lower min_rank or raise r"
        )
    if not ratios:
        return ranks
    density = pooled / torch.tensor(prices, device="cpu")[layer]
    floor, ceiling = (torch.tensor(values, device="cpu") for values in (ranks, limits))
    open_ = (index >= floor[layer]) & (index < ceiling[layer])
    order = torch.sort(density.masked_fill(~open_, -1.0), descending=True, stable=True).indices
    winners = layer[order[: int(open_.sum())]]
    if costs is None:
        counts = torch.bincount(winners[:left], minlength=len(ranks))
        return (floor + counts).tolist()
    for i in winners.tolist():
        if prices[i] <= left:
            ranks[i], left = ranks[i] + 1, left - prices[i]
    return ranks
