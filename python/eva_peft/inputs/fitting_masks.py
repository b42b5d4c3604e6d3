"""The masks of a batch, and which of them fit the input of a layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.architecture import FrameLengthFunction
from ..model.layer_kind import LayerKind
from .fits import (
    FittedMask,
    holds_more_than,
    longest_sample,
    mask_of_pairs,
    of_own_pairs,
    padded_to_windows,
    repeated_per_frame,
    repeated_per_head,
)
from .media_masks import frame_mask_for, patch_mask_for, tile_mask_for

__all__ = ["BatchMasks"]

_ADAPTER_OPTIONS: tuple[dict[str, bool], ...] = ({}, {"add_adapter": False}, {"add_adapter": True})


@dataclass(eq=False, repr=False)
class BatchMasks:
    """The masks of one batch, and what is known of the model that reads it.

    Attributes:
        main: bool (B, T): tokens of the model's only, or encoder's, stream; all if ``None``.
        decoder: bool (B, T_dec): tokens of an encoder-decoder model's decoder stream.
        tokens_per_position: how many tokens of a layer's input one position of ``main`` stands for.
        multimodal: the batch holds other modalities besides text (images, sound).
        encoder_decoder: ``main`` is the mask of the encoder only, whatever the shapes.
        cross_masks: bool (B, S) each: tokens of hidden states from elsewhere, for cross attention,
            or the prompt that images are generated from.
        padding_multiple: the model pads texts, or frames of sound, on the right to a multiple.
        frame_length_functions: of a model that turns T samples of sound into fewer frames: see
            :class:`eva_peft.model.architecture.Architecture`.
        text_first: whether text comes first in a sequence that is longer than the text; ``None``
            if unknown.
        non_text_mask: bool (B, V): tokens other than text that have a mask: boxes of images,
            entities.
        qformer_mask: bool (B, T): the text that a Q-Former reads after its queries.
        audio_mask, pixel_masks, tile_mask: with or without text; see ``media_masks``.
        audio_only: there is sound, and nothing else except possibly text.
        has_media: there is sound, or there are images.
        patch_sizes: of images in pixels, if the model has them in its config.
        ignored_prefixes: of layer names, to be ignored when judging by the name what a layer reads.
        unit_masks: bool (B, W) each: masks of units other than tokens, such as words or spans.
        unmasked_prefixes: of the names of layers that may read inputs without a mask: only inputs
            of exactly the text's shape are taken for text there.
        unpadded: bool (B, T): the mask of padding only, if labels mask more than that.
    """

    main: Tensor | None
    decoder: Tensor | None = None
    tokens_per_position: int = 1
    multimodal: bool = False
    encoder_decoder: bool = False
    cross_masks: Sequence[Tensor] = ()
    padding_multiple: int = 1
    frame_length_functions: Sequence[FrameLengthFunction] = ()
    text_first: bool | None = None
    non_text_mask: Tensor | None = None
    qformer_mask: Tensor | None = None
    audio_mask: Tensor | None = None
    pixel_masks: Sequence[Tensor] = ()
    tile_mask: Tensor | None = None
    audio_only: bool = False
    has_media: bool = False
    patch_sizes: tuple[int, ...] = ()
    ignored_prefixes: tuple[str, ...] = ()
    unmasked_prefixes: tuple[str, ...] = ()
    unpadded: Tensor | None = None
    unit_masks: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        self._stream_fits: dict[LayerKind, list[FittedMask]] = {}

    def token_streams(self, layer: LayerKind) -> list[FittedMask]:
        """Return the masks of the token streams that a layer may read, the likeliest first."""
        if layer not in self._stream_fits:
            streams = self._readable_streams(layer)
            present = [FittedMask(key, mask) for key, mask in streams if mask is not None]
            padded = padded_to_windows(present, self.padding_multiple)
            self._stream_fits[layer] = [*present, *padded]
        return self._stream_fits[layer]

    def _readable_streams(self, layer: LayerKind) -> list[tuple[str, Tensor | None]]:
        main, decoder = ("main", self.main), ("decoder", self.decoder)
        if layer.in_qformer and self.qformer_mask is not None:
            reads_no_text = layer.reads_encoder or layer.reads_queries
            return [] if reads_no_text else [("qformer", self.qformer_mask)]
        if self.cross_masks and (layer.reads_encoder or (layer.reads_prompt and self.main is None)):
            return [(f"attended {i}", mask) for i, mask in enumerate(self.cross_masks)]
        # given neither sound nor images, a projector reads text, and a decoder makes the sound
        reads_tokens = layer.in_projector or (self.encoder_decoder and layer.in_decoder)
        if self.multimodal and layer.reads_no_text and (self.has_media or not reads_tokens):
            # text only if the other modality has a mask, too: the same layers of LXMERT's cross
            # attention read either
            return [] if self.non_text_mask is None else [("non-text", self.non_text_mask), main]
        in_text_decoder = self.encoder_decoder and layer.in_decoder  # attends to an encoder's text
        reads_media = layer.in_text and layer.reads_encoder and not in_text_decoder
        if self.multimodal and self.has_media and reads_media:
            return []
        if not self.encoder_decoder:  # any layer may read attended tokens, of another shape
            attended = [] if self.main is None else self.cross_masks
            return [main, decoder, *((f"attended {i}", mask) for i, mask in enumerate(attended))]
        if layer.reads_encoder or layer.in_encoder_only:
            return [main]
        # a decoder may read the encoder's tokens in layers whose names do not show it
        return [decoder, main]

    def matching_fits(self, layer: LayerKind, leading: tuple[int, ...]) -> Iterator[FittedMask]:
        """Yield the masks that fit an input of a shape, the likeliest first."""
        others = [] if self.non_text_mask is None else [FittedMask("non-text", self.non_text_mask)]
        texts = [repeated_per_frame(fit, leading) for fit in self.token_streams(layer)]
        for key, mask in [*texts, *others]:
            flat = len(leading) == 1 and leading[0] == mask.numel() != mask.shape[0]
            if flat or leading in (tuple(mask.shape), tuple(mask.shape)[::-1]):
                yield FittedMask(key, mask.reshape(-1) if flat else mask)
        if len(leading) == 3 and self.encoder_decoder and self.main is not None:
            frames = self._frame_mask(self.main, leading[:2])
            if frames is not None:
                # an encoder's convolutions read bands of the frames, perhaps as many as steps
                steps = None if layer.in_encoder_only else self.decoder
                yield FittedMask(f"pairs {leading}", mask_of_pairs(frames, steps, leading))
        for key, mask in texts:
            for expanded in self._expanded_masks(key, mask, leading):
                yield FittedMask(f"{key} {leading}", expanded)
        for kind, media_mask in self._media_masks(layer, leading):
            if media_mask is not None:
                yield FittedMask(f"{kind} {leading}", media_mask)

    def _expanded_masks(self, key: str, mask: Tensor, leading: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield a mask, (B, T), adapted to inputs with more or fewer rows."""
        if leading == (len(mask), mask.shape[1] * self.tokens_per_position):
            yield mask.repeat_interleave(self.tokens_per_position, dim=1)
        frames = self._frame_mask(mask, leading) if key == "main" else None
        for token_mask in (mask, frames):
            heads = None if token_mask is None else repeated_per_head(token_mask, leading)
            if heads is not None:
                yield heads
        if frames is not None and tuple(frames.shape) == leading:
            yield frames
        if (pairs := of_own_pairs(mask, leading)) is not None:
            yield pairs
        if len(leading) == 2 and leading[0] == mask.numel() > max(mask.shape):
            yield mask.reshape(-1, 1).expand(leading)  # for each token the outputs of n layers
        seen = self.unpadded if key == "main" and self.unpadded is not None else mask
        longest = longest_sample(seen)  # the length to which a packed sequence is padded again
        if leading in ((len(mask), longest), (longest, len(mask))) and not mask[:, longest:].any():
            yield mask[:, :longest]
        if leading[:-1] in ((), (1,)) and leading[-1:] == (int(seen.sum()),):
            yield mask[seen].view(leading)  # all samples concatenated, without padding
        qformer = key.startswith("qformer")
        text_first = False if qformer else self.text_first
        if (qformer or key == "main") and text_first is not None and holds_more_than(leading, mask):
            yield self._with_other_tokens(mask, leading, text_first)

    def _frame_mask(self, mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
        """Return the mask of frames, (B, T'), of a mask over samples of sound, (B, T)."""
        if len(leading) < 2 or leading[0] != len(mask):
            return None
        counts = [mask.shape[1], *mask.sum(1).tolist()]
        # padded frames may be as many as those of an earlier stage, without padding
        for window in dict.fromkeys((1, self.padding_multiple)):
            for total, *kept in self._frame_counts(counts):
                if leading[-1] == -(-total // window) * window:
                    lengths = torch.tensor(kept, device="cpu")
                    return torch.arange(leading[-1], device="cpu") < lengths[:, None]
        return None

    def _frame_counts(self, counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Yield how many frames are made of so many samples of sound each, for every stage."""
        for count_frames, options in itertools.product(
            self.frame_length_functions, _ADAPTER_OPTIONS
        ):
            try:
                found = [count_frames(torch.tensor([n], device="cpu"), **options) for n in counts]
                stages = list(zip(*map(_as_ints, found), strict=True))
            except (TypeError, ValueError, RuntimeError, AttributeError):  # other arguments
                continue
            yield from stages

    def _with_other_tokens(
        self, mask: Tensor, leading: tuple[int, ...], text_first: bool
    ) -> Tensor:
        """Return the mask of one sequence of text, masked by (B, T), and other tokens."""
        others = mask.new_ones(len(mask), leading[1] - mask.shape[1])
        if self.non_text_mask is not None and self.non_text_mask.shape == others.shape:
            others = self.non_text_mask
        return torch.cat([mask, others] if text_first else [others, mask], dim=1)

    def _media_masks(
        self, layer: LayerKind, leading: tuple[int, ...]
    ) -> Iterator[tuple[str, Tensor | None]]:
        if self.audio_mask is not None and self._reads_audio(layer):
            yield "sound", self._frame_mask(self.audio_mask, leading)
            yield "sound", frame_mask_for(self.audio_mask, leading)
        audio_alone = self.audio_only and not self.multimodal and self._reads_audio(layer)
        if audio_alone and self.main is not None and not holds_more_than(leading, self.main):
            yield "frames", frame_mask_for(self.main, leading)  # not by the model's functions
        for pixels in self.pixel_masks if self.reads_pixels(layer) else ():
            yield "pixels", patch_mask_for(pixels, leading, self.patch_sizes)
        if self.tile_mask is not None and (layer.reads_no_text or layer.reads_encoder):
            yield "tiles", tile_mask_for(self.tile_mask, leading)

    def _reads_audio(self, layer: LayerKind) -> bool:
        if layer.reads_distances:
            return False
        if layer.reads_audio or not self.audio_only:
            return layer.reads_audio
        if self.multimodal:  # a text encoder uses the text's mask; if there is one, it was tried
            return layer.reads_no_text or (layer.in_encoder_only and self.main is not None)
        return layer.reads_encoder or not layer.in_decoder

    def reads_pixels(self, layer: LayerKind) -> bool:
        """Tell whether a layer reads patches of images, which ``pixel_masks`` mask."""
        if layer.reads_queries:
            return False
        if layer.reads_no_text or self.multimodal:
            return layer.reads_no_text and not layer.reads_audio
        # after the encoder's patches there may be queries, whose number may fit by chance
        return layer.reads_encoder or layer.in_encoder_only


def _as_ints(counts: Any) -> list[int]:
    """Return numbers of frames as a list: a model may give one after each of several parts."""
    return [int(count) for count in (counts if isinstance(counts, tuple) else (counts,))]
