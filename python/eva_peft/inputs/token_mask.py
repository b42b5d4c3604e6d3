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
        mixed: the batch holds other modalities besides text (images, sound).
        encoder_decoder: ``main`` is the mask of the encoder only, whatever the shapes.
        given: bool (B, S) each: tokens of hidden states from elsewhere, for cross attention, or
            the prompt that images are generated from.
        window: the model pads texts on the right to a multiple of this many tokens.
        frame_lengths: of a model that turns T samples of sound into fewer frames: see
            :class:`eva_peft.model.architecture.Architecture`.
        text_first: whether text comes first in a sequence that is longer than the text; ``None``
            if unknown.
        beside: bool (B, V): tokens other than text that have a mask: boxes of images, entities.
        queries: bool (B, T): the text that a Q-Former reads after its queries.
        sound, pixels, tiles: masks of sound and images, with or without text; see
            ``media_masks``.
        sound_only: there is sound, and nothing else except possibly text.
        media: there is sound, or there are images.
        patch_sizes: of images in pixels, if the model has them in its config.
        prefixes: of layer names, to be ignored when judging by the name what a layer reads.
        others: bool (B, W) each: masks of units other than tokens, such as words or spans.
        apart: prefixes of the names of layers that may read inputs without a mask: only inputs of
            exactly the text's shape are taken for text there.
        unpadded: bool (B, T): the mask of padding only, if labels mask more than that.

    Attributes:
        masks: all token masks; layers that read one tensor share a stream only if these are the
            same tensors.
        draws: random subsets of tokens (``tokens_per_step``) by the key of a mask; "" for others.
        warned: warnings already given, and kinds of layers already warned about.
        quiet: do not warn about layers that no mask fits.
        supposed: ``main`` is an assumption that every token counts; the masks are of others.
        of_parts: the masks are those passed to parts of the model; the batch has none.
        of_text: do not use ``apart`` and ``others`` for layers named after sound or images.
        transposed: by layer, whether its input is sequence first, as far as batches have shown.
        attended: the hidden states that ``given`` masks, if they have the shape of ``main``.
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
        """Return this mask with these masks as ``others``, the first of each new shape."""
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
        """Return this mask with the ``given`` and ``others`` of a part's mask added."""
        found = copy.copy(self)
        found.given = [*told.given, *self.given]
        found.masks = (*told.given, *self.masks)
        found._texts, found._fits, found._kept = {}, {}, {}
        found._picked, found.of_parts = (None, "", None), False
        found.attended = found._alone = None  # to be determined again
        return found.with_others([*told.others, *self.others])

    def behind(self, told: TokenMask, of_text: bool) -> TokenMask:
        """Return the mask after a part of the model: this one, and the part's of other shapes.

        The part's takes precedence if this one, too, is known from parts only.

        Args:
            told: the mask that was used in the part.
            of_text: see :class:`TokenMask`.
        """
        if self.tells and not self.of_parts:
            found, first = self, [told.main, told.decoder]
        else:
            found, first = copy.copy(told), [self.main, *self.others]
            found.apart, found.of_parts = ("",), True  # only a shape tells what is read there
        found = found.with_others(each for each in (*first, *found.others) if each is not None)
        if found.of_parts is self.of_parts and are_same(found.masks, self.masks):
            return self  # which keeps its cached rows
        found.of_text = of_text
        return found

    def of_input(self, x: Tensor) -> TokenMask:
        """Return the mask of a layer's input: that of ``given`` alone if it is ``attended``."""
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
        """Whether there is any token mask; masks over sound samples and pixels do not count."""
        return any(mask is not None for mask in self.masks)

    @property
    def of_text_alone(self) -> bool:
        """Whether other modalities besides text, such as images and sound, have no mask."""
        known = self.sound, self.tiles, self.beside, self.queries, *self.pixels
        apart = self.mixed and not self.encoder_decoder
        return apart and all(mask is None for mask in known)

    def rows(
        self, shape: torch.Size, device: torch.device, name: str, x: Tensor | None = None
    ) -> Tensor | None:
        """Return the rows of a layer's input to use, after flattening all but the last dimension.

        Args:
            shape: of the layer's input, features last.
            device: of the returned indices.
            name: of the layer.
            x: the input, which may be a view of more tokens, see :func:`part_of`.

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
        if apart:  # such a part may read the text as well as tokens of its own
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
        """Return the rows to use of an input with selected tokens, such as that of an expert.

        Args:
            tokens: the token index of each row, (n,).
            count: the number of tokens they were selected from.
            name: of the layer.

        Returns:
            Whether there is a mask over ``count`` tokens; and the rows, all if ``None``.
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
        """Return the masks of the token streams that a layer may read, the likeliest first."""
        if layer not in self._texts:
            present = [Fit(key, mask) for key, mask in self._streams_of(layer) if mask is not None]
            self._texts[layer] = [*present, *in_windows(present, self.window)]
        return self._texts[layer]

    def _streams_of(self, layer: LayerKind) -> list[tuple[str, Tensor | None]]:
        main, decoder = ("main", self.main), ("decoder", self.decoder)
        if layer.in_qformer and self.queries is not None:
            alone = layer.reads_encoder or layer.reads_queries  # patches or queries, but no text
            return [] if alone else [("queries", self.queries)]
        if self.given and (layer.reads_encoder or (layer.reads_prompt and self.main is None)):
            return [(f"given {i}", mask) for i, mask in enumerate(self.given)]
        if self.mixed and layer.reads_no_text and (self.media or not layer.in_projector):
            # text only if the other modality has a mask, too: the same layers of LXMERT's cross
            # attention read either
            return [] if self.beside is None else [("beside", self.beside), main]
        decodes = self.encoder_decoder and layer.in_decoder  # attends to an encoder's text
        across = layer.in_text and layer.reads_encoder and not decodes
        if self.mixed and self.media and across:
            return []
        if not self.encoder_decoder:  # any layer may read attended tokens, of another shape
            others = [] if self.main is None else self.given
            return [main, decoder, *((f"given {i}", mask) for i, mask in enumerate(others))]
        if layer.reads_encoder or (layer.in_encoder and not layer.in_decoder):
            return [main]
        # a decoder may read the encoder's tokens in layers whose names do not show it
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
        """Yield a mask, (B, T), adapted to inputs with more or fewer rows."""
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
            yield mask.reshape(-1, 1).expand(leading)  # for each token the outputs of n layers
        seen = self.unpadded if key == "main" and self.unpadded is not None else mask
        longest = longest_of(seen)  # the length to which a packed sequence is padded again
        if leading in ((len(mask), longest), (longest, len(mask))) and not mask[:, longest:].any():
            yield mask[:, :longest]
        if leading[:-1] in ((), (1,)) and leading[-1:] == (int(seen.sum()),):
            yield mask[seen].view(leading)  # all samples concatenated, without padding
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
            except (TypeError, ValueError, RuntimeError, AttributeError):  # other arguments
                continue
            for found in stages:
                if found[0] == leading[-1]:
                    kept = torch.tensor(found[1:], device="cpu")
                    return torch.arange(leading[-1], device="cpu") < kept[:, None]
        return None

    def _with_others(self, mask: Tensor, leading: tuple[int, ...], text_first: bool) -> Tensor:
        """Return the mask of one sequence of text, masked by (B, T), and other tokens."""
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
            yield "frames", frames_seen(self.main, leading)  # not by the model's frame_lengths
        for pixels in self.pixels if self._sees_pixels(layer) else ():
            yield "pixels", patches_seen(pixels, leading, self.patch_sizes)
        if self.tiles is not None and (layer.reads_no_text or layer.reads_encoder):
            yield "tiles", tiles_seen(self.tiles, leading)

    def _hears(self, layer: LayerKind) -> bool:
        if layer.reads_distances:
            return False
        if layer.reads_sound or not self.sound_only:
            return layer.reads_sound
        if self.mixed:  # an encoder of text uses the text's mask; if there is one, it was tried
            in_encoder = layer.in_encoder and not layer.in_decoder
            return layer.reads_no_text or (in_encoder and self.main is not None)
        return layer.reads_encoder or not layer.in_decoder

    def _sees_pixels(self, layer: LayerKind) -> bool:
        if layer.reads_queries:
            return False
        if layer.reads_no_text or self.mixed:
            return layer.reads_no_text and not layer.reads_sound
        # after the encoder's patches there may be queries, whose number may fit by chance
        return layer.reads_encoder or (layer.in_encoder and not layer.in_decoder)

    def _is_transposed(self, mask: Tensor, leading: tuple[int, ...], name: str) -> bool:
        """Tell whether a layer takes the sequence first; a square mask cannot show it."""
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
        # Every row is to be used, without a warning: without a mask, with one that keeps all, for
        # pooled inputs (one row for one or several samples), for tokens without padding, as in
        # packed sequences, for inputs common to all samples (position embeddings), and for other
        # modalities.
        one_for_all = leading[:1] == (1,) and all(m.shape[0] > 1 for m in masks)
        one_for_all = one_for_all or layer.reads_distances
        if self.mixed:  # warn only of inputs that may hold text and others in one sequence
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
    """Return numbers of frames as a list: a model may give one after each of several parts."""
    return [int(part) for part in (told if isinstance(told, tuple) else (told,))]


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only then the copy is asynchronous
    return copied_to(device, tensor)
