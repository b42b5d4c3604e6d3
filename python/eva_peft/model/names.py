"""Names of layers: in the base model, as PEFT's keys, and as a user gives them."""

from __future__ import annotations

import re
from collections.abc import Container

from torch import nn

from .._peft_compat import LoraLayer, ParamWrapper

__all__ = [
    "adapter_layers",
    "layer_name",
    "name_in_base_model",
    "peft_key",
    "resolve_name",
    "without_fsdp",
    "without_inserted_wrappers",
]

# Wrappers in module paths: DDP and PEFT prefix the names of the base model; torch.compile and
# activation checkpointing insert theirs anywhere; FullyShardedDataParallel does, too, also after
# the last name, where PEFT never sees it.
_WRAPPER_PREFIX = re.compile(r"^(?:module\.|base_model\.model\.)")
_INSERTED_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")
_FSDP_WRAPPER = re.compile(r"(?:^|\.)_fsdp_wrapped_module(?=\.|$)")
# PEFT's suffix for a module with an adapter (of one of its parameters, if inside the path).
_BASE_LAYER_SUFFIX = re.compile(r"\.base_layer(?=\.|$)")


def name_in_base_model(name: str) -> str:
    """Return the name in the base model of a module of a PeftModel."""
    return without_inserted_wrappers(peft_key(name))


def peft_key(path: str, module: nn.Module | None = None) -> str:
    """Return PEFT's name of a module of a PeftModel, or of the adapted parameter.

    It is the path in the base model, including ``_orig_mod`` of compiled parts and other wrappers
    that were there when PEFT added its adapters.
    """
    key = _BASE_LAYER_SUFFIX.sub("", without_fsdp(path).removeprefix("base_model.model."))
    return f"{key}.{module.parameter_name}" if isinstance(module, ParamWrapper) else key


def without_fsdp(path: str) -> str:
    """Return the path of a module without FullyShardedDataParallel wrappers."""
    return _FSDP_WRAPPER.sub("", path).removeprefix(".")


def without_inserted_wrappers(path: str) -> str:
    """Return the path of a module without torch.compile and activation checkpointing."""
    return _INSERTED_WRAPPER.sub("", path)


def layer_name(path: str, module: LoraLayer) -> str:
    """Return the base-model name of the module or parameter that a LoRA layer adapts."""
    return without_inserted_wrappers(peft_key(path, module))


def resolve_name(name: str, known_names: Container[str]) -> str:
    """Return the known layer that a key refers to, ignoring the prefixes of wrappers.

    Prefixes are removed one by one, since a base model may itself have a ``module``. A key that
    refers to no known layer is returned unchanged.
    """
    candidate = without_inserted_wrappers(name)
    while candidate not in known_names:
        shorter = _WRAPPER_PREFIX.sub("", candidate)
        if shorter == candidate:
            return name
        candidate = shorter
    return candidate


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, LoraLayer]]:
    """Return path and LoRA layer of everything an adapter adapts, by the name in the base model.

    If the output projection of an attention is a target as well, PEFT adapts it a second time,
    unused by the attention: of the two the first is returned.
    """
    layers: dict[str, tuple[str, LoraLayer]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            layers.setdefault(layer_name(path, module), (path, module))
    return layers
