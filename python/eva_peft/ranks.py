"""Spend the budget: from explained variance to the rank of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from eva_kernels.streaming import allocate_ranks

from .planning import components_of
from .targets import Target

if TYPE_CHECKING:
    from .calibrate import CalibrationPass

__all__ = ["allocate", "spend"]


def allocate(run: CalibrationPass) -> dict[int, int]:
    """Return the rank of every layer that was called so far, by its index."""
    indices = sorted(run.collector.slot_of)
    targets = [run.targets[i] for i in indices]
    spectra = {id(s): s.stream.ratios() for s in run.collector.slots}
    ratios = [
        spectra[id(run.collector.slot_of[i])][: components_of(run.targets[i], run.eva.rho)]
        for i in indices
    ]
    ranks = spend(targets, ratios, run.options.budget, run.options.min_rank)
    return dict(zip(indices, ranks, strict=True))


def spend(
    targets: Sequence[Target], ratios: Sequence[Tensor], budget: str, min_rank: int
) -> list[int]:
    """Distribute the layers' own budget among them.

    Args:
        targets: the layers that take part.
        ratios: their explained-variance ratios, descending.
        budget: ``"rank"``: the sum of ranks stays; ``"params"``: the number of parameters.
        min_rank: every layer keeps at least this rank.
    """
    steps = [t.step for t in targets]
    each = [1 if budget == "rank" else t.in_features + t.out_features for t in targets]
    prices = [step * price for step, price in zip(steps, each, strict=True)]
    total = sum(t.rank * price for t, price in zip(targets, each, strict=True))
    counts = allocate_ranks(
        [_by_step(r, step) for r, step in zip(ratios, steps, strict=True)],
        total,
        costs=None if set(prices) <= {1} else prices,
        min_rank=[-(-min_rank // step) for step in steps],
    )
    return [count * step for count, step in zip(counts, steps, strict=True)]


def _by_step(ratios: Tensor, step: int) -> Tensor:
    """Return what each further ``step`` components explain; an incomplete step is left out."""
    if step == 1:
        return ratios
    whole = len(ratios) // step * step
    return ratios[:whole].reshape(-1, step).sum(1)
