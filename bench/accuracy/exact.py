"""Exact PCA of the tokens so far, in float64, and the ranks that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eva_kernels.streaming import allocate_ranks


@dataclass(frozen=True)
class Truth:
    """The exact answer for the tokens so far.

    Attributes:
        covariance: scatter matrix about the mean, float64 (D, D).
        spectrum: its eigenvalues, ascending, (D,).
        ratios: explained-variance ratios of the K leading components, (K,).
    """

    covariance: Tensor
    spectrum: Tensor
    ratios: Tensor


class Exact:
    """Accumulates the scatter matrix of a stream.

    Args:
        features: D.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self._sum = torch.zeros(features, dtype=torch.float64)
        self._scatter = torch.zeros(features, features, dtype=torch.float64)
        self._pivot: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add tokens, (N, D)."""
        wide = x.double()
        if self._pivot is None:  # so that a large mean does not dominate the squares
            self._pivot = wide.mean(0)
        wide = wide - self._pivot
        self.count += len(x)
        self._sum += wide.sum(0)
        self._scatter.addmm_(wide.T, wide)

    def solve(self, components: int) -> Truth:
        """Return the exact answer so far."""
        covariance = torch.addr(self._scatter, self._sum, self._sum, alpha=-1 / self.count)
        spectrum = torch.linalg.eigvalsh(covariance)
        leading = spectrum.flip(0)[:components].clamp_min(0)
        return Truth(covariance, spectrum, leading / covariance.trace())


def rank_errors(rows: Sequence[Mapping[str, Any]], rank: int) -> list[dict[str, Any]]:
    """Compare the joint rank allocation of each method over all layers with the exact one.

    Args:
        rows: of layer inputs that saw the same tokens, as returned by ``measure``.
        rank: average rank of a layer; the budget is this times the number of layers.

    Returns:
        For every method and checkpoint ``{"method", "step", "tokens", "rank_error"}``, the last
        being the sum over layers of the absolute difference to the exact rank. Methods without an
        answer for every layer are left out.
    """
    if not rows:
        return []
    budget = rank * len(rows)
    found = []
    names = [n for n in rows[0]["methods"] if all("points" in r["methods"][n] for r in rows)]
    for i, point in enumerate(rows[0]["exact"]):
        exact = _allocate([row["exact"][i] for row in rows], budget)
        for name in names:
            own = _allocate([row["methods"][name]["points"][i] for row in rows], budget)
            error = sum(abs(a - b) for a, b in zip(own, exact, strict=True))
            place = {"step": point["step"], "tokens": point["tokens"]}
            found.append({"method": name, **place, "rank_error": error})
    return found


def _allocate(points: Sequence[Mapping[str, Any]], budget: int) -> list[int]:
    ratios = [torch.tensor(point["ratios"], dtype=torch.float64) for point in points]
    return allocate_ranks(ratios, budget)
