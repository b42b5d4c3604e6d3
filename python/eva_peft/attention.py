"""What the projections of ``nn.MultiheadAttention`` read, which it does not call as modules.

PEFT adapts ``in_proj``, with one ``lora_A`` for queries, keys and values, and ``out_proj`` with it,
both of one rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OUT_PROJ", "attended", "projected"]

OUT_PROJ = "out_proj"


def projected(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return what ``in_proj`` reads in a call: query, key and value, what is one tensor once."""
    named = [kwargs.get(name) for name in ("query", "key", "value")[len(args) :]]
    tensors = {id(x): x for x in (*args[:3], *named) if isinstance(x, Tensor)}
    return list(tensors.values())


def attended(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return what ``out_proj`` reads in a call, by a run with one that changes nothing."""
    weight: Tensor = module.out_proj.weight  # type: ignore[union-attr, assignment]
    same = nn.Linear(1, 1, device="meta")
    same.weight = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device))
    same.bias = nn.Parameter(weight.new_zeros(len(weight)))
    inner = copy.copy(module)
    inner._modules = {**module._modules, OUT_PROJ: same}
    with torch.no_grad():
        found = inner.forward(*args, **kwargs)
    return [found[0]]
