"""What the arguments of a part of a model say: which tokens it reads, and which masks they have."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .batch_mask import split_joint_mask
from .mask_contents import (
    is_contiguous,
    is_pairwise,
    is_true_at_padding,
    kept_before_padding,
    kept_by_attention,
    kept_by_padding,
    mask_from_lengths,
)
from .roles import PADDING_MASKS, is_decoder_input

__all__ = [
    "PADDING_MASK_SUFFIXES",
    "TARGET_PREFIXES",
    "attended_shape",
    "attended_tokens",
    "dense_arguments",
    "is_cross_attention",
    "is_mask_argument",
    "is_relevant_name",
    "masks_by_batch_name",
    "own_tokens",
    "text_or_decoder_inputs",
    "token_shape",
]

_SEQUENCE_ID = "sequence_id"  # number of each token's sequence, negative for padding; or a mask
# Names of masks of visible tokens, and suffixes of names of padding masks. Under other names only
# masks with one row for all tokens, or one for each, (B, 1, T) or (B, T, T), are understood,
# floating ones if additive; under the names in _GENERIC_MASKS also (B, T) and (B, T, 1), and (B, T)
# under any name if what it hides shows that it is padding.
_ATTENTION_MASKS = ("attention_mask", "encoder_attention_mask", _SEQUENCE_ID)
PADDING_MASK_SUFFIXES = ("padding_mask", "pad_mask")
_GENERIC_MASKS = ("mask", "attn_mask", "context_mask")
# Prefixes of names of a decoder's tokens; an encoder's: "src".
TARGET_PREFIXES = ("tgt", "trg", "target")
# Suffixes of names of sample lengths, which may be fractions of the longest.
_LENGTH_SUFFIXES = ("lengths", "length", "lens", "_len")
# Substrings of the names of what cross attention reads, and of its mask.
_CROSS_WORDS = ("encoder", "memory", "context", "key_value", "enc_out")
_QUERY_OF_KEY = {"key": "query", "keys": "queries", "k": "q"}  # attended: attending tokens
_TEXT_INPUTS = {"input_ids", "inputs_embeds"}


def dense_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without tensors that are nested, sparse or on the meta device.

    A packed sequence is returned as padded tokens, and their lengths.
    """
    for name, value in arguments.items():
        if isinstance(value, PackedSequence):
            padded, lengths = pad_packed_sequence(value, batch_first=True)
            arguments = {**arguments, name: padded, f"{name}_lengths": lengths}
    return {
        name: value
        for name, value in arguments.items()
        if not isinstance(value, Tensor)
        or (value.layout == torch.strided and not value.is_nested and not value.is_meta)
    }


