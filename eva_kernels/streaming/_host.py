"""Device-to-host reads: the only place where a step waits for the device.

A device works through a queue. Reading a number that is still being computed (``.item()``,
``bool(tensor)``, a boolean index) blocks the host until the queue is empty, and the device is then
idle until the host has refilled it. So a step collects all numbers that host decisions depend on
and reads them once. The host keeps the state of a stream that it decides on as plain numbers and
NumPy arrays, so that no later decision needs a read.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "as_array", "read", "reads_are_free", "state_device", "upload"]

Array = np.ndarray[Any, np.dtype[np.float64]]
_NOTHING: Array = np.empty(0)


def reads_are_free(device: torch.device) -> bool:
    """Tell whether the host can read a tensor without waiting for a queue."""
    return device.type == "cpu"


def state_device(device: torch.device) -> torch.device:
    """Return the device for the state of a stream whose tokens are on ``device``.

    That is the device itself, or the CPU if the device lacks float64 support for the operations of
    a fold, such as Apple's GPUs and some of Intel's.
    """
    return device if _supports_float64(device) else torch.device("cpu")


@functools.cache
def _supports_float64(device: torch.device) -> bool:
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        matrix = torch.full((1, 1), 1 + 2.0**-40, dtype=torch.float64, device=device)
        lower, _ = torch.linalg.cholesky_ex(torch.linalg.eigh(matrix).eigenvectors.square())
        square = matrix @ torch.linalg.solve_triangular(lower, matrix, upper=False)
        # false on devices where float64 is an alias of float32
        return square.item() == (1 + 2.0**-40) ** 2
    except (TypeError, RuntimeError):
        return False


def read(tensors: Sequence[Tensor]) -> list[Array]:
    """Bring tensors to the host, with one copy per device.

    Args:
        tensors: of any shapes, devices and dtypes whose values float64 can hold; no gradient.

    Returns:
        Arrays of the same shapes, float64; those of CPU tensors have the tensor's dtype and share
        its memory. They must not be written to.
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
    """Return values as float64 on the host: an array unchanged, a tensor as a copy or view."""
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without a synchronisation; for the CPU, return it itself."""
    if device.type == "cpu":
        return host
    # Only a copy from pinned memory is asynchronous.
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
