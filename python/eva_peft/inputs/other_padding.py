"""A copy of a batch with other values in its padding, as given by its masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EvaValueError
from ..model.architecture import configs_of
from .arguments import positional_to_named
from .batch_mask import token_mask
from .batches import as_mapping, as_tensors
from .mask_contents import is_true_at_padding, kept_by_padding
from .media_masks import is_image_key
from .part_arguments import PADDING_MASK_SUFFIXES, TARGET_PREFIXES
from .roles import PADDING_MASKS, is_decoder_input

__all__ = ["with_other_padding"]

# Not changed: inputs with a restricted range of values, and inputs that locate tokens.
_UNCHANGED = (
    "label",
    "position",
    "token_type",
    "mask",
    "length",
    "index",
    "indices",
    "grid",
    "sizes",
)
_TOKEN_MASKS = ("attention_mask", "decoder_attention_mask")
# Prefixes of mask names that do not say what the mask applies to.
_GENERIC_PREFIXES = ("attention", "input", "key", "mask", "padding")
_SPECIAL_SUFFIXES = ("_token_id", "_token_index")
# Prefixes of the names of a decoder's inputs, and of its masks.
_DECODER_PREFIXES = ("decoder_", *TARGET_PREFIXES)


def with_other_padding(batch: Any, model: nn.Module) -> tuple[Any, list[str]]:
    """Return a batch whose padding has other values, and the names of the changed parts.

    It is of the same type, but lists become tensors.

    Integers become another ordinary token, floats get noise of the scale of non-padding values. A
    mask (any name with ``mask`` in it) applies to parts whose names begin with the same word, else
    to all parts with its leading shape; a decoder's mask to inputs of the decoder.

    Args:
        batch: a mapping, a dataclass, or arguments of ``forward``; not modified. Anything else is
            returned as it is.
        model: determines the names of arguments, and which tokens are special.
    """
    named = as_mapping(positional_to_named(batch, model))
    if not isinstance(named, Mapping):
        return batch, []
    try:
        whole = as_tensors(named)
    except EvaValueError:  # samples that a user's function pads
        return batch, []
    special = _special_tokens(model)
    changed: dict[str, Tensor] = {}
    handled: set[str] = set()
    paddings = _padding_by_mask(whole)
    parts_of = {name: [key for key in whole if _shares_name(str(key), name)] for name in paddings}
    for name in sorted(paddings, key=lambda name: not parts_of[name]):
        of_text = "input_ids" in whole and not is_image_key(name)
        for key in parts_of[name] or whole:
            value = whole[key]
            if key in handled or (of_text and is_image_key(key)):
                continue
            if not _may_apply(str(key), name, value):
                continue
            positions = _padding_positions(value, paddings[name])
            if positions is None:
                continue
            handled.add(key)
            if not positions.any() or positions.all():
                continue
            if value.is_floating_point():
                changed[key] = _with_noise(value, positions)
            elif (other := _with_another_token(value, positions, special)) is not None:
                changed[key] = other
    parts = {key: _like_original(changed.get(key, whole[key]), part) for key, part in named.items()}
    return _rebuilt_batch(batch, named, parts, changed), list(map(str, changed))


def _like_original(value: Any, original: Any) -> Any:
    """Convert a tensor back to the shape and type, tensor or array, that it was made from."""
    if isinstance(value, Tensor) and isinstance(original, (Tensor, np.ndarray)):
        value = value.reshape(original.shape)
        return value if isinstance(original, Tensor) else value.numpy()
    return value


def _rebuilt_batch(
    batch: Any, named: Mapping[Any, Any], parts: dict[Any, Any], changed: Iterable[Any]
) -> Any:
    """Return a batch of the same type, which a user's function may rely on, with new parts."""
    if isinstance(batch, (tuple, list)):
        # one tensor may have two names: ids that are also labels
        new_parts = {id(named[key]): parts[key] for key in (*parts, *changed)}
        every: list[Any] = [new_parts.get(id(part), part) for part in batch]
        return type(batch)(*every) if hasattr(batch, "_fields") else type(batch)(every)
    if not isinstance(batch, Mapping):
        return replace(batch, **parts)
    try:
        return type(batch)(parts)  # type: ignore[call-arg]
    except TypeError:
        return parts


