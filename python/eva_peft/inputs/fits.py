"""Masks for inputs with the tokens in another layout: parts, heads, windows, frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

__all__ = [
    "FittedMask",
    "TokenSlice",
    "are_same_tensors",
    "holds_more_than",
    "longest_sample",
    "mask_of_pairs",
    "nested_fit",
    "of_own_pairs",
    "padded_to_windows",
    "repeated_per_frame",
    "repeated_per_head",
    "token_slice_of",
    "version_of",
]


class FittedMask(NamedTuple):
    """A mask of the tokens of a layer's input.

    Attributes:
        key: the same for the same tokens, whatever their layout.
        mask: bool, in the order of the input, or its transpose if it has two dimensions.
    """

    key: str
    mask: Tensor


class TokenSlice(NamedTuple):
    """A run of consecutive tokens of each sample, such as all but the first.

    Attributes:
        total: the number of tokens per sample.
        begin: position of the first token of the run.
    """

    total: int
    begin: int


def token_slice_of(x: Tensor) -> TokenSlice | None:
    """Locate a layer's input, (B, T, D), in the (B, more, D) that it is a view of, if any.

    A single token is not treated as a part: it represents its sample, like BERT's first token.
    """
    if x.dim() != 3 or x.shape[1] < 2:
        return None
    sample, token, feature = x.stride()
    if feature != 1 or token < x.shape[2] or sample <= token * x.shape[1]:
        return None
    size = x.untyped_storage().nbytes() // x.element_size()
    begin, offset = divmod(int(x.storage_offset()) % sample, token)
    if sample % token or size % sample or offset + x.shape[2] > token:
        return None
    total = sample // token
    return TokenSlice(total, begin) if begin + x.shape[1] <= total else None


def are_same_tensors(masks: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Tell whether masks are the same tensors."""
    return len(masks) == len(others) and all(map(is_, masks, others))


def version_of(x: Tensor) -> int:
    """Return a tensor's version counter; -1 for inference tensors, which have none."""
    return -1 if x.is_inference() else x._version


def longest_sample(mask: Tensor) -> int:
    """Return the number of tokens of the longest sample, 0 without samples."""
    return max(mask.sum(1).tolist(), default=0)


def padded_to_windows(fits: Sequence[FittedMask], window: int) -> Iterator[FittedMask]:
    """Yield texts padded to whole windows, and also by half a window on either side.

    The layers of PEGASUS-X read these two in turn.
    """
    for key, mask in fits if window > 1 else ():
        padded = functional.pad(mask, (0, -mask.shape[1] % window))
        if padded.shape != mask.shape:
            yield FittedMask(f"{key} padded", padded)
        yield FittedMask(f"{key} moved", functional.pad(padded, [window // 2] * 2))


def holds_more_than(leading: tuple[int, ...], mask: Tensor) -> bool:
    """Tell whether an input, (B, T + more), may hold the tokens of a mask among others."""
    return (
        len(leading) == mask.dim() == 2 and leading[0] == len(mask) and leading[1] > mask.shape[1]
    )


def nested_fit(masks: Sequence[Tensor | None], leading: tuple[int, ...]) -> FittedMask | None:
    """Return the mask of units that have tokens, such as the sentences of documents.

    Args:
        masks: of the tokens of all units, (B * S, T).
        leading: (B, S, T), or (B, S), of which those without a token do not count.
    """
    for i, mask in enumerate(masks if len(leading) in (2, 3) and 1 not in leading[:2] else ()):
        if mask is None or mask.dim() != 2 or len(mask) != leading[0] * leading[1]:
            continue
        units = mask.any(1)
        if len(leading) == 2 and not units.all():
            return FittedMask(f"units of {i} {leading}", units.view(leading))
        if leading[2:] == mask.shape[1:]:
            return FittedMask(f"nested {i} {leading}", mask.reshape(leading))
    return None


def repeated_per_frame(fit: FittedMask, leading: tuple[int, ...]) -> FittedMask:
    """Repeat the mask of queries for each frame of a video, since frames are read one by one."""
    frames = leading[0] // max(len(fit.mask), 1) if len(leading) == 2 else 1
    if not fit.key.startswith("qformer") or frames < 2 or leading[0] != frames * len(fit.mask):
        return fit
    return FittedMask(f"{fit.key} {frames} times", fit.mask.repeat_interleave(frames, dim=0))


def repeated_per_head(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of an input with each token once per head: (B, H, T) or (B, T, H)."""
    if len(leading) != 3 or leading[1] == leading[2] != 1:
        return None
    if (leading[0], leading[2]) == tuple(mask.shape):
        return mask[:, None].expand(leading)
    return mask[:, :, None].expand(leading) if leading[:2] == tuple(mask.shape) else None


def of_own_pairs(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of an input with each pair of tokens of a sample, (B, T, T)."""
    samples, tokens = mask.shape
    return mask[:, :, None] & mask[:, None] if leading == (samples, tokens, tokens) else None


def mask_of_pairs(frames: Tensor, steps: Tensor | None, leading: tuple[int, ...]) -> Tensor:
    """Return the mask of all pairs of a frame and a decoder's step, (B, T, U), of transducers.

    Args:
        frames: bool (B, T).
        steps: bool (B, U); all count if it is of another shape.
        leading: (B, T, U).
    """
    if steps is None or tuple(steps.shape) != (leading[0], leading[2]):
        return frames[:, :, None].expand(leading)
    return frames[:, :, None] & steps[:, None]
