"""Masks over sound and images, and the masks of the frames and patches that layers see.

A layer after convolutions or pooling sees fewer frames or patches than the mask has entries; each
of them represents equally many entries, except the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "audio_mask_of",
    "frame_mask_for",
    "has_audio",
    "has_images",
    "is_image_key",
    "patch_mask_for",
    "pixel_masks_of",
    "silent_frames",
    "tile_mask_for",
    "tile_mask_of",
]

# Masks over frames or samples of sound, (sounds, frames): those of these names, or any other with
# one entry per frame of one of the inputs in _AUDIO_INPUTS. An attention_mask is handled elsewhere.
_AUDIO_MASKS = ("feature_attention_mask", "input_features_mask", "audio_attention_mask")
_AUDIO_INPUTS = ("input_features", "input_values", "audio_values", "audio_features")
_TOKEN_MASKS = ("attention_mask", "decoder_attention_mask", "mask_time_indices")
# Masks over pixels, (images, height, width) or (samples, images, height, width), or over patches,
# (images, patches).
_PIXEL_MASKS = ("pixel_attention_mask", "pixel_mask")
_IMAGE_WORDS = ("pixel", "image", "video", "visual")  # in the names of image inputs and their masks

# Possible strides, in pixels, of the positions of a convolutional network.
_STRIDES = (1, 2, 4, 8, 16, 32, 64)
_PATCH_MERGES = (1, 2, 4)  # patches along a side that later layers may merge into one


def audio_mask_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which frames of sound a batch keeps, bool (samples, F) on the CPU, or ``None``."""
    keys = [key for key in batch if "mask" in str(key) and key not in _TOKEN_MASKS]
    by_name = [batch.get(key) for key in _AUDIO_MASKS]
    masks = [*by_name, *(batch[key] for key in keys if _is_audio_mask(batch[key], batch))]
    return next((m.bool().cpu() for m in masks if isinstance(m, Tensor) and m.dim() == 2), None)


