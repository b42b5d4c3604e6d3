"""Which tokens of a batch count, and which rows of a layer's input they are."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from ._peft_compat import LoraConfig
from .architecture import Architecture, FrameLengths
from .errors import EvaWarning
from .media_masks import frames_seen, patches_seen, pixel_mask, sound_mask
from .subsample import Draw

__all__ = ["TokenMask", "mask_of_batch"]

# Keys and values of cross attention are encoder tokens, although the layer is in the decoder.
_READS_ENCODER = re.compile(
    r"(EncDecAttention|encoder_attn|encoder_decoder_attention|cross_?att(ention|n)|attn2).*"
    r"\b(k|v|k_proj|v_proj|key|value|key_proj|value_proj|to_k|to_v)$"
)
# Layers of the other stream of a model that takes text and something else.
_READS_NO_TEXT = re.compile(
    r"vision|visual|visn|(^|\.)r_layers\.|image|img|video|pixel|patch|audio|speech|sound|multi_modal|mm_proj|connector"
    r"|perceiver|resampler|qformer"
)
_READS_SOUND = re.compile(r"audio|speech|sound")
# A Decision Transformer interleaves return, state and action: three tokens a time step.
_DECISION_STREAMS = 3
_ADAPTER_OPTIONS: tuple[dict[str, bool], ...] = ({}, {"add_adapter": False}, {"add_adapter": True})
_ANY = Architecture()


class LayerKind(NamedTuple):
    """What a layer's name tells of the tokens that it reads."""

    reads_encoder: bool
    reads_no_text: bool
    reads_sound: bool
    in_encoder: bool
    in_decoder: bool


@functools.cache
def kind_of_layer(name: str) -> LayerKind:
    """Return what the name tells; asked for every layer of every batch."""
    return LayerKind(
        reads_encoder=bool(_READS_ENCODER.search(name)),
        reads_no_text=bool(_READS_NO_TEXT.search(name)),
        reads_sound=bool(_READS_SOUND.search(name)),
        in_encoder="encoder" in name,
        in_decoder="decoder" in name,
    )


