"""PEFT's EVA, ended after a number of forward passes, for which it has no option."""

from __future__ import annotations

import torch
from peft.tuners.lora.eva import SVDHook
from torch import nn


def end_pass(model: nn.Module) -> None:
    """Tell PEFT's hooks on a model that they have converged, so that its pass ends."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, SVDHook):
                hook.converged = torch.ones_like(hook.converged)
