"""Spend the budget: from explained variance to the rank of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from eva_kernels.streaming import Array, allocate_ranks, as_array

from .targets import Target

if TYPE_CHECKING:
    from .calibrate import CalibrationPass

__all__ = ["allocate", "spend"]


def allocate(run: CalibrationPass) -> dict[int, int]:
    """Return the rank of every layer that was called so far, by its index."""
    indices = sorted(run.collector.slot_of)
    targets = [run.targets[i] for i in indices]
    spectra = {id(s): s.stream.ratios() for s in run.collector.slots}
    ratios = [spectra[id(run.collector.slot_of[i])][: run.limits[i]] for i in indices]
    ranks = spend(targets, ratios, run.options.budget, run.options.min_rank)
    return dict(zip(indices, ranks, strict=True))


def spend(
    targets: Sequence[Target], ratios: Sequence[Tensor | Array], budget: str, min_rank: int
) -> list[int]:
    """Distribute the layers' own budget among them.

    Args:
        targets: the layers that take part.
        ratios: their explained-variance ratios, descending.
        budget: ``"rank"``: the sum of ranks stays; ``"params"``: the number of parameters.
        min_rank: every layer keeps at least this rank.
    """
    layers = _with_common_rank(targets)
    first = [targets[members[0]] for members in layers]
    # rows of lora_A are what a rank costs: of each expert one
    each = [t.experts for t in first]
    if budget == "params":
        each = [n * (t.in_features + t.out_features) for n, t in zip(each, first, strict=True)]
    prices = [t.step * price for t, price in zip(first, each, strict=True)]
    counts = allocate_ranks(
        [_by_step([ratios[i] for i in m], t.step) for m, t in zip(layers, first, strict=True)],
        sum(t.rank * price for t, price in zip(first, each, strict=True)),
        costs=None if set(prices) <= {1} else prices,
        # PEFT cannot take the adapter off one of several parameters of a module
        min_rank=[max(-(-min_rank // t.step), int(bool(t.owner))) for t in first],
    )
    ranks = [0] * len(targets)
    for members, target, count in zip(layers, first, counts, strict=True):
        for i in members:  # one, too, where no expert's tokens differ
            ranks[i] = max(count, int(bool(target.owner))) * target.step
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
