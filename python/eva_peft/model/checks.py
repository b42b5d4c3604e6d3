"""Checks of the config, the base model and numbers, before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from copy import copy
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from .._peft_compat import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    adapter_configs,
    config_for_fused_experts,
    eva_config_or_none,
    has_adapters,
    injected_adapter_names,
    is_lora,
    peft_type_of,
)
from ..errors import EvaTypeError, EvaValueError, listed, warn
from .architecture import is_transformers_model
from .parts import outermost_modules

__all__ = [
    "check_base_model",
    "check_config",
    "check_weights_loaded",
    "checked_number",
    "config_of",
    "plain_number",
    "warn_if_inside_peft_model",
]


def check_config(model: nn.Module, config: object, adapter_name: str) -> LoraConfig:
    """Return the LoRA config to use for a model, with plain Python numbers.

    Raises:
        EvaTypeError: not a LoraConfig, or the adapter or the model is of another kind.
        EvaValueError: no config, no such adapter, a rank below 1, options that EVA does not
            support, or a base model that carries adapters.
    """
    adapter_config = None
    if has_adapters(model):
        adapter_config = config_of(model, adapter_name)
        if not is_lora(adapter_config):
            raise EvaTypeError(
                f"the model's adapter {adapter_name!r} is of type {peft_type_of(adapter_config)}; "
                "EVA initialises LoRA adapters, which are made with a LoraConfig"
            )
        config = adapter_config if config is None else config
    else:
        check_base_model(model, adapter_name)
    if not isinstance(config, LoraConfig) or not is_lora(config):
        raise EvaTypeError(f"EVA initialises LoRA: expected a LoraConfig, got {type(config)}")
    if not has_adapters(model):
        _check_keeps_base_layers(config)
    elif config is not adapter_config:
        config = config_for_fused_experts(model, config)
        _warn_of_ignored_options(config, adapter_config, adapter_name)
    _check_dense_lora_a(config if adapter_config is None else adapter_config)
    return _with_plain_numbers(config)


def config_of(model: nn.Module, adapter_name: str) -> Any:
    """Return the config of an adapter that a model carries.

    Raises:
        EvaValueError: it has no such adapter.
    """
    configs = adapter_configs(model)
    if adapter_name not in configs:
        raise EvaValueError(
            f"the model has no adapter {adapter_name!r}; its adapters are {sorted(configs)}"
        )
    return configs[adapter_name]


def warn_if_inside_peft_model(model: nn.Module, config: LoraConfig | None) -> None:
    """Warn if the base model of a PeftModel is given, as when a notebook cell runs twice.

    It cannot be distinguished from the result of ``inject_adapter_in_model``; but that is rarely a
    transformers model, and is given without a config.
    """
    if isinstance(model, PeftModel) or not has_adapters(model):
        return
    # set by transformers and diffusers
    injected_by_library = getattr(model, "_hf_peft_config_loaded", False)
    if not injected_by_library and (config is not None or is_transformers_model(model)):
        warn(
            f"this {type(model).__name__} already has the adapters "
            f"{injected_adapter_names(model)}, like the base model inside a PeftModel. They are "
            "initialised, but what is returned is not a PeftModel, and its save_pretrained would "
            "write no adapter. Pass the PeftModel instead, or load the base model again"
        )


def _warn_of_ignored_options(
    config: LoraConfig, adapter_config: LoraConfig, adapter_name: str
) -> None:
    # of an existing adapter EVA changes only the ranks, and keeps the scaling
    ignored = ["lora_alpha"] if config.lora_alpha != adapter_config.lora_alpha else []
    requested, existing = (c.target_modules for c in (config, adapter_config))
    both_named = all(isinstance(names, (list, set, tuple)) for names in (requested, existing))
    if both_named and set(requested) != set(existing):
        ignored.append("target_modules")
    if ignored:
        warn(
            f"adapter {adapter_name!r} keeps its own {' and '.join(ignored)}, and ignores the "
            "config's; to use these, make another adapter, or pass the base model with the config"
        )


def check_base_model(model: nn.Module, adapter_name: str) -> None:
    """Refuse a model that has adapters already, or an adapter name that PEFT cannot use.

    Raises:
        EvaTypeError: a PeftMixedModel. EvaValueError: adapters without a PeftModel, or such a name.
    """
    if isinstance(model, PeftMixedModel):
        raise EvaTypeError(
            "EVA cannot initialise a PeftMixedModel; make a PeftModel, by peft.get_peft_model "
            "without mixed=True"
        )
    names = injected_adapter_names(model)
    if names:
        raise EvaValueError(
            f"a part of the model{_adapted_part(model)} already has the adapters {names}, which "
            "EVA would overwrite. To initialise them, pass that part as the model, and a "
            "forward_fn that runs the whole model on a batch"
        )
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise EvaValueError(
            f"adapter_name={adapter_name!r} must be a non-empty string without a dot: PEFT names "
            "modules by it"
        )


def _adapted_part(model: nn.Module) -> str:
    name = next((name for name, _ in outermost_modules(model, has_adapters)), "")
    return f", {name}," if name else ""


def check_weights_loaded(model: nn.Module) -> None:
    """Refuse a model that has no weights yet.

    Raises:
        EvaValueError: all are on the meta device, and no hook will load them when needed.
    """
    parameters = list(model.parameters())
    all_on_meta = bool(parameters) and all(parameter.is_meta for parameter in parameters)
    if all_on_meta and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise EvaValueError(
            "the weights of the model are on the meta device: load them first (estimate() works "
            "without them)"
        )


def _check_keeps_base_layers(config: LoraConfig) -> None:
    # changes of the base model would have to be made before the pass, and could not be undone
    for name in ("layer_replication", "kasa_config"):
        if getattr(config, name, None):
            raise EvaValueError(
                f"{name} changes the layers of the base model, so that EVA would read other "
                "inputs than the adapters get; first wrap it with peft.get_peft_model(model, "
                "config), and initialise the PeftModel"
            )


def _check_dense_lora_a(config: LoraConfig) -> None:
    names = getattr(getattr(config, "use_bdlora", None), "target_modules_bd_a", None)
    if names:
        raise EvaValueError(
            f"use_bdlora makes lora_A of {listed(names)} block-diagonal: each block reads a part "
            "of the input, but EVA's components need all of it. Leave target_modules_bd_a empty, "
            "with match_strict=False"
        )


def checked_number(name: str, value: Any, kind: Any = Integral) -> Any:
    """Return a number as a plain Python number.

    Raises:
        EvaTypeError: not of this kind. EvaValueError: below 1.
    """
    _check_kind(name, value, kind)
    if not value >= 1:
        raise EvaValueError(f"{name}={value} must be at least 1")
    return plain_number(value)


def _check_kind(name: str, value: Any, kind: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = "a whole number" if kind is Integral else "a number"
        raise EvaTypeError(f"{name}={value!r} must be {wanted}")


def plain_number(value: Any) -> Any:
    """Convert NumPy's and torch's numbers, also in collections, to Python's; nothing else."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, dict):
        return {plain_number(key): plain_number(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain_number(item) for item in value)
    return value


def _with_plain_numbers(config: LoraConfig) -> LoraConfig:
    # other numbers cannot be saved as JSON, by us or by PEFT
    config = copy(config)
    config.eva_config = copy(eva_config_or_none(config))
    for part in filter(None, (config, config.eva_config)):
        for name, value in vars(part).items():
            setattr(part, name, plain_number(value))
    config.r = checked_number("r", config.r)
    _check_names(config)
    config.rank_pattern = {
        key: checked_number(f"rank_pattern[{key!r}]", rank)
        for key, rank in (config.rank_pattern or {}).items()
    }
    config.alpha_pattern = config.alpha_pattern or {}
    _check_finite("lora_alpha", config.lora_alpha)
    for key, alpha in config.alpha_pattern.items():
        _check_finite(f"alpha_pattern[{key!r}]", alpha)
    if config.eva_config is not None and config.eva_config.use_label_mask:
        _check_finite("label_mask_value", config.eva_config.label_mask_value)
    return config


def _check_names(config: LoraConfig) -> None:
    """Refuse options that name layers, if they are not names or regular expressions."""
    for option in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        given = getattr(config, option, None) or ()
        is_pattern = option.endswith("pattern")
        if is_pattern and given and not isinstance(given, Mapping):
            raise EvaTypeError(f"{option}={given!r} must be a mapping from names to numbers")
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, Collection) or not all(isinstance(n, str) for n in names):
            raise EvaTypeError(f"{option}={given!r} must name layers by strings")
        for name in names if is_pattern or isinstance(given, str) else ():
            try:
                re.compile(rf"(.*\.)?({name})$" if is_pattern else name)  # as PEFT does
            except re.error as error:
                raise EvaValueError(
                    f"{option}: {name!r} is not a regular expression ({error}); correct it, or "
                    "escape its special characters"
                ) from error


def _check_finite(name: str, value: Any) -> None:
    _check_kind(name, value, Real)
    if not math.isfinite(value):
        raise EvaValueError(f"{name}={value} must be finite")
