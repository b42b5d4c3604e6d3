"""Masks and lengths that a model passes to its own parts, used where the batch has none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._peft_compat import base_model_of
from ..model.architecture import forward_signature
from .call_hooks import CallHooks, named_arguments
from .embedded_ids import EmbeddedIds, own_embeddings, tells_padding
from .fits import version_of
from .part_arguments import (
    attended_shape,
    attended_tokens,
    dense_arguments,
    is_cross_attention,
    is_mask_argument,
    is_relevant_name,
    masks_by_batch_name,
    own_tokens,
    text_or_decoder_inputs,
    token_shape,
)
from .token_mask import TokenMask

__all__ = ["PartMaskHooks", "parts_taking_masks"]

# Masks of a part's own tokens.
_OWN_MASKS = {"attention_mask", "decoder_attention_mask"}
_OWN_MASKS |= {"src_key_padding_mask", "tgt_key_padding_mask"}


def parts_taking_masks(model: nn.Module) -> dict[nn.Module, int]:
    """Return the parts of a model, with or without adapters, that may be passed masks or lengths.

    Parts with cross attention are included, and embeddings that have a number for padding, with the
    parts that they are in. The model itself comes first, since it may take everything as one
    argument.

    Returns:
        For each, the number of arguments before its first mask, lengths, attended tokens or ids.
    """
    index_of_kind: dict[tuple[type, type], int | None] = {}
    base = base_model_of(model)
    found = {base: 0}
    embeddings = own_embeddings(base)
    parts = base.modules() if embeddings else ()
    enclosing = {part for part in parts if embeddings & set(part.modules())}
    found |= dict.fromkeys(embeddings, 0)
    for part in base.modules():
        kind = type(part), type(_base_layer_of(part))
        if kind not in index_of_kind:
            index_of_kind[kind] = _first_mask_index(part)
        index = index_of_kind[kind]
        if index is not None:
            found.setdefault(part, index)
        elif part in enclosing and not isinstance(part, torch.jit.ScriptModule):
            found.setdefault(part, sys.maxsize)
    return found


def _first_mask_index(part: nn.Module) -> int | None:
    """Return the number of arguments before the first of interest; ``None`` if there is none."""
    if isinstance(part, torch.jit.ScriptModule):
        return None  # takes no hooks
    if isinstance(part, nn.RNNBase):
        return 0  # a packed sequence has lengths
    signature, wrapped = forward_signature(part), _base_layer_of(part)
    names = {} if signature is None else signature.parameters
    first = next((i for i, name in enumerate(names) if is_relevant_name(name)), None)
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
        # some models call forward directly, that of their parts or their own
        super().__init__(list(parts), make_mask, use_mask, list(parts), media_parts)
        self._first_mask_index = parts
        # cache of masks by the arguments, as every layer may be passed the same. These are held
        # weakly: a layer may have made them, and pairwise masks are large.
        self._mask_cache: dict[tuple[object, ...], tuple[list[ref[Tensor]], TokenMask | None]] = {}
        self._merged_masks: dict[tuple[TokenMask, TokenMask], TokenMask] = {}
        self._embedded_ids = EmbeddedIds(parts, self._silent_mask)

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._embedded_ids.begin_call(module, (*args, *kwargs.values()))
        relevant = tells_padding(module) or any(map(_is_relevant, kwargs.items()))
        if len(args) <= self._first_mask_index[module] and not relevant:
            return  # early, since most parts are passed no mask
        arguments = dense_arguments(named_arguments(module, args, kwargs))
        if is_cross_attention(arguments):
            return  # the masks are of keys from elsewhere
        mask, outer = self._mask_of(arguments), self._use_mask()
        if mask is None and tells_padding(module):
            mask = self._embedded_ids.mask_of_call(module, arguments)
        cross_shape = attended_shape(arguments)
        if mask is None and outer.from_parts:
            mask = self._mask_of_earlier_part(outer.main, token_shape(arguments), cross_shape)
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
        told = self._embedded_ids.without_earlier(outer, mask)
        covered = not self._outer_is_of_others(outer, mask) and _takes_precedence(told, mask)
        if self._embedded_ids.have_mask(mask.main) and not covered:
            return mask
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
        if self._open_calls and self._open_calls[-1][0] is module:
            _, mask, outer = self._open_calls.pop()
            self._use_mask_after(module, mask, outer)
        for mask in self._embedded_ids.end_call(module):
            self._use_mask_after(module, mask, self._use_mask())

    def _use_mask_after(self, module: nn.Module, mask: TokenMask, outer: TokenMask) -> None:
        """Use the mask after a part: that around it, with those of other shapes in the part."""
        skips_media = module not in self._media_parts
        if not self._open_calls:
            self._use_mask(outer.after_part(mask, skips_media))
            return
        part, in_use, before = self._open_calls[-1]
        outside = self._embedded_ids.without_earlier(outer, mask)
        after = _with_inner_masks(outside, mask, skips_media)
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
        if cross_shape is None or mask.cross_masks:
            return mask
        assumed = outer.cross_masks if outer.main_is_assumed else ()
        known = outer.masks if outer.from_parts else assumed
        earlier = [m for m in known if m is not None and m.shape == cross_shape]
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
        masks = {name: value for name, value in arguments.items() if is_mask_argument(name, value)}
        if not masks:
            return None
        shape, cross_shape = token_shape(arguments), attended_shape(arguments)
        given = (value for value in arguments.values() if isinstance(value, Tensor))
        sizes = frozenset(size for value in given for size in value.shape)
        outer = self._open_calls[-1][1].main if self._open_calls else None
        sources = {**masks, "": outer} if outer is not None else masks
        identities = ((name, id(mask), version_of(mask)) for name, mask in sources.items())
        key = (shape, sizes, cross_shape, *identities)
        references, mask = self._mask_cache.get(key, ([], None))
        if not references or any(each() is None for each in references):  # ids may be reused
            named_masks = masks_by_batch_name(
                masks, own_tokens(arguments), cross_shape, sizes, outer
            )
            inputs = text_or_decoder_inputs(arguments)
            mask = self._silent_mask({**inputs, **named_masks}, shape) if named_masks else None
            self._mask_cache[key] = [ref(source) for source in sources.values()], mask
        return mask


def _is_relevant(argument: tuple[str, Any]) -> bool:
    """Tell whether a named argument may be a mask or lengths, have them, or be attended tokens."""
    name, value = argument
    is_named = isinstance(value, Tensor) and is_relevant_name(name)
    return is_named or isinstance(value, PackedSequence)


def _with_inner_masks(outer: TokenMask, inner: TokenMask, skips_media_layers: bool) -> TokenMask:
    """Add to a part's mask those of other shapes that a part within it was passed.

    If that was passed the mask of the part's own tokens, they no longer need be assumed to count.
    """
    if outer.main_is_assumed and not inner.main_is_assumed and _are_of_one_shape(outer, inner):
        return inner.with_part_masks(outer)
    known = _mask_shapes(outer)
    inner_masks = (inner.main, inner.decoder, *inner.unit_masks)
    new_masks = [mask for mask in inner_masks if mask is not None and mask.shape not in known]
    if not new_masks:
        return outer
    extended = outer.with_unit_masks([*new_masks, *outer.unit_masks])
    extended.skips_media_layers = skips_media_layers
    return extended


def _are_of_one_shape(first: TokenMask, second: TokenMask) -> bool:
    main, other = first.main, second.main
    return main is not None and other is not None and main.shape == other.shape


def _takes_precedence(outer: TokenMask, mask: TokenMask) -> bool:
    """Tell whether a mask takes precedence over one that a part is passed for the same tokens."""
    known = _mask_shapes(outer)
    if outer.main is None or mask.main is None:
        only_attended = mask.main is None or bool(mask.main.all())  # of attended tokens only
        others = [*mask.cross_masks, *mask.unit_masks]
        return only_attended and bool(others) and all(other.shape in known for other in others)
    return mask.main.shape in known


def _mask_shapes(mask: TokenMask) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in mask.masks if value is not None]


def _has_shape_of(mask: TokenMask, other: Tensor) -> bool:
    """Tell whether a mask has one of the shape of these tokens, maybe sequence first."""
    return any(shape in (other.shape, other.shape[::-1]) for shape in _mask_shapes(mask))


def _keeps_every_token(mask: TokenMask) -> bool:
    return all(value is None or bool(value.all()) for value in mask.masks)


def _note_attended_states(mask: TokenMask, arguments: Mapping[str, Any]) -> None:
    """Record in a mask the attended tensor if it has as many tokens as the part itself.

    They cannot be distinguished by shape, and the part's own tokens may have no mask.
    """
    cross_tokens = attended_tokens(arguments)
    if cross_tokens is None or mask.encoder_decoder or len(mask.cross_masks) != 1:
        return
    own_shape = mask.cross_masks[0].shape if mask.main is None else mask.main.shape
    if own_shape == mask.cross_masks[0].shape == cross_tokens.shape[:2]:
        mask.attended_states = ref(cross_tokens)


def _all_true_mask(named_masks: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return an all-true mask of a part's own tokens, unless those it attends to are as many."""
    memory_mask = named_masks.get("memory_key_padding_mask")
    cross_mask = named_masks.get("encoder_attention_mask", memory_mask)
    alike = cross_mask is not None and shape in (cross_mask.shape, cross_mask.shape[::-1])
    if len(shape) != 2 or alike:
        return {}
    return {"attention_mask": torch.ones(shape, dtype=torch.bool, device="cpu")}
