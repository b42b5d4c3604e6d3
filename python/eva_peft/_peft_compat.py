"""Differences between PEFT releases, and its private functions, which no other module uses."""

from __future__ import annotations

import functools
import inspect
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, PeftType
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from peft.tuners.lora.layer import ParamWrapper, _ConvNd
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import nn

from .errors import EvaValueError, warnings_caught

try:  # targets of models whose experts were fused in transformers 5
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:
    convert_peft_config_for_transformers = None

__all__ = [
    "SWITCHABLE_LAYERS",
    "BaseTunerLayer",
    "EvaConfig",
    "LoraConfig",
    "LoraLayer",
    "ParamWrapper",
    "PeftMixedModel",
    "PeftModel",
    "adapter_configs",
    "adapter_dilation",
    "anchored_pattern",
    "base_model_of",
    "config_for_fused_experts",
    "dora_magnitude",
    "eva_config_of",
    "eva_config_or_none",
    "exclude_pattern",
    "failed_layer_name",
    "forward_fn_dict",
    "has_adapters",
    "injected_adapter_names",
    "is_lora",
    "library_versions",
    "matches_parameter",
    "matches_target",
    "new_adapters_on_cpu",
    "patch_convolution_dilation",
    "pattern_from_values",
    "pattern_value",
    "peft_type_of",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
    "resolved_config",
    "splits_target_string",
    "tied_modules",
    "untrained_dora_magnitude",
    "update_layer",
]


# Earlier versions tie only modules that are trained fully (``modules_to_save``).
_PEFT_TIES_TARGETS = "_add_targets_to_tie" in vars(LoraModel)

# Earlier versions refuse no module names.
_CHECK_MODULE_NAME: Any = getattr(
    tuners_utils, "_check_lora_target_modules_mamba", lambda config, model, name: None
)

# ``re`` caches 512 compiled expressions, which the patterns of ranks and of alphas share.
MAX_PATTERN_KEYS = 240

# What PEFT's own ``disable_adapter`` switches off: adapters, and trained copies of modules.
SWITCHABLE_LAYERS = (BaseTunerLayer, ModulesToSaveWrapper)


# What PEFT's models of these tasks add to ``modules_to_save``.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _is_transformers_model(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "model_type")


