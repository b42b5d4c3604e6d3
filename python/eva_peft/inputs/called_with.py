"""Masks among the arguments of a model or of its parts, which may differ from the batch's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .._peft_compat import base_of
from ..model.architecture import is_of_transformers, signature_of
from ..model.parts import outermost
from ..surroundings.interrupts import temporarily
from ..surroundings.snapshot import take_off
from .arguments import PADDING_MASKS
from .token_mask import TokenMask

__all__ = ["AroundCalls", "CalledWith", "ModelsWithin", "is_model", "named_arguments"]

_OF_TEXT = ("attention_mask", "src_key_padding_mask")
_MASKS = ("attention_mask", *PADDING_MASKS)

_OF_TORCH = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


class AroundCalls:
    """Hooks around the calls of parts of a model, which choose the mask to use in each.

    Args:
        parts: modules whose calls are observed.
        make_mask: returns the mask of a mapping of arguments.
        use_mask: takes the mask to use from now on, if it changes, and returns the previous one.
        by_forward: parts that are also observed when ``forward`` is called directly, which runs no
            hook.
        of_media: parts that read sound or images, judged by their names.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        make_mask: Callable[[Mapping[str, Any]], TokenMask],
        use_mask: Callable[..., TokenMask],
        by_forward: Sequence[nn.Module],
        of_media: Container[nn.Module],
    ) -> None:
        self._parts, self._make_mask, self._use_mask = parts, make_mask, use_mask
        self._forwards = [(part, vars(part).get("forward")) for part in by_forward]
        self._of_media = of_media
        # stack of open calls: the module, the mask used in it, and the one around it
        self._in_use: list[tuple[nn.Module | None, TokenMask, TokenMask]] = []

    def looking(self) -> AbstractContextManager[None]:
        """Return a context within which the hooks are registered."""
        return temporarily(self._remove, self._add)

    def _add(self) -> None:
        for part in self._parts:
            part.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
            part.register_forward_hook(self._behind, always_call=True)
        for part, _ in self._forwards:
            part.forward = self._watched(part, part.forward)

    def _remove(self) -> None:
        for part in self._parts:
            take_off(part, self._before)
            take_off(part, self._behind)
        for part, own in self._forwards:
            vars(part).pop("forward", None)
            if own is not None:
                part.forward = own

    def _watched(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if any(module is part for module, *_ in self._in_use):  # the hooks have seen this call
                return forward(*args, **kwargs)
            self._before(part, args, kwargs)
            try:
                return forward(*args, **kwargs)
            finally:
                self._behind(part, args, None)

        return watched

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    def _behind(self, module: nn.Module, args: Any, output: Any) -> None:
        raise NotImplementedError


class CalledWith(AroundCalls):
    """Hooks that observe the arguments of a model, and of the transformers models in it.

    A ``forward_fn`` may make the tokens itself, or run a model on a text other than the one that
    the batch's mask belongs to. A mask that the model is called with is used in it; otherwise the
    batch's, if it has the shape of the first argument, or else none. ``forward`` of transformers
    models may also be called directly, as by sentence-transformers.

    Args:
        model: whose outermost wanted parts are observed.
        batch: its labels are used where they label the tokens that a model is called with.
        mask: of the batch.
        make_mask, use_mask, of_media: see :class:`AroundCalls`.
        begin: called before each outermost call.
    """

    looks_at_base = True  # even if it is no transformers model

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        mask: TokenMask,
        make_mask: Callable[[Mapping[str, Any]], TokenMask],
        use_mask: Callable[..., TokenMask],
        of_media: Container[nn.Module],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        base = base_of(model)
        # without a mask in the batch, PaddingTold observes torch's models and what follows them
        wanted = is_model if mask.has_token_masks else is_of_transformers
        tops = [base] if self.looks_at_base else base.children()
        inner = [part for top in tops for _, part in outermost(top, wanted)]
        around = [base] if self.looks_at_base and base not in inner else []
        super().__init__([*around, *inner], make_mask, use_mask, inner, of_media)
        named = batch if isinstance(batch, Mapping) else {}
        self._labels, self._given = named.get("labels"), named.get("attention_mask")
        self._base, self._mask, self._begin = base, mask, begin
        self._in_use.append((None, mask, mask))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self._in_use) == 1:
            self._begin()
        named = named_arguments(module, args, kwargs)
        is_part = len(self._in_use) > 1 and _is_of_torch(module)
        mask = self._mask_of_part(named) if is_part else self._mask_of(named)
        self._in_use.append((module, mask, self._use_mask(mask)))

    def _behind(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._in_use[-1][0] is not module:  # an earlier hook failed, so ours did not run
            return
        _, mask, around = self._in_use.pop()
        if module is not self._base and mask.has_token_masks:
            around = around.after_part(mask, module not in self._of_media)
        self._use_mask(around)

    def _mask_of_part(self, named: dict[str, Any]) -> TokenMask:
        """Return the mask in a part of a model: its own only if the model was also passed one."""
        around = self._in_use[-1][1]
        told = around is not self._mask and any(named.get(n) is not None for n in PADDING_MASKS)
        return self._mask_of(named) if told else around

    def _mask_of(self, named: dict[str, Any]) -> TokenMask:
        shape = _shape_of(named)
        if all(not isinstance(named.get(name), (Tensor, Mapping)) for name in _MASKS):
            main = self._mask.main
            if shape is not None and main is not None and main.shape == shape:
                return self._mask
            if main is None and self._are_decoders(named):
                return self._mask
        return self._own_mask(named, shape)

    def _are_decoders(self, named: Mapping[str, Any]) -> bool:
        """Tell whether a model is called with a decoder's tokens, under any name."""
        decoder = self._mask.decoder
        ids = (v for v in named.values() if isinstance(v, Tensor) and not v.is_floating_point())
        return decoder is not None and any(each.shape == decoder.shape for each in ids)

    def _own_mask(self, named: dict[str, Any], shape: torch.Size | None) -> TokenMask:
        steps = getattr(named.get("decoder_input_ids"), "shape", None)
        turned = None if shape is None else shape[::-1]  # torch's models take the sequence first
        if isinstance(self._labels, Tensor) and self._labels.shape in (shape, turned, steps):
            named.setdefault("labels", self._labels)
        return self._make_mask(named)


class ModelsWithin(CalledWith):
    """The same for transformers or torch models inside a user's module that is given the batch.

    The batch's mask is used, except in models that are passed another one, (B, T): of another
    text, or of this one with a prefix.
    """

    looks_at_base = False

    def _mask_of(self, named: dict[str, Any]) -> TokenMask:
        told = {name: named.get(name) for name in _MASKS}
        if not any(self._is_another(name, mask) for name, mask in told.items()):
            return self._mask
        mask = self._own_mask(named, _shape_of(named))
        mask.draws = self._mask.draws  # which are distributed over the parts of a batch
        return mask

    def _is_another(self, name: str, mask: Any) -> bool:
        """Tell whether a mask differs from the batch's, which may have been converted to bool."""
        given = self._given
        if mask is given or not isinstance(mask, Tensor) or mask.dim() != 2:
            return False
        if name not in _OF_TEXT or not isinstance(given, Tensor) or given.shape != mask.shape:
            return True
        kept = mask == 0 if name in PADDING_MASKS else mask != 0
        return not torch.equal(kept.to(given.device), given != 0)


def is_model(module: nn.Module) -> bool:
    """Tell whether a module is a model of transformers or torch."""
    return is_of_transformers(module) or _is_of_torch(module)


def _is_of_torch(module: nn.Module) -> bool:
    return isinstance(module, _OF_TORCH)


def _shape_of(named: Mapping[str, Any]) -> torch.Size | None:
    """Return the shape of the tokens that a model is called with, (B, T)."""
    first = next((value for value in named.values() if isinstance(value, Tensor)), None)
    if first is None or first.dim() not in (2, 3):
        return None
    if first.is_floating_point() and "encoder_hidden_states" in named:
        return None  # image patches, whose number may equal the text's by chance
    return first.shape[:2]


def named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments by name; a mapping as first argument is merged with the keyword ones."""
    if args and isinstance(args[0], Mapping):
        return {**kwargs, **{str(name): value for name, value in args[0].items()}}
    signature = signature_of(module)
    try:
        bound = None if signature is None else signature.bind_partial(*args, **kwargs)
    except TypeError:
        bound = None
    if bound is None:
        return dict(kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"{name} {i}": part for i, part in enumerate(value)}
        else:
            found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found
