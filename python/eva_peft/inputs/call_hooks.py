"""Masks among the arguments of a model or of its parts, which may differ from the batch's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .._peft_compat import base_model_of
from ..model.architecture import forward_signature, is_transformers_model
from ..model.parts import outermost_modules
from ..surroundings.interrupts import temporarily
from ..surroundings.snapshot import remove_hook
from .roles import PADDING_MASKS, has_ids_like, token_labels_of
from .token_mask import TokenMask

__all__ = ["CallHooks", "InnerModelHooks", "ModelCallHooks", "is_model", "named_arguments"]

_ATTENTION_MASKS = ("attention_mask", "src_key_padding_mask")
_TOKEN_MASKS = ("attention_mask", *PADDING_MASKS)

_TORCH_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


class CallHooks:
    """Hooks around the calls of parts of a model, which choose the mask to use in each.

    Args:
        parts: modules whose calls are observed.
        make_mask: returns the mask of a mapping of arguments.
        use_mask: takes the mask to use from now on, if it changes, and returns the previous one.
        forward_parts: parts that are also observed when ``forward`` is called directly, which runs
            no hook.
        media_parts: parts that read sound or images, judged by their names.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        make_mask: Callable[[Mapping[str, Any]], TokenMask],
        use_mask: Callable[..., TokenMask],
        forward_parts: Sequence[nn.Module],
        media_parts: Container[nn.Module],
    ) -> None:
        self._parts, self._make_mask, self._use_mask = parts, make_mask, use_mask
        self._own_forwards = [(part, vars(part).get("forward")) for part in forward_parts]
        self._media_parts = media_parts
        # stack of open calls: the module, the mask used in it, and the one around it
        self._open_calls: list[tuple[nn.Module | None, TokenMask, TokenMask]] = []
        self._hooked: nn.Module | None = None  # whose hooks have run, and whose forward is next

    def registered(self) -> AbstractContextManager[None]:
        """Return a context within which the hooks are registered."""
        return temporarily(self._unregister, self._register)

    def _register(self) -> None:
        for part in self._parts:
            part.register_forward_pre_hook(self._pre_hook, prepend=True, with_kwargs=True)
            part.register_forward_hook(self._after_call, always_call=True)
        for part, _ in self._own_forwards:
            part.forward = self._wrapped_forward(part, part.forward)

    def _unregister(self) -> None:
        for part in self._parts:
            remove_hook(part, self._pre_hook)
            remove_hook(part, self._after_call)
        for part, own in self._own_forwards:
            vars(part).pop("forward", None)
            if own is not None:
                part.forward = own

    def _wrapped_forward(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            hooked, self._hooked = self._hooked, None
            if hooked is part or any(module is part for module, *_ in self._open_calls):
                return forward(*args, **kwargs)
            self._before_call(part, args, kwargs)
            try:
                return forward(*args, **kwargs)
            finally:
                self._after_call(part, args, None)

        return wrapper

    def _pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before_call(module, args, kwargs)
        self._hooked = module

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        raise NotImplementedError


class ModelCallHooks(CallHooks):
    """Hooks that observe the arguments of a model, and of the transformers models in it.

    A ``forward_fn`` may make the tokens itself, or run a model on a text other than the one that
    the batch's mask belongs to. A mask that the model is called with is used in it; otherwise the
    batch's, if it has the shape of the first argument or of token ids, or else none. ``forward`` of
    transformers models may also be called directly, as by sentence-transformers.

    Args:
        model: whose outermost wanted parts are observed.
        batch: its labels are used where they label the tokens that a model is called with.
        batch_mask: the mask of the batch.
        make_mask, use_mask, media_parts: see :class:`CallHooks`.
        on_model_call: called before each outermost call.
    """

    hooks_base = True  # even if it is no transformers model

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        batch_mask: TokenMask,
        make_mask: Callable[[Mapping[str, Any]], TokenMask],
        use_mask: Callable[..., TokenMask],
        media_parts: Container[nn.Module],
        on_model_call: Callable[[], None] = lambda: None,
    ) -> None:
        base = base_model_of(model)
        # without a mask in the batch, PartMaskHooks observes torch's models and what follows them
        wanted = is_model if batch_mask.has_token_masks else is_transformers_model
        tops = [base] if self.hooks_base else base.children()
        inner = [part for top in tops for _, part in outermost_modules(top, wanted)]
        base_first = [base] if self.hooks_base and base not in inner else []
        super().__init__([*base_first, *inner], make_mask, use_mask, inner, media_parts)
        values = batch if isinstance(batch, Mapping) else {}
        self._labels = token_labels_of(batch)  # now, since the function may take them out
        self._attention_mask = values.get("attention_mask")
        self._base, self._batch_mask, self._on_model_call = base, batch_mask, on_model_call
        self._open_calls.append((None, batch_mask, batch_mask))

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if len(self._open_calls) == 1:
            self._on_model_call()
        arguments = named_arguments(module, args, kwargs)
        is_part = len(self._open_calls) > 1 and _is_torch_transformer(module)
        mask = self._mask_of_part(arguments) if is_part else self._mask_of(arguments)
        self._open_calls.append((module, mask, self._use_mask(mask)))

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open_calls[-1][0] is not module:  # an earlier hook failed, so ours did not run
            return
        _, mask, enclosing = self._open_calls.pop()
        in_use = self._use_mask()
        if module is not self._base and mask.has_token_masks:
            enclosing = enclosing.after_part(mask, module not in self._media_parts)
        elif in_use.from_parts and not enclosing.has_token_masks:
            enclosing = in_use  # a function of the user's may call the head by itself
        self._use_mask(enclosing)

    def _mask_of_part(self, arguments: dict[str, Any]) -> TokenMask:
        """Return the mask in a part of a model: its own only if the model was also passed one."""
        enclosing = self._open_calls[-1][1]
        if enclosing is self._batch_mask or all(arguments.get(n) is None for n in PADDING_MASKS):
            return enclosing
        return self._mask_of(arguments)

    def _mask_of(self, arguments: dict[str, Any]) -> TokenMask:
        shape = _token_shape(arguments)
        if all(not isinstance(arguments.get(name), (Tensor, Mapping)) for name in _TOKEN_MASKS):
            main = self._batch_mask.main
            if main is None and has_ids_like(self._batch_mask.decoder, arguments):
                return self._batch_mask
            if main is not None and (main.shape == shape or has_ids_like(main, arguments)):
                return self._batch_mask
        return self._mask_from_arguments(arguments, shape)

    def _mask_from_arguments(
        self, arguments: dict[str, Any], shape: torch.Size | None
    ) -> TokenMask:
        steps = getattr(arguments.get("decoder_input_ids"), "shape", None)
        swapped = None if shape is None else shape[::-1]  # torch's models take the sequence first
        if isinstance(self._labels, Tensor) and self._labels.shape in (shape, swapped, steps):
            arguments.setdefault("labels", self._labels)
        return self._make_mask(arguments)


