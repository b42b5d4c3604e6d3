"""Which rows of a layer's input are tokens that count."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from weakref import ref

import torch
from torch import Tensor

from ..errors import warn
from ..model.layer_kind import LayerKind, kind_of_layer
from ..surroundings.devices import copy_to_device
from .fits import (
    FittedMask,
    TokenSlice,
    are_same_tensors,
    holds_more_than,
    nested_fit,
    token_slice_of,
)
from .fitting_masks import BatchMasks
from .subsample import Draw

__all__ = ["TokenMask"]


class TokenMask(BatchMasks):
    """The tokens of one batch that EVA uses.

    Args: see :class:`BatchMasks`.

    Attributes:
        masks: all token masks; layers that read one tensor share a stream only if these are the
            same tensors.
        draws: random subsets of tokens (``tokens_per_step``) by the key of a mask; "" for others.
        warned: warnings already given, and kinds of layers already warned about.
        suppress_warnings: do not warn about layers that no mask fits.
        skips_media_layers: do not use ``unmasked_prefixes`` and ``unit_masks`` for layers named
            after sound or images.
        main_is_assumed: ``main`` is an assumption that every token counts; the masks are of others.
        seem_kept: the tokens of a batch without masks, bool (B, T), that seem to be no padding.
        from_parts: the masks are those passed to parts of the model; the batch has none.
        is_of_several_texts: ``main`` is of texts of one shape with other padding each, and keeps
            what is a token in any of them.
        sequence_first: by layer, whether its input is, as far as batches have shown.
        attended_states: the hidden states that ``cross_masks`` masks, if they have the shape of
            ``main``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        masks = self.main, self.decoder, self.non_text_mask, self.qformer_mask
        self.masks = (*masks, *self.cross_masks, *self.unit_masks)
        self.draws: dict[str, Draw] = {}
        self.warned: set[str] = set()
        self.suppress_warnings = self.skips_media_layers = False
        self.main_is_assumed = self.from_parts = self.is_of_several_texts = False
        self.seem_kept: Tensor | None = None
        self.sequence_first: dict[str, bool] = {}
        self.attended_states: ref[Tensor] | None = None
        self._attended_mask: TokenMask | None = None
        self._fits: dict[tuple[LayerKind, tuple[int, ...]], FittedMask | None] = {}
        self._rows: dict[tuple[str, bool, torch.device], Tensor | None] = {}
        self._flat_masks: dict[tuple[str, torch.device], Tensor | None] = {}
        self._last_selected: tuple[Tensor | None, str, Tensor | None] = (None, "", None)

    def with_unit_masks(self, unit_masks: Iterable[Tensor]) -> TokenMask:
        """Return this mask with these masks as ``unit_masks``, the first of each new shape."""
        token_masks = self.masks[: len(self.masks) - len(self.unit_masks)]
        shapes = {mask.shape for mask in token_masks if mask is not None}
        first: dict[torch.Size, Tensor] = {}
        for mask in unit_masks:
            first.setdefault(mask.shape, mask)
        new = copy.copy(self)
        new.unit_masks = [mask for shape, mask in first.items() if shape not in shapes]
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
            self._warn_if_padding_seems_to_count(leading, name)
            if not self.draws:
                return None
            every_row = torch.ones(shape[:-1].numel(), dtype=torch.bool, device="cpu")
            fit = FittedMask(f"all of {len(every_row)}", every_row)
        elif self.is_of_several_texts and fit.mask is self.main:
            self._warn_of_several_texts(name)
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
            fits = (fit for fit in self.token_streams(layer) if tuple(fit.mask.shape) in shapes)
            return next(fits, None)
        key = layer, leading
        if key not in self._fits:
            self._fits[key] = next(self.matching_fits(layer, leading), None)
        return self._fits[key]

    def _fit_units(self, leading: tuple[int, ...]) -> FittedMask | None:
        shapes = leading, leading[::-1]
        fits = (FittedMask(f"units {i}", mask) for i, mask in enumerate(self.unit_masks))
        fit = next((fit for fit in fits if tuple(fit.mask.shape) in shapes), None)
        return nested_fit(self.masks, leading) if fit is None else fit

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
        for fit in self.token_streams(self._layer_kind(name)):
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
        masks = [fit.mask for fit in self.token_streams(layer)]
        # Every row is to be used, without a warning: without a mask, with one that keeps all, for
        # pooled inputs (one row for one or several samples), for tokens without padding, as in
        # packed sequences, for inputs common to all samples (position embeddings), and for other
        # modalities.
        one_for_all = leading[:1] == (1,) and all(m.shape[0] > 1 for m in masks)
        one_for_all = one_for_all or layer.reads_distances
        if self.multimodal:  # warn only of inputs that may hold text and others in one sequence
            masks = [m for m in masks if not layer.reads_encoder and holds_more_than(leading, m)]
        if self.pixel_masks and layer.in_encoder and self.reads_pixels(layer):
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

    def _warn_if_padding_seems_to_count(self, leading: tuple[int, ...], name: str) -> None:
        kept = self.seem_kept
        if kept is None or self.has_token_masks or "counted padding" in self.warned:
            return
        if leading in (kept.shape, kept.shape[::-1], (kept.numel(),)):
            self.warned.add("counted padding")
            warn(
                f"layer {name}: of {kept.numel()} tokens that count, {int((~kept).sum())} seem to "
                "be padding, since one token fills the ends of many samples and is nowhere else. "
                "If so, let the loader yield a mapping with an attention_mask that is 0 there; "
                "where the model does not take it, pass forward_fn, too"
            )

    def _warn_of_several_texts(self, name: str) -> None:
        if self.main is None or "counted padding" in self.warned:
            return
        self.warned.add("counted padding")
        warn(
            f"layer {name}: some tokens that count seem to be padding, since the model embeds "
            f"several texts of shape {tuple(self.main.shape)} before, and may read any of them "
            "here. If so, let the loader pad each to a length of its own, or pass "
            "prepare_layer_inputs_fn to select rows"
        )


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only then the copy is asynchronous
    return copy_to_device(device, tensor)
