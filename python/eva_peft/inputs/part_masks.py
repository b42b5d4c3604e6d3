"""Masks and lengths that a model passes to its own parts, used where the batch has none."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .._peft_compat import base_model_of
from ..model.architecture import forward_signature
from .arguments import PADDING_MASKS, is_decoder_input
from .batch_mask import split_joint_mask
from .call_hooks import CallHooks, named_arguments
from .fits import version_of
from .mask_contents import (
    is_contiguous,
    is_pairwise,
    kept_by_attention,
    kept_by_padding,
    mask_from_lengths,
)
from .token_mask import TokenMask

__all__ = ["PADDING_MASK_SUFFIXES", "TARGET_PREFIXES", "PartMaskHooks", "parts_taking_masks"]

_SEQUENCE_ID = "sequence_id"  # number of each token's sequence, negative for padding; or a mask
# Names of masks of visible tokens, and suffixes of names of padding masks. Under other names only
# masks with one row for all tokens, or one for each, (B, 1, T) or (B, T, T), are understood,
# floating ones if additive; under the names in _GENERIC_MASKS also (B, T).
_ATTENTION_MASKS = ("attention_mask", "encoder_attention_mask", _SEQUENCE_ID)
PADDING_MASK_SUFFIXES = ("padding_mask", "pad_mask")
_GENERIC_MASKS = ("mask", "attn_mask", "context_mask")
# Prefixes of names of a decoder's tokens; an encoder's: "src".
TARGET_PREFIXES = ("tgt", "trg", "target")
# Suffixes of names of sample lengths, which may be fractions of the longest.
_LENGTH_SUFFIXES = ("lengths", "length", "lens", "_len")
# Substrings of the names of what cross attention reads, and of its mask.
_CROSS_WORDS = ("encoder", "memory", "context", "key_value", "enc_out")
_QUERY_OF_KEY = {"key": "query", "k": "q"}  # name of the attended tokens: of the attending ones
_TEXT_INPUTS = {"input_ids", "inputs_embeds"}
# Masks of a part's own tokens.
_OWN_MASKS = {"attention_mask", "decoder_attention_mask"}
_OWN_MASKS |= {"src_key_padding_mask", "tgt_key_padding_mask"}


def parts_taking_masks(model: nn.Module) -> dict[nn.Module, int]:
    """Return the parts of a model, with or without adapters, that may be passed masks or lengths.

    Parts with cross attention are included. The model itself comes first, since it may take
    everything as one argument.

    Returns:
        For each, the number of arguments before its first mask, lengths or attended tokens.
    """
    index_of_kind: dict[tuple[type, type], int | None] = {}
    base = base_model_of(model)
    found = {base: 0}
    for part in base.modules():
        kind = type(part), type(_base_layer_of(part))
        if kind not in index_of_kind:
            index_of_kind[kind] = _first_mask_index(part)
        index = index_of_kind[kind]
        if index is not None:
            found.setdefault(part, index)
    return found


def _first_mask_index(part: nn.Module) -> int | None:
    """Return the number of arguments before the first of interest; ``None`` if there is none."""
    signature, wrapped = forward_signature(part), _base_layer_of(part)
    names = {} if signature is None else signature.parameters
    first = next((i for i, name in enumerate(names) if _is_relevant_name(name)), None)
    any_name = any(p.kind is p.VAR_KEYWORD for p in names.values())
    if first is None and any_name and (wrapped is None or _first_mask_index(wrapped) is not None):
        return len(names)
    return first


def _base_layer_of(part: nn.Module) -> nn.Module | None:
    """Return the layer to which one with adapters passes on its keyword arguments."""
    found = getattr(part, "base_layer", None)
    return found if isinstance(found, nn.Module) else None


class PartMaskHooks(CallHooks):
    """Hooks that read the masks and lengths that a model passes to its parts.

    A model may compute them from lengths or token ids, or take them under a name of its own. They
    are used in these parts if nothing else says which tokens count, and after them for inputs of
    equal shape.

    Args:
        parts: see :func:`parts_taking_masks`.
        media_parts: those of them that read sound or images, judged by their names.
        make_mask: returns the mask of a mapping of arguments.
        use_mask: see :class:`CallHooks`.
    """

    def __init__(
        self,
        parts: Mapping[nn.Module, int],
        media_parts: Container[nn.Module],
        make_mask: Callable[[Mapping[str, Any]], TokenMask],
        use_mask: Callable[..., TokenMask],
    ) -> None:
        # some models call their own forward directly in the method that computes the loss
        super().__init__(list(parts), make_mask, use_mask, list(parts)[:1], media_parts)
        self._first_mask_index = parts
        # cache of masks by the arguments, as every layer may be passed the same. These are held
        # weakly: a layer may have made them, and pairwise masks are large.
        self._mask_cache: dict[tuple[object, ...], tuple[list[ref[Tensor]], TokenMask | None]] = {}
        self._merged_masks: dict[tuple[TokenMask, TokenMask], TokenMask] = {}

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        relevant = (isinstance(v, Tensor) and _is_relevant_name(name) for name, v in kwargs.items())
        if len(args) <= self._first_mask_index[module] and not any(relevant):
            return  # early, since most parts are passed no mask
        arguments = _dense_arguments(named_arguments(module, args, kwargs))
        if any(_is_cross_attention(arguments, key, query) for key, query in _QUERY_OF_KEY.items()):
            return  # the masks are of keys from elsewhere
        mask, outer = self._mask_of(arguments), self._use_mask()
        cross_shape = _cross_shape(arguments)
        if mask is None and outer.from_parts:
            mask = self._mask_of_earlier_part(outer.main, _token_shape(arguments), cross_shape)
        if mask is None:
            return
        mask = self._with_earlier_masks(outer, mask, cross_shape)
        if module not in self._media_parts or not outer.media_unmasked:
            mask = self._merged_with(outer, mask)
        _note_attended_states(mask, arguments)
        if mask is not outer:
            self._open_calls.append((module, mask, self._use_mask(mask)))

    def _merged_with(self, outer: TokenMask, mask: TokenMask) -> TokenMask:
        """Return the mask to use in a part.

        For its own tokens that may be the outer one, with the masks of others that it is passed.

        Args:
            outer: the mask in use around the part.
            mask: the mask from the arguments of the part.
        """
        covered = not self._outer_is_of_others(outer, mask) and _takes_precedence(outer, mask)
        # known already from the batch, a user's function, or an enclosing part
        known = not outer.from_parts and (covered or _keeps_every_token(mask))
        assumed = mask.main if mask.main_is_assumed else None
        if not known and (assumed is None or not _has_shape_of(outer, assumed)):
            return mask
        others = (*mask.cross_masks, *mask.unit_masks)
        new_masks = [other for other in others if not _has_shape_of(outer, other)]
        if known and all(bool(other.all()) for other in new_masks):
            return outer
        if (outer, mask) not in self._merged_masks:
            self._merged_masks[outer, mask] = outer.with_part_masks(mask)
        return self._merged_masks[outer, mask]

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open_calls or self._open_calls[-1][0] is not module:
            return
        _, mask, outer = self._open_calls.pop()
        skips_media = module not in self._media_parts
        if not self._open_calls:
            self._use_mask(outer.after_part(mask, skips_media))
            return
        part, in_use, before = self._open_calls[-1]
        after = _with_inner_masks(outer, mask, skips_media)
        self._open_calls[-1] = part, after if in_use is outer else in_use, before
        self._use_mask(after)

    def _outer_is_of_others(self, outer: TokenMask, mask: TokenMask) -> bool:
        """Tell whether the mask of the enclosing part is of other tokens than this part's.

        That is assumed if it keeps every token, or if only this one masks attended tokens.
        """
        if not self._open_calls or outer is not self._open_calls[-1][1] or outer.main is None:
            return False
        return bool(mask.cross_masks and not outer.cross_masks) or bool(outer.main.all())

    def _mask_of_earlier_part(
        self, earlier: Tensor | None, shape: tuple[int, ...], cross_shape: tuple[int, ...] | None
    ) -> TokenMask | None:
        """Return the mask in a part that attends to the output of an earlier part.

        Its own tokens are others, possibly of the same number.

        Args:
            earlier: the mask of the earlier part's tokens.
            shape, cross_shape: of its own tokens, and of those that it attends to.
        """
        if earlier is None or cross_shape not in (earlier.shape, earlier.shape[::-1]):
            return None
        return self._silent_mask({"encoder_attention_mask": earlier}, shape)

    def _with_earlier_masks(
        self, outer: TokenMask, mask: TokenMask, cross_shape: tuple[int, ...] | None
    ) -> TokenMask:
        """Add to a part's mask those that earlier parts were passed of the tokens it attends to."""
        if cross_shape is None or mask.cross_masks or not outer.from_parts:
            return mask
        earlier = [m for m in outer.masks if m is not None and m.shape == cross_shape]
        return mask.with_unit_masks([*mask.unit_masks, *earlier]) if earlier else mask

    def _silent_mask(self, named_masks: Mapping[str, Any], shape: tuple[int, ...]) -> TokenMask:
        assumed = not _OWN_MASKS & named_masks.keys()
        own_mask = _all_true_mask(named_masks, shape) if assumed else {}
        mask = self._make_mask({**named_masks, **own_mask})
        mask.main_is_assumed = assumed
        # it is not from the user, and the part may read other tokens, too
        mask.suppress_warnings = True
        return mask

    def _mask_of(self, arguments: Mapping[str, Any]) -> TokenMask | None:
        masks = {name: value for name, value in arguments.items() if _is_mask_argument(name, value)}
        if not masks:
            return None
        shape, cross_shape = _token_shape(arguments), _cross_shape(arguments)
        given = (value for value in arguments.values() if isinstance(value, Tensor))
        sizes = frozenset(size for value in given for size in value.shape)
        outer = self._open_calls[-1][1].main if self._open_calls else None
        sources = {**masks, "": outer} if outer is not None else masks
        identities = ((name, id(mask), version_of(mask)) for name, mask in sources.items())
        key = (shape, sizes, cross_shape, *identities)
        references, mask = self._mask_cache.get(key, ([], None))
        if not references or any(each() is None for each in references):  # ids may be reused
            named_masks = _named_masks(masks, shape, cross_shape, sizes, outer)
            others = {name: value for name, value in arguments.items() if "mask" not in name}
            if not _TEXT_INPUTS & others.keys():  # with text there may be other modalities
                others = _decoder_inputs(others)
            mask = self._silent_mask({**others, **named_masks}, shape) if named_masks else None
            self._mask_cache[key] = [ref(source) for source in sources.values()], mask
        return mask


