"""The convergence of all layer inputs at once, after a fold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import convergence
from .stream import InputStream

__all__ = ["compare_streams", "leading_similar"]


def compare_streams(
    folded: Sequence[InputStream],
    ranks: Sequence[int],
    *,
    tau: float,
    criterion: str = "cosine",
    backend: str = "auto",
) -> None:
    """Compare the leading components of folded streams with those before the fold.

    Sets ``similarity`` (smallest over the first R components; ``None`` before the second fold)
    and ``converged`` of every stream, raises ``settled`` (how many leading components have been
    similar enough together), and drops the old basis.

    Args:
        folded: what :func:`fold_streams` returned.
        ranks: R, how many components of each stream are needed.
        tau: threshold; NaN never passes.
        criterion: ``"cosine"`` compares vector with vector (the paper's rule, without the sign),
            ``"subspace"`` the spans: the smallest cosine of their principal angles.
        backend: of the ``convergence`` op.
    """
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for i, stream in enumerate(folded):
        if stream.previous is None:
            stream.similarity, stream.converged = None, False
        else:
            by_device[stream.device].append(i)
    for indices in by_device.values():
        chosen, needed = [folded[i] for i in indices], [ranks[i] for i in indices]
        old = [s.previous.float() for s in chosen if s.previous is not None]
        new = [s.sketch.basis[: s.components].float() for s in chosen if s.sketch is not None]
        if criterion == "subspace":
            smallest = [
                _principal_cosine(o, n, r) for o, n, r in zip(old, new, needed, strict=True)
            ]
            passed = [value >= tau for value in smallest]
            for stream, rank, flag in zip(chosen, needed, passed, strict=True):
                stream.settled = max(stream.settled, rank if flag else 0)
        else:
            cosines, missing = convergence(old, new, needed, tau, backend=backend)
            parts = cosines.cpu().split([s.components for s in chosen])
            for stream, part in zip(chosen, parts, strict=True):
                stream.cosines = part
                stream.settled = max(stream.settled, leading_similar(part, tau))
            smallest = [_least(p[:r]) for p, r in zip(parts, needed, strict=True)]
            passed = [count == 0 for count in missing.tolist()]
        for stream, value, flag in zip(chosen, smallest, passed, strict=True):
            stream.similarity, stream.converged, stream.previous = value, flag, None


def leading_similar(cosines: Tensor, tau: float) -> int:
    """Return how many leading components are at least ``tau`` similar; NaN is not."""
    return int((cosines >= tau).long().cumprod(0).sum())


def _least(cosines: Tensor) -> float:
    return float(cosines.min()) if cosines.numel() else 1.0


def _principal_cosine(old: Tensor, new: Tensor, rank: int) -> float:
    return _least(torch.linalg.svdvals(new[:rank] @ old[:rank].mT)) if rank else 1.0
