"""Masks and lengths that a model passes to its own parts, used where the batch has none.

Here *told* always means: passed as an argument to a part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .._peft_compat import base_of
from ..model.architecture import signature_of
from .arguments import PADDING_MASKS, is_decoder_input
from .batch_mask import split_joint_mask
from .called_with import AroundCalls, named_arguments
from .fits import version_of
from .mask_contents import (
    is_contiguous,
    is_pairwise,
    kept_by_attention,
    kept_by_padding,
    mask_from_lengths,
)
from .token_mask import TokenMask

__all__ = ["ENDS_OF_PADDING", "TARGETS", "PaddingTold", "parts_told"]

_SEQUENCES = "sequence_id"  # number of each token's sequence, negative for padding; or a mask
# Names of masks of visible tokens, and suffixes of names of padding masks. Under other names only
# masks with one row for all tokens, or one for each, (B, 1, T) or (B, T, T), are understood,
# floating ones if additive; under the names in _PLAIN also (B, T).
_SEEN = ("attention_mask", "encoder_attention_mask", _SEQUENCES)
ENDS_OF_PADDING = ("padding_mask", "pad_mask")
_PLAIN = ("mask", "attn_mask", "context_mask")
TARGETS = ("tgt", "trg", "target")  # prefixes of names of a decoder's tokens; encoder: "src"
# Suffixes of names of sample lengths, which may be fractions of the longest.
_LENGTHS = ("lengths", "length", "lens", "_len")
# Substrings of the names of what cross attention reads, and of its mask.
_ELSEWHERE = ("encoder", "memory", "context", "key_value", "enc_out")
_ATTENDED = {"key": "query", "k": "q"}  # name of the attended tokens: of the attending ones
_TEXT = {"input_ids", "inputs_embeds"}
# Masks of a part's own tokens.
_OWN = {"attention_mask", "decoder_attention_mask", "src_key_padding_mask", "tgt_key_padding_mask"}


def parts_told(model: nn.Module) -> dict[nn.Module, int]:
    """Return the parts of a model, with or without adapters, that may be told of padding.

    Parts with cross attention are included. The model itself comes first, since it may take
    everything as one argument.

    Returns:
        For each, the number of arguments before its first mask, lengths or attended tokens.
    """
    told: dict[tuple[type, type], int | None] = {}
    base = base_of(model)
    found = {base: 0}
    for part in base.modules():
        kind = type(part), type(_wrapped(part))
        if kind not in told:
            told[kind] = _arguments_before(part)
        before = told[kind]
        if before is not None:
            found.setdefault(part, before)
    return found


def _arguments_before(part: nn.Module) -> int | None:
    """Return the number of arguments before the first of interest; ``None`` if there is none."""
    signature, within = signature_of(part), _wrapped(part)
    names = {} if signature is None else signature.parameters
    first = next((i for i, name in enumerate(names) if _is_of_interest(name)), None)
    any_name = any(p.kind is p.VAR_KEYWORD for p in names.values())
    if first is None and any_name and (within is None or _arguments_before(within) is not None):
        return len(names)
    return first


def _wrapped(part: nn.Module) -> nn.Module | None:
    """Return the layer to which one with adapters passes on its keyword arguments."""
    found = getattr(part, "base_layer", None)
    return found if isinstance(found, nn.Module) else None


class PaddingTold(AroundCalls):
    """Hooks that read the masks and lengths that a model passes to its parts.

    A model may compute them from lengths or token ids, or take them under a name of its own. They
    are used in these parts if nothing else says which tokens count, and after them for inputs of
    equal shape.

    Args:
        parts: see :func:`parts_told`.
        of_media: those of them that read sound or images, judged by their names.
        make_mask: returns the mask of a mapping of arguments.
        use_mask: see :class:`AroundCalls`.
    """

    def __init__(
        self,
        parts: Mapping[nn.Module, int],
        of_media: Container[nn.Module],
        make_mask: Callable[[Mapping[str, Any]], TokenMask],
        use_mask: Callable[..., TokenMask],
    ) -> None:
        # some models call their own forward directly in the method that computes the loss
        super().__init__(list(parts), make_mask, use_mask, list(parts)[:1], of_media)
        self._arguments_before = parts
        # cache of masks by the arguments told, as every layer may be told the same. Those are held
        # weakly: a layer may have made them, and pairwise masks are large.
        self._known: dict[tuple[object, ...], tuple[list[ref[Tensor]], TokenMask | None]] = {}
        self._within: dict[tuple[TokenMask, TokenMask], TokenMask] = {}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = (isinstance(v, Tensor) and _is_of_interest(name) for name, v in kwargs.items())
        if len(args) <= self._arguments_before[module] and not any(told):
            return  # early, since most parts are told nothing
        named = _readable(named_arguments(module, args, kwargs))
        if any(_is_another(named, key, query) for key, query in _ATTENDED.items()):
            return  # the masks are of keys from elsewhere
        mask, around, elsewhere = self._mask_of(named), self._use_mask(), _shape_elsewhere(named)
        if mask is None and around.from_parts:
            mask = self._mask_of_attended(around.main, _shape_of(named), elsewhere)
        if mask is None:
            return
        mask = self._with_attended(around, mask, elsewhere)
        if module not in self._of_media or not around.media_unmasked:
            mask = self._mask_within(around, mask)
        _tell_apart(mask, named)
        if mask is not around:
            self._in_use.append((module, mask, self._use_mask(mask)))

    def _mask_within(self, around: TokenMask, mask: TokenMask) -> TokenMask:
        """Return the mask to use in a part.

        For its own tokens that may be the surrounding one, with the masks it is told of others.

        Args:
            around: the mask in use around the part.
            mask: the mask from what the part is told.
        """
        as_much = not self._is_of_others(around, mask) and _says_as_much(around, mask)
        # known already from the batch, a user's function, or an enclosing part
        said = not around.from_parts and (as_much or _keeps_all(mask))
        unsaid = mask.main_is_assumed and mask.main is not None and _knows(around, mask.main)
        if not said and not unsaid:
            return mask
        more = [each for each in (*mask.cross_masks, *mask.unit_masks) if not _knows(around, each)]
        if said and all(bool(each.all()) for each in more):
            return around
        if (around, mask) not in self._within:
            self._within[around, mask] = around.with_part_masks(mask)
        return self._within[around, mask]

    def _behind(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._in_use or self._in_use[-1][0] is not module:
            return
        _, mask, around = self._in_use.pop()
        of_text = module not in self._of_media
        if not self._in_use:
            self._use_mask(around.after_part(mask, of_text))
            return
        part, outer, before = self._in_use[-1]
        behind = _knowing_more(around, mask, of_text)
        self._in_use[-1] = part, behind if outer is around else outer, before
        self._use_mask(behind)

    def _is_of_others(self, around: TokenMask, mask: TokenMask) -> bool:
        """Tell whether the mask of the enclosing part is of other tokens than this part's.

        That is assumed if it keeps every token, or if only this one masks attended tokens.
        """
        if not self._in_use or around is not self._in_use[-1][1] or around.main is None:
            return False
        return bool(mask.cross_masks and not around.cross_masks) or bool(around.main.all())

    def _mask_of_attended(
        self, before: Tensor | None, shape: tuple[int, ...], elsewhere: tuple[int, ...] | None
    ) -> TokenMask | None:
        """Return the mask in a part that attends to the output of an earlier part.

        Its own tokens are others, possibly of the same number.

        Args:
            before: the mask of the earlier part's tokens.
            shape, elsewhere: of its own tokens, and of those that it attends to.
        """
        if before is None or elsewhere not in (before.shape, before.shape[::-1]):
            return None
        return self._quiet_mask({"encoder_attention_mask": before}, shape)

    def _with_attended(
        self, around: TokenMask, mask: TokenMask, shape: tuple[int, ...] | None
    ) -> TokenMask:
        """Add to a part's mask those that earlier parts were told of the tokens it attends to."""
        if shape is None or mask.cross_masks or not around.from_parts:
            return mask
        before = [m for m in around.masks if m is not None and m.shape == shape]
        return mask.with_unit_masks([*mask.unit_masks, *before]) if before else mask

    def _quiet_mask(self, told: Mapping[str, Any], shape: tuple[int, ...]) -> TokenMask:
        supposed = not _OWN & told.keys()
        mask = self._make_mask({**told, **_whole(told, shape)} if supposed else told)
        mask.main_is_assumed = supposed
        mask.suppress_warnings = (
            True  # it is not from the user, and the part may read other tokens, too
        )
        return mask

    def _mask_of(self, named: Mapping[str, Any]) -> TokenMask | None:
        masks = {name: value for name, value in named.items() if _tells(name, value)}
        if not masks:
            return None
        shape, elsewhere = _shape_of(named), _shape_elsewhere(named)
        given = (value for value in named.values() if isinstance(value, Tensor))
        sizes = frozenset(size for value in given for size in value.shape)
        within = self._in_use[-1][1].main if self._in_use else None
        telling = {**masks, "": within} if within is not None else masks
        told_by = ((name, id(mask), version_of(mask)) for name, mask in telling.items())
        key = (shape, sizes, elsewhere, *told_by)
        before, mask = self._known.get(key, ([], None))
        if not before or any(each() is None for each in before):  # ids may have been reused
            told = _told(masks, shape, elsewhere, sizes, within)
            beside = {name: value for name, value in named.items() if "mask" not in name}
            if not _TEXT & beside.keys():  # with text there may be other modalities
                beside = _of_decoder(beside)
            mask = self._quiet_mask({**beside, **told}, shape) if told else None
            self._known[key] = [ref(each) for each in telling.values()], mask
        return mask


