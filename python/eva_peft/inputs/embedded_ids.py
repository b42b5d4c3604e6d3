"""Token ids that embeddings of the user's own modules read, and which of them are padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..model.architecture import modules_of_transformers
from .mask_contents import FEW, is_right_padded
from .roles import may_be_ids
from .token_mask import TokenMask

__all__ = ["EmbeddedIds", "own_embeddings", "padding_among", "tells_padding"]


def own_embeddings(base: nn.Module) -> set[nn.Module]:
    """Return the embeddings with a ``padding_idx``; models of transformers are passed masks."""
    in_transformers = modules_of_transformers(base)
    return {part for part in base.modules() if tells_padding(part) and part not in in_transformers}


def tells_padding(part: nn.Module) -> TypeGuard[nn.Embedding]:
    """Tell whether a module is an embedding in which a number stands for padding."""
    return isinstance(part, nn.Embedding) and part.padding_idx is not None


class _Ids(NamedTuple):
    """Token ids of one shape, all that embeddings read, bool (B, T) each.

    Attributes:
        hidden: which have the number that stands for padding, in all of them.
        padding: which of these are padding, not values, in any of them.
    """

    hidden: Tensor
    padding: Tensor

    def merged_with(self, other: _Ids | None) -> _Ids:
        if other is None:
            return self
        return _Ids(self.hidden & other.hidden, self.padding | other.padding)


class EmbeddedIds:
    """The token ids that embeddings read in a forward pass, by shape, and the masks of these.

    Of several texts of one shape, a later layer may read any. A part that is called with ids alone
    reads no others.

    Args:
        parts: whose calls are noted, if there is an embedding that tells padding among them.
        make_mask: returns a mask, given named masks and the shape of the tokens.
    """

    def __init__(
        self,
        parts: Iterable[nn.Module],
        make_mask: Callable[[Mapping[str, Tensor], tuple[int, ...]], TokenMask],
    ) -> None:
        self._are_read, self._make_mask = any(map(tells_padding, parts)), make_mask
        self._read: dict[torch.Size, _Ids] = {}
        self._last_mask: dict[torch.Size, TokenMask] = {}
        self._own_masks: list[Tensor | None] = []
        # stack of open calls with ids alone, with the ids read before each
        self._before: list[tuple[nn.Module, dict[torch.Size, _Ids]]] = []

    def begin_call(self, part: nn.Module, arguments: Iterable[Any]) -> None:
        """Note that a part is called."""
        if self._are_read and not tells_padding(part) and _are_ids_alone(arguments):
            self._before.append((part, self._read))
            self._read = {}

    def end_call(self, part: nn.Module) -> Iterator[TokenMask]:
        """Note that a call is over; yields the masks from now on, if they may be others."""
        if self._before and self._before[-1][0] is part:
            inside, self._read = self._read, self._before.pop()[1]
            yield from filter(None, map(self._mask_of, inside.values()))

    def mask_of_call(
        self, embedding: nn.Embedding, arguments: Mapping[str, Any]
    ) -> TokenMask | None:
        """Return the mask from now on of inputs of the shape of the ids in a call, if there is."""
        values = (v for v in arguments.values() if isinstance(v, Tensor))
        rows = (v.flatten(0, 1) if v.dim() == 3 else v for v in values)  # maybe of documents
        ids, padding_idx = next(filter(may_be_ids, rows), None), embedding.padding_idx
        if ids is None or padding_idx is None or not ids.numel():
            return None
        ids = ids.cpu()
        hidden, padding = ids.eq(padding_idx), torch.zeros_like(ids, dtype=torch.bool)
        # others are flags, such as two segments, or holidays
        if hidden.any() and int(ids.max()) - int(ids.min()) > 1:
            padding = padding_among(hidden)
        return self._mask_of(_Ids(hidden, padding))

    def _mask_of(self, ids: _Ids) -> TokenMask | None:
        """Return the mask of ids and all others of their shape, ``None`` if none is padding.

        A token counts unless it is padding in one of them, and has the number for it in all.
        """
        shape = ids.hidden.shape
        ids = self._read[shape] = ids.merged_with(self._read.get(shape))
        known = self._last_mask.get(shape)
        if known is None and not ids.padding.any():
            return None
        kept = ~(ids.hidden & ids.padding)
        several = int((ids.padding & kept).sum()) > FEW * kept.numel() and min(shape) > 1
        if known is not None and _is_mask_of(known, kept, several):
            return known  # the same, so that layers may share a stream
        mask = self._last_mask[shape] = self._make_mask({"attention_mask": kept}, shape)
        mask.is_of_several_texts = several
        self._own_masks.append(mask.main)
        return mask

    def have_mask(self, kept: Tensor | None) -> bool:
        """Tell whether these are tokens that the ids, not the model, tell to count."""
        return any(kept is known for known in self._own_masks)

    def without_earlier(self, outer: TokenMask, mask: TokenMask) -> TokenMask:
        """Return a mask without those of the ids of one shape that were read before others.

        Args:
            outer: the mask.
            mask: of the others; if it is not of ids, the result is ``outer``.
        """
        if mask.main is None or not self.have_mask(mask.main):
            return outer
        shape = mask.main.shape
        units = [u for u in outer.unit_masks if u.shape != shape or not self.have_mask(u)]
        return outer if len(units) == len(outer.unit_masks) else outer.with_unit_masks(units)


def _is_mask_of(mask: TokenMask, kept: Tensor, several_texts: bool) -> bool:
    equal = mask.main is not None and torch.equal(mask.main, kept)
    return equal and mask.is_of_several_texts is several_texts


def _are_ids_alone(values: Iterable[Any]) -> bool:
    """Tell whether there are token ids among arguments, and no states of tokens."""
    packed: list[Any] = []
    for value in values:
        items = value.values() if isinstance(value, Mapping) else value
        packed.extend(items if isinstance(value, (Mapping, tuple, list)) else [value])
    tensors = [value for value in packed if isinstance(value, Tensor)]
    states = (value.is_floating_point() and value.dim() > 2 for value in tensors)
    return any(map(may_be_ids, tensors)) and not any(states)


def padding_among(hidden: Tensor) -> Tensor:
    """Return which tokens with the ``padding_idx`` of an embedding are padding, bool (B, T).

    The others are values, such as an unknown word, a rest in music, or the hour 0. Padding fills
    one end of samples, in longer runs than elsewhere, where there are few. Where samples are padded
    on the right, all may begin with a token of that number, as with a transducer's blank.

    Args:
        hidden: which tokens are that number, bool (B, T), or (T, B).
    """
    if hidden.shape[1] < 2:
        return torch.zeros_like(hidden)
    if hidden[:, 0].all():
        behind = _padding_on_the_right(hidden[:, 1:])
        if behind.any() or not hidden[:, 1:].any():
            return torch.cat([torch.zeros_like(hidden[:, :1]), behind], dim=1)
    longest = int(hidden.sum(0).max())  # if 1, it may be a value in the last sample
    if longest > 1 and not hidden[0].any() and is_right_padded(~hidden.mT):
        return hidden  # sequence first
    found = _padding_on_the_right(hidden)
    return found if found.any() else _padding_on_the_right(hidden.flip(1)).flip(1)


def _padding_on_the_right(hidden: Tensor) -> Tensor:
    run = hidden.flip(1).cumprod(1).flip(1).bool()
    others, whole = hidden & ~run, run.all(1)
    count = others.cumsum(1)
    longest = (count - (count * ~others).cummax(1).values).max()
    padded = run.sum(1) > longest
    # whole samples alone, or single tokens alone, may be values, such as those of a last column
    evident = (padded & ~whole).any() and (whole.any() or (run.sum(1) > 1).any())
    if others.sum() > FEW * hidden.numel() or not evident:
        return torch.zeros_like(hidden)
    return run & padded[:, None]
