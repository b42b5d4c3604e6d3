"""What a layer's adapter reads: tokens of a number of features, or patches of a convolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from operator import index

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._peft_compat import adapter_dilation

__all__ = ["CONVOLUTIONS", "Patches", "distribute_over_groups", "in_out_features", "patches_of"]

# The convolutions that PEFT adapts.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Bytes of patches copied at a time: they overlap, so all of a batch may be a multiple of its size.
MAX_PATCH_BYTES = 1 << 26


@dataclass(frozen=True)
class Patches:
    """How a convolution cuts its input into patches; each is one token for EVA.

    ``lora_A`` of a convolution is a convolution over all input channels, even if the base layer
    has groups, and pads with zeros: these are the patches that it reads.

    Attributes:
        channels: C, input channels.
        kernel, stride, dilation: by spatial dimension.
        padding: zeros before and after each spatial dimension.
    """

    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def features(self) -> int:
        """D: the number of entries of a patch."""
        return self.channels * prod(self.kernel)

    def windows(self, x: Tensor) -> Tensor:
        """Return all patches as a view of the padded input.

        Args:
            x: (B, C, *spatial), or one sample without B.

        Returns:
            (B, *positions, C, *kernel).
        """
        dimensions = len(self.kernel)
        if x.dim() == dimensions + 1:
            x = x[None]
        # the last dimension comes first in F.pad
        flat = [side for pair in reversed(self.padding) for side in pair]
        if any(flat):
            x = nn.functional.pad(x, flat)
        for i, (size, step, gap) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
        positions = range(2, 2 + dimensions)
        taps = range(2 + dimensions, 2 + 2 * dimensions)
        return x.permute(0, *positions, 1, *taps)

    def token_chunks(self, windows: Tensor, rows: Tensor | None = None) -> Iterator[Tensor]:
        """Yield patches as (N, D) matrices, a few samples at a time.

        Args:
            windows: from :meth:`windows`.
            rows: indices of the patches to use; all if ``None``.
        """
        positions = windows.shape[: 1 + len(self.kernel)]
        token_bytes = self.features * windows.element_size()
        if rows is not None:
            for part in rows.split(max(1, MAX_PATCH_BYTES // token_bytes)):
                selected = windows[torch.unravel_index(part, positions)]
                yield selected.reshape(-1, self.features)
            return
        samples = max(1, MAX_PATCH_BYTES // (token_bytes * max(1, prod(positions[1:]))))
        for part in windows.split(samples):
            yield part.reshape(-1, self.features)  # a copy, since patches overlap


def patches_of(module: nn.Module) -> Patches | None:
    """Return how a convolution cuts its input; ``None`` for any other layer."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    dilation = adapter_dilation(module)
    padding: tuple[tuple[int, int], ...]
    if module.padding == "valid":
        padding = ((0, 0),) * len(module.kernel_size)
    elif module.padding == "same":
        spans = [d * (k - 1) for k, d in zip(module.kernel_size, dilation, strict=True)]
        padding = tuple((span // 2, span - span // 2) for span in spans)
    else:
        padding = tuple((int(p), int(p)) for p in module.padding)
    return Patches(module.in_channels, module.kernel_size, module.stride, dilation, padding)


def in_out_features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a layer whose input EVA can read, else ``None``.

    The features of a convolution are the entries of a patch.
    """
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)  # not from its weight, which may be elsewhere
    patches = patches_of(module)
    if patches is not None:
        return patches.features, int(module.out_channels)  # type: ignore[arg-type]
    if isinstance(module, nn.MultiheadAttention):
        width = int(module.embed_dim)  # of in_proj; PEFT requires keys and values of that width
        return (width, 3 * width) if module._qkv_same_embed_dim else None
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return None
    try:  # some models store them as NumPy or torch numbers
        return index(module.in_features), index(module.out_features)  # type: ignore[arg-type]
    except (AttributeError, TypeError):
        return None


def distribute_over_groups(rows: Tensor, groups: int) -> Tensor:
    """Distribute components, best first, over the groups of a convolution in round-robin order.

    ``lora_B`` of a grouped convolution has groups, too: each reads its own consecutive rows of
    ``lora_A``. This way every group gets its share of the leading components.

    Args:
        rows: (r, D), r a multiple of ``groups``.
    """
    if groups == 1:
        return rows
    return rows.reshape(-1, groups, rows.shape[1]).transpose(0, 1).reshape(rows.shape)
