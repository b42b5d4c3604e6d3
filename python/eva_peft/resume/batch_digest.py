"""A digest of a batch: does a loader yield the batches that a checkpoint has counted?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..inputs.batches import dataclass_fields

__all__ = ["digest_of_batch"]

# Elements of a tensor or array that count, evenly spaced if it has more: all of a batch of tokens,
# and enough of one of images.
MAX_ELEMENTS = 1 << 16
_NUMBERS = {bool, int, float}


def digest_of_batch(batch: Any) -> str:
    """Return a digest of a batch's contents, the same in every process and on every device.

    Tensors, arrays and texts count in nested mappings, sequences and dataclasses; of other objects,
    and of tensors or a whole batch that cannot be read, only the type.

    Args:
        batch: as it came from the loader.
    """
    digest = hashlib.sha256()
    try:
        for part in _parts(batch):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    except Exception:  # of a class of the user's, or it contains itself
        # nothing that was read before: where a recursion ends depends on the caller
        return type(batch).__qualname__
    return digest.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray) and value.dtype.hasobject:  # its bytes are addresses
        yield from _parts(value.tolist())
    elif isinstance(value, (Tensor, np.ndarray)):
        yield from _array_parts(value)
    elif isinstance(value, (bytes, bytearray)):
        yield bytes(value)
    elif isinstance(value, Mapping):
        yield b"{"
        # sorted: a collator may take them from a set, whose order is another in each process
        for name in sorted(value, key=_name):
            yield _name(name)
            yield from _parts(value[name])
        yield b"}"
    elif isinstance(value, (tuple, list)):
        yield b"["
        # at once, if they are numbers: datasets yield the pixels of images in lists
        array = np.array(value) if set(map(type, value)) <= _NUMBERS else None
        for each in value if array is None or array.dtype.hasobject else [array]:
            yield from _parts(each)
        yield b"]"
    elif isinstance(value, (str, int, float, complex, np.generic)) or value is None:
        yield repr(value).encode(errors="replace")
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _parts(dataclass_fields(value))
    else:
        yield type(value).__qualname__.encode()


def _name(key: Any) -> bytes:
    return repr(key).encode(errors="replace") if isinstance(key, (str, int)) else b"key"


def _array_parts(value: Tensor | np.ndarray) -> tuple[bytes, ...]:
    try:
        flat = (value.detach() if isinstance(value, Tensor) else value).reshape(-1)
        chosen = flat[:: max(1, -(-len(flat) // MAX_ELEMENTS))]
        if isinstance(chosen, Tensor):
            chosen = chosen.cpu().contiguous().view(torch.uint8).numpy()
        return f"{value.dtype} {tuple(value.shape)}".encode(), chosen.tobytes()
    except Exception:  # nested, sparse, on the meta device, or of a subclass with limits of its own
        return (type(value).__qualname__.encode(),)
