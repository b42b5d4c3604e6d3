"""Which rows of a layer's input are tokens that count."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..errors import warn
from ..model.architecture import FrameLengthFunction
from ..model.layer_kind import LayerKind, kind_of_layer
from ..surroundings.devices import copy_to_device
from .fits import (
    FittedMask,
    TokenSlice,
    are_same_tensors,
    holds_more_than,
    longest_sample,
    mask_of_pairs,
    padded_to_windows,
    repeated_per_frame,
    repeated_per_head,
    token_slice_of,
)
from .media_masks import frame_mask_for, patch_mask_for, tile_mask_for
from .subsample import Draw

__all__ = ["TokenMask"]

_ADAPTER_OPTIONS: tuple[dict[str, bool], ...] = ({}, {"add_adapter": False}, {"add_adapter": True})


class TokenMask:
    """The tokens of one batch that EVA uses.

    Args:
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

    Attributes:
        masks: all token masks; layers that read one tensor share a stream only if these are the
            same tensors.
        draws: random subsets of tokens (``tokens_per_step``) by the key of a mask; "" for others.
        warned: warnings already given, and kinds of layers already warned about.
        suppress_warnings: do not warn about layers that no mask fits.
        skips_media_layers: do not use ``unmasked_prefixes`` and ``unit_masks`` for layers named
            after sound or images.
        main_is_assumed: ``main`` is an assumption that every token counts; the masks are of others.
        from_parts: the masks are those passed to parts of the model; the batch has none.
        sequence_first: by layer, whether its input is, as far as batches have shown.
        attended_states: the hidden states that ``cross_masks`` masks, if they have the shape of
            ``main``.
    """

    def __init__(
        self,
        main: Tensor | None,
        decoder: Tensor | None = None,
        tokens_per_position: int = 1,
        multimodal: bool = False,
        encoder_decoder: bool = False,
        cross_masks: Sequence[Tensor] = (),
        padding_multiple: int = 1,
        frame_length_functions: Sequence[FrameLengthFunction] = (),
        text_first: bool | None = None,
        non_text_mask: Tensor | None = None,
        qformer_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        pixel_masks: Sequence[Tensor] = (),
        tile_mask: Tensor | None = None,
        audio_only: bool = False,
        has_media: bool = False,
        patch_sizes: tuple[int, ...] = (),
        ignored_prefixes: tuple[str, ...] = (),
        unmasked_prefixes: tuple[str, ...] = (),
        unpadded: Tensor | None = None,
        unit_masks: Sequence[Tensor] = (),
    ) -> None:
        self.main, self.decoder, self.tokens_per_position = main, decoder, tokens_per_position
        self.multimodal, self.encoder_decoder = multimodal, encoder_decoder
        self.cross_masks, self.padding_multiple = cross_masks, padding_multiple
        self.frame_length_functions = frame_length_functions
        self.text_first = text_first
        self.non_text_mask, self.qformer_mask = non_text_mask, qformer_mask
        self.audio_mask, self.pixel_masks, self.tile_mask = audio_mask, pixel_masks, tile_mask
        self.audio_only, self.has_media = audio_only, has_media
        self.patch_sizes = patch_sizes
        self.ignored_prefixes, self.unmasked_prefixes = ignored_prefixes, unmasked_prefixes
        self.unpadded, self.unit_masks = unpadded, unit_masks
        self.masks = (main, decoder, non_text_mask, qformer_mask, *cross_masks, *unit_masks)
        self.draws: dict[str, Draw] = {}
        self.warned: set[str] = set()
        self.suppress_warnings = self.skips_media_layers = False
        self.main_is_assumed = self.from_parts = False
        self.sequence_first: dict[str, bool] = {}
        self.attended_states: ref[Tensor] | None = None
        self._attended_mask: TokenMask | None = None
        self._stream_fits: dict[LayerKind, list[FittedMask]] = {}
        self._fits: dict[tuple[LayerKind, tuple[int, ...]], FittedMask | None] = {}
        self._rows: dict[tuple[str, bool, torch.device], Tensor | None] = {}
        self._flat_masks: dict[tuple[str, torch.device], Tensor | None] = {}
        self._last_selected: tuple[Tensor | None, str, Tensor | None] = (None, "", None)

    def with_unit_masks(self, unit_masks: Iterable[Tensor]) -> TokenMask:
        """Return this mask with these masks as ``unit_masks``, the first of each new shape."""
        token_masks = self.masks[: len(self.masks) - len(self.unit_masks)]
        shapes = {mask.shape for mask in token_masks if mask is not None}
        new = copy.copy(self)
        new.unit_masks = []
        for mask in unit_masks:
            if mask.shape not in shapes:
                shapes.add(mask.shape)
                new.unit_masks.append(mask)
        new.masks, new._rows = (*token_masks, *new.unit_masks), {}
        return new

    def with_part_masks(self, part: TokenMask) -> TokenMask:
        """Return this mask with the ``cross_masks`` and ``unit_masks`` of a part added."""
        new = copy.copy(self)
        new.cross_masks = [*part.cross_masks, *self.cross_masks]
        new.masks = (*part.cross_masks, *self.masks)
        new._stream_fits, new._fits, new._flat_masks = {}, {}, {}
        new._last_selected, new.from_parts = (None, "", None), False
        new.attended_states = new._attended_mask = None  # to be determined again
        return new.with_unit_masks([*part.unit_masks, *self.unit_masks])

    def after_part(self, part: TokenMask, skips_media_layers: bool) -> TokenMask:
        """Return the mask after a part of the model: this one, and the part's of other shapes.

        The part's takes precedence if this one, too, is known from parts only.

        Args:
            part: the mask that was used in the part.
            skips_media_layers: see :class:`TokenMask`.
        """
        if self.has_token_masks and not self.from_parts:
            new, more = self, [part.main, part.decoder]
        else:
            new, more = copy.copy(part), [self.main, *self.unit_masks]
            new.unmasked_prefixes = ("",)  # only a shape tells what is read there
            new.from_parts = True
        new = new.with_unit_masks(mask for mask in (*more, *new.unit_masks) if mask is not None)
        if new.from_parts is self.from_parts and are_same_tensors(new.masks, self.masks):
            return self  # which keeps its cached rows
        new.skips_media_layers = skips_media_layers
        return new

    def for_input(self, x: Tensor) -> TokenMask:
        """Return the mask of a layer's input: of ``cross_masks`` if that is ``attended_states``."""
        if self.attended_states is None or self.attended_states() is not x:
            return self
        if self._attended_mask is None:
            alone = self._attended_mask = TokenMask(self.cross_masks[0])
            alone.draws, alone.warned = self.draws, self.warned
            alone.suppress_warnings = self.suppress_warnings
            alone.sequence_first = self.sequence_first
        return self._attended_mask

    @property
    def excludes_tokens(self) -> bool:
        """Whether any token is left out."""
        return any(m is not None and not bool(m.all()) for m in (self.main, self.decoder))

    @property
    def has_token_masks(self) -> bool:
        """Whether there is any token mask; masks over sound samples and pixels do not count."""
        return any(mask is not None for mask in self.masks)

    @property
    def media_unmasked(self) -> bool:
        """Whether other modalities besides text, such as images and sound, have no mask."""
        others = self.audio_mask, self.tile_mask, self.non_text_mask, self.qformer_mask
        in_one_stream = self.multimodal and not self.encoder_decoder
        return in_one_stream and all(mask is None for mask in (*others, *self.pixel_masks))

    def rows(
        self, shape: torch.Size, device: torch.device, name: str, x: Tensor | None = None
    ) -> Tensor | None:
        """Return the rows of a layer's input to use, after flattening all but the last dimension.

        Args:
            shape: of the layer's input, features last.
            device: of the returned indices.
            name: of the layer.
            x: the input, which may be a view of more tokens, see :func:`token_slice_of`.

        Returns:
            int64 indices, or ``None`` for all rows.
        """
        leading, layer = tuple(shape[:-1]), self._layer_kind(name)
        unmasked = name.startswith(self.unmasked_prefixes)
        fit = self._find_fit(layer, leading, unmasked)
        if fit is None and x is not None and (token_slice := token_slice_of(x)) is not None:
            fit = self._fit_slice(layer, leading, unmasked, token_slice)
        if fit is None:
            if not unmasked:
                self._warn_unmatched(layer, leading, name)
            if not self.draws:
                return None
            every_row = torch.ones(shape[:-1].numel(), dtype=torch.bool, device="cpu")
            fit = FittedMask(f"all of {len(every_row)}", every_row)
        return self._indices(fit, device, self._is_sequence_first(fit.mask, leading, name))

    def _find_fit(
        self, layer: LayerKind, leading: tuple[int, ...], unmasked: bool
    ) -> FittedMask | None:
        reads_other_media = self.skips_media_layers and layer.reads_no_text
        fit = None if unmasked and reads_other_media else self._fit_tokens(layer, leading, unmasked)
        return self._fit_units(leading) if fit is None and not reads_other_media else fit

    def _fit_slice(
        self, layer: LayerKind, leading: tuple[int, ...], unmasked: bool, token_slice: TokenSlice
    ) -> FittedMask | None:
        samples, tokens = leading
        all_tokens = self._find_fit(layer, (samples, token_slice.total), unmasked)
        if all_tokens is None or all_tokens.mask.shape != (samples, token_slice.total):
            return None
        kept = all_tokens.mask[:, token_slice.begin : token_slice.begin + tokens]
        return FittedMask(f"{all_tokens.key} {tuple(token_slice)} {leading}", kept)

    def _fit_tokens(
        self, layer: LayerKind, leading: tuple[int, ...], unmasked: bool
    ) -> FittedMask | None:
        if unmasked:  # such a part may read the text as well as tokens of its own
            shapes = leading, leading[::-1]
            fits = (fit for fit in self._token_streams(layer) if tuple(fit.mask.shape) in shapes)
            return next(fits, None)
        key = layer, leading
        if key not in self._fits:
            self._fits[key] = next(self._matching_fits(layer, leading), None)
        return self._fits[key]

    def _fit_units(self, leading: tuple[int, ...]) -> FittedMask | None:
        shapes = leading, leading[::-1]
        fits = (FittedMask(f"units {i}", mask) for i, mask in enumerate(self.unit_masks))
        return next((fit for fit in fits if tuple(fit.mask.shape) in shapes), None)

    def rows_of_selected(
        self, token_indices: Tensor, num_tokens: int, name: str
    ) -> tuple[bool, Tensor | None]:
        """Return the rows to use of an input with selected tokens, such as that of an expert.

        Args:
            token_indices: the token index of each row, (n,).
            num_tokens: the number of tokens they were selected from.
            name: of the layer.

        Returns:
            Whether there is a mask over ``num_tokens`` tokens; and the rows, all if ``None``.
        """
        for fit in self._token_streams(self._layer_kind(name)):
            if fit.mask.numel() == num_tokens:
                last_indices, last_key, _ = self._last_selected
                if last_indices is not token_indices or last_key != fit.key:
                    rows = self._rows_of_selected(fit, token_indices)
                    self._last_selected = token_indices, fit.key, rows
                return True, self._last_selected[2]
        return False, None

    def _rows_of_selected(self, fit: FittedMask, token_indices: Tensor) -> Tensor | None:
        key = fit.key, token_indices.device
        if key not in self._flat_masks:
            flat = self._subsampled(fit).reshape(-1)
            self._flat_masks[key] = None if bool(flat.all()) else _upload(flat, key[1])
        flat_mask = self._flat_masks[key]
        return None if flat_mask is None else flat_mask[token_indices].nonzero().flatten()

    def _layer_kind(self, name: str) -> LayerKind:
        return kind_of_layer(name, self.ignored_prefixes)

    def _token_streams(self, layer: LayerKind) -> list[FittedMask]:
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
        if self.multimodal and layer.reads_no_text and (self.has_media or not layer.in_projector):
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
        if layer.reads_encoder or (layer.in_encoder and not layer.in_decoder):
            return [main]
        # a decoder may read the encoder's tokens in layers whose names do not show it
        return [decoder, main]

    def _matching_fits(self, layer: LayerKind, leading: tuple[int, ...]) -> Iterator[FittedMask]:
        """Yield the masks that fit an input of a shape, the likeliest first."""
        others = [] if self.non_text_mask is None else [FittedMask("non-text", self.non_text_mask)]
        texts = [repeated_per_frame(fit, leading) for fit in self._token_streams(layer)]
        for key, mask in [*texts, *others]:
            flat = len(leading) == 1 and leading[0] == mask.numel() != mask.shape[0]
            if flat or leading in (tuple(mask.shape), tuple(mask.shape)[::-1]):
                yield FittedMask(key, mask.reshape(-1) if flat else mask)
        if len(leading) == 3 and self.encoder_decoder and self.main is not None:
            frames = self._frame_mask(self.main, leading[:2])
            if frames is not None:
                pairs = mask_of_pairs(frames, self.decoder, leading)
                yield FittedMask(f"pairs {leading}", pairs)
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
        functions, window = self.frame_length_functions, self.padding_multiple
        for count_frames, options in itertools.product(functions, _ADAPTER_OPTIONS):
            try:
                found = [count_frames(torch.tensor([n], device="cpu"), **options) for n in counts]
                stages = list(zip(*map(_as_ints, found), strict=True))
            except (TypeError, ValueError, RuntimeError, AttributeError):  # other arguments
                continue
            for stage_counts in stages:
                if leading[-1] in (stage_counts[0], -(-stage_counts[0] // window) * window):
                    kept = torch.tensor(stage_counts[1:], device="cpu")
                    return torch.arange(leading[-1], device="cpu") < kept[:, None]
        return None

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
        for pixels in self.pixel_masks if self._reads_pixels(layer) else ():
            yield "pixels", patch_mask_for(pixels, leading, self.patch_sizes)
        if self.tile_mask is not None and (layer.reads_no_text or layer.reads_encoder):
            yield "tiles", tile_mask_for(self.tile_mask, leading)

    def _reads_audio(self, layer: LayerKind) -> bool:
        if layer.reads_distances:
            return False
        if layer.reads_audio or not self.audio_only:
            return layer.reads_audio
        if self.multimodal:  # a text encoder uses the text's mask; if there is one, it was tried
            in_encoder = layer.in_encoder and not layer.in_decoder
            return layer.reads_no_text or (in_encoder and self.main is not None)
        return layer.reads_encoder or not layer.in_decoder

    def _reads_pixels(self, layer: LayerKind) -> bool:
        if layer.reads_queries:
            return False
        if layer.reads_no_text or self.multimodal:
            return layer.reads_no_text and not layer.reads_audio
        # after the encoder's patches there may be queries, whose number may fit by chance
        return layer.reads_encoder or (layer.in_encoder and not layer.in_decoder)

    def _is_sequence_first(self, mask: Tensor, leading: tuple[int, ...], name: str) -> bool:
        """Tell whether a layer takes the sequence first; a square mask cannot show it."""
        if mask.dim() != 2:
            return False
        if mask.shape[0] != mask.shape[1]:
            self.sequence_first[name] = leading != tuple(mask.shape)
        return self.sequence_first.get(name, False)

    def _subsampled(self, fit: FittedMask) -> Tensor:
        if not self.draws:
            return fit.mask
        return self.draws.get(fit.key, self.draws[""]).subset(fit.mask)

    def _indices(self, fit: FittedMask, device: torch.device, transposed: bool) -> Tensor | None:
        key = (fit.key, transposed, device)
        if key not in self._rows:
            mask = self._subsampled(fit)
            flat = (mask.mT if transposed else mask).reshape(-1)
            kept = None if bool(flat.all()) else flat.nonzero().flatten()
            self._rows[key] = None if kept is None else _upload(kept, device)
        return self._rows[key]

    def _warn_unmatched(self, layer: LayerKind, leading: tuple[int, ...], name: str) -> None:
        masks = [fit.mask for fit in self._token_streams(layer)]
        # Every row is to be used, without a warning: without a mask, with one that keeps all, for
        # pooled inputs (one row for one or several samples), for tokens without padding, as in
        # packed sequences, for inputs common to all samples (position embeddings), and for other
        # modalities.
        one_for_all = leading[:1] == (1,) and all(m.shape[0] > 1 for m in masks)
        one_for_all = one_for_all or layer.reads_distances
        if self.multimodal:  # warn only of inputs that may hold text and others in one sequence
            masks = [m for m in masks if not layer.reads_encoder and holds_more_than(leading, m)]
        if self.pixel_masks and layer.in_encoder and self._reads_pixels(layer):
            masks = [m for m in self.pixel_masks if leading[:-1] == (len(m),)]
        kind = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        if self.suppress_warnings or kind in self.warned or one_for_all:
            return
        rows = math.prod(leading)
        if all(bool(m.all()) or rows <= len(m) for m in masks):
            return
        self.warned.add(kind)
        others = (
            ""
            if kind == name
            else f". Further layers named like {kind} get no warning of their own"
        )
        warn(
            f"layer {name}: no token mask fits its input of leading shape {leading} (the mask has "
            f"shape {tuple(masks[0].shape)}), so all of its rows are used, padding included. To "
            f"select rows, pass prepare_layer_inputs_fn{others}",
        )


def _as_ints(counts: Any) -> list[int]:
    """Return numbers of frames as a list: a model may give one after each of several parts."""
    return [int(count) for count in (counts if isinstance(counts, tuple) else (counts,))]


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only then the copy is asynchronous
    return copy_to_device(device, tensor)
