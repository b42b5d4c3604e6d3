"""The convergence test of all layer inputs at once, after a fold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EvaValueError
from ..ops.eigh import eigh
from . import _host
from ._autocast import without_autocast
from ._host import Array
from .step import read_cosines, split_by_device
from .stream import InputStream

Float32Array = np.ndarray[Any, np.dtype[np.float32]]

__all__ = ["compare_streams", "leading_similar"]


@without_autocast
def compare_streams(
    folded: Sequence[InputStream],
    ranks: Sequence[int],
    *,
    tau: float,
    criterion: str = "cosine",
) -> None:
    """Compare the leading components of folded streams with those before the fold.

    Of every stream, sets ``similarity`` (smallest over the first R components; ``None`` before the
    second fold) and ``converged``, increases ``settled`` (the most leading components that were all
    similar enough at one fold), and drops the old basis.

    Args:
        folded: what :func:`fold_streams` returned.
        ranks: R, how many components of each stream are needed.
        tau: threshold; NaN never passes.
        criterion: ``"cosine"`` compares component with component (the paper's rule, without the
            sign), ``"subspace"`` their spans: the smallest cosine of the principal angles.

    Raises:
        EvaValueError: ``tau`` is not between 0 and 1.
    Cost: on an accelerator ``"cosine"`` needs no read, since the fold has read the cosines;
        ``"subspace"`` reads once.
    """
    if not 0.0 <= tau <= 1.0:  # NaN, too
        raise EvaValueError(f"tau must be between 0 and 1, not {tau}")
    pairs = [(stream, ranks[i]) for i, stream in enumerate(folded)]
    if criterion == "subspace":
        _compare_spans([(s, r) for s, r in pairs if s.previous is not None], tau)
    else:
        read_cosines([s for s in folded if s.pending_cosines is None])
        by_width: dict[int, list[tuple[InputStream, int]]] = defaultdict(list)
        for stream, rank in pairs:
            if stream.pending_cosines is not None:
                by_width[len(stream.pending_cosines)].append((stream, rank))
        for group in by_width.values():
            _apply_threshold(group, tau)
    for stream in folded:
        if stream.previous is None:
            stream.similarity, stream.converged = None, False
        stream.previous = stream.pending_cosines = None


def leading_similar(cosines: Tensor, tau: float) -> int:
    """Return how many leading components are at least ``tau`` similar; NaN does not count."""
    return int(_count_similar(_running_minimum(cosines.numpy()), tau))


def _apply_threshold(group: Sequence[tuple[InputStream, int]], tau: float) -> None:
    """Compare the cosines that the fold has read, of streams of equal K, with ``tau``."""
    cosines = np.stack(
        [s.pending_cosines for s, _ in group if s.pending_cosines is not None]
    ).astype(np.float32)
    minima = _running_minimum(cosines)
    num_similar = _count_similar(minima, tau).tolist()
    rows, ranks = np.arange(len(group)), np.array([rank for _, rank in group])
    last_needed = ranks.clip(1, minima.shape[1]) - 1
    smallest = np.where(ranks > 0, minima[rows, last_needed], 1.0).tolist()
    cosines_by_stream = torch.from_numpy(cosines).unbind()  # one call for all
    for i, (stream, rank) in enumerate(group):
        stream.cosines = cosines_by_stream[i]
        stream.settled = max(stream.settled, num_similar[i])
        stream.similarity, stream.converged = smallest[i], num_similar[i] >= rank


def _running_minimum(cosines: Float32Array) -> Float32Array:
    """Return the running minimum along the last axis; NaN from the first NaN on."""
    return np.minimum.accumulate(cosines, axis=-1)


def _count_similar(minima: Float32Array, tau: float) -> np.ndarray[Any, Any]:
    # In single precision, like the cosines: one that was rounded to tau passes.
    return (minima >= np.float32(tau)).sum(-1)


def _compare_spans(pairs: Sequence[tuple[InputStream, int]], tau: float) -> None:
    rank_of = {id(stream): rank for stream, rank in pairs}
    parts = split_by_device([stream for stream, _ in pairs])
    cosines = [_principal_cosines(part, [rank_of[id(s)] for s in part]) for part in parts]
    for part, array in zip(parts, _host.read(cosines), strict=True):
        for stream, value in zip(part, array.tolist(), strict=True):
            stream.similarity, stream.converged = value, value >= tau
            stream.settled = max(stream.settled, rank_of[id(stream)] if value >= tau else 0)


def _principal_cosines(streams: Sequence[InputStream], ranks: Sequence[int]) -> Tensor:
    """Return the smallest cosine of the principal angles of each stream, (L,)."""
    overlaps = [
        s.sketch.basis[:r].float() @ s.previous[:r].float().mT
        for s, r in zip(streams, ranks, strict=True)
        if s.sketch is not None and s.previous is not None
    ]
    if _host.reads_are_free(streams[0].device):
        return torch.tensor(
            [_smallest_or_one(torch.linalg.svdvals(o).numpy()) for o in overlaps],
            dtype=torch.float64,
            device="cpu",
        )
    # The squared singular values of all in one launch; blocks are padded with ones, the largest
    # possible cosine.
    width = max(1, *ranks)
    blocks = torch.eye(width, dtype=torch.float64, device=streams[0].device)
    blocks = blocks.repeat(len(streams), 1, 1)
    for block, overlap, rank in zip(blocks.unbind(0), overlaps, ranks, strict=True):
        block[:rank, :rank] = overlap.double().mT @ overlap.double()
    return eigh(blocks)[0][:, 0].clamp(0.0, 1.0).sqrt()


def _smallest_or_one(cosines: Array) -> float:
    return float(cosines.min()) if cosines.size else 1.0
