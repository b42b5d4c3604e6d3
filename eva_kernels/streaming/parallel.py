"""A stream whose tokens are distributed over processes.

One process leads: it holds the state and folds. The others use its basis, and their additive sums
are added to the leader's before every fold. See "Processes" in this folder's README.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state import GramState, clear_sums, empty_sketch, zero_sums
from .stream import InputStream

__all__ = ["add_counts", "adopt_basis", "clear_pending", "pending_sums"]


def pending_sums(stream: InputStream) -> list[Tensor]:
    """Return the stream's own tensors that are to be summed over the processes.

    Args:
        stream: of the leader or a follower. For an exact stream the leader's sums are its state.
    """
    sums = stream.sums
    assert sums is not None
    tensors = [sums.products, sums.shift, sums.square]
    if isinstance(stream.state, GramState):
        if sums.bad is None:
            sums.bad = torch.zeros_like(sums.square)
        tensors.append(sums.bad)
    return tensors


def add_counts(stream: InputStream, tokens: int, skipped: int) -> None:
    """Count the tokens of other processes, whose sums have been added to this stream's.

    Args:
        stream: the leader's.
        tokens: number accumulated. ``skipped``: number left out as not finite.
    """
    assert stream.sums is not None
    stream.sums.count += tokens
    stream.pending += tokens
    stream.skipped += skipped


def clear_pending(stream: InputStream) -> None:
    """Forget the pending tokens of a follower's stream: the leader has them."""
    if stream.sums is not None:
        clear_sums([stream.sums])
        if stream.sums.bad is not None:
            stream.sums.bad.zero_()
    stream.pending = stream.skipped = 0


def adopt_basis(stream: InputStream, basis: Tensor, mean: Tensor, pivot: Tensor | None) -> None:
    """Accumulate with the leader's basis and mean from here on, and discard the old state.

    Args:
        stream: with or without a state.
        basis: (Q, D), in the dtype and on the device of the stream, like the others; not copied.
        mean: (D,).
        pivot: of an exact stream, (D,); ``None`` for a sketch.
    """
    rows = stream.width if pivot is None else stream.features
    if stream.sums is None:
        stream.sums = zero_sums(rows, stream.features, stream.dtype, stream.device)
    # A stream without a state was not merged, since all its tokens were skipped: count them still.
    skipped = 0 if stream.state is not None else stream.skipped
    clear_pending(stream)
    stream.skipped = skipped
    sketch = empty_sketch(basis, mean)
    stream.state = sketch if pivot is None else GramState(stream.sums, pivot, sketch)
