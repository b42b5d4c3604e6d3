"""Convert masks and lengths to the tokens that they keep, judging by their values."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

__all__ = [
    "FEW",
    "hides_where_true",
    "is_contiguous",
    "is_pairwise",
    "is_right_padded",
    "is_true_at_padding",
    "kept_before_padding",
    "kept_by_attention",
    "kept_by_padding",
    "mask_from_lengths",
    "seem_kept",
]

# The share of a batch's tokens up to which those that pad may be words.
FEW = 0.1


def kept_by_attention(mask: Tensor) -> Tensor | None:
    """Return which tokens an attention mask keeps, bool (B, T), ``None`` if it is not understood.

    Of a pairwise mask, (B, T, T) or (B, heads or 1, T or 1, T), the diagonal is used; see
    :mod:`.batch_mask`. Values that no mask has mean something else: global attention, or
    distances.
    """
    whole, mask = mask, mask[:, 0] if mask.dim() == 4 else mask
    pairs = mask if mask.dim() == 3 and 1 < mask.shape[1] == mask.shape[2] else None
    if mask.dim() == 3 and mask.shape[1] in (1, mask.shape[2]):
        mask = mask[:, 0] if mask.shape[1] == 1 else mask.diagonal(dim1=1, dim2=2)
    if mask.dim() != 2:
        return None
    values = mask.cpu()
    # as many samples as tokens, or pairwise
    square = len(values) == values.shape[1] and mask is whole
    zero, one, hidden = values == 0, values == 1, values < -1
    if not (zero | one).all() and not (zero | hidden).all():
        return None
    additive = bool(hidden.any())
    kept = zero if additive else one
    if square and kept.diagonal().all() and not kept.triu(1).any():
        return None  # pairwise and causal: each token sees itself, and none after it
    if pairs is not None and hides_where_true(pairs):
        kept = zero
    elif pairs is not None and _sees_padding(pairs, kept, additive):
        return None  # of other things, such as the values in as many patches
    return kept if _keeps_every_sample(kept) else None


def hides_where_true(mask: Tensor) -> bool:
    """Tell whether a mask is pairwise, (..., T, T), not additive, and true of what is hidden.

    It is if some token that others see does not see itself, or no token of a sample sees any, but
    neither is so in the inverted mask.
    """
    if not is_pairwise(mask) or mask.shape[-2] != mask.shape[-1]:
        return False
    inverted = not _may_be_visible(mask != 0) and _may_be_visible(mask == 0)
    return inverted and bool(mask.any()) and not bool((mask < 0).any())


def _may_be_visible(pairs: Tensor) -> bool:
    seen = pairs.any(-2)
    see_themselves = pairs.diagonal(dim1=-2, dim2=-1) | ~seen
    return bool(see_themselves.all() and seen.any(-1).all())


def _sees_padding(pairs: Tensor, kept: Tensor, additive: bool) -> bool:
    """Tell whether a token that pairs keep sees the first of its sample that they hide."""
    samples, first_hidden = torch.arange(len(kept), device="cpu"), kept.int().argmin(1)
    column = pairs[samples, :, first_hidden].cpu()
    seen = column == 0 if additive else column == 1
    return bool((seen & kept & ~kept[samples, first_hidden, None]).any())


def is_true_at_padding(mask: Tensor) -> bool:
    """Tell whether a boolean mask, (B, T), is true at padding on the right, and not causal.

    It is if every sample is false up to some token and true from there on, and one is false
    throughout: read as a mask of kept tokens, it would keep nothing of that sample.
    """
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] == 0:
        return False
    mask = mask.cpu()
    if mask.shape[0] == mask.shape[1] and not mask.tril().any():
        return False  # as many samples as tokens, or pairwise
    kept = ~mask
    return is_right_padded(kept) and bool(kept[:, 0].all() & kept.all(1).any())


def kept_by_padding(mask: Tensor) -> Tensor | None:
    """Return which tokens a padding mask keeps, bool (B, T), ``None`` if it is not understood.

    Padding is true, or -inf; or 0 in a mask of integers, as feature extractors of transformers make
    them. If a whole sample would be padding, it is the other way round.
    """
    if mask.dim() != 2:
        return None
    kept = mask.cpu() == 0
    kept = ~kept if mask.dtype in (torch.int32, torch.int64) else kept
    if not _keeps_every_sample(kept):
        kept = ~kept
    return kept if _keeps_every_sample(kept) else None


def seem_kept(ids: Tensor) -> Tensor | None:
    """Return which token ids, (B, T), seem to be no padding, bool (B, T); ``None`` if all are.

    Padding is one token that fills many ends of samples, and is nowhere else.
    """
    for rows in (ids, ids.flip(1)):
        same = rows == rows[:, -1:].mode(0).values
        run = same.flip(1).cumprod(1).flip(1).bool()
        if run.all(1).any() or not torch.equal(run, same):
            continue
        # one an end aside, which may be the end of a text
        if (run.sum(1) - 1).clamp(min=0).sum() > FEW * ids.numel():
            return ~run if rows is ids else ~run.flip(1)
    return None


def mask_from_lengths(
    lengths: Tensor, shape: tuple[int, ...], sizes: Container[int], tokens: Tensor | None = None
) -> Tensor | None:
    """Return the mask, bool (B, T), of lengths, which may be fractions of the longest.

    Args:
        lengths: (B,).
        shape: of the tokens, (B, T) or (T, B).
        sizes: one of which the longest must be, unless all tokens that lengths leave are equal.
        tokens: (B, T, ...) or (T, B, ...).
    """
    if lengths.is_floating_point():
        if len(shape) != 2 or not len(lengths) or lengths.max() != 1 or lengths.min() <= 0:
            return None
        lengths = (lengths * shape[1]).round()
    longest = int(lengths.max()) if len(lengths) else 0
    if longest in sizes:
        return torch.arange(longest, device="cpu") < lengths[:, None]
    if tokens is None or len(lengths) not in shape:
        return None
    tokens = tokens if len(lengths) == len(tokens) else tokens.transpose(0, 1)
    kept = torch.arange(tokens.shape[1], device="cpu") < lengths[:, None]
    return kept if _are_equal(tokens, ~kept) else None


def kept_before_padding(mask: Tensor, tokens: Tensor) -> Tensor | None:
    """Return which tokens a mask of any name keeps, bool (B, T), if it seems to hide padding.

    It does if it keeps all of a sample, and all tokens that it hides are equal.

    Args:
        mask: 0 at what it hides; otherwise, the result is ``None``.
        tokens: (B, T, ...), which it masks.
    """
    if mask.shape != tokens.shape[:2] or bool((mask < 0).any()):
        return None
    kept = mask.cpu() != 0
    return kept if kept.all(1).any() and _are_equal(tokens, ~kept) else None


def _are_equal(tokens: Tensor, chosen: Tensor) -> bool:
    """Tell whether some tokens, (B, T, ...), are chosen, and all of these are equal."""
    found = tokens[chosen.to(tokens.device)]
    return len(found) > 0 and bool((found == found[0]).all())


def is_pairwise(mask: Tensor) -> bool:
    """Tell whether a mask is pairwise: it has a row for each token, not one for all."""
    return mask.dim() > 2 and mask.shape[-2] > 1


def is_right_padded(kept: Tensor) -> bool:
    """Tell whether no token of a sample, bool (B, T), is kept behind one that is not."""
    return bool((kept[:, 1:] <= kept[:, :-1]).all())


def is_contiguous(kept: Tensor) -> bool:
    """Tell whether the kept tokens of each sample are consecutive."""
    begins = kept[:, 1:] & ~kept[:, :-1]
    return bool((begins.sum(1) + kept[:, 0] == 1).all())


def _keeps_every_sample(kept: Tensor) -> bool:
    return bool(kept.any(1).all())