def _dense_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without tensors that are nested, sparse or on the meta device."""
    return {
        name: value
        for name, value in arguments.items()
        if not isinstance(value, Tensor)
        or (value.layout == torch.strided and not value.is_nested and not value.is_meta)
    }


def _is_relevant_name(name: str) -> bool:
    return _may_be_mask_name(name) or _is_cross_name(name)


def _is_cross_attention(arguments: Mapping[str, Any], key: str, query: str) -> bool:
    return isinstance(arguments.get(key), Tensor) and arguments[key] is not arguments.get(query)


def _may_be_mask_name(name: str) -> bool:
    return name.endswith(("mask", "masks", _SEQUENCE_ID, *_LENGTH_SUFFIXES))


def _is_mask_argument(name: str, value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return _is_known_mask_name(name) or _may_be_token_mask(name, value)


def _is_known_mask_name(name: str) -> bool:
    return name in _ATTENTION_MASKS or name.endswith(PADDING_MASK_SUFFIXES)


def _may_be_token_mask(name: str, mask: Tensor) -> bool:
    """Tell whether a mask under an unknown name may say which tokens are visible."""
    if name.endswith(_LENGTH_SUFFIXES):
        return mask.dim() == 1
    if not _may_be_mask_name(name) or mask.shape[-1:] == (1,):
        return False
    if mask.dim() == 2:  # a square one may be pairwise: then each token sees itself
        if name not in _GENERIC_MASKS or mask.is_floating_point():
            return False
        return mask.shape[0] != mask.shape[1] or not mask.diagonal().all()
    return mask.dim() in (3, 4)


def _with_inner_masks(outer: TokenMask, inner: TokenMask, skips_media_layers: bool) -> TokenMask:
    """Add to a part's mask those of other shapes that a part within it was passed."""
    known = _mask_shapes(outer)
    inner_masks = (inner.main, inner.decoder, *inner.unit_masks)
    new_masks = [mask for mask in inner_masks if mask is not None and mask.shape not in known]
    if not new_masks:
        return outer
    extended = outer.with_unit_masks([*new_masks, *outer.unit_masks])
    extended.skips_media_layers = skips_media_layers
    return extended


