"""Inputs of the projections of ``nn.MultiheadAttention``, which it does not call as modules.

PEFT adapts ``in_proj``, with one ``lora_A`` for queries, keys and values, together with
``out_proj``, both with the same rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..surroundings.devices import device_of
from ..surroundings.interrupts import temporarily

__all__ = ["OUT_PROJ", "attended", "projected"]

OUT_PROJ = "out_proj"


def projected(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the inputs of ``in_proj`` in a call: query, key and value, the same tensor once."""
    named = [kwargs.get(name) for name in ("query", "key", "value")[len(args) :]]
    tensors = {id(x): x for x in (*args[:3], *named) if isinstance(x, Tensor)}
    return list(tensors.values())


def attended(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the input of ``out_proj`` in a call: the output with an identity in its place.

    The module itself is run, not a copy: its ``forward`` may be bound to it, as by accelerate.
    """
    last = module.get_submodule(OUT_PROJ)
    weight: Tensor = last.weight  # type: ignore[assignment]
    device = device_of(module)  # where offloaded parameters go; these two are no parameters
    same = nn.Identity()
    same.weight = torch.eye(len(weight), dtype=weight.dtype, device=device)
    same.bias = torch.zeros(len(weight), dtype=weight.dtype, device=device)
    put = functools.partial(module._modules.__setitem__, OUT_PROJ)
    with temporarily(functools.partial(put, last), functools.partial(put, same)), torch.no_grad():
        found = module.forward(*args, **kwargs)
    return [found[0]]
