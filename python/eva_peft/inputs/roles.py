"""What the parts of a batch are, judging by their names and values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

__all__ = [
    "PADDING_MASKS",
    "has_decoder_inputs",
    "has_ids_like",
    "is_decoder_input",
    "may_be_ids",
    "may_be_mask",
    "token_labels_of",
]

# Padding masks of torch's transformers, and the names of the equivalent token masks. A plain
# "key_padding_mask" is left out: it means either, depending on the library.
PADDING_MASKS = {
    "src_key_padding_mask": "attention_mask",
    "tgt_key_padding_mask": "decoder_attention_mask",
    "memory_key_padding_mask": "encoder_attention_mask",
}
# Inputs of a decoder: in transformers, in models that follow torch's, in fairseq.
_DECODER_INPUT = re.compile(
    r"(decoder|dec)_input|(tgt|trg)(_(seq|tokens|ids|in|inputs?|input_ids))?$|prev_output_tokens$"
)


def has_decoder_inputs(arguments: Mapping[str, Any]) -> bool:
    """Tell whether the arguments include a decoder's inputs (tokens, embeddings, spectra)."""
    return any(is_decoder_input(key) for key, value in arguments.items() if value is not None)


def is_decoder_input(name: Any) -> bool:
    """Tell whether an argument is an input of a decoder, by its name."""
    return _DECODER_INPUT.match(str(name)) is not None


def has_ids_like(mask: Tensor | None, arguments: Mapping[str, Any]) -> bool:
    """Tell whether there are token ids of a mask's shape among arguments, under any name."""
    ids = (v for k, v in arguments.items() if isinstance(v, Tensor) and k != "labels")
    return mask is not None and any(
        value.shape == mask.shape and not value.is_floating_point() for value in ids
    )


def token_labels_of(batch: Any) -> Any:
    """Return the part of a batch that labels its token ids, with one negative number for no label.

    In a mapping that is ``labels``, whatever it holds, or without masks a part under any name.
    """
    if isinstance(batch, Mapping):
        named = "labels" in batch or any("mask" in str(key) for key in batch)
        return batch.get("labels") if named else _labels_among(batch.values())
    begins_with_ids = isinstance(batch, (tuple, list)) and batch and may_be_ids(batch[0])
    return _labels_among(batch) if begins_with_ids else None


def _labels_among(parts: Iterable[Any]) -> Tensor | None:
    candidates = [part for part in parts if may_be_ids(part)]
    if len(candidates) < 2:
        return None  # without a read
    pairs = [(part, len(part[part < 0].unique())) for part in candidates]
    shape = next((part.shape for part, negatives in pairs if negatives == 0), None)
    labels = (part for part, negatives in pairs if negatives == 1 and part.shape == shape)
    return next(labels, None)


def may_be_ids(part: Any) -> TypeGuard[Tensor]:
    """Tell whether a part of a batch may be token ids, (B, T)."""
    if not isinstance(part, Tensor) or part.layout != torch.strided or part.is_nested:
        return False
    return part.dim() == 2 and part.dtype in (torch.int32, torch.int64)


def may_be_mask(part: Tensor) -> bool:
    """Tell whether a tensor may be a mask, over tokens or pairs: of ones and zeros, or additive."""
    if part.dim() < 2:
        return False
    binary = (part == 0) | (part == 1)
    additive = part.is_floating_point() and bool((part <= 0).all())
    return additive or bool(binary.all())