def _readable(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without tensors that are nested, sparse or on the meta device."""
    return {
        name: value
        for name, value in named.items()
        if not isinstance(value, Tensor)
        or (value.layout == torch.strided and not value.is_nested and not value.is_meta)
    }


def _is_of_interest(name: str) -> bool:
    return _may_tell(name) or _is_elsewhere(name)


def _is_another(named: Mapping[str, Any], key: str, query: str) -> bool:
    return isinstance(named.get(key), Tensor) and named[key] is not named.get(query)


def _may_tell(name: str) -> bool:
    return name.endswith(("mask", "masks", _SEQUENCES, *_LENGTHS))


def _tells(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and (_is_known(name) or _may_be_of_tokens(name, value))


def _is_known(name: str) -> bool:
    return name in _SEEN or name.endswith(ENDS_OF_PADDING)


def _may_be_of_tokens(name: str, mask: Tensor) -> bool:
    """Tell whether a mask under an unknown name may say which tokens are visible."""
    if name.endswith(_LENGTHS):
        return mask.dim() == 1
    if not _may_tell(name) or mask.shape[-1:] == (1,):
        return False
    if mask.dim() == 2:  # a square one may be pairwise: then each token sees itself
        if name not in _PLAIN or mask.is_floating_point():
            return False
        return mask.shape[0] != mask.shape[1] or not mask.diagonal().all()
    return mask.dim() in (3, 4)


def _knowing_more(around: TokenMask, mask: TokenMask, of_text: bool) -> TokenMask:
    """Add to a part's mask those of other shapes that a part within it was told."""
    known = _shapes(around)
    told = (mask.main, mask.decoder, *mask.unit_masks)
    more = [each for each in told if each is not None and each.shape not in known]
    if not more:
        return around
    found = around.with_unit_masks([*more, *around.unit_masks])
    found.skips_media_layers = of_text
    return found


def _says_as_much(around: TokenMask, mask: TokenMask) -> bool:
    """Tell whether a mask takes precedence over one that a part is told of the same tokens."""
    known = _shapes(around)
    if around.main is None or mask.main is None:
        of_given = mask.main is None or bool(mask.main.all())  # of attended tokens only
        told = [*mask.cross_masks, *mask.unit_masks]
        of_these = bool(told) and all(each.shape in known for each in told)
        return (of_given and of_these) or around.main is not None or around.decoder is not None
    return mask.main.shape in known


def _shapes(mask: TokenMask) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in mask.masks if each is not None]


