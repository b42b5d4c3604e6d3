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

__all__ = ["random_state_kept", "read_random_state", "set_random_state"]

# Both are Mersenne twisters, and each may cache the second of two normal numbers that it drew.
_PLAIN = np.dtype(
    [
        ("python", "<u4", 625),
        ("python_gauss", "<f8"),  # NaN for none
        ("numpy", "<u4", 624),
        ("numpy_at", "<i4"),  # -1 for another generator, whose state is not kept
        ("numpy_has_gauss", "<i4"),
        ("numpy_gauss", "<f8"),
    ]
)


def read_random_state(device: torch.device) -> Tensor:
    """Return the global random states as bytes, uint8 of one dimension.

    Args:
        device: its state is included, along with that of the CPU.
    """
    plain = np.zeros((), _PLAIN)
    _, plain["python"], gauss = random.getstate()
    plain["python_gauss"] = np.nan if gauss is None else gauss
    state = _numpy_state()
    plain["numpy_at"] = -1
    if state is not None:
        plain["numpy"], plain["numpy_at"] = state["state"]["key"], state["state"]["pos"]
        plain["numpy_has_gauss"], plain["numpy_gauss"] = state["has_gauss"], state["gauss"]
    parts = [torch.frombuffer(bytearray(plain.tobytes()), dtype=torch.uint8), torch.get_rng_state()]
    if (module := _with_states(device)) is not None:
        parts.append(module.get_rng_state(device))
    return torch.cat(parts)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Restore a state that :func:`read_random_state` has returned.

    If the device is of another kind, its state is left unchanged.
    """
    cpu = torch.get_rng_state().numel()
    sizes = [_PLAIN.itemsize, cpu, state.numel() - _PLAIN.itemsize - cpu]
    head, here, there = (part.clone() for part in state.split(sizes))  # torch wants them aligned
    plain = np.frombuffer(head.numpy().tobytes(), _PLAIN)[0]
    gauss = float(plain["python_gauss"])
    words = tuple(plain["python"].tolist())
    random.setstate((random.Random.VERSION, words, None if np.isnan(gauss) else gauss))
    if plain["numpy_at"] >= 0 and _numpy_state() is not None:
        rest = (plain[name].item() for name in ("numpy_at", "numpy_has_gauss", "numpy_gauss"))
        np.random.set_state(("MT19937", plain["numpy"], *rest))
    torch.set_rng_state(here)
    module = _with_states(device)
    if module is not None and there.numel() == module.get_rng_state(device).numel():
        module.set_rng_state(there, device)


def random_state_kept() -> AbstractContextManager[None]:
    """Restore the global random states on exit: torch's of every device, Python's, NumPy's.

    An unused device is left alone: once this process has a CUDA context, its forked children could
    not use CUDA.
    """
    plain, array = random.getstate(), np.random.get_state()
    cpu, devices = torch.get_rng_state(), _states_of_devices()

    def put_back() -> None:
        random.setstate(plain)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        devices()

    return temporarily(put_back)


def _states_of_devices() -> Callable[[], None]:
    """Return a function that restores the states of all devices of the accelerator's kind."""
    kind = accelerator()
    module = _with_states(kind) if kind is not None else None
    if module is None:
        return lambda: None
    if not _is_in_use(module):
        return lambda: _begin_anew(module) if _is_in_use(module) else None
    of_all = hasattr(module, "get_rng_state_all")  # an Apple machine has one GPU
    states = module.get_rng_state_all() if of_all else module.get_rng_state()
    return lambda: (module.set_rng_state_all if of_all else module.set_rng_state)(states)


def _is_in_use(module: Any) -> bool:
    return not hasattr(module, "is_initialized") or bool(module.is_initialized())


def _begin_anew(module: Any) -> None:
    """Reset the generators of the devices to their initial seeds."""
    for generator in module.default_generators:
        generator.manual_seed(generator.initial_seed())


def _numpy_state() -> dict[str, Any] | None:
    """Return the state of NumPy's global generator, ``None`` if it is of another kind."""
    state = np.random.get_state(legacy=False)
    return state if state["bit_generator"] == "MT19937" else None


def _with_states(device: torch.device) -> Any:
    """Return torch's module for a kind of device, ``None`` if it has no random states."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None