class TokenMask:
    """The tokens of one batch that EVA uses.

    Args:
        main: bool (B, T): tokens of the model's only, or encoder's, stream; all if ``None``.
        decoder: bool (B, T_dec): tokens of an encoder-decoder model's decoder stream.
        streams: how many tokens of a layer's input one position of ``main`` stands for.
        mixed: the batch holds something beside text (images, sound).
        encoder_decoder: ``main`` is that of the encoder only, whatever the shapes.
        given: bool (B, S): tokens of hidden states that cross attention is given from elsewhere.
        window: the model pads texts on the right to a multiple of so many tokens.
        frame_lengths: of a model that turns T samples of sound into fewer frames: see
            :class:`.architecture.Architecture`.
        text_first: where a sequence is longer than a mixed batch's text, whether text comes first
            in it; ``None`` if that is not known.
        beside: bool (B, V): which of the other tokens of such a sequence count; all if ``None``.
        sound, pixels: of sound and images, beside text or by themselves; see ``media_masks``.

    Attributes:
        draw: leaves a random part of the tokens, if set.
        warned: layers that need no second warning.
        transposed: layer -> whether it takes the sequence first, as far as batches have told.
    """

    def __init__(
        self,
        main: Tensor | None,
        decoder: Tensor | None = None,
        streams: int = 1,
        mixed: bool = False,
        encoder_decoder: bool = False,
        given: Tensor | None = None,
        window: int = 1,
        frame_lengths: Sequence[FrameLengths] = (),
        text_first: bool | None = None,
        beside: Tensor | None = None,
        sound: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> None:
        self.main, self.decoder, self.streams = main, decoder, streams
        self.mixed, self.encoder_decoder = mixed, encoder_decoder
        self.given, self.window, self.frame_lengths = given, window, frame_lengths
        self.text_first, self.beside = text_first, beside
        self.sound, self.pixels = sound, pixels
        self.draw: Draw | None = None
        self.warned: set[str] = set()
        self.transposed: dict[str, bool] = {}
        self._rows: dict[tuple[str, bool, torch.device], Tensor | None] = {}
        self._by_kind: dict[LayerKind, list[tuple[str, Tensor]]] = {}
        self._drawn: dict[str, Tensor] = {}
        self._framed: dict[tuple[int, ...], Tensor | None] = {}
        self._media: dict[tuple[str, tuple[int, ...]], Tensor | None] = {}

    def rows(self, shape: torch.Size, device: torch.device, name: str) -> Tensor | None:
        """Return the rows of a layer's input to use, after flattening all but the last dimension.

        Args:
            shape: of the layer's input, features last.
            device: where the indices are needed.
            name: of the layer.

        Returns:
            int64 indices, or ``None`` for all rows.
        """
        leading = tuple(shape[:-1])
        for kind, mask in self._candidates(name):
            if len(leading) == 1 and leading[0] == mask.numel() != mask.shape[0]:
                return self._indices(kind, mask, device)
            if leading in (tuple(mask.shape), tuple(mask.shape)[::-1]):
                transposed = self._is_transposed(leading, mask, name)
                return self._indices(kind, mask, device, transposed)
            if self.streams > 1 and leading == (mask.shape[0], mask.shape[1] * self.streams):
                wide = mask.repeat_interleave(self.streams, dim=1)
                return self._indices(kind + "*", wide, device)
            heads = _for_every_head(mask, leading)
            if heads is not None:
                return self._indices(f"{kind} {leading}", heads, device)
            if kind == "main" and leading not in self._framed:
                self._framed[leading] = self._frames(mask, leading)
            frames = self._framed[leading] if kind == "main" else None
            if frames is not None:
                return self._indices(f"{kind} {leading}", frames, device)
            longer = self._with_others(mask, leading) if kind == "main" else None
            if longer is not None:
                return self._indices(f"{kind} {leading}", longer, device)
        kind = self._kind_of_media(name)
        media = self._of_media(kind, leading)
        if media is not None:
            return self._indices(f"{kind} {leading}", media, device)
        self._warn_unknown(leading, name)
        if self.draw is None:
            return None
        whole = torch.ones(leading, dtype=torch.bool, device="cpu")
        return self._indices(f"all of {whole.numel()}", whole.reshape(-1), device)

    def _frames(self, mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
        """Return the mask of frames, (B, T'), of a mask over samples of sound, (B, T)."""
        if mask.dim() != 2 or leading[:-1] != (len(mask),):
            return None
        counts = [mask.shape[1], *mask.sum(1).tolist()]
        for lengths, options in itertools.product(self.frame_lengths, _ADAPTER_OPTIONS):
            try:
                found = [int(lengths(torch.tensor([n], device="cpu"), **options)) for n in counts]
            except (TypeError, ValueError, RuntimeError):  # of another kind of model
                continue
            if found[0] == leading[-1]:
                kept = torch.tensor(found[1:], device="cpu")
                return torch.arange(leading[-1], device="cpu") < kept[:, None]
        return None

    def _kind_of_media(self, name: str) -> str:
        """Return whether a layer sees frames of sound or patches of images that have a mask."""
        layer = kind_of_layer(name)
        if layer.reads_sound:
            return "" if self.sound is None else "sound"
        reads_images = layer.reads_no_text if self.mixed else not layer.in_decoder
        return "pixels" if self.pixels is not None and reads_images else ""

    def _of_media(self, kind: str, leading: tuple[int, ...]) -> Tensor | None:
        """Return the mask of such a layer; many layers see the same."""
        key = kind, leading
        if key not in self._media:
            seen = None
            if kind == "sound" and self.sound is not None:
                seen = frames_seen(self.sound, leading)
            elif kind == "pixels" and self.pixels is not None:
                seen = patches_seen(self.pixels, leading)
            self._media[key] = seen
        return self._media[key]

    def _with_others(self, mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
        """Return the mask of text, (B, T), and of what stands beside it in one sequence."""
        if self.text_first is None or not _is_longer(leading, mask):
            return None
        count = leading[1] - mask.shape[1]
        others = mask.new_ones(len(mask), count)
        if self.beside is not None and self.beside.shape == others.shape:
            others = self.beside
        return torch.cat([mask, others] if self.text_first else [others, mask], dim=1)

    def _is_transposed(self, leading: tuple[int, ...], mask: Tensor, name: str) -> bool:
        """Tell whether a layer takes the sequence first; as many samples as tokens tell nothing."""
        if mask.shape[0] != mask.shape[1]:
            self.transposed[name] = leading != tuple(mask.shape)
        return self.transposed.get(name, False)

    @property
    def selective(self) -> bool:
        """Whether any token is left out."""
        return any(m is not None and not bool(m.all()) for m in (self.main, self.decoder))

    def rows_of_tokens(self, tokens: Tensor, count: int, name: str) -> tuple[bool, Tensor | None]:
        """Return the rows to use of an input that holds picked tokens, as that of an expert.

        Args:
            tokens: which token each row is, (n,).
            count: how many tokens they were picked from.
            name: of the layer.

        Returns:
            Whether a mask is known for so many tokens; and the rows, all if ``None``.
        """
        for kind, mask in self._candidates(name):
            if mask.numel() == count:
                kept = self._after_draw(kind, mask).reshape(-1).to(tokens.device)[tokens]
                return True, None if bool(kept.all()) else kept.nonzero().flatten()
        return False, None

    def _candidates(self, name: str) -> list[tuple[str, Tensor]]:
        """Return the masks that a layer's tokens may be those of, the likeliest first."""
        kind = kind_of_layer(name)
        if kind not in self._by_kind:
            self._by_kind[kind] = self._candidates_of(kind)
        return self._by_kind[kind]

    def _candidates_of(self, layer: LayerKind) -> list[tuple[str, Tensor]]:
        found = [("main", self.main), ("decoder", self.decoder)]
        if self.mixed and layer.reads_no_text:
            found = []
        elif self.encoder_decoder and layer.in_decoder and not layer.reads_encoder:
            found = found[1:]
        elif self.encoder_decoder and (layer.reads_encoder or layer.in_encoder):
            found = found[:1]
        if self.given is not None and layer.reads_encoder:
            found = [("given", self.given)]
        present = [(kind, mask) for kind, mask in found if mask is not None]
        return present + [
            (f"{kind} padded", functional.pad(mask, (0, -mask.shape[1] % self.window)))
            for kind, mask in present
            if mask.dim() == 2 and mask.shape[1] % self.window
        ]

    def _after_draw(self, kind: str, mask: Tensor) -> Tensor:
        if self.draw is None:
            return mask
        if kind not in self._drawn:
            self._drawn[kind] = self.draw.subset(mask)
        return self._drawn[kind]

    def _indices(
        self, kind: str, mask: Tensor, device: torch.device, transposed: bool = False
    ) -> Tensor | None:
        key = (kind, transposed, device)
        if key not in self._rows:
            mask = self._after_draw(kind, mask)
            flat = (mask.mT if transposed else mask).reshape(-1)
            rows = None if bool(flat.all()) else flat.nonzero().flatten()
            if rows is not None and device.type == "cuda":
                rows = rows.pin_memory()  # only from there the upload does not wait for the GPU
            self._rows[key] = None if rows is None else rows.to(device, non_blocking=True)
        return self._rows[key]

    def _warn_unknown(self, leading: tuple[int, ...], name: str) -> None:
        masks = [m for _, m in self._candidates(name)]
        # Without a mask, with one that keeps everything, for pooled inputs (one row a sample), for
        # what is the same for all samples (embeddings of positions), and beside text, using every
        # row is what is wanted.
        one_for_all = leading[:1] == (1,) and all(m.shape[0] > 1 for m in masks)
        if self.mixed:  # beside text, but not in one sequence with it
            reads_other = kind_of_layer(name).reads_encoder
            masks = [m for m in masks if not reads_other and _is_longer(leading, m)]
        if name in self.warned or one_for_all:
            return
        if all(bool(m.all()) or leading == (m.shape[0],) for m in masks):
            return
        self.warned.add(name)
        warnings.warn(
            f"layer {name}: no token mask fits its input of leading shape {leading} (the mask is "
            f"{tuple(masks[0].shape)}); every row is used. Pass prepare_layer_inputs_fn to select",
            EvaWarning,
            stacklevel=2,
        )


def mask_of_batch(batch: Any, config: LoraConfig, architecture: Architecture = _ANY) -> TokenMask:
    """Build the mask of a batch from ``attention_mask`` and ``labels``, as PEFT does.

    Labels count only where they are labels of tokens, that is where their shape is that of the
    tokens; the labels of an encoder-decoder model mask its decoder.

    Args:
        batch: a mapping; anything else has no mask.
        config: its ``eva_config`` says whether, and with which value, labels mask tokens.
        architecture: of the model.
    """
    if not isinstance(batch, Mapping):
        return TokenMask(None)
    attention, labels = _of_samples(batch, "attention_mask"), batch.get("labels")
    main = _token_mask(attention)
    model_config = architecture.config
    more: dict[str, Any] = {
        "given": _token_mask(batch.get("encoder_attention_mask")),
        "mixed": _is_mixed(batch),
        "window": architecture.window,
        "frame_lengths": architecture.frame_lengths,
        "text_first": architecture.text_first,
        "beside": _token_mask(batch.get("visual_attention_mask")),
        "sound": sound_mask(batch),
        "pixels": pixel_mask(batch),
    }
    decoder = _token_mask(batch.get("decoder_attention_mask"))
    eva = config.eva_config
    label_mask = None
    wanted = eva is None or eva.use_label_mask
    if wanted and _are_token_labels(labels, model_config):
        label_mask = labels.cpu() != (-100 if eva is None else eva.label_mask_value)
    if architecture.encoder_decoder:
        if label_mask is not None:
            fits = decoder is not None and decoder.shape == label_mask.shape
            decoder = decoder & label_mask if decoder is not None and fits else label_mask
        return TokenMask(main, decoder, encoder_decoder=True, **more)
    shape = _token_shape(batch, main)
    if main is not None and shape is not None:
        main = _without_prefix(main, shape)
    if label_mask is not None and tuple(label_mask.shape) == shape:
        main = label_mask if main is None else main & label_mask
    decision = getattr(model_config, "model_type", "") == "decision_transformer"
    streams = _DECISION_STREAMS if decision else 1
    return TokenMask(main, decoder, streams, **more)


def _is_longer(leading: tuple[int, ...], mask: Tensor) -> bool:
    """Tell whether an input, (B, T + more), may hold the tokens of a mask among others."""
    return (
        len(leading) == mask.dim() == 2 and leading[0] == len(mask) and leading[1] > mask.shape[1]
    )


def _for_every_head(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of an input that has each token once a head: (B, H, T) or (B, T, H)."""
    if len(leading) != 3 or mask.dim() != 2 or leading[1] == leading[2] != 1:
        return None
    if (leading[0], leading[2]) == tuple(mask.shape):
        return mask[:, None].expand(leading)
    return mask[:, :, None].expand(leading) if leading[:2] == tuple(mask.shape) else None


def _is_mixed(batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch of text holds values of another kind, too."""
    ids = batch.get("input_ids")
    return isinstance(ids, Tensor) and any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= 2
        and value.shape != ids.shape  # weights of tokens, say
        for key, value in batch.items()
        if key not in ("inputs_embeds", "decoder_inputs_embeds", "labels") and "mask" not in key
    )


def _of_samples(batch: Mapping[str, Any], key: str) -> Any:
    """Return a value; where samples have choices, (B, C, T), as the model runs them, (B C, T)."""
    value, ids = batch.get(key), batch.get("input_ids")
    if isinstance(value, Tensor) and isinstance(ids, Tensor) and ids.dim() == 3:
        return value.flatten(0, 1) if value.shape == ids.shape else value
    return value


def _are_token_labels(labels: Any, model_config: Any) -> TypeGuard[Tensor]:
    if getattr(model_config, "problem_type", None) == "multi_label_classification":
        return False
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def _token_mask(mask: Any) -> Tensor | None:
    """Return the tokens that a mask keeps, bool (B, T).

    A mask over pairs, (B, T, T) or (B, heads or 1, T or 1, T), says which token sees which. A token
    that does not even see itself is padding; where padding sees itself, it cannot be told from
    tokens.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 3 and mask.shape[1] == mask.shape[2]:
        mask = mask[:, None]
    if mask.dim() == 4 and mask.shape[2] in (1, mask.shape[3]):
        first = mask[:, 0]
        alike = mask.shape[2] == 1  # (B, 1, 1, T): the same for every token
        own = (first[:, 0] if alike else first.diagonal(dim1=-2, dim2=-1)).cpu()
        additive = own.is_floating_point() and bool((mask <= 0).all())
        return own > -1 if additive else own.bool()
    return mask.bool().cpu() if mask.dim() == 2 else None


def _without_prefix(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the mask of the tokens of a batch, where it covers cached ones in front, too."""
    longer = len(shape) == 2 and mask.shape[0] == shape[0] and mask.shape[1] > shape[1]
    return mask[:, -shape[1] :] if longer else mask


def _token_shape(batch: Mapping[str, Any], main: Tensor | None) -> tuple[int, ...] | None:
    ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return tuple(ids.flatten(0, -2).shape) if ids.dim() > 2 else tuple(ids.shape)
    if isinstance(embeds, Tensor):
        return tuple(embeds.shape[:2])
    return None if main is None else tuple(main.shape)
