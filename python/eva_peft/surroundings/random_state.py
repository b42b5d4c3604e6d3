"""The global random states: Python's, NumPy's, and torch's on the CPU and on devices."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .devices import accelerator
from .interrupts import temporarily

__all__ = ["preserved_random_state", "read_random_state", "set_random_state"]

# Both are Mersenne twisters, and each may cache the second of two normal numbers that it drew.
_HOST_STATE = np.dtype(
    [
        ("python", "<u4", 625),
        ("python_gauss", "<f8"),  # NaN for none
        ("numpy", "<u4", 624),
        ("numpy_position", "<i4"),  # -1 for another generator, whose state is not kept
        ("numpy_has_gauss", "<i4"),
        ("numpy_gauss", "<f8"),
    ]
)


def read_random_state(device: torch.device) -> Tensor:
    """Return the global random states as bytes, uint8 of one dimension.

    Args:
        device: its state is included, along with that of the CPU.
    """
    host = np.zeros((), _HOST_STATE)
    _, host["python"], gauss = random.getstate()
    host["python_gauss"] = np.nan if gauss is None else gauss
    state = _numpy_state()
    host["numpy_position"] = -1
    if state is not None:
        host["numpy"], host["numpy_position"] = state["state"]["key"], state["state"]["pos"]
        host["numpy_has_gauss"], host["numpy_gauss"] = state["has_gauss"], state["gauss"]
    parts = [torch.frombuffer(bytearray(host.tobytes()), dtype=torch.uint8), torch.get_rng_state()]
    if (module := _random_module(device)) is not None:
        parts.append(module.get_rng_state(device))
    return torch.cat(parts)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Restore a state that :func:`read_random_state` has returned.

    If the device is of another kind, its state is left unchanged.
    """
    cpu_size = torch.get_rng_state().numel()
    sizes = [_HOST_STATE.itemsize, cpu_size, state.numel() - _HOST_STATE.itemsize - cpu_size]
    # clones, since torch wants them aligned
    host_state, cpu_state, device_state = (part.clone() for part in state.split(sizes))
    host = np.frombuffer(host_state.numpy().tobytes(), _HOST_STATE)[0]
    gauss = float(host["python_gauss"])
    words = tuple(host["python"].tolist())
    random.setstate((random.Random.VERSION, words, None if np.isnan(gauss) else gauss))
    if host["numpy_position"] >= 0 and _numpy_state() is not None:
        rest = (host[name].item() for name in ("numpy_position", "numpy_has_gauss", "numpy_gauss"))
        np.random.set_state(("MT19937", host["numpy"], *rest))
    torch.set_rng_state(cpu_state)
    module = _random_module(device)
    if module is not None and device_state.numel() == module.get_rng_state(device).numel():
        module.set_rng_state(device_state, device)


def preserved_random_state() -> AbstractContextManager[None]:
    """Restore the global random states on exit: torch's of every device, Python's, NumPy's.

    An unused device is left alone: once this process has a CUDA context, its forked children could
    not use CUDA.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cpu_state, restore_devices = torch.get_rng_state(), _device_state_restorer()

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        restore_devices()

    return temporarily(restore)


def _device_state_restorer() -> Callable[[], None]:
    """Return a function that restores the states of all devices of the accelerator's kind."""
    kind = accelerator()
    module = _random_module(kind) if kind is not None else None
    if module is None:
        return lambda: None
    if not _is_in_use(module):
        return lambda: _reset_generators(module) if _is_in_use(module) else None
    has_all = hasattr(module, "get_rng_state_all")  # an Apple machine has one GPU
    states = module.get_rng_state_all() if has_all else module.get_rng_state()
    return lambda: (module.set_rng_state_all if has_all else module.set_rng_state)(states)


def _is_in_use(module: Any) -> bool:
    return not hasattr(module, "is_initialized") or bool(module.is_initialized())


def _reset_generators(module: Any) -> None:
    """Reset the generators of the devices to their initial seeds."""
    for generator in module.default_generators:
        generator.manual_seed(generator.initial_seed())


def _numpy_state() -> dict[str, Any] | None:
    """Return the state of NumPy's global generator, ``None`` if it is of another kind."""
    state = np.random.get_state(legacy=False)
    return state if state["bit_generator"] == "MT19937" else None


def _random_module(device: torch.device) -> Any:
    """Return torch's module for a kind of device, ``None`` if it has no random states."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None
