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
from ..model.architecture import FrameLengths
from ..model.layer_kind import LayerKind, kind_of_layer
from ..surroundings.devices import copied_to
from .fits import (
    Fit,
    Part,
    are_same,
    for_every_frame,
    for_every_head,
    in_windows,
    is_longer,
    longest_of,
    part_of,
)
from .media_masks import frames_seen, patches_seen, tiles_seen
from .subsample import Draw

__all__ = ["TokenMask"]

_ADAPTER_OPTIONS: tuple[dict[str, bool], ...] = ({}, {"add_adapter": False}, {"add_adapter": True})


class TokenMask:
    """The tokens of one batch that EVA uses.

    Args:
        main: bool (B, T): tokens of the model's only, or encoder's, stream; all if ``None``.
        decoder: bool (B, T_dec): tokens of an encoder-decoder model's decoder stream.
        streams: how many tokens of a layer's input one position of ``main`` stands for.
        mixed: the batch holds something beside text (images, sound).
        encoder_decoder: ``main`` is that of the encoder only, whatever the shapes.
        given: bool (B, S) each: tokens of hidden states that come from elsewhere, for cross
            attention, or as the text that images are made of.
        window: the model pads texts on the right to a multiple of so many tokens.
        frame_lengths: of a model that turns T samples of sound into fewer frames: see
            :class:`eva_peft.model.architecture.Architecture`.
        text_first: where a sequence is longer than the text, whether text comes first in it;
            ``None`` if that is not known.
        beside: bool (B, V): tokens beside text that have a mask: boxes of images, entities.
        queries: bool (B, T): the text that a Q-Former reads behind its queries.
        sound, pixels, tiles: of sound and images, beside text or by themselves; see
            ``media_masks``.
        sound_only: there is sound, and nothing else than it and maybe text.
        media: there is sound, or there are images.
        patch_sizes: of images in pixels, where the model tells them.
        prefixes: of names of layers, which say nothing of what they read.
        others: bool (B, W) each: of something else than tokens, as words or spans.
        apart: prefixes of names of layers that may read what has no mask: of these only
            inputs of the text's own shape are taken for text.
        unpadded: bool (B, T): text without its padding, where labels mask more than that.

    Attributes:
        masks: all of tokens; layers that read one tensor share a stream only where these are same.
        draws: random subsets of tokens (``tokens_per_step``) by the key of a mask; "" for others.
        warned: kinds of layers that need no second warning.
        quiet: no layer is warned about.
        supposed: ``main`` is an assumption, that every token counts; others have a mask.
        of_parts: the masks are those passed to parts of the model; the batch has none.
        of_text: ``apart`` and ``others`` do not hold for layers whose names say sound or images.
        transposed: by layer, whether its input is sequence first, as far as batches have shown.
        attended: the hidden states that ``given`` masks, where they have the shape of ``main``.
    """

    def __init__(
        self,
        main: Tensor | None,
        decoder: Tensor | None = None,
        streams: int = 1,
        mixed: bool = False,
        encoder_decoder: bool = False,
        given: Sequence[Tensor] = (),
        window: int = 1,
        frame_lengths: Sequence[FrameLengths] = (),
        text_first: bool | None = None,
        beside: Tensor | None = None,
        queries: Tensor | None = None,
        sound: Tensor | None = None,
        pixels: Sequence[Tensor] = (),
        tiles: Tensor | None = None,
        sound_only: bool = False,
        media: bool = False,
        patch_sizes: tuple[int, ...] = (),
        prefixes: tuple[str, ...] = (),
        apart: tuple[str, ...] = (),
        unpadded: Tensor | None = None,
        others: Sequence[Tensor] = (),
    ) -> None:
        self.main, self.decoder, self.streams = main, decoder, streams
        self.mixed, self.encoder_decoder = mixed, encoder_decoder
        self.given, self.window, self.frame_lengths = given, window, frame_lengths
        self.text_first, self.beside, self.queries = text_first, beside, queries
        self.sound, self.pixels, self.tiles = sound, pixels, tiles
        self.sound_only, self.media = sound_only, media
        self.patch_sizes, self.prefixes, self.apart = patch_sizes, prefixes, apart
        self.unpadded, self.others = unpadded, others
        self.masks = (main, decoder, beside, queries, *given, *others)
        self.draws: dict[str, Draw] = {}
        self.warned: set[str] = set()
        self.quiet = self.of_text = self.supposed = self.of_parts = False
        self.transposed: dict[str, bool] = {}
        self.attended: ref[Tensor] | None = None
        self._alone: TokenMask | None = None
        self._texts: dict[LayerKind, list[Fit]] = {}
        self._fits: dict[tuple[LayerKind, tuple[int, ...]], Fit | None] = {}
        self._rows: dict[tuple[str, bool, torch.device], Tensor | None] = {}
        self._kept: dict[tuple[str, torch.device], Tensor | None] = {}
        self._picked: tuple[Tensor | None, str, Tensor | None] = (None, "", None)

    def with_others(self, others: Iterable[Tensor]) -> TokenMask:
        """Return this mask with others of something else than tokens, the first of each shape."""
        of_tokens = self.masks[: len(self.masks) - len(self.others)]
        shapes = {mask.shape for mask in of_tokens if mask is not None}
        found = copy.copy(self)
        found.others = []
        for mask in others:
            if mask.shape not in shapes:
                shapes.add(mask.shape)
                found.others.append(mask)
        found.masks, found._rows = (*of_tokens, *found.others), {}
        return found

    def with_given(self, told: TokenMask) -> TokenMask:
        """Return this mask with a part's masks of tokens that are not its own."""
        found = copy.copy(self)
        found.given = [*told.given, *self.given]
        found.masks = (*told.given, *self.masks)
        found._texts, found._fits, found._kept = {}, {}, {}
        found._picked, found.of_parts = (None, "", None), False
        found.attended = found._alone = None  # it is told apart anew
        return found.with_others([*told.others, *self.others])

    def behind(self, told: TokenMask, of_text: bool) -> TokenMask:
        """Return the mask behind a part of the model: this one, and the part's of other shapes.

        Where this one is known from parts alone, the part's comes first.

        Args:
            told: the mask that was used in the part.
            of_text: see above.
        """
        if self.tells and not self.of_parts:
            found, first = self, [told.main, told.decoder]
        else:
            found, first = copy.copy(told), [self.main, *self.others]
            found.apart, found.of_parts = ("",), True  # only a shape tells what is read there
        found = found.with_others(each for each in (*first, *found.others) if each is not None)
        if found.of_parts is self.of_parts and are_same(found.masks, self.masks):
            return self  # with the rows that it has found
        found.of_text = of_text
        return found

    def of_input(self, x: Tensor) -> TokenMask:
        """Return the mask of a layer's input: another one if that is what ``given`` masks."""
        if self.attended is None or self.attended() is not x:
            return self
        if self._alone is None:
            self._alone = TokenMask(self.given[0])
            self._alone.draws, self._alone.warned = self.draws, self.warned
            self._alone.quiet, self._alone.transposed = self.quiet, self.transposed
        return self._alone

    @property
    def selective(self) -> bool:
        """Whether any token is left out."""
        return any(m is not None and not bool(m.all()) for m in (self.main, self.decoder))

    @property
    def tells(self) -> bool:
        """Whether anything is known of tokens; masks over samples of sound and pixels tell less."""
        return any(mask is not None for mask in self.masks)

    @property
    def of_text_alone(self) -> bool:
        """Whether nothing is known of what stands beside text, as images and sound."""
        known = self.sound, self.tiles, self.beside, self.queries, *self.pixels
        apart = self.mixed and not self.encoder_decoder
        return apart and all(mask is None for mask in known)

    def rows(
        self, shape: torch.Size, device: torch.device, name: str, x: Tensor | None = None
    ) -> Tensor | None:
        """Return the rows of a layer's input to use, after flattening all but the last dimension.

        Args:
            shape: of the layer's input, features last.
            device: where the indices are needed.
            name: of the layer.
            x: the input, which may be a part of other tokens, see :func:`part_of`.

        Returns:
            int64 indices, or ``None`` for all rows.
        """
        leading, layer = tuple(shape[:-1]), self._kind(name)
        apart = name.startswith(self.apart)
        fit = self._find(layer, leading, apart)
        if fit is None and x is not None and (part := part_of(x)) is not None:
            fit = self._fit_part(layer, leading, apart, part)
        if fit is None:
            if not apart:
                self._warn_unknown(layer, leading, name)
            if not self.draws:
                return None
            whole = torch.ones(shape[:-1].numel(), dtype=torch.bool, device="cpu")
            fit = Fit(f"all of {len(whole)}", whole)
        return self._indices(fit, device, self._is_transposed(fit.mask, leading, name))

    def _find(self, layer: LayerKind, leading: tuple[int, ...], apart: bool) -> Fit | None:
        of_others = self.of_text and layer.reads_no_text
        fit = None if apart and of_others else self._fit(layer, leading, apart)
        return self._fit_others(leading) if fit is None and not of_others else fit

    def _fit_part(
        self, layer: LayerKind, leading: tuple[int, ...], apart: bool, part: Part
    ) -> Fit | None:
        samples, tokens = leading
        whole = self._find(layer, (samples, part.whole), apart)
        if whole is None or whole.mask.shape != (samples, part.whole):
            return None
        kept = whole.mask[:, part.begin : part.begin + tokens]
        return Fit(f"{whole.key} {tuple(part)} {leading}", kept)

    def _fit(self, layer: LayerKind, leading: tuple[int, ...], apart: bool) -> Fit | None:
        if apart:  # a part may read the text, too, beside tokens of its own
            shapes = leading, leading[::-1]
            return next((f for f in self._text(layer) if tuple(f.mask.shape) in shapes), None)
        key = layer, leading
        if key not in self._fits:
            self._fits[key] = next(self._all_fits(layer, leading), None)
        return self._fits[key]

    def _fit_others(self, leading: tuple[int, ...]) -> Fit | None:
        shapes = leading, leading[::-1]
        fits = (Fit(f"other {i}", mask) for i, mask in enumerate(self.others))
        return next((fit for fit in fits if tuple(fit.mask.shape) in shapes), None)

    def rows_of_tokens(self, tokens: Tensor, count: int, name: str) -> tuple[bool, Tensor | None]:
        """Return the rows to use of an input that holds picked tokens, as that of an expert.

        Args:
            tokens: which token each row is, (n,).
            count: how many tokens they were picked from.
            name: of the layer.

        Returns:
            Whether a mask is known for so many tokens; and the rows, all if ``None``.
        """
        for fit in self._text(self._kind(name)):
            if fit.mask.numel() == count:
                before, key, _ = self._picked
                if before is not tokens or key != fit.key:
                    self._picked = tokens, fit.key, self._of_picked(fit, tokens)
                return True, self._picked[2]
        return False, None

    def _of_picked(self, fit: Fit, tokens: Tensor) -> Tensor | None:
        place = fit.key, tokens.device
        if place not in self._kept:
            kept = self._after_draw(fit).reshape(-1)
            self._kept[place] = None if bool(kept.all()) else _upload(kept, tokens.device)
        kept_there = self._kept[place]
        return None if kept_there is None else kept_there[tokens].nonzero().flatten()

    def _kind(self, name: str) -> LayerKind:
        return kind_of_layer(name, self.prefixes)

    def _text(self, layer: LayerKind) -> list[Fit]:
        """Return the masks that a layer's tokens may be those of, the likeliest first."""
        if layer not in self._texts:
            present = [Fit(key, mask) for key, mask in self._streams_of(layer) if mask is not None]
            self._texts[layer] = [*present, *in_windows(present, self.window)]
        return self._texts[layer]

    def _streams_of(self, layer: LayerKind) -> list[tuple[str, Tensor | None]]:
        main, decoder = ("main", self.main), ("decoder", self.decoder)
        if layer.in_qformer and self.queries is not None:
            alone = layer.reads_encoder or layer.reads_queries  # patches, or queries, and no text
            return [] if alone else [("queries", self.queries)]
        if self.given and (layer.reads_encoder or (layer.reads_prompt and self.main is None)):
            return [(f"given {i}", mask) for i, mask in enumerate(self.given)]
        if self.mixed and layer.reads_no_text and (self.media or not layer.in_projector):
            # text only where what stands beside it has a mask, too: LXMERT's cross attention reads
            # either, by the same layers
            return [] if self.beside is None else [("beside", self.beside), main]
        decodes = self.encoder_decoder and layer.in_decoder  # what an encoder has made of text
        across = layer.in_text and layer.reads_encoder and not decodes
        if self.mixed and self.media and across:
            return []
        if not self.encoder_decoder:  # what is attended to, of another shape, may be read anywhere
            others = [] if self.main is None else self.given
            return [main, decoder, *((f"given {i}", mask) for i, mask in enumerate(others))]
        if layer.reads_encoder or (layer.in_encoder and not layer.in_decoder):
            return [main]
        # a decoder may read the encoder's tokens in layers whose names do not tell
        return [decoder, main]

    def _all_fits(self, layer: LayerKind, leading: tuple[int, ...]) -> Iterator[Fit]:
        """Yield the masks that fit an input of a shape, the likeliest first."""
        beside = [] if self.beside is None else [Fit("beside", self.beside)]
        texts = [for_every_frame(fit, leading) for fit in self._text(layer)]
        for key, mask in [*texts, *beside]:
            flat = len(leading) == 1 and leading[0] == mask.numel() != mask.shape[0]
            if flat or leading in (tuple(mask.shape), tuple(mask.shape)[::-1]):
                yield Fit(key, mask.reshape(-1) if flat else mask)
        for key, mask in texts:
            for seen in self._expanded(key, mask, leading):
                yield Fit(f"{key} {leading}", seen)
        for kind, found in self._of_media(layer, leading):
            if found is not None:
                yield Fit(f"{kind} {leading}", found)

    def _expanded(self, key: str, mask: Tensor, leading: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield what a mask, (B, T), is for inputs with more, or with fewer, rows."""
        if leading == (len(mask), mask.shape[1] * self.streams):
            yield mask.repeat_interleave(self.streams, dim=1)
        frames = self._frames(mask, leading) if key == "main" else None
        for one in (mask, frames):
            heads = None if one is None else for_every_head(one, leading)
            if heads is not None:
                yield heads
        if frames is not None and tuple(frames.shape) == leading:
            yield frames
        if len(leading) == 2 and leading[0] == mask.numel() > max(mask.shape):
            yield mask.reshape(-1, 1).expand(leading)  # what several layers make of each token
        seen = self.unpadded if key == "main" and self.unpadded is not None else mask
        longest = longest_of(seen)  # as far as which a packed sequence comes back
        if leading in ((len(mask), longest), (longest, len(mask))) and not mask[:, longest:].any():
            yield mask[:, :longest]
        if leading[-1:] == (int(seen.sum()),) and leading[:-1] in ((), (1,)):
            yield mask[seen].view(leading)  # all samples as one, without their padding
        queries = key.startswith("queries")
        text_first = False if queries else self.text_first
        if (queries or key == "main") and text_first is not None and is_longer(leading, mask):
            yield self._with_others(mask, leading, text_first)

    def _frames(self, mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
        """Return the mask of frames, (B, T'), of a mask over samples of sound, (B, T)."""
        if len(leading) < 2 or leading[0] != len(mask):
            return None
        counts = [mask.shape[1], *mask.sum(1).tolist()]
        for lengths, options in itertools.product(self.frame_lengths, _ADAPTER_OPTIONS):
            try:
                every = [lengths(torch.tensor([n], device="cpu"), **options) for n in counts]
                stages = list(zip(*map(_numbers, every), strict=True))
            except (TypeError, ValueError, RuntimeError, AttributeError):  # of another model
                continue
            for found in stages:
                if found[0] == leading[-1]:
                    kept = torch.tensor(found[1:], device="cpu")
                    return torch.arange(leading[-1], device="cpu") < kept[:, None]
        return None

    def _with_others(self, mask: Tensor, leading: tuple[int, ...], text_first: bool) -> Tensor:
        """Return the mask of text, (B, T), and of what stands beside it in one sequence."""
        others = mask.new_ones(len(mask), leading[1] - mask.shape[1])
        if self.beside is not None and self.beside.shape == others.shape:
            others = self.beside
        return torch.cat([mask, others] if text_first else [others, mask], dim=1)

    def _of_media(
        self, layer: LayerKind, leading: tuple[int, ...]
    ) -> Iterator[tuple[str, Tensor | None]]:
        if self.sound is not None and self._hears(layer):
            yield "sound", self._frames(self.sound, leading)
            yield "sound", frames_seen(self.sound, leading)
        alone = self.sound_only and not self.mixed and self._hears(layer)
        if alone and self.main is not None and not is_longer(leading, self.main):
            yield "frames", frames_seen(self.main, leading)  # of which the model does not tell
        for pixels in self.pixels if self._sees_pixels(layer) else ():
            yield "pixels", patches_seen(pixels, leading, self.patch_sizes)
        if self.tiles is not None and (layer.reads_no_text or layer.reads_encoder):
            yield "tiles", tiles_seen(self.tiles, leading)

    def _hears(self, layer: LayerKind) -> bool:
        if layer.reads_distances:
            return False
        if layer.reads_sound or not self.sound_only:
            return layer.reads_sound
        if self.mixed:  # an encoder of text has the text's mask, if there is one, which was tried
            in_encoder = layer.in_encoder and not layer.in_decoder
            return layer.reads_no_text or (in_encoder and self.main is not None)
        return layer.reads_encoder or not layer.in_decoder

    def _sees_pixels(self, layer: LayerKind) -> bool:
        if layer.reads_queries:
            return False
        if layer.reads_no_text or self.mixed:
            return layer.reads_no_text and not layer.reads_sound
        # behind the encoder's patches there may be queries, whose number means nothing
        return layer.reads_encoder or (layer.in_encoder and not layer.in_decoder)

    def _is_transposed(self, mask: Tensor, leading: tuple[int, ...], name: str) -> bool:
        """Tell whether a layer takes the sequence first; as many samples as tokens tell nothing."""
        if mask.dim() != 2:
            return False
        if mask.shape[0] != mask.shape[1]:
            self.transposed[name] = leading != tuple(mask.shape)
        return self.transposed.get(name, False)

    def _after_draw(self, fit: Fit) -> Tensor:
        if not self.draws:
            return fit.mask
        return self.draws.get(fit.key, self.draws[""]).subset(fit.mask)

    def _indices(self, fit: Fit, device: torch.device, transposed: bool) -> Tensor | None:
        key = (fit.key, transposed, device)
        if key not in self._rows:
            mask = self._after_draw(fit)
            flat = (mask.mT if transposed else mask).reshape(-1)
            kept = None if bool(flat.all()) else flat.nonzero().flatten()
            self._rows[key] = None if kept is None else _upload(kept, device)
        return self._rows[key]

    def _warn_unknown(self, layer: LayerKind, leading: tuple[int, ...], name: str) -> None:
        masks = [fit.mask for fit in self._text(layer)]
        # Without a mask, with one that keeps everything, for pooled inputs (one row a sample, or of
        # several), for tokens without padding, as packed sequences hold them, for what is the same
        # for all samples (embeddings of positions), and beside text, using every row is wanted.
        one_for_all = leading[:1] == (1,) and all(m.shape[0] > 1 for m in masks)
        one_for_all = one_for_all or layer.reads_distances
        if self.mixed:  # beside text, but not in one sequence with it
            masks = [m for m in masks if not layer.reads_encoder and is_longer(leading, m)]
        if self.pixels and layer.in_encoder and self._sees_pixels(layer):
            masks = [m for m in self.pixels if leading[:-1] == (len(m),)]
        kind = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        if self.quiet or kind in self.warned or one_for_all:
            return
        rows = math.prod(leading)
        if all(bool(m.all()) or rows <= len(m) for m in masks):
            return
        self.warned.add(kind)
        others = "" if kind == name else f". Other layers {kind} get no warning of their own"
        warn(
            f"layer {name}: no token mask fits its input of leading shape {leading} (the mask is "
            f"{tuple(masks[0].shape)}); every row is used, padding too. Pass "
            f"prepare_layer_inputs_fn to select rows{others}",
        )


def _numbers(told: Any) -> list[int]:
    """Return how many frames there are, maybe behind one part of the model and behind another."""
    return [int(part) for part in (told if isinstance(told, tuple) else (told,))]


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only from there the upload does not wait for the GPU
    return copied_to(device, tensor)
