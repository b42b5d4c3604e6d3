"""Synthetic tokens for timing whose exact PCA needs no large decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .work import Point

SPECTRUM = (1.0, -1.0)  # decimal exponents of the largest and the least standard deviation


@dataclass(frozen=True)
class Tokens:
    """Tokens ``Z W`` with their exact scatter matrix.

    Attributes:
        x: (N, D), on the device.
        mixing: W, (rank, D), orthonormal rows, float64 on the CPU.
        scatter: scatter matrix of Z about its mean, which is that of x in the basis W; (rank,
            rank), float64 on the CPU.
    """

    x: Tensor
    mixing: Tensor
    scatter: Tensor

    def lost(self, components: Tensor) -> float:
        """Return the share of the best variance that the span of (K, D) rows misses, float64."""
        basis = torch.linalg.qr(components.double().cpu().mT).Q
        inside = self.mixing @ basis
        captured = float((inside.mT @ self.scatter @ inside).trace())
        best = torch.linalg.eigvalsh(self.scatter).flip(0)[: len(components)].sum()
        return float(1 - captured / best)


def make_tokens(point: Point, device: torch.device, dtype: torch.dtype, seed: int) -> Tokens:
    """Return tokens of one layer input, of rank ``min(D, 2 Q)``: no row of the sketch is zero."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(point.D, 2 * point.plan().width)
    mixing = torch.linalg.qr(torch.randn(point.D, rank, generator=generator)).Q.mT.contiguous()
    scale = torch.logspace(*SPECTRUM, rank)
    factors = torch.randn(point.N, rank, generator=generator) * scale
    centred = (factors - factors.mean(0)).double()
    x = (factors @ mixing).to(device=device, dtype=dtype)
    return Tokens(x, mixing.double(), centred.mT @ centred)
