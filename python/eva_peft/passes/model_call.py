"""Runs the model on a part of a batch, with the hooks that record what its layers read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .._peft_compat import LoraConfig, base_model_of
from ..inputs import arguments, batches
from ..inputs.call_hooks import InnerModelHooks, ModelCallHooks, is_model
from ..inputs.part_masks import PartMaskHooks, parts_taking_masks
from ..inputs.prepare import Preparer
from ..inputs.token_mask import TokenMask
from ..model.architecture import (
    Architecture,
    is_defined_in_transformers,
    modules_of_transformers,
)
from ..model.layer_kind import kind_of_layer
from ..options import AUTO, CalibrateOptions
from .hooks import InputCollector, StopForward

__all__ = ["ModelCall", "ReadyPart"]

# A part of a batch on the device, its token mask, and the model input for users' functions.
ReadyPart = tuple[Any, TokenMask, Any]

_TOKEN_INPUTS = {
    "input_ids",
    "inputs_embeds",
    "token_type_ids",
    "position_ids",
    "labels",
    "pixel_values",
}


class ModelCall:
    """Runs the model of a pass.

    Args:
        model, options, config: of the pass.
        architecture: of the model.
        collector: of the layer inputs.
        preparer: of the batches.
        may_stop_early: the forward pass may be ended after the last target layer.

    Attributes:
        in_forward: the model is running, or has failed.
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
        self.in_forward = False
        self._has_succeeded = False  # whether a batch has succeeded
        self._model, self._options, self._config = model, options, config
        self._architecture, self._collector, self._preparer = architecture, collector, preparer
        self._may_stop_early = may_stop_early
        # others may infer padding from ids
        known = is_defined_in_transformers(base_model_of(model))
        self._is_plain_transformers = known and not architecture.encoder_decoder

    def move_to_device(self, batch: Any, mask: TokenMask, device: torch.device) -> ReadyPart:
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

    def run(self, ready: ReadyPart, batch_number: int) -> None:
        """Run the model on a part of a batch.

        Args:
            ready: see :meth:`move_to_device`.
            batch_number: from 0.
        """
        batch, mask, model_input = ready
        size = batches.samples_and_elements(batch)
        self._collector.begin_forward(mask, model_input, self._may_stop_early, size)
        self.in_forward = True  # and stays so on failure
        routed_inputs = (
            self._collector.routed if self._collector.routed.is_needed else nullcontext()
        )
        part_hooks = self._part_mask_hooks(batch, mask, batch_number)
        call_hooks = self._model_call_hooks(batch, mask, batch_number)
        with suppress(StopForward), routed_inputs, part_hooks, call_hooks:
            if self._options.forward_fn is not None:
                self._options.forward_fn(self._model, batch)
            else:
                self._call(batch)
        self.in_forward, self._has_succeeded = False, True

    def _call(self, batch: Any) -> None:
        args, kwargs = arguments.model_arguments(batch, self._model)
        kwargs = arguments.without_string_columns(kwargs, self._model)
        kwargs = arguments.without_labels(kwargs, self._architecture)
        try:
            self._model(*args, **kwargs)
        except Exception as error:
            # checked only now, since inspecting signatures is slow
            if isinstance(error, TypeError) and not arguments.accepts_arguments(
                args, kwargs, self._model
            ):
                self._call_with_one(arguments.as_one_argument(batch, self._model, error))
                return
            if not self._has_succeeded:
                arguments.raise_if_not_taken(batch, kwargs, self._model, error)
            raise

    def _call_with_one(self, batch: Any) -> None:
        try:
            self._model(batch)
        except Exception as error:
            if not self._has_succeeded:
                arguments.raise_if_mapping_refused(batch, self._model, error)
            raise

    def _model_call_hooks(
        self, batch: Any, mask: TokenMask, batch_number: int
    ) -> AbstractContextManager[object]:
        if not self._preparer.masks_from_batches:
            return nullcontext()

        make_mask = functools.partial(self._preparer.drawn_mask_of, batch_number=batch_number)
        common = self._model, batch, mask, make_mask, self._collector.use_mask, self._media_parts
        if self._options.forward_fn is not None:
            return ModelCallHooks(*common, self._collector.begin_model_call).registered()
        has_inner_models = mask.has_token_masks and self._contains_models
        return InnerModelHooks(*common).registered() if has_inner_models else nullcontext()

    def _part_mask_hooks(
        self, batch: Any, mask: TokenMask, batch_number: int
    ) -> AbstractContextManager[object]:
        if not self._preparer.masks_from_batches:
            return nullcontext()
        by_default = self._options.forward_fn is None
        if by_default and self._is_plain_transformers and _has_only_token_inputs(batch):
            return nullcontext()  # such models pass on no other masks: saves hooks on every layer
        parts = self._unmasked_parts(mask)
        if not parts:
            return nullcontext()
        make_mask = functools.partial(self._preparer.drawn_mask_of, batch_number=batch_number)
        return PartMaskHooks(
            parts, self._media_parts, make_mask, self._collector.use_mask
        ).registered()

    def _unmasked_parts(self, mask: TokenMask) -> dict[nn.Module, int]:
        """Return the parts that may be passed masks that the batch, with this mask, lacks."""
        if not mask.has_token_masks:
            return self._parts_taking_masks
        custom = self._custom_parts if self._architecture.has_own_layers else {}
        return {**custom, **self._media_taking_masks} if mask.media_unmasked else custom

    @functools.cached_property
    def _contains_models(self) -> bool:
        """Whether a user's module, which may derive from a transformers model, contains models."""
        base = base_model_of(self._model)
        inner = (part for part in base.modules() if part is not base)
        return not is_defined_in_transformers(base) and any(map(is_model, inner))

    @functools.cached_property
    def _parts_taking_masks(self) -> dict[nn.Module, int]:
        """The parts that may be passed masks or lengths."""
        return parts_taking_masks(self._model)

    @functools.cached_property
    def _media_parts(self) -> set[nn.Module]:
        """The parts that read sound or images."""
        prefixes = self._architecture.name_prefixes
        named = base_model_of(self._model).named_modules()
        return {part for name, part in named if kind_of_layer(name, prefixes).reads_no_text}

    @functools.cached_property
    def _media_taking_masks(self) -> dict[nn.Module, int]:
        """Those that read sound or images, for which a batch with text may have no mask."""
        return {
            part: n for part, n in self._parts_taking_masks.items() if part in self._media_parts
        }

    @functools.cached_property
    def _custom_parts(self) -> dict[nn.Module, int]:
        """Those that are custom, as only these may have tokens other than the batch's."""
        in_transformers = modules_of_transformers(base_model_of(self._model))
        return {
            part: n for part, n in self._parts_taking_masks.items() if part not in in_transformers
        }


def _has_only_token_inputs(batch: Any) -> bool:
    return isinstance(batch, Tensor) or (
        isinstance(batch, Mapping) and batch.keys() <= _TOKEN_INPUTS
    )