def token_shape(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of the tokens that a part is called with, (B, T) or (T, B)."""
    return _shape_of(own_tokens(arguments))


def _shape_of(tokens: Tensor | None) -> tuple[int, ...]:
    return () if tokens is None else tuple(tokens.shape[:2])


def own_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens that a part is called with.

    They may be in a tuple with related tensors, such as the positions in ESPnet's encoders.
    """
    own = {k: v for k, v in arguments.items() if "mask" not in k and not _is_cross_name(k)}
    packed = (v[0] for v in own.values() if isinstance(v, (tuple, list)) and v)
    return next(filter(_are_tokens, (*own.values(), *packed)), None)


def attended_shape(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of the tokens from elsewhere that a part attends to, as for its own."""
    tokens = attended_tokens(arguments)
    return None if tokens is None else tuple(tokens.shape[:2])


def attended_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens from elsewhere that a part attends to."""
    others = (v for k, v in arguments.items() if _is_cross_name(k) and not _may_be_mask_name(k))
    return next(filter(_are_tokens, others), None)


def is_cross_attention(arguments: Mapping[str, Any]) -> bool:
    """Tell whether these are arguments of attention to other tokens, without a word for them."""
    for key, query in _QUERY_OF_KEY.items():
        if isinstance(attended := arguments.get(key), Tensor):
            attending = arguments.get(query)
            if attended is not (own_tokens(arguments) if attending is None else attending):
                return True
    return False


def text_or_decoder_inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments other than masks: all beside text, else a decoder's inputs.

    With text there may be other modalities. The first tokens are an encoder's.
    """
    arguments = {name: value for name, value in arguments.items() if "mask" not in name}
    if _TEXT_INPUTS & arguments.keys():
        return arguments
    own = [k for k, v in arguments.items() if _are_tokens(v) and not _is_cross_name(k)]
    return {key: arguments[key] for key in own[1:] if is_decoder_input(key)}


def _are_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= (3 if value.is_floating_point() else 2)


def is_relevant_name(name: str) -> bool:
    """Tell whether a name may be that of a mask, of lengths, or of attended tokens."""
    return _may_be_mask_name(name) or _is_cross_name(name)


def _is_cross_name(name: str) -> bool:
    return any(word in name for word in _CROSS_WORDS)


def is_mask_argument(name: str, value: Any) -> bool:
    """Tell whether an argument is a mask or the lengths of samples."""
    if not isinstance(value, Tensor):
        return False
    return _is_known_mask_name(name) or _may_be_token_mask(name, value)


def _may_be_mask_name(name: str) -> bool:
    return name.endswith(("mask", "masks", _SEQUENCE_ID, *_LENGTH_SUFFIXES))


def _is_known_mask_name(name: str) -> bool:
    return name in _ATTENTION_MASKS or name.endswith(PADDING_MASK_SUFFIXES)


def _may_be_token_mask(name: str, mask: Tensor) -> bool:
    """Tell whether a mask under an unknown name may say which tokens are visible."""
    if name.endswith(_LENGTH_SUFFIXES):
        return mask.dim() == 1
    if not _may_be_mask_name(name):
        return False
    if mask.shape[-1:] == (1,):
        return name in _GENERIC_MASKS and mask.dim() == 3
    if mask.dim() == 2 and name in _GENERIC_MASKS:
        # a square one may be pairwise: then each token sees itself
        return mask.shape[0] != mask.shape[1] or not mask.diagonal().all()
    return mask.dim() in (2, 3, 4)


def masks_by_batch_name(
    given_masks: Mapping[str, Tensor],
    tokens: Tensor | None,
    cross_shape: tuple[int, ...] | None,
    sizes: Container[int],
    outer: Tensor | None,
) -> dict[str, Tensor]:
    """Return the masks that a part is passed, under the names that they would have in a batch.

    Args:
        given_masks: the masks and lengths that the part is passed.
        tokens: see :func:`own_tokens`.
        cross_shape: shape of other tokens that the part attends to; see :func:`attended_shape`.
        sizes: of all dimensions of the arguments; the longest sample must have one of them.
        outer: the mask of the enclosing part, bool (B, T), if that was passed one.
    """
    shape = _shape_of(tokens)
    named_masks: dict[str, Tensor] = {}
    others = {}
    # the only mask may be that of the attended tokens
    ambiguous = cross_shape is not None and not any(map(_is_cross_name, given_masks))
    for name, mask in given_masks.items():
        if name in PADDING_MASKS:
            named_masks[name] = mask
            continue
        mask = mask >= 0 if name == _SEQUENCE_ID and mask.dtype != torch.bool else mask
        kept = _kept_tokens(name, mask, tokens, sizes)
        of_own_tokens = "self" in name or name.startswith(("src", *TARGET_PREFIXES))
        if ambiguous and not of_own_tokens and not _is_own_mask_only(kept, shape, cross_shape):
            if name in _ATTENTION_MASKS:
                named_masks = {**_as_cross_mask(kept, shape, cross_shape), **named_masks}
        elif kept is not None and _marks_counted_tokens(name, mask, kept, outer):
            attended = _is_cross_name(name) or name.startswith("src")
            if attended and (cross_shape is not None or name in _ATTENTION_MASKS):
                named_masks = {"encoder_attention_mask": kept, **named_masks}
            elif cross_shape is None and name.startswith(TARGET_PREFIXES):
                # passed to a whole encoder-decoder
                named_masks["decoder_attention_mask"] = kept
            elif tuple(kept.shape) in (shape, shape[::-1]):
                named_masks["attention_mask"] = kept
            elif name.endswith(_LENGTH_SUFFIXES):
                # of another input, such as sound to be made from text
                others[f"{name}_mask"] = kept
    return {**named_masks, **others}


def _is_own_mask_only(
    kept: Tensor | None, own_shape: tuple[int, ...], cross_shape: tuple[int, ...] | None
) -> bool:
    """Tell whether a mask has the shape of a part's own tokens, and not of the attended ones."""
    shapes = () if kept is None else (tuple(kept.shape), tuple(kept.shape)[::-1])
    return own_shape in shapes and cross_shape not in shapes


def _as_cross_mask(
    kept: Tensor | None, own_shape: tuple[int, ...], cross_shape: tuple[int, ...] | None
) -> dict[str, Tensor]:
    """Return an ambiguous mask as that of attended tokens, if its shape is not that of own ones."""
    if kept is None or own_shape in (kept.shape, kept.shape[::-1]):
        return {}
    if not kept.all() and cross_shape in (kept.shape, kept.shape[::-1]):
        return {"encoder_attention_mask": kept}
    return split_joint_mask(kept, own_shape, cross_shape)


def _marks_counted_tokens(name: str, mask: Tensor, kept: Tensor, outer: Tensor | None) -> bool:
    """Tell whether the entries that a mask keeps, bool (B, T), are the tokens that count."""
    if not kept.numel() or (kept.all() and is_pairwise(mask)):
        return False  # padding may see itself, too
    if name not in _ATTENTION_MASKS and not kept[:, 0].any():
        return False  # either left padding in every sample, or the mask is inverted
    # with several runs, true may mean something else, such as tokens to be predicted
    return _is_known_mask_name(name) or is_contiguous(kept) or _extends(kept, outer)


def _extends(kept: Tensor, known: Tensor | None) -> bool:
    """Tell whether a mask is a known one with a prefix."""
    if known is None or len(kept) != len(known) or kept.shape[1] <= known.shape[1]:
        return False
    return not known.all() and torch.equal(kept[:, -known.shape[1] :], known)


def _kept_tokens(
    name: str, mask: Tensor, tokens: Tensor | None, sizes: Container[int]
) -> Tensor | None:
    shape = _shape_of(tokens)
    if name.endswith(_LENGTH_SUFFIXES):
        return mask_from_lengths(mask.cpu(), shape, sizes, tokens)
    if mask.dim() == 3 and tuple(mask.shape) == (*shape, 1):
        mask = mask[..., 0]
    if name in _GENERIC_MASKS and is_true_at_padding(mask):
        return ~mask.cpu()
    if mask.dim() == 2 and name not in _GENERIC_MASKS and not _is_known_mask_name(name):
        return None if tokens is None else kept_before_padding(mask, tokens)
    unknown_pairs = mask.dim() > 2 and not _is_known_mask_name(name)
    if unknown_pairs and mask.is_floating_point() and not (mask < -1).any():
        return None  # not additive, so its numbers may mean anything
    return (
        kept_by_padding(mask) if name.endswith(PADDING_MASK_SUFFIXES) else kept_by_attention(mask)
    )