class InnerModelHooks(ModelCallHooks):
    """The same for transformers or torch models inside a user's module that is given the batch.

    The batch's mask is used, except in models that are passed another one, (B, T): of another
    text, or of this one with a prefix.
    """

    hooks_base = False

    def _mask_of(self, arguments: dict[str, Any]) -> TokenMask:
        given = {name: arguments.get(name) for name in _TOKEN_MASKS}
        if not any(self._differs_from_batch(name, mask) for name, mask in given.items()):
            return self._batch_mask
        mask = self._mask_from_arguments(arguments, _token_shape(arguments))
        mask.draws = self._batch_mask.draws  # which are distributed over the parts of a batch
        return mask

    def _differs_from_batch(self, name: str, mask: Any) -> bool:
        """Tell whether a mask differs from the batch's, which may have been converted to bool."""
        given = self._attention_mask
        if mask is given or not isinstance(mask, Tensor) or mask.dim() != 2:
            return False
        if not isinstance(given, Tensor) or given.shape != mask.shape:
            return True
        if name not in _ATTENTION_MASKS:
            return True
        kept = mask == 0 if name in PADDING_MASKS else mask != 0
        return not torch.equal(kept.to(given.device), given != 0)


def is_model(module: nn.Module) -> bool:
    """Tell whether a module is a model of transformers or torch."""
    return is_transformers_model(module) or _is_torch_transformer(module)


def _is_torch_transformer(module: nn.Module) -> bool:
    return isinstance(module, _TORCH_TRANSFORMERS)


def _token_shape(arguments: Mapping[str, Any]) -> torch.Size | None:
    """Return the shape of the tokens that a model is called with, (B, T)."""
    first = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    if first is None or first.dim() not in (2, 3):
        return None
    if first.is_floating_point() and "encoder_hidden_states" in arguments:
        return None  # image patches, whose number may equal the text's by chance
    return first.shape[:2]


def named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments by name; a mapping as first argument is merged with the keyword ones.

    Not if another has the same names: they are two texts, for example.
    """
    others = (value for value in (*args[1:], *kwargs.values()) if isinstance(value, Mapping))
    if args and isinstance(args[0], Mapping) and all(args[0].keys().isdisjoint(o) for o in others):
        return {**kwargs, **{str(name): value for name, value in args[0].items()}}
    signature = forward_signature(module)
    try:
        bound = None if signature is None else signature.bind_partial(*args, **kwargs)
    except TypeError:
        bound = None
    if bound is None:
        return dict(kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments |= {f"{name} {i}": part for i, part in enumerate(value)}
        else:
            arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return arguments