def _knows(mask: TokenMask, tokens: Tensor) -> bool:
    """Tell whether a mask has one of the shape of these tokens, maybe sequence first."""
    return any(shape in (tokens.shape, tokens.shape[::-1]) for shape in _shapes(mask))


def _keeps_all(mask: TokenMask) -> bool:
    return all(known is None or bool(known.all()) for known in mask.masks)


def _shape_of(named: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of the tokens that a part is called with, (B, T) or (T, B).

    They may be in a tuple with related tensors, such as the positions in ESPnet's encoders.
    """
    own = {k: v for k, v in named.items() if "mask" not in k and not _is_elsewhere(k)}
    packed = (v[0] for v in own.values() if isinstance(v, (tuple, list)) and v)
    every = (*own.values(), *packed)
    return next((tuple(value.shape[:2]) for value in every if _are_tokens(value)), ())


def _of_decoder(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a decoder's inputs among the arguments after the first tokens, an encoder's."""
    own = [key for key, value in named.items() if _are_tokens(value) and not _is_elsewhere(key)]
    return {key: named[key] for key in own[1:] if is_decoder_input(key)}


def _are_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= (3 if value.is_floating_point() else 2)


def _is_elsewhere(name: str) -> bool:
    return any(word in name for word in _ELSEWHERE)


def _shape_elsewhere(named: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of the tokens from elsewhere that a part attends to."""
    others = _elsewhere(named)
    return None if others is None else tuple(others.shape[:2])


def _elsewhere(named: Mapping[str, Any]) -> Tensor | None:
    others = (v for k, v in named.items() if _is_elsewhere(k) and not _may_tell(k))
    return next(filter(_are_tokens, others), None)


def _tell_apart(mask: TokenMask, named: Mapping[str, Any]) -> None:
    """Record in a mask the attended tensor if it has as many tokens as the part itself.

    They cannot be distinguished by shape, and the part's own tokens may have no mask.
    """
    others = _elsewhere(named)
    if others is None or mask.encoder_decoder or len(mask.cross_masks) != 1:
        return
    own = mask.cross_masks[0].shape if mask.main is None else mask.main.shape
    if own == mask.cross_masks[0].shape == others.shape[:2]:
        mask.attended_states = ref(others)


def _told(
    masks: Mapping[str, Tensor],
    shape: tuple[int, ...],
    elsewhere: tuple[int, ...] | None,
    sizes: Container[int],
    within: Tensor | None,
) -> dict[str, Tensor]:
    """Return the masks that a part is told, under the names that they would have in a batch.

    Args:
        masks: the masks and lengths that the part is told.
        shape: see :func:`_shape_of`.
        elsewhere: shape of other tokens that the part attends to; see :func:`_shape_elsewhere`.
        sizes: of all dimensions of the arguments; the longest sample must have one of them.
        within: the mask of the enclosing part, bool (B, T), if that was told one.
    """
    told: dict[str, Tensor] = {}
    others = {}
    # the only mask may be that of the attended tokens
    unclear = elsewhere is not None and not any(map(_is_elsewhere, masks))
    for name, mask in masks.items():
        if name in PADDING_MASKS:
            told[name] = mask
            continue
        mask = mask >= 0 if name == _SEQUENCES and mask.dtype != torch.bool else mask
        kept = _kept(name, mask, shape, sizes)
        of_own = "self" in name or name.startswith(("src", *TARGETS))
        if unclear and not of_own and not _is_alone_of(kept, shape, elsewhere):
            told = {**(_of_others(kept, shape, elsewhere) if name in _SEEN else {}), **told}
        elif kept is not None and _is_telling(name, mask, kept, within):
            attended = _is_elsewhere(name) or name.startswith("src")
            if attended and (elsewhere is not None or name in _SEEN):
                told = {"encoder_attention_mask": kept, **told}
            elif elsewhere is None and name.startswith(TARGETS):  # told to a whole encoder-decoder
                told["decoder_attention_mask"] = kept
            elif tuple(kept.shape) in (shape, shape[::-1]):
                told["attention_mask"] = kept
            elif name.endswith(_LENGTHS):  # of another input, such as sound to be made from text
                others[f"{name}_mask"] = kept
    return {**told, **others}


def _whole(told: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return an all-true mask of a part's own tokens, unless those it attends to are as many."""
    given = told.get("encoder_attention_mask", told.get("memory_key_padding_mask"))
    alike = given is not None and shape in (given.shape, given.shape[::-1])
    if len(shape) != 2 or alike:
        return {}
    return {"attention_mask": torch.ones(shape, dtype=torch.bool, device="cpu")}


def _is_telling(name: str, mask: Tensor, kept: Tensor, within: Tensor | None) -> bool:
    """Tell whether the entries that a mask keeps, bool (B, T), are the tokens that count."""
    if not kept.numel() or (kept.all() and is_pairwise(mask)):
        return False  # padding may see itself, too
    if name not in _SEEN and not kept[:, 0].any():
        return False  # either left padding in every sample, or the mask is inverted
    # with several runs, true may mean something else, such as tokens to be predicted
    return _is_known(name) or is_contiguous(kept) or _ends_as(kept, within)


def _ends_as(kept: Tensor, known: Tensor | None) -> bool:
    """Tell whether a mask is a known one with a prefix."""
    if known is None or len(kept) != len(known) or kept.shape[1] <= known.shape[1]:
        return False
    return not known.all() and torch.equal(kept[:, -known.shape[1] :], known)


def _is_alone_of(kept: Tensor | None, own: tuple[int, ...], others: tuple[int, ...] | None) -> bool:
    """Tell whether a mask has the shape of a part's own tokens, and not of the attended ones."""
    shapes = () if kept is None else (tuple(kept.shape), tuple(kept.shape)[::-1])
    return own in shapes and others not in shapes


def _of_others(
    kept: Tensor | None, own: tuple[int, ...], others: tuple[int, ...] | None
) -> dict[str, Tensor]:
    """Return an ambiguous mask as that of attended tokens, if its shape is not that of own ones."""
    if kept is None or own in (kept.shape, kept.shape[::-1]):
        return {}
    of_them = not kept.all() and others in (kept.shape, kept.shape[::-1])
    return {"encoder_attention_mask": kept} if of_them else split_joint_mask(kept, own, others)


def _kept(name: str, mask: Tensor, shape: tuple[int, ...], sizes: Container[int]) -> Tensor | None:
    if name.endswith(_LENGTHS):
        return mask_from_lengths(mask.cpu(), shape, sizes)
    if mask.is_floating_point() and not _is_known(name) and not (mask < -1).any():
        return None  # not additive, so its numbers may mean anything
    return kept_by_padding(mask) if name.endswith(ENDS_OF_PADDING) else kept_by_attention(mask)
