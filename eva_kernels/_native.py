"""Load the compiled modules on first use, and say why one cannot be used."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import EvaRuntimeError

__all__ = ["MODULES", "call", "load", "load_or_none", "unavailable_reason", "upload"]

logger = logging.getLogger(__name__)

# Compute capabilities of Jetson boards, which run no code built for other chips.
_TEGRA = {53, 62, 72, 87, 101, 110}
# Device type -> the module with the code for it.
MODULES = {"cpu": "eva_kernels._C", "cuda": "eva_kernels._cuda"}


@functools.cache
def _module_or_reason(device: torch.device | str) -> ModuleType | str:
    """Return the module for a device, or the reason why there is none."""
    device = torch.device(device)
    name = MODULES.get(device.type)
    if name is None:
        return f"there is no native code for device type {device.type!r}"
    try:
        # `from eva_kernels import _C` would report a missing file as a circular import.
        module = importlib.import_module(name)
    except ImportError as error:
        return (
            f"the compiled module {name} cannot be imported ({error}); "
            "install from source with a C++ compiler"
            + (", nvcc and EVA_KERNELS_CUDA=1" if device.type == "cuda" else "")
        )
    reason = _reason_unfit_for_gpu(module, device.index) if device.type == "cuda" else None
    return module if reason is None else f"the compiled module {name} cannot run: {reason}"


def _reason_unfit_for_gpu(module: ModuleType, index: int | None) -> str | None:
    """Return why a CUDA module cannot run on a GPU, or None; without an index on the current."""
    if not torch.cuda.is_available():
        return None
    if module.device_count() == 0:
        version = f"{module.toolkit // 1000}.{module.toolkit % 1000 // 10}"
        return f"it was built with CUDA {version}, which finds no GPU; the driver may be too old"
    index = torch.cuda.current_device() if index is None else index
    major, minor = torch.cuda.get_device_capability(index)
    if _code_runs_on(module.archs.split(), 10 * major + minor):
        return None
    return (
        f"GPU {index} has compute capability {major}.{minor}, but it was built for "
        f"{module.archs}; rebuild it with EVA_KERNELS_CUDA_ARCHS={10 * major + minor}"
    )


def _code_runs_on(built_archs: list[str], capability: int) -> bool:
    """Tell whether code built for architectures such as "80", "90a" or "100f" runs on a chip.

    Code for 8.0 runs on every later 8.x (but never between Jetson and other chips), and the PTX of
    the last entry on every later chip. With the suffix "a" neither runs on any other capability,
    with "f" on no other major version. See "Binary Compatibility" in NVIDIA's CUDA Programming
    Guide.
    """
    for arch in built_archs:
        built = int(arch.rstrip("af"))
        same_family = (
            built < capability and built // 10 == capability // 10 and not arch.endswith("a")
        )
        if built == capability or (same_family and not _TEGRA & {built, capability}):
            return True
    return built_archs[-1].isdigit() and int(built_archs[-1]) <= capability


def unavailable_reason(device: torch.device | str) -> str | None:
    """Return why no native code can run on a device, or None if it can."""
    found = _module_or_reason(device)
    return found if isinstance(found, str) else None


def load(device: torch.device | str) -> ModuleType:
    """Return the compiled module for a device.

    Raises:
        EvaRuntimeError: with the reason, if there is none.
    """
    found = _module_or_reason(device)
    if isinstance(found, str):
        raise EvaRuntimeError(f"backend='native' cannot run: {found}")
    return found


@functools.cache
def load_or_none(device: torch.device | str) -> ModuleType | None:
    """Return the compiled module, or None; the reason is logged the first time."""
    found = _module_or_reason(device)
    if isinstance(found, str):
        logger.info("running without native code: %s", found)
        return None
    return found


def call(module: ModuleType, name: str, *arguments: float, device: torch.device) -> None:
    """Call a function of a module; on CUDA, on the device's current stream."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(module, name)(*arguments, device.index, stream)
    else:
        getattr(module, name)(*arguments)


def upload(table: np.ndarray[Any, np.dtype[np.int64]], device: torch.device) -> Tensor:
    """Copy an int64 table of addresses and sizes to a device, without a synchronisation."""
    host = torch.from_numpy(table)
    if device.type != "cuda":
        return host
    # Only a copy from pinned memory is asynchronous.
    return host.pin_memory().to(device, non_blocking=True)
