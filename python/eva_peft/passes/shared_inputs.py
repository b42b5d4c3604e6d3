"""Which layers read the same tensor, decided anew in every forward pass.

Query, key and value projections are called with one tensor object; so are gate and up. Such
layers share one stream. Identity means: the same object (seen through a weak reference, since
memory is reused within a forward) with the same version (it was not written to in between).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor

from eva_kernels.streaming import InputStream

from ..inputs.fits import are_same, version_of
from ..inputs.token_mask import TokenMask

__all__ = ["Seen", "Slot"]


class Seen:
    """A tensor that a layer was called with: recognised later without being kept alive.

    Args:
        x: the tensor.
        mask: which of its tokens count.
        held: it is still to be accumulated: then it is kept alive.
    """

    def __init__(self, x: Tensor, mask: TokenMask, held: bool = False) -> None:
        self._reference = weakref.ref(x)
        self._version = version_of(x)
        self._counting = mask.masks
        self._held = (x, mask) if held else None

    def is_same(self, x: Tensor) -> bool:
        """Tell whether x is that tensor, unchanged."""
        return self._reference() is x and version_of(x) == self._version

    def is_shared(self, x: Tensor, mask: TokenMask) -> bool:
        """Tell whether x is that tensor, and the same of its tokens count."""
        now, then = mask.masks, self._counting
        alike = now is then or are_same(now, then)
        return alike and self.is_same(x)

    def take(self) -> tuple[Tensor, TokenMask] | None:
        """Return the held tensor and its mask once, ``None`` if it is not held any more."""
        held, self._held = self._held, None
        return held

    @property
    def unchanged(self) -> bool:
        """Whether a held tensor still has the contents that the layer was called with."""
        return self._held is not None and version_of(self._held[0]) == self._version

    @property
    def held(self) -> tuple[Tensor, TokenMask] | None:
        """The tensor and its mask, as long as it waits to be accumulated."""
        return self._held


@dataclass(eq=False)
class Slot:
    """The layers that share one input, and its stream.

    Attributes:
        stream: the incremental SVD of that input.
        members: indices of the layers, the first called first.
        calls: what the layers were called with in the present forward pass, in order.
        counts: how many calls of each member the present forward pass has had.
    """

    stream: InputStream
    members: list[int]
    calls: list[Seen] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)

    def begin_forward(self) -> None:
        """Forget the calls of the forward pass before."""
        self.calls.clear()
        self.counts = dict.fromkeys(self.members, 0)

    def complete(self, call: int) -> bool:
        """Tell whether every member has made its call number ``call``."""
        return all(count > call for count in self.counts.values())
