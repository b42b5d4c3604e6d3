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

__all__ = ["OUT_PROJ", "in_proj_inputs", "out_proj_inputs"]

OUT_PROJ = "out_proj"


def in_proj_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Return the inputs of ``in_proj`` in a call: query, key and value, the same tensor once."""
    from_kwargs = [kwargs.get(name) for name in ("query", "key", "value")[len(args) :]]
    tensors = {id(x): x for x in (*args[:3], *from_kwargs) if isinstance(x, Tensor)}
    return list(tensors.values())


def out_proj_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Return the input of ``out_proj`` in a call: the output with an identity in its place.

    The module itself is run, not a copy: its ``forward`` may be bound to it, as by accelerate.
    """
    out_proj = module.get_submodule(OUT_PROJ)
    weight: Tensor = out_proj.weight  # type: ignore[assignment]
    device = device_of(module)  # where offloaded parameters go; these two are no parameters
    identity = nn.Identity()
    identity.weight = torch.eye(len(weight), dtype=weight.dtype, device=device)
    identity.bias = torch.zeros(len(weight), dtype=weight.dtype, device=device)
    set_out_proj = functools.partial(module._modules.__setitem__, OUT_PROJ)
    with (
        temporarily(
            functools.partial(set_out_proj, out_proj), functools.partial(set_out_proj, identity)
        ),
        torch.no_grad(),
    ):
        output = module.forward(*args, **kwargs)
    return [output[0]]
