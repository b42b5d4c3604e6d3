"""The host and the device: the only place where a step waits for the device.

A device works through a queue. Whoever asks for a number that is still being computed
(``.item()``, ``bool(tensor)``, a boolean index) stops until the queue is empty, and the queue then
stays empty until the host has filled it again. So a step collects all numbers that the host decides
on and reads them once. What the host keeps of a stream are plain numbers and NumPy arrays, on
which no later decision can cost a read.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "as_array", "home_of", "read", "reads_are_free", "upload"]

Array = np.ndarray[Any, np.dtype[np.float64]]
_NOTHING: Array = np.empty(0)


def reads_are_free(device: torch.device) -> bool:
    """Tell whether the host can look at a tensor without waiting for a queue."""
    return device.type == "cpu"


def home_of(device: torch.device) -> torch.device:
    """Return where the state of a stream is kept whose tokens are on a device.

    That is the device itself, or the CPU where it does not compute in float64 all that a fold does,
    as Apple's GPUs and some of Intel's.
    """
    return device if _is_wide(device) else torch.device("cpu")


@functools.cache
def _is_wide(device: torch.device) -> bool:
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        matrix = torch.full((1, 1), 1 + 2.0**-40, dtype=torch.float64, device=device)
        lower, _ = torch.linalg.cholesky_ex(torch.linalg.eigh(matrix).eigenvectors.square())
        square = matrix @ torch.linalg.solve_triangular(lower, matrix, upper=False)
        # not so where float64 is another name of float32
        return square.item() == (1 + 2.0**-40) ** 2
    except (TypeError, RuntimeError):
        return False


def read(tensors: Sequence[Tensor]) -> list[Array]:
    """Bring tensors to the host, with one copy a device.

    Args:
        tensors: of any shapes, devices and dtypes whose values float64 can hold; no gradient.

    Returns:
        Arrays of the same shapes, float64; those from the CPU in their own dtype, and sharing
        memory with the tensors. They are for reading only.
    """
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    arrays: list[Array] = []
    for i, tensor in enumerate(tensors):
        if tensor.is_cpu:
            arrays.append(tensor.numpy())
        else:
            by_device[tensor.device].append(i)
            arrays.append(_NOTHING)
    for indices in by_device.values():
        flat = [tensors[i].reshape(-1).double() for i in indices]
        ends = np.cumsum([part.numel() for part in flat])[:-1]
        parts = np.split(torch.cat(flat).cpu().numpy(), ends)
        for i, part in zip(indices, parts, strict=True):
            arrays[i] = part.reshape(tensors[i].shape)
    return arrays


def as_array(values: Tensor | Array) -> Array:
    """Return values as float64 on the host; an array as it is, of a tensor a copy or a view."""
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device, without waiting for it; on the CPU, the tensor itself."""
    if device.type == "cpu":
        return host
    # Only from pinned memory does a copy not wait for the queue.
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