def has_audio(batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch holds sound."""
    return any(_is_float_tensor(batch.get(key)) for key in _AUDIO_INPUTS)


def silent_frames(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which frames of a batch's sound are silent, (samples, F), ``None`` if it has a mask.

    Samples that equal the first or last one are, as padding need not be zero once normalised, and
    frames whose features are all zero.
    """
    given = (batch[key] for key in _AUDIO_INPUTS if _is_float_tensor(batch.get(key)))
    sound = next((value.cpu() for value in given), None)
    masked = isinstance(batch.get("attention_mask"), Tensor) or audio_mask_of(batch) is not None
    if masked or sound is None or sound.dim() not in (2, 3):
        return None
    if sound.dim() == 2:
        return (sound == sound[:, :1]) | (sound == sound[:, -1:])
    by_frame, by_band = (sound == 0).all(2), (sound == 0).all(1)  # features come last, or first
    return by_frame if by_frame.any() else by_band


def has_images(batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch holds images or videos."""
    return any(_is_float_tensor(value) and is_image_key(key) for key, value in batch.items())


def is_image_key(key: Any) -> bool:
    """Tell whether the name of a part of a batch is one of images or videos."""
    return any(word in str(key) for word in _IMAGE_WORDS)


def _is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_audio_mask(mask: Any, batch: Mapping[str, Any]) -> bool:
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        return False
    inputs = [batch[key] for key in _AUDIO_INPUTS if _is_float_tensor(batch.get(key))]
    return any(len(mask) == len(x) and mask.shape[1] in x.shape[1:] for x in inputs)


def pixel_masks_of(batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the masks of pixels, (images, H, W), or patches, (images, P), in a batch.

    Images and videos may each have their own.
    """
    image_mask = _image_mask(batch)
    others = (batch.get(key) for key in _PIXEL_MASKS if batch.get(key) is not image_mask)
    masks = [m.bool() for m in others if isinstance(m, Tensor) and m.dim() in (2, 3, 4)]
    places = [value for key, value in batch.items() if _are_patch_positions(key, value)]
    masks += [positions.ge(0).any(-1) for positions in places]
    crops = batch.get("image_attention_mask")  # of Phi-4: (samples, crops, rows, columns)
    if isinstance(crops, Tensor) and crops.dim() == 4:
        masks.append(crops.bool().flatten(0, 1).flatten(1))
    return tuple((m.flatten(0, 1) if m.dim() == 4 else m).cpu() for m in masks)


def _are_patch_positions(key: Any, values: Any) -> bool:
    """Tell whether values are the positions of patches in images, (images, P, 2); -1 is padding."""
    named = is_image_key(key) and str(key).endswith("position_ids")
    is_pairs = isinstance(values, Tensor) and values.dim() == 3 and values.shape[2] == 2
    return named and is_pairs and not values.is_floating_point()


def tile_mask_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which tiles of images a batch keeps, bool (samples, images, tiles), or ``None``."""
    mask, ratios = batch.get("aspect_ratio_mask"), batch.get("aspect_ratio_ids")
    if isinstance(mask, Tensor) and mask.dim() == 3:
        kept = mask.bool().cpu()
        if isinstance(ratios, Tensor) and ratios.shape == mask.shape[:2]:
            kept = kept & (ratios.cpu()[..., None] > 0)  # one tile is kept of an absent image
        return kept
    images = _image_mask(batch)
    return None if images is None else images[..., None].bool().cpu()


def _image_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which images of its samples a batch keeps, (samples, images).

    The others are padding: left out by a mask over whole images, such as PI0's over cameras, or
    attended to by no text token, in a mask like that of IDEFICS, (samples, tokens, images).
    """
    pixels, looks = batch.get("pixel_values"), batch.get("image_attention_mask")
    if not isinstance(pixels, Tensor) or pixels.dim() != 5:
        return None
    masks = [m for m in map(batch.get, _PIXEL_MASKS) if isinstance(m, Tensor) and m.dim() == 2]
    masks += [looks.bool().any(1)] if isinstance(looks, Tensor) and looks.dim() == 3 else []
    return next((mask for mask in masks if mask.shape == pixels.shape[:2]), None)


def frame_mask_for(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of a layer's frames, bool (samples, F').

    Args:
        mask: see :func:`audio_mask_of`. An entry may stand for several of the layer's frames, as in
            Granite's speech models.
        leading: shape of the layer's input without its features. Its first dimension may run over
            the chunks of equal length that a model cuts each sound into.

    Returns:
        ``None`` if the input is of another kind, or padding is not on the right.
    """
    if leading and len(mask) and leading[0] > len(mask) and mask.numel() % leading[0] == 0:
        mask = mask.reshape(leading[0], -1) if leading[0] % len(mask) == 0 else mask
    samples, frames = mask.shape
    lengths = mask.sum(1)
    if len(leading) != 2 or leading[0] != samples or not leading[1] or not frames:
        return None
    if not torch.equal(mask, torch.arange(frames, device="cpu") < lengths[:, None]):
        return None
    stride = -(-frames // leading[1])
    covers_all = -(-frames // stride) == leading[1]  # otherwise convolutions drop some at the end
    kept = -(-lengths // stride) if covers_all else -(-lengths * leading[1] // frames)
    if leading[1] > frames:
        # slightly longer: other tokens are among the frames; 2F - 1: distances between frames
        if 2 * leading[1] < 3 * frames or leading == (1, 2 * frames - 1):
            return None
        kept = lengths * -(-leading[1] // frames)  # the last entry may cover fewer frames
    return torch.arange(leading[1], device="cpu") < kept[:, None]


def patch_mask_for(
    mask: Tensor, leading: tuple[int, ...], patch_sizes: tuple[int, ...] = ()
) -> Tensor | None:
    """Return the mask of a layer's patches, bool (images, P'): those whose first pixel counts.

    Args:
        mask: one of :func:`pixel_masks_of`. Images without any pixel are padding, which models may
            leave out.
        leading: shape of the layer's input without its features.
        patch_sizes: of the model, in pixels, if known: the rest at the end of an image is cut off.
            Otherwise patches are taken by strides, of which the last may be short.
    """
    image_pixels = mask.flatten(1)
    if leading in ((len(mask),), (len(mask), 1)):  # pooled; the mean of no pixels may be NaN
        return image_pixels.any(1).reshape(leading)
    if len(leading) != 2:
        return None
    mask = mask if leading[0] == len(mask) else mask[image_pixels.any(1)]
    if leading[0] != len(mask):
        return None
    if mask.dim() == 2:
        return mask if leading[1] == mask.shape[1] else None
    height, width = mask.shape[1:]
    for side in (patch_size * factor for patch_size in patch_sizes for factor in _PATCH_MERGES):
        rows, columns = height // side, width // side
        if rows * columns == leading[1]:
            return mask[:, ::side, ::side][:, :rows, :columns].flatten(1)
    for side in () if patch_sizes else _STRIDES:
        rows, columns = -(-height // side), -(-width // side)
        if rows * columns == leading[1]:  # resized as object detectors do
            seen = functional.interpolate(mask[:, None].float(), (rows, columns))
            return seen.bool().flatten(1)
    return None


def tile_mask_for(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of an input with the tokens of all tiles concatenated.

    Args:
        mask: see :func:`tile_mask_of`.
        leading: shape of the layer's input without its features.
    """
    if len(leading) < 2 or math.prod(leading) % mask.numel():
        return None
    rows = mask.reshape(-1).repeat_interleave(math.prod(leading) // mask.numel())
    return rows.reshape(leading)