def base_model_of(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def eva_config_or_none(config: LoraConfig) -> EvaConfig | None:
    """Return the EVA part of a config, if it has one."""
    eva: EvaConfig | dict[str, Any] | None = config.eva_config
    # PEFT 0.17 leaves the dict that was read from an adapter's file
    return EvaConfig(**eva) if isinstance(eva, dict) else eva


def eva_config_of(config: LoraConfig) -> EvaConfig:
    """Return the EVA part of a config, with PEFT's defaults where it has none."""
    return eva_config_or_none(config) or EvaConfig()


def library_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def resolved_config(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Return a copy of a config with its targets as PEFT would resolve them for this model.

    A FullyShardedDataParallel wrapper is ignored.

    Raises:
        EvaValueError: no ``target_modules`` given and PEFT knows no default for the model type, or
            targets that PEFT cannot translate to fused experts.
    """
    config, model = deepcopy(config), _without_fsdp(model)
    head_names = _TASK_HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    if head_names:  # trained fully, so not adapted
        config.modules_to_save = [*(config.modules_to_save or ()), *head_names]
        head_paths = [
            name for name, _ in model.named_modules() if name.split(".")[-1] in head_names
        ]
        if _is_all_linear(config.target_modules) and config.task_type != "SEQ_CLS" and head_paths:
            # PEFT excludes the head only for SEQ_CLS, and refuses to adapt those of other tasks
            config.exclude_modules = exclude_pattern(config, head_paths)
    converted = _peft_conversion(config, model)
    is_split = _was_split_into_letters(config, converted)
    if not is_split:
        config = converted
    if config.target_modules is None:  # the default applies next to target_parameters
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if default is None and not config.target_parameters:
            raise EvaValueError(
                f"please specify target_modules in the LoraConfig: PEFT has no default for model "
                f'type {model_type!r} (target_modules="all-linear" takes every linear layer)'
            )
        config.target_modules = set(default) if isinstance(default, (list, tuple)) else default
    requested = config.target_modules
    if _is_all_linear(requested):
        refused_names = _refused_names(config, model)
        if refused_names:
            config.exclude_modules = exclude_pattern(config, refused_names)
    config = _maybe_include_all_linear_layers(config, model)
    names = config.target_modules
    if is_split:
        config.target_modules = {n for n, _ in model.named_modules() if matches_target(config, n)}
    elif (
        isinstance(requested, str)
        and isinstance(names, set)
        and _are_suffixes_of_others(names, model)
    ):
        config.target_modules = "|".join(sorted(map(re.escape, names)))
    return config


def splits_target_string(model: nn.Module, config: LoraConfig) -> bool:
    """Tell whether PEFT turns a string of targets into the set of its letters.

    PEFT 0.19 does, "all-linear" included, in models whose experts transformers 5 has fused.
    """
    is_string = isinstance(config.target_modules, str)  # else nothing can be spoilt
    return is_string and _was_split_into_letters(config, _peft_conversion(config, model))


def _was_split_into_letters(config: LoraConfig, converted: LoraConfig) -> bool:
    targets = config.target_modules
    return isinstance(targets, str) and bool(converted.target_modules == set(targets))


def _peft_conversion(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Return a copy of a config as PEFT changes it for models whose experts are fused."""
    config = deepcopy(config)
    if convert_peft_config_for_transformers is None or not _is_transformers_model(model):
        return config
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError as error:
        raise EvaValueError(str(error)) from error
    return config


def config_for_fused_experts(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Return a copy of a config as PEFT changes it for fused experts; a string of targets stays.

    Raises:
        EvaValueError: targets that PEFT cannot translate to fused experts.
    """
    converted, requested = _peft_conversion(config, base_model_of(model)), config.target_modules
    if isinstance(requested, str):  # PEFT matches it with names of the base model
        converted.target_modules, converted.target_parameters = requested, config.target_parameters
    return converted


def _refused_names(config: LoraConfig, model: nn.Module) -> list[str]:
    """Return the modules that PEFT refuses to adapt for their names, in Mamba-like models."""
    refused = []
    for name, _ in model.named_modules():
        try:
            _CHECK_MODULE_NAME(config, model, name.split(".")[-1])
        except ValueError:
            refused.append(name)
    return refused


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _are_suffixes_of_others(names: set[str], model: nn.Module) -> bool:
    # PEFT matches suffixes, and a layer's name may be a suffix of a container's: "0" in an
    # nn.Sequential of "1.layers.0"
    paths = (path.split(".") for path, _ in model.named_modules() if path not in names)
    return any(".".join(parts[i:]) in names for parts in paths for i in range(1, len(parts)))


def tied_modules(model: nn.Module, config: LoraConfig) -> set[str]:
    """Return the paths in the base model of layers whose adapter PEFT ties to the embeddings'.

    Args:
        model: with adapters, or a base model that would be wrapped.
        config: that of the adapter.
    """
    if not (getattr(config, "ensure_weight_tying", False) and _PEFT_TIES_TARGETS):
        return set()
    if not has_adapters(model):  # what PEFT would find on wrapping
        config, tuner = deepcopy(config), LoraModel.__new__(LoraModel)
        nn.Module.__init__(tuner)
        tuner.model = model
        with warnings_caught():
            warnings.simplefilter("ignore")
            tuner._check_tied_modules(model, config)
    return set(getattr(config, "target_modules_to_tie", None) or ())


def matches_target(config: LoraConfig, name: str) -> bool:
    """Tell whether PEFT would adapt the module of this name."""
    if config.target_modules is None:
        return False
    return bool(check_target_module_exists(config, name))


def matches_parameter(config: LoraConfig, name: str) -> bool:
    """Tell whether PEFT would adapt the parameter of this name by itself."""
    requested = config.target_parameters or ()
    return any(name == key or name.endswith(f".{key}") for key in requested)


def pattern_value(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """Look a layer up in ``rank_pattern`` or ``alpha_pattern`` as PEFT does.

    PEFT tries the keys in turn as regular expressions, which are compiled again if there are more
    of them than ``re`` caches. Keys that name exactly one other layer are left out here.
    """
    own_key = anchored_pattern(name)
    keys = [key for key in pattern if key == own_key or not _names_one_layer(key)]
    return pattern.get(get_pattern_key(keys, name), default)


@functools.lru_cache(1 << 14)
def _names_one_layer(key: str) -> bool:
    return key == anchored_pattern(re.sub(r"\\(.)", r"\1", key.removeprefix("^")))


def update_layer(
    layer: LoraLayer, path: str, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig
) -> None:
    """Rebuild one adapter of a LoRA layer, by its path in the model: new rank, zero ``lora_B``."""
    parameters = inspect.signature(layer.update_layer).parameters
    if "lora_alpha" not in parameters:  # an attention passes all on to this
        parameters = inspect.signature(LoraLayer.update_layer).parameters
    if "config" in parameters:
        arguments = {"r": r, "lora_alpha": lora_alpha, "config": config, "target_name": path}
        layer.update_layer(adapter_name=adapter_name, **arguments)
        return
    # PEFT before 0.18.1 takes the fields as separate arguments
    fields = {
        name: getattr(config, name)
        for name in parameters
        if name not in ("adapter_name", "r", "lora_alpha") and hasattr(config, name)
    }
    layer.update_layer(adapter_name, r, lora_alpha=lora_alpha, **fields)


@contextmanager
def new_adapters_on_cpu(layer: LoraLayer) -> Iterator[None]:
    """Keep what PEFT makes for a layer within the block on the CPU, where it was made."""
    name = "_move_adapter_to_device_of_base_layer"
    setattr(layer, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        delattr(layer, name)


def adapter_dilation(module: nn.Module) -> tuple[int, ...]:
    """Return the dilation that ``lora_A`` of a convolution needs to run beside the base layer.

    PEFT sets none. With ``padding="same"`` that works, and is left unchanged.
    """
    dilation: tuple[int, ...] = module.dilation  # type: ignore[assignment]
    return (1,) * len(dilation) if module.padding == "same" else dilation


def patch_convolution_dilation() -> None:
    """Make PEFT's LoRA of a convolution adopt the dilation of its base layer, for the process.

    Without it the output of lora_A differs in size from that of the base layer, and forward fails;
    so nothing that works is changed. It is not undone: models made meanwhile still need it.
    """
    original = _ConvNd.update_layer
    if getattr(original, "keeps_dilation", False):
        return

    @functools.wraps(original)
    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        original(self, adapter_name, *args, **kwargs)
        self.lora_A[adapter_name].dilation = adapter_dilation(self.get_base_layer())

    update_layer.keeps_dilation = True  # type: ignore[attr-defined]
    _ConvNd.update_layer = update_layer


def anchored_pattern(name: str) -> str:
    """Return a ``rank_pattern`` key that matches this layer and no other.

    PEFT matches keys as regular expressions for a suffix, so that ``lin`` also matches ``sub.lin``.
    Parts of the path that torch.compile inserted are optional.
    """
    return "^" + _path_pattern(name)


def _path_pattern(path: str) -> str:
    return re.escape(path).replace(r"_orig_mod\.", r"(?:_orig_mod\.)?")


def pattern_from_values(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the ``rank_pattern`` or ``alpha_pattern`` that gives each layer its value.

    One key per layer or, if these are too many, per value. PEFT tries every key on every layer
    when it loads an adapter, and takes minutes for a thousand.
    """
    others = {name: value for name, value in values.items() if value != default}
    if len(others) <= MAX_PATTERN_KEYS:
        return {anchored_pattern(name): value for name, value in others.items()}
    layers: dict[Any, list[str]] = {}
    for name, value in others.items():
        layers.setdefault(value, []).append(_path_pattern(name))
    return {f"^(?:{'|'.join(names)})": value for value, names in layers.items()}


def exclude_pattern(config: LoraConfig, names: Iterable[str]) -> str:
    """Return ``exclude_modules`` as one regular expression: its exclusions, and these layers."""
    patterns = [_path_pattern(name) for name in names]
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        patterns.insert(0, excluded)  # flags, if any, stay in front
    elif excluded:
        patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(excluded)]
    return "|".join(patterns)


def _without_fsdp(model: nn.Module) -> nn.Module:
    """Return the model in FullyShardedDataParallel, or the model itself."""
    wrapped = model._modules.get("_fsdp_wrapped_module")
    return model if wrapped is None else wrapped


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a model has adapters and their configs: a PeftModel, or one with its own.

    The latter are models after ``add_adapter`` of transformers or diffusers, or after PEFT's
    ``inject_adapter_in_model``, which leaves the configs as ``peft_config``.
    """
    model = _without_fsdp(model)
    if isinstance(model, (PeftModel, PeftMixedModel)):
        return isinstance(model, PeftModel)
    # not getattr: a user's module may forward attributes of a model inside it, at another path
    configs = vars(model).get("peft_config")
    return isinstance(configs, dict) and bool(injected_adapter_names(model))


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Return the configs of the adapters that a model carries, by their names."""
    configs: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    return configs


def injected_adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters in a model's layers, with or without a PeftModel."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return sorted({name for layer in layers for name in layer._get_available_adapters()})


def is_lora(config: object) -> bool:
    """Tell whether a config makes plain LoRA layers; AdaLoRA's is a subclass, and does not."""
    return isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA


def peft_type_of(config: Any) -> str:
    """Return PEFT's name for the method of a config."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def failed_layer_name(error: BaseException) -> str | None:
    """Return the layer that PEFT was about to wrap when it failed; its own message has no name."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_create_and_replace":
            name = frame.f_locals.get("current_key")
            return name if isinstance(name, str) else None
    return None


def dora_magnitude(layer: LoraLayer, adapter_name: str) -> nn.Parameter | None:
    """Return DoRA's magnitude vector of an adapter, if it has one."""
    vectors = layer.lora_magnitude_vector
    return vectors[adapter_name].weight if vectors and adapter_name in vectors else None


@torch.no_grad()
def untrained_dora_magnitude(layer: LoraLayer, adapter_name: str) -> torch.Tensor:
    """Return what DoRA's magnitude vector is while ``lora_B`` is zero: the norms of the weight."""
    base = layer.get_base_layer()
    with gather_params_ctx(base.parameters()):
        weight = dequantize_module_weight(base).detach()
        zero_update = weight.new_zeros(())
        return layer.lora_magnitude_vector[adapter_name].get_weight_norm(
            weight, zero_update, scaling=1
        )