def _special_tokens(model: nn.Module) -> set[int]:
    """Return the special tokens, such as placeholders for images."""
    values = (vars(config).items() for config in configs_of(model) if hasattr(config, "__dict__"))
    named = (v for items in values for k, v in items if k.endswith(_SPECIAL_SUFFIXES))
    return {v for v in named if isinstance(v, int)}


def _padding_by_mask(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return where each mask of a batch has padding, bool on the CPU.

    Token masks come first: others, such as masks of special tokens, may not be about padding.
    """
    masks = {k: v for k, v in batch.items() if "mask" in str(k) and isinstance(v, Tensor)}
    of_tokens = [k for k in (*_TOKEN_MASKS, *PADDING_MASKS) if k in masks]
    padding_of = {k: _padding(k, masks[k].cpu()) for k in dict.fromkeys([*of_tokens, *masks])}
    return {k: padding for k, padding in padding_of.items() if padding is not None}


def _padding(name: str, mask: Tensor) -> Tensor | None:
    """Return where a mask has padding, or ``None`` if the mask is not understood."""
    if name in PADDING_MASKS:
        return mask != 0
    if name in _TOKEN_MASKS:
        kept = token_mask(mask)
        return None if kept is None else ~kept
    if mask.dim() == 2 and name.endswith(PADDING_MASK_SUFFIXES):
        kept = kept_by_padding(mask)
        return None if kept is None else ~kept
    if is_true_at_padding(mask):
        return mask
    return mask == 0 if mask.dim() in (2, 3) and _is_binary(mask) else None


def _is_binary(mask: Tensor) -> bool:
    return bool(((mask == 0) | (mask == 1)).all())


def _shares_name(key: str, mask_name: str) -> bool:
    """Tell whether a mask is named after a part of a batch, such as a context or a memory."""
    first = mask_name.partition("_")[0]
    by_first_word = first not in _GENERIC_PREFIXES and key.startswith(first)
    alike = mask_name.startswith(f"{key}_") or by_first_word
    return alike and not any(word in key for word in _UNCHANGED)


def _may_apply(key: str, mask_name: str, value: Any) -> bool:
    """Tell whether a mask may be that of a part of a batch, by their names."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    if any(word in key for word in _UNCHANGED):
        return False
    return _is_decoder_name(key) == _is_decoder_name(mask_name)


def _is_decoder_name(name: str) -> bool:
    return name.startswith(_DECODER_PREFIXES) or is_decoder_input(name)


def _with_noise(value: Tensor, positions: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(value.shape, generator=generator, device="cpu").to(value.device)
    spread = value[~positions].float().std(correction=0).clamp_min(1e-3)
    return torch.where(positions, value + (noise * spread).to(value.dtype), value)


def _with_another_token(value: Tensor, positions: Tensor, special: set[int]) -> Tensor | None:
    """Replace the tokens in some places; ``None`` if the batch has no suitable other tokens."""
    tokens = value[~positions].unique().tolist()
    usual = [token for token in tokens if token not in special]
    if len(usual) < 2:
        return None
    first, second = usual[len(usual) // 2], usual[-1 if len(usual) > 2 else 0]
    return torch.where(positions, torch.where(value == first, second, first), value)


def _padding_positions(value: Tensor, padding: Tensor) -> Tensor | None:
    """Return where a part of a batch holds padding, bool in its shape, if a mask fits it.

    (B, T) fits (B, T, ...), sound with features first, (B, F, T), and sequence-first inputs,
    (T, B, ...); (B, H, W) fits images with channels first, (B, C, H, W).
    """
    size = padding.shape
    if value.shape[: padding.dim()] == size:
        shape = [*size, *[1] * (value.dim() - padding.dim())]
    elif value.dim() == padding.dim() + 1 and (value.shape[0], *value.shape[2:]) == tuple(size):
        shape = [size[0], 1, *size[1:]]
    elif padding.dim() == 2 and value.shape[:2] == size[::-1]:
        return _padding_positions(value, padding.mT)
    else:
        return None
    return padding.reshape(shape).expand(value.shape).to(value.device)
