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


class ExactPCA:
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
        x64 = x.double()
        if self._pivot is None:  # so that a large mean does not dominate the squares
            self._pivot = x64.mean(0)
        x64 = x64 - self._pivot
        self.count += len(x)
        self._sum += x64.sum(0)
        self._scatter.addmm_(x64.T, x64)

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
    errors = []
    names = [n for n in rows[0]["methods"] if all("points" in r["methods"][n] for r in rows)]
    for i, point in enumerate(rows[0]["exact"]):
        exact_ranks = _allocate([row["exact"][i] for row in rows], budget)
        for name in names:
            method_ranks = _allocate([row["methods"][name]["points"][i] for row in rows], budget)
            error = sum(abs(a - b) for a, b in zip(method_ranks, exact_ranks, strict=True))
            checkpoint = {"step": point["step"], "tokens": point["tokens"]}
            errors.append({"method": name, **checkpoint, "rank_error": error})
    return errors


def _allocate(points: Sequence[Mapping[str, Any]], budget: int) -> list[int]:
    ratios = [torch.tensor(point["ratios"], dtype=torch.float64) for point in points]
    return allocate_ranks(ratios, budget)
