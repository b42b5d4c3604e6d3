"""Which layers read the same tensor, determined again in every forward pass.

Query, key and value projections are called with one tensor object; so are gate and up. Such
layers share one stream. Identity means: the same object (held by a weak reference, since memory
is reused within a forward pass) with the same version (not written to in between).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor

from eva_kernels.streaming import InputStream

from ..inputs.fits import are_same_tensors, version_of
from ..inputs.token_mask import TokenMask

__all__ = ["SeenTensor", "Slot"]


class SeenTensor:
    """A tensor that a layer was called with, to be recognised later without being kept alive.

    Args:
        x: the tensor.
        mask: which of its tokens count.
        held: it is yet to be accumulated, and is kept alive until then.
    """

    def __init__(self, x: Tensor, mask: TokenMask, held: bool = False) -> None:
        self._reference = weakref.ref(x)
        self._version = version_of(x)
        self._masks = mask.masks
        self._held = (x, mask) if held else None

    def is_same(self, x: Tensor) -> bool:
        """Tell whether x is that tensor, unchanged."""
        return self._reference() is x and version_of(x) == self._version

    def is_shared(self, x: Tensor, mask: TokenMask) -> bool:
        """Tell whether x is that tensor, with the same masks."""
        return self.is_same(x) and are_same_tensors(mask.masks, self._masks)

    def take_held(self) -> tuple[Tensor, TokenMask] | None:
        """Return the held tensor and its mask, once; ``None`` if it is no longer held."""
        held, self._held = self._held, None
        return held

    @property
    def is_unchanged(self) -> bool:
        """Whether a held tensor still has the contents of the call."""
        return self._held is not None and version_of(self._held[0]) == self._version

    @property
    def held(self) -> tuple[Tensor, TokenMask] | None:
        """The tensor and its mask until it is accumulated; ``None`` afterwards."""
        return self._held


@dataclass(eq=False)
class Slot:
    """The layers that share one input, and its stream.

    Attributes:
        stream: the incremental SVD of that input.
        members: indices of the layers, in the order of their first call.
        calls: the tensors the layers were called with in the current forward pass, in order.
        call_counts: by member, its number of calls in the current forward pass.
    """

    stream: InputStream
    members: list[int]
    calls: list[SeenTensor] = field(default_factory=list)
    call_counts: dict[int, int] = field(default_factory=dict)

    def begin_forward(self) -> None:
        """Forget the calls of the previous forward pass."""
        self.calls.clear()
        self.call_counts = dict.fromkeys(self.members, 0)

    def is_complete(self, call: int) -> bool:
        """Tell whether every member has made its call number ``call``."""
        return all(count > call for count in self.call_counts.values())
