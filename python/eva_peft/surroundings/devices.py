"""Devices: the accelerator, the device of a module, and copies to a device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["accelerator", "copy_to_device", "device_of"]


def accelerator() -> torch.device | None:
    """Return the kind of accelerator that this machine has, if any."""
    found = torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if found else None


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of a module's weights, or where a hook will put them, if that is known."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    hooked = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if hooked is None else torch.device(hooked)


def copy_to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a tensor on a device, copied asynchronously where that is safe.

    It is not safe to the host. Nor is it where the device reads host memory only later, when that
    may have been overwritten, as by a loader that fills the same pinned tensor for every batch: an
    Apple GPU reads any memory so, others pinned memory.
    """
    if device.type in ("cpu", "mps") or (tensor.device.type == "cpu" and tensor.is_pinned()):
        return tensor.to(device)
    return tensor.to(device, non_blocking=True)
