"""Parts of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

__all__ = ["device_of", "outermost"]


def outermost(
    model: nn.Module, wanted: Callable[[nn.Module], bool], name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of wanted parts, maybe the model itself, and none inside of another."""
    if wanted(model):
        yield name, model
        return
    for child, part in model.named_children():
        yield from outermost(part, wanted, f"{name}.{child}" if name else child)


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of a module's weights, or where a hook will put them, if that is known."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    hooked = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if hooked is None else torch.device(hooked)
