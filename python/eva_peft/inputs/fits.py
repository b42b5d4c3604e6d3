"""Masks for inputs that hold the tokens in another shape: parts, heads, windows, frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

__all__ = [
    "Fit",
    "Part",
    "are_same",
    "for_every_frame",
    "for_every_head",
    "in_windows",
    "is_longer",
    "longest_of",
    "part_of",
    "version_of",
]


class Fit(NamedTuple):
    """A mask of the tokens of a layer's input.

    Attributes:
        key: the same for the same tokens, however they are laid out.
        mask: bool, in the order of the input or, of two dimensions, transposed.
    """

    key: str
    mask: Tensor


class Part(NamedTuple):
    """Neighbours among the tokens of each sample, as all but the first.

    Attributes:
        whole: how many tokens each sample has.
        begin: the first of those that are taken.
    """

    whole: int
    begin: int


def part_of(x: Tensor) -> Part | None:
    """Return what a layer's input, (B, T, D), is a part of, if it is a view of (B, more, D).

    A single token is no part: it stands for its whole sample, as BERT's first.
    """
    if x.dim() != 3 or x.shape[1] < 2:
        return None
    sample, token, feature = x.stride()
    if feature != 1 or token < x.shape[2] or sample <= token * x.shape[1]:
        return None
    size = x.untyped_storage().nbytes() // x.element_size()
    begin, aside = divmod(int(x.storage_offset()) % sample, token)
    if sample % token or size % sample or aside + x.shape[2] > token:
        return None
    whole = sample // token
    return Part(whole, begin) if begin + x.shape[1] <= whole else None


def are_same(masks: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Tell whether masks are the same tensors."""
    return len(masks) == len(others) and all(map(is_, masks, others))


def version_of(x: Tensor) -> int:
    """Return how often a tensor was written to; -1 in inference mode, where that is not counted."""
    return -1 if x.is_inference() else x._version


def longest_of(mask: Tensor) -> int:
    """Return how many tokens a sample has at most, of samples that may be none."""
    return max(mask.sum(1).tolist(), default=0)


def in_windows(texts: Sequence[Fit], window: int) -> Iterator[Fit]:
    """Yield texts that are padded to whole windows, and by half a window on either side, too.

    As the layers of PEGASUS-X read them in turn.
    """
    for key, mask in texts if window > 1 else ():
        whole = functional.pad(mask, (0, -mask.shape[1] % window))
        if whole.shape != mask.shape:
            yield Fit(f"{key} padded", whole)
        yield Fit(f"{key} moved", functional.pad(whole, [window // 2] * 2))


def is_longer(leading: tuple[int, ...], mask: Tensor) -> bool:
    """Tell whether an input, (B, T + more), may hold the tokens of a mask among others."""
    return (
        len(leading) == mask.dim() == 2 and leading[0] == len(mask) and leading[1] > mask.shape[1]
    )


def for_every_frame(fit: Fit, leading: tuple[int, ...]) -> Fit:
    """Return the mask of queries once more for each frame of a film, which are read one by one."""
    times = leading[0] // max(len(fit.mask), 1) if len(leading) == 2 else 1
    if not fit.key.startswith("queries") or times < 2 or leading[0] != times * len(fit.mask):
        return fit
    return Fit(f"{fit.key} {times} times", fit.mask.repeat_interleave(times, dim=0))


def for_every_head(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of an input that has each token once a head: (B, H, T) or (B, T, H)."""
    if len(leading) != 3 or leading[1] == leading[2] != 1:
        return None
    if (leading[0], leading[2]) == tuple(mask.shape):
        return mask[:, None].expand(leading)
    return mask[:, :, None].expand(leading) if leading[:2] == tuple(mask.shape) else None
