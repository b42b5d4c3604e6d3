"""Masks over sound and images, and what of them layers see: frames and patches.

A layer behind convolutions or a pooling sees fewer frames or patches than the mask has entries;
each of them stands for equally many, but for the last.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["frames_seen", "patches_seen", "pixel_mask", "sound_mask", "tile_mask", "tiles_seen"]

# Masks over frames of sound, (samples, frames), beside text.
_SOUND = ("feature_attention_mask", "input_features_mask", "audio_attention_mask")
# Masks over pixels, (images, height, width) or (samples, images, height, width), or over patches,
# (images, patches).
_PIXELS = ("pixel_attention_mask", "pixel_mask")


def sound_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which frames of sound a batch keeps, bool (samples, F) on the CPU, if it tells."""
    found = (batch.get(key) for key in _SOUND)
    return next((m.bool().cpu() for m in found if isinstance(m, Tensor) and m.dim() == 2), None)


def pixel_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which pixels, (images, H, W), or patches, (images, P), a batch keeps, if it tells."""
    found = (batch.get(key) for key in _PIXELS)
    mask = next((m for m in found if isinstance(m, Tensor) and m.dim() in (2, 3, 4)), None)
    if mask is None:
        return None
    return (mask.flatten(0, 1) if mask.dim() == 4 else mask).bool().cpu()


def tile_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which tiles of its images a batch keeps, bool (samples, images, tiles)."""
    mask = batch.get("aspect_ratio_mask")
    return mask.bool().cpu() if isinstance(mask, Tensor) and mask.dim() == 3 else None


def frames_seen(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of a layer's frames, bool (samples, F').

    Args:
        mask: see :func:`sound_mask`.
        leading: shape of the layer's input without its features.

    Returns:
        ``None`` where the input is of another kind, or padding is not on the right.
    """
    samples, frames = mask.shape
    lengths = mask.sum(1)
    if len(leading) != 2 or leading[0] != samples or not 0 < leading[1] <= frames:
        return None
    if not torch.equal(mask, torch.arange(frames, device="cpu") < lengths[:, None]):
        return None
    kept = -(-lengths * leading[1] // frames)
    return torch.arange(leading[1], device="cpu") < kept[:, None]


def patches_seen(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of a layer's patches, bool (images, P'), those whose first pixel counts.

    Args:
        mask: see :func:`pixel_mask`. Images without any pixel fill up samples; models leave them
            out.
        leading: shape of the layer's input without its features.
    """
    if len(leading) != 2:
        return None
    images = mask.flatten(1)
    mask = mask if leading[0] == len(mask) else mask[images.any(1)]
    if leading[0] != len(mask):
        return None
    if mask.dim() == 2:
        return mask if leading[1] == mask.shape[1] else None
    grid = _grid(mask.shape[1], mask.shape[2], leading[1])
    if grid is None:
        return None
    return functional.interpolate(mask[:, None].float(), grid).bool().flatten(1)


def tiles_seen(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """Return the mask of an input that has the tokens of all tiles one after another.

    Args:
        mask: see :func:`tile_mask`.
        leading: shape of the layer's input without its features.
    """
    if len(leading) < 2 or math.prod(leading) % mask.numel():
        return None
    rows = mask.reshape(-1).repeat_interleave(math.prod(leading) // mask.numel())
    return rows.reshape(leading)


@functools.cache
def _grid(height: int, width: int, patches: int) -> tuple[int, int] | None:
    """Return how many patches stand above and beside each other in an image of so many pixels."""
    smallest = min(height, width)
    powers = [2**i for i in range(smallest.bit_length())]
    for side in itertools.chain(powers, range(1, smallest + 1)):
        for shape in ((-(-height // side), -(-width // side)), (height // side, width // side)):
            if math.prod(shape) == patches:
                return shape
    return None
