"""Preparation of batches for the model, also while the device still works on the previous one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from .._peft_compat import LoraConfig, base_model_of
from ..errors import DeferredError
from ..model.architecture import Architecture, is_defined_in_transformers
from ..options import AUTO, CalibrateOptions
from . import arguments, batches
from .batch_mask import mask_of_batch, warn_of_counted_padding
from .mask_contents import seem_kept
from .subsample import Draw
from .token_mask import TokenMask

__all__ = ["Prefetcher", "PreparedBatch", "Preparer"]

T = TypeVar("T")


class Prefetcher(Iterator[T], Generic[T]):
    """An iterator whose next item can be prefetched.

    Args:
        items: what to iterate over.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._fetched: list[T] = []
        self._held_error = DeferredError()

    def fetch(self) -> None:
        """Fetch the next item; an exception is held until that item is requested."""
        if self._fetched or self._held_error.error is not None:
            return
        try:
            self._fetched += islice(self._items, 1)
        except Exception as error:
            self._held_error.error = error

    def close(self) -> None:
        """Drop what was fetched, and a held error, whose frames refer to this object."""
        self._fetched.clear()
        self._held_error.error = None

    def __next__(self) -> T:
        self._held_error.reraise()
        return self._fetched.pop() if self._fetched else next(self._items)


class PreparedBatch(NamedTuple):
    """A batch ready for the model.

    Attributes:
        parts: of the batch, one per forward pass; still on the loader's device.
        masks: the token mask of each part.
    """

    parts: Sequence[Any]
    masks: Sequence[TokenMask]


class Preparer:
    """Prepares the batches of a pass.

    Args:
        model, options, config: of the pass.
        architecture: of the model.
        device: where the model's inputs go.
        split_by_length: short samples may be run separately from long ones.

    Attributes:
        masks_from_batches: masks are derived from batches, not by a function of the user's.
    """

    def __init__(
        self,
        model: nn.Module,
        options: CalibrateOptions,
        config: LoraConfig,
        architecture: Architecture,
        device: torch.device,
        split_by_length: bool,
    ) -> None:
        self.masks_from_batches = options.prepare_model_inputs_fn == AUTO
        self._model, self._options, self._config = model, options, config
        self._architecture, self._device = architecture, device
        self._split_by_length = split_by_length
        self._is_of_transformers = is_defined_in_transformers(base_model_of(model))
        self._warned: set[str] = set()  # warnings already given in this pass
        self._sequence_first: dict[str, bool] = {}  # by layer: whether its input is sequence first

    def prepare(self, batch: Any, batch_number: int) -> PreparedBatch:
        """Return a batch without unneeded padding, and its masks.

        Args:
            batch: as it came from the loader.
            batch_number: from 0.
        """
        by_default = self._options.forward_fn is None
        if by_default:
            arguments.raise_if_nested(batch, self._model)
            whole = batches.as_mapping(batch)
            if whole is batch or not arguments.takes_whole_object(batch, whole, self._model):
                if not isinstance(whole, Mapping):  # with names, an index looks like one sample
                    arguments.raise_if_misread(whole, self._model)
                batch = batches.as_tensors(arguments.positional_to_named(whole, self._model))
                arguments.raise_if_misread(batch, self._model)
        parts = [batch]
        if by_default and self._options.trim_padding and self.masks_from_batches:
            parts = batches.without_padding(
                batch, self._device, self._architecture, self._split_by_length
            )
        masks = [self._mask_of(part, batch_number) for part in parts]
        # a model or a function of the user's may hide padding itself
        own_rows = callable(self._options.prepare_layer_inputs_fn)
        known = by_default and self.masks_from_batches and self._is_of_transformers and not own_rows
        if known and batch_number == 0:  # later, the host may wait for the device
            for part, mask in zip(parts, masks, strict=True):
                warn_of_counted_padding(part, mask, self._architecture.config, self._warned)
        self._draw(masks, batch_number)
        return PreparedBatch(parts, masks)

    def drawn_mask_of(self, batch: Any, batch_number: int) -> TokenMask:
        """Return the mask of a batch, or of named arguments, which is not run in parts."""
        mask = self._mask_of(batch, batch_number)
        self._draw([mask], batch_number)
        return mask

    def _mask_of(self, batch: Any, batch_number: int) -> TokenMask:
        if not self.masks_from_batches:
            return TokenMask(None)
        batch = batches.as_mapping(batch)
        mask = mask_of_batch(batch, self._config, self._architecture, self._warned)
        mask.sequence_first = self._sequence_first
        if batch_number == 0 and not (self._is_of_transformers or mask.has_token_masks):
            ids = batches.first_ids(batch)
            mask.seem_kept = None if ids is None else seem_kept(ids.cpu())
        return mask

    def _draw(self, masks: Sequence[TokenMask], batch_number: int) -> None:
        """Restrict the masks to a random subset of tokens if ``tokens_per_step`` is set."""
        limit = self._options.tokens_per_step
        if limit is None:
            return
        draw_of_batch = Draw(limit, self._options.seed, batch_number)
        # for inputs with rows of neither stream the limit is split as for the main stream
        for key, attribute in {"": "main", "decoder": "decoder"}.items():
            streams = [getattr(mask, attribute) for mask in masks]
            counts = [0 if stream is None else int(stream.sum()) for stream in streams]
            for mask, draw in zip(masks, draw_of_batch.split_over_parts(counts), strict=True):
                mask.draws[key] = draw
