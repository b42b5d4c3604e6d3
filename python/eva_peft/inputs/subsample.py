"""A random subset of the tokens of a batch, the same for every layer and on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Draw"]


@dataclass(frozen=True)
class Draw:
    """Draws at most ``limit`` of the tokens that count, uniformly and without replacement.

    The draw depends only on these numbers and on the number of tokens; the global random state is
    not used.

    Attributes:
        limit: maximum number of tokens.
        seed: of the pass.
        batch_number: from 0.
        part: number of the part of the batch, if it is run in several.
    """

    limit: int
    seed: int
    batch_number: int
    part: int = 0

    def indices(self, count: int) -> Tensor | None:
        """Return the indices drawn from ``count`` tokens, ascending int64; ``None`` for all."""
        if count <= self.limit:
            return None
        seed = (self.seed * 1_000_003 + self.batch_number) * 1_009 + self.part
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.randperm(count, generator=generator, device="cpu")[: self.limit].sort().values

    def subset(self, mask: Tensor) -> Tensor:
        """Return a bool mask of the same shape that keeps only the drawn tokens."""
        kept = mask.reshape(-1).nonzero().flatten()
        drawn = self.indices(len(kept))
        if drawn is None:
            return mask
        chosen = torch.zeros(mask.numel(), dtype=torch.bool, device="cpu")
        chosen[kept[drawn]] = True
        return chosen.reshape(mask.shape)

    def split_over_parts(self, token_counts: Sequence[int]) -> list[Draw]:
        """Return one draw for each part of the batch, with limits proportional to their tokens.

        The limits add up to that of the batch.
        """
        if len(token_counts) == 1:
            return [self]
        total = max(1, sum(token_counts))
        shares = [self.limit * count / total for count in token_counts]
        limits = [int(share) for share in shares]
        by_rounding = sorted(range(len(token_counts)), key=lambda part: limits[part] - shares[part])
        for part in by_rounding[: self.limit - sum(limits)]:
            limits[part] += 1
        return [replace(self, limit=limit, part=part) for part, limit in enumerate(limits)]