def _takes_precedence(outer: TokenMask, mask: TokenMask) -> bool:
    """Tell whether a mask takes precedence over one that a part is passed for the same tokens."""
    known = _mask_shapes(outer)
    if outer.main is None or mask.main is None:
        only_attended = mask.main is None or bool(mask.main.all())  # of attended tokens only
        others = [*mask.cross_masks, *mask.unit_masks]
        others_known = bool(others) and all(other.shape in known for other in others)
        has_own = outer.main is not None or outer.decoder is not None
        return (only_attended and others_known) or has_own
    return mask.main.shape in known


def _mask_shapes(mask: TokenMask) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in mask.masks if value is not None]


def _has_shape_of(mask: TokenMask, other: Tensor) -> bool:
    """Tell whether a mask has one of the shape of these tokens, maybe sequence first."""
    return any(shape in (other.shape, other.shape[::-1]) for shape in _mask_shapes(mask))


def _keeps_every_token(mask: TokenMask) -> bool:
    return all(value is None or bool(value.all()) for value in mask.masks)


def _token_shape(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of the tokens that a part is called with, (B, T) or (T, B).

    They may be in a tuple with related tensors, such as the positions in ESPnet's encoders.
    """
    own = {k: v for k, v in arguments.items() if "mask" not in k and not _is_cross_name(k)}
    packed = (v[0] for v in own.values() if isinstance(v, (tuple, list)) and v)
    every = (*own.values(), *packed)
    return next((tuple(value.shape[:2]) for value in every if _are_tokens(value)), ())


def _decoder_inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a decoder's inputs among the arguments after the first tokens, an encoder's."""
    own = [k for k, v in arguments.items() if _are_tokens(v) and not _is_cross_name(k)]
    return {key: arguments[key] for key in own[1:] if is_decoder_input(key)}


def _are_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= (3 if value.is_floating_point() else 2)


def _is_cross_name(name: str) -> bool:
    return any(word in name for word in _CROSS_WORDS)


def _cross_shape(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of the tokens from elsewhere that a part attends to."""
    tokens = _cross_tokens(arguments)
    return None if tokens is None else tuple(tokens.shape[:2])


def _cross_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    others = (v for k, v in arguments.items() if _is_cross_name(k) and not _may_be_mask_name(k))
    return next(filter(_are_tokens, others), None)


def _note_attended_states(mask: TokenMask, arguments: Mapping[str, Any]) -> None:
    """Record in a mask the attended tensor if it has as many tokens as the part itself.

    They cannot be distinguished by shape, and the part's own tokens may have no mask.
    """
    cross_tokens = _cross_tokens(arguments)
    if cross_tokens is None or mask.encoder_decoder or len(mask.cross_masks) != 1:
        return
    own_shape = mask.cross_masks[0].shape if mask.main is None else mask.main.shape
    if own_shape == mask.cross_masks[0].shape == cross_tokens.shape[:2]:
        mask.attended_states = ref(cross_tokens)


def _named_masks(
    given_masks: Mapping[str, Tensor],
    shape: tuple[int, ...],
    cross_shape: tuple[int, ...] | None,
    sizes: Container[int],
    outer: Tensor | None,
) -> dict[str, Tensor]:
    """Return the masks that a part is passed, under the names that they would have in a batch.

    Args:
        given_masks: the masks and lengths that the part is passed.
        shape: see :func:`_token_shape`.
        cross_shape: shape of other tokens that the part attends to; see :func:`_cross_shape`.
        sizes: of all dimensions of the arguments; the longest sample must have one of them.
        outer: the mask of the enclosing part, bool (B, T), if that was passed one.
    """
    named_masks: dict[str, Tensor] = {}
    others = {}
    # the only mask may be that of the attended tokens
    ambiguous = cross_shape is not None and not any(map(_is_cross_name, given_masks))
    for name, mask in given_masks.items():
        if name in PADDING_MASKS:
            named_masks[name] = mask
            continue
        mask = mask >= 0 if name == _SEQUENCE_ID and mask.dtype != torch.bool else mask
        kept = _kept_tokens(name, mask, shape, sizes)
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


def _all_true_mask(named_masks: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return an all-true mask of a part's own tokens, unless those it attends to are as many."""
    memory_mask = named_masks.get("memory_key_padding_mask")
    cross_mask = named_masks.get("encoder_attention_mask", memory_mask)
    alike = cross_mask is not None and shape in (cross_mask.shape, cross_mask.shape[::-1])
    if len(shape) != 2 or alike:
        return {}
    return {"attention_mask": torch.ones(shape, dtype=torch.bool, device="cpu")}


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


def _kept_tokens(
    name: str, mask: Tensor, shape: tuple[int, ...], sizes: Container[int]
) -> Tensor | None:
    if name.endswith(_LENGTH_SUFFIXES):
        return mask_from_lengths(mask.cpu(), shape, sizes)
    if mask.is_floating_point() and not _is_known_mask_name(name) and not (mask < -1).any():
        return None  # not additive, so its numbers may mean anything
    return (
        kept_by_padding(mask) if name.endswith(PADDING_MASK_SUFFIXES) else kept_by_attention(mask)
    )
