"""Runs the model on a part of a batch, with the hooks that record what its layers read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .._peft_compat import LoraConfig, base_of
from ..inputs import arguments, batches
from ..inputs.called_with import CalledWith, ModelsWithin, is_model
from ..inputs.padding_told import PaddingTold, parts_told
from ..inputs.prepare import Preparer
from ..inputs.token_mask import TokenMask
from ..model.architecture import Architecture, is_defined_in_transformers
from ..model.layer_kind import kind_of_layer
from ..model.parts import outermost
from ..options import AUTO, CalibrateOptions
from .hooks import InputCollector, StopForward

__all__ = ["ModelCall", "Ready"]

# A part of a batch on the device, its token mask, and the model input for users' functions.
Ready = tuple[Any, TokenMask, Any]

_TOKENS = {"input_ids", "inputs_embeds", "token_type_ids", "position_ids", "labels", "pixel_values"}


class ModelCall:
    """Runs the model of a pass.

    Args:
        model, options, config: of the pass.
        architecture: of the model.
        collector: of the layer inputs.
        preparer: of the batches.
        may_stop_early: the forward pass may be ended after the last target layer.

    Attributes:
        inside: the model is running, or has failed.
    """

    def __init__(
        self,
        model: nn.Module,
        options: CalibrateOptions,
        config: LoraConfig,
        architecture: Architecture,
        collector: InputCollector,
        preparer: Preparer,
        may_stop_early: bool,
    ) -> None:
        self.inside = False
        self._ran = False  # whether a batch has succeeded
        self._model, self._options, self._config = model, options, config
        self._architecture, self._collector, self._preparer = architecture, collector, preparer
        self._may_stop_early = may_stop_early
        known = is_defined_in_transformers(base_of(model))  # others may infer padding from ids
        self._is_of_decoders = known and not architecture.encoder_decoder

    def ready(self, batch: Any, mask: TokenMask, device: torch.device) -> Ready:
        """Bring a part of a batch to the device."""
        batch = batches.to_device(batch, device)
        return batch, mask, self._model_input(batch, mask, device)

    def _model_input(self, batch: Any, mask: TokenMask, device: torch.device) -> Any:
        prepare = self._options.prepare_model_inputs_fn
        if prepare == AUTO and mask.main is not None and any(self._collector.selectors):
            # what PEFT's default passes to users' functions: (tokens, 2) of (sample, position)
            return mask.main.nonzero().to(device)
        if prepare == AUTO:
            return batch
        return batch if prepare is None else prepare(deepcopy(batch), self._config)

    def run(self, ready: Ready, number: int) -> None:
        """Run the model on a part of a batch.

        Args:
            ready: see :meth:`ready`.
            number: of the batch, from 0.
        """
        batch, mask, model_input = ready
        size = batches.size_of(batch)
        self._collector.begin_forward(mask, model_input, self._may_stop_early, size)
        self.inside = True  # and stays so on failure
        routed = self._collector.routed if self._collector.routed.needed else nullcontext()
        told = self._padding_told(batch, mask, number)
        with suppress(StopForward), routed, told, self._called_with(batch, mask, number):
            if self._options.forward_fn is not None:
                self._options.forward_fn(self._model, batch)
            else:
                self._call(batch)
        self.inside, self._ran = False, True

    def _call(self, batch: Any) -> None:
        args, kwargs = arguments.model_arguments(batch)
        kwargs = arguments.without_string_columns(kwargs, self._model)
        kwargs = arguments.without_labels(kwargs, self._architecture)
        try:
            self._model(*args, **kwargs)
        except TypeError:  # checked only now, since inspecting signatures is slow
            if arguments.accepts_arguments(args, kwargs, self._model):
                raise
            self._call_with_one(arguments.as_one_argument(batch, self._model))
        except Exception as error:
            if not self._ran:
                arguments.raise_if_names_unknown(batch, kwargs, self._model, error)
            raise

    def _call_with_one(self, batch: Any) -> None:
        try:
            self._model(batch)
        except Exception as error:
            if not self._ran:
                arguments.raise_if_mapping_refused(batch, self._model, error)
            raise

    def _called_with(
        self, batch: Any, mask: TokenMask, number: int
    ) -> AbstractContextManager[object]:
        if not self._preparer.masks_from_batches:
            return nullcontext()

        make_mask = functools.partial(self._preparer.drawn_mask_of, batch_number=number)
        told = self._model, batch, mask, make_mask, self._collector.use_mask, self._of_media
        if self._options.forward_fn is not None:
            return CalledWith(*told, self._collector.begin_call).looking()
        within = mask.has_token_masks and self._holds_models
        return ModelsWithin(*told).looking() if within else nullcontext()

    def _padding_told(
        self, batch: Any, mask: TokenMask, number: int
    ) -> AbstractContextManager[object]:
        if not self._preparer.masks_from_batches:
            return nullcontext()
        by_default = self._options.forward_fn is None
        if by_default and self._is_of_decoders and _holds_tokens_alone(batch):
            return nullcontext()  # such models pass on no other masks: saves hooks on every layer
        parts = self._parts_to_ask(mask)
        if not parts:
            return nullcontext()
        make_mask = functools.partial(self._preparer.drawn_mask_of, batch_number=number)
        return PaddingTold(parts, self._of_media, make_mask, self._collector.use_mask).looking()

    def _parts_to_ask(self, mask: TokenMask) -> dict[nn.Module, int]:
        """Return the parts that may be told masks that the batch, with this mask, lacks."""
        if not mask.has_token_masks:
            return self._told
        own = self._own_told if self._architecture.has_own_layers else {}
        return {**own, **self._media_told} if mask.media_unmasked else own

    @functools.cached_property
    def _holds_models(self) -> bool:
        """Whether a user's module, which may derive from a transformers model, contains models."""
        base = base_of(self._model)
        inner = (part for part in base.modules() if part is not base)
        return not is_defined_in_transformers(base) and any(map(is_model, inner))

    @functools.cached_property
    def _told(self) -> dict[nn.Module, int]:
        """The parts that may be told of padding."""
        return parts_told(self._model)

    @functools.cached_property
    def _of_media(self) -> set[nn.Module]:
        """The parts that read sound or images."""
        prefixes = self._architecture.prefixes
        named = base_of(self._model).named_modules()
        return {part for name, part in named if kind_of_layer(name, prefixes).reads_no_text}

    @functools.cached_property
    def _media_told(self) -> dict[nn.Module, int]:
        """Those that read sound or images, for which a batch with text may have no mask."""
        return {part: n for part, n in self._told.items() if part in self._of_media}

    @functools.cached_property
    def _own_told(self) -> dict[nn.Module, int]:
        """Those that are custom, as only these may have tokens other than the batch's."""
        known = outermost(base_of(self._model), is_defined_in_transformers)
        inside = {part for _, model in known for part in model.modules()}
        return {part: n for part, n in self._told.items() if part not in inside}


def _holds_tokens_alone(batch: Any) -> bool:
    return isinstance(batch, Tensor) or (isinstance(batch, Mapping) and batch.keys() <= _TOKENS)
