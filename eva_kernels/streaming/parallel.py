"""A stream whose tokens are spread over processes: what is added up, and who follows whom.

One process leads: it holds the state and folds. The others follow its basis, and their sums, which
are additive, are added to its own before every fold. See "Processes" in this folder's README.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .state import GramState, SketchState, clear_sums, zero_sums
from .stream import InputStream

__all__ = ["absorb", "follow", "hand_over", "pending_sums"]


def pending_sums(stream: InputStream) -> list[Tensor]:
    """Return the tensors that are to be added up over the processes, the stream's own.

    Args:
        stream: one that leads or follows. Of an exact stream the leader's sums are its state.
    """
    sums = stream.sums
    assert sums is not None
    tensors = [sums.products, sums.shift, sums.square]
    if isinstance(stream.state, GramState):
        if sums.bad is None:
            sums.bad = torch.zeros_like(sums.square)
        tensors.append(sums.bad)
    return tensors


def absorb(stream: InputStream, tokens: int, skipped: int) -> None:
    """Count the tokens of other processes, whose sums have been added to this stream's.

    Args:
        stream: the leader's.
        tokens: that were accumulated; ``skipped``: that were left out as not finite.
    """
    assert stream.sums is not None
    stream.sums.count += tokens
    stream.pending += tokens
    stream.skipped += skipped


def hand_over(stream: InputStream) -> None:
    """Forget the tokens of a stream that follows: the leader has them."""
    if stream.sums is not None:
        clear_sums([stream.sums])
        if stream.sums.bad is not None:
            stream.sums.bad.zero_()
    stream.pending = stream.skipped = 0


def follow(stream: InputStream, basis: Tensor, mean: Tensor, pivot: Tensor | None) -> None:
    """Accumulate about the leader's basis and mean from here on, and forget what there was.

    Args:
        stream: of any state, or none.
        basis: (Q, D), in the dtype and on the device of the stream, as the others; kept.
        mean: (D,).
        pivot: of an exact stream, (D,); ``None`` for a sketch.
    """
    rows = stream.width if pivot is None else stream.features
    if stream.sums is None:
        stream.sums = zero_sums(rows, stream.features, stream.dtype, stream.device)
    # Without a state it was not merged, for all of its tokens were skipped: these still count.
    skipped = 0 if stream.state is not None else stream.skipped
    hand_over(stream)
    stream.skipped = skipped
    none = np.zeros(stream.width)
    sketch = SketchState(0, mean, basis, none, total=0.0, rank=0, mean_norm=0.0)
    stream.state = sketch if pivot is None else GramState(stream.sums, pivot, sketch)
