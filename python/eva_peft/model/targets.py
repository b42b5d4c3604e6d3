"""Which layers EVA initialises: matched as by PEFT, with their names in the base model."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._peft_compat import (
    BaseTunerLayer,
    LoraConfig,
    LoraLayer,
    ParamWrapper,
    adapter_configs,
    has_adapters,
    matches_parameter,
    matches_target,
    pattern_value,
    resolved_config,
    tied_modules,
)
from ..errors import EvaRuntimeError, EvaTypeError, EvaValueError, listed, warn
from .attention import OUT_PROJ, in_proj_inputs, out_proj_inputs
from .checks import plain_number
from .layers import Patches, in_out_features, patches_of
from .routing import ExpertWeight, expert_names, expert_weights

__all__ = [
    "DEEPSPEED_ENGINE",
    "Target",
    "adapter_layers",
    "check_may_resize",
    "check_not_merged",
    "check_not_replicated",
    "class_names",
    "find_targets",
    "name_in_base_model",
    "peft_key",
    "resolve_name",
    "unwrap",
]

# Wrappers in module paths: DDP and PEFT prefix the names of the base model; torch.compile and
# activation checkpointing insert theirs anywhere; FullyShardedDataParallel does, too, also after
# the last name, where PEFT never sees it.
_WRAPPER_PREFIX = re.compile(r"^(?:module\.|base_model\.model\.)")
_INSERTED_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")
_FSDP_WRAPPER = re.compile(r"(?:^|\.)_fsdp_wrapped_module(?=\.|$)")
# PEFT's suffix for a module with an adapter (of one of its parameters, if inside the path).
_BASE_LAYER_SUFFIX = re.compile(r"\.base_layer(?=\.|$)")
_DATA_PARALLEL_CLASSES = (nn.DataParallel, nn.parallel.DistributedDataParallel)
DEEPSPEED_ENGINE = "DeepSpeedEngine"
_GPTQ_CLASS = "GPTQQuantLinear"  # gptqmodel's class, the only one to which PEFT applies QA-LoRA
_FABRIC_MODEL_ATTRIBUTE = "_forward_module"  # the model's name in the wrapper of Lightning's Fabric
# Config options that exclude some of the modules matched by target_modules.
_EXCLUDING_OPTIONS = ("layers_to_transform", "layers_pattern", "exclude_modules")
# Config options that set the size and scaling of the adapters.
_SIZE_OPTIONS = ("r", "rank_pattern", "lora_alpha", "alpha_pattern")


@dataclass(frozen=True)
class Target:
    """One layer to initialise.

    Attributes:
        name: in the base model.
        module: whose input is read (below the adapter, if there is one).
        in_features, out_features: D and the output width.
        rank: r of this layer before redistribution.
        alpha: LoRA alpha of this layer.
        patches: how a convolution cuts its input into tokens; ``None`` for other layers.
        rank_multiple: ranks of this layer are multiples of it (the groups of a convolution).
        weight: set if the layer is no module, but a part of a fused parameter of ``module``.
        inputs_from_call: for a layer that is not called as a module: returns its inputs from a
            call of ``module`` and its arguments; ``None`` for the first tensor among the arguments.
        owner: name of that parameter, or of that module; layers of one owner have equal rank.
        owner_parts: number of layers of the owner.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    rank: int
    alpha: float
    patches: Patches | None = None
    rank_multiple: int = 1
    weight: ExpertWeight | None = None
    inputs_from_call: (
        Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], list[Tensor]] | None
    ) = None
    owner: str = ""
    owner_parts: int = 1


def name_in_base_model(name: str) -> str:
    """Return the name in the base model of a module of a PeftModel."""
    return _INSERTED_WRAPPER.sub("", peft_key(name))


def peft_key(path: str, module: nn.Module | None = None) -> str:
    """Return PEFT's name of a module of a PeftModel, or of the adapted parameter.

    It is the path in the base model, including ``_orig_mod`` of compiled parts and other wrappers
    that were there when PEFT added its adapters.
    """
    key = _BASE_LAYER_SUFFIX.sub("", _without_fsdp(path).removeprefix("base_model.model."))
    return f"{key}.{module.parameter_name}" if isinstance(module, ParamWrapper) else key


def _without_fsdp(path: str) -> str:
    """Return the path of a module without FullyShardedDataParallel wrappers."""
    return _FSDP_WRAPPER.sub("", path).removeprefix(".")


def layer_name(path: str, module: LoraLayer) -> str:
    """Return the base-model name of the module or parameter that a LoRA layer adapts."""
    return _INSERTED_WRAPPER.sub("", peft_key(path, module))


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


def resolve_name(name: str, known_names: Container[str]) -> str:
    """Return the known layer that a key refers to, ignoring the prefixes of wrappers.

    Prefixes are removed one by one, since a base model may itself have a ``module``. A key that
    refers to no known layer is returned unchanged.
    """
    candidate = _INSERTED_WRAPPER.sub("", name)
    while candidate not in known_names:
        shorter = _WRAPPER_PREFIX.sub("", candidate)
        if shorter == candidate:
            return name
        candidate = shorter
    return candidate


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model below (Distributed)DataParallel, torch.compile and other wrappers.

    Raises:
        EvaTypeError: not a module, or one of TorchScript.
    """
    if not isinstance(model, nn.Module):
        raise EvaTypeError(
            f"expected a torch.nn.Module, got {type(model)}; of a pipeline, or another object "
            "that holds a model, pass the model itself (such as pipeline.unet, or model_body)"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise EvaTypeError(
            "the model is TorchScript, whose layers PEFT cannot replace; pass the module that it "
            "was made from"
        )
    *_, inner = _wrapper_chain(model)
    return inner


def check_not_replicated(model: nn.Module) -> None:
    """Refuse a model whose adapters cannot be resized.

    Raises:
        EvaRuntimeError: DistributedDataParallel wraps it, even if the inner model is given, as a
            callback of a Trainer gets it.
    """
    is_wrapped = any(
        isinstance(m, nn.parallel.DistributedDataParallel) for m in _wrapper_chain(model)
    )
    if is_wrapped or _is_replicated(unwrap(model)):
        raise EvaRuntimeError(
            "the model is wrapped in DistributedDataParallel, which relies on the current sizes "
            "of the adapters, and EVA would change them. Initialise before wrapping "
            "(accelerator.prepare wraps, too): drop this wrapper (inner = model.module; del "
            "model), pass inner, and wrap what is returned. Or keep the sizes, with rho=1"
        )


def _is_replicated(model: nn.Module) -> bool:
    """Tell whether a model is inside any existing DistributedDataParallel."""
    if not (dist.is_available() and dist.is_initialized()):
        return False

    def is_part_of_wrapper() -> bool:
        ddp_class = nn.parallel.DistributedDataParallel
        wrappers = [wrapper for wrapper in gc.get_objects() if issubclass(type(wrapper), ddp_class)]
        return any(part is model for wrapper in wrappers for part in wrapper.modules())

    if not is_part_of_wrapper():
        return False
    gc.collect()  # it may be an unreachable cycle
    return is_part_of_wrapper()


def check_may_resize(model: nn.Module, config: LoraConfig) -> None:
    """Refuse to change the ranks of adapters if something else depends on them.

    Args:
        model: maybe in a wrapper.
        config: of the adapters, which need not exist yet.

    Raises:
        EvaRuntimeError: see :func:`check_not_replicated`; or KaSA truncates the base weights by
            rank; or BD-LoRA divides ``lora_B`` into blocks.
    """
    check_not_replicated(model)
    if getattr(config, "kasa_config", None) is not None:
        raise EvaRuntimeError(
            "kasa_config: PEFT removes as many components from the base weights as an adapter has "
            "ranks, and would remove them again if ranks changed. Keep the ranks, with rho=1"
        )
    blocks = getattr(getattr(config, "use_bdlora", None), "target_modules_bd_b", None)
    if blocks:
        raise EvaRuntimeError(
            f"use_bdlora makes lora_B of {listed(blocks)} block-diagonal, with blocks made for "
            "the current ranks. Keep the ranks, with rho=1"
        )


def _wrapper_chain(model: nn.Module) -> Iterator[nn.Module]:
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        # Not getattr: a PeftModel forwards to the attributes of a compiled base model.
        wrapped = (inner._modules.get(name) for name in ("_orig_mod", _FABRIC_MODEL_ATTRIBUTE))
        next_inner = next((part for part in wrapped if part is not None), None)
        if next_inner is None and (
            isinstance(inner, _DATA_PARALLEL_CLASSES) or DEEPSPEED_ENGINE in class_names(inner)
        ):
            next_inner = inner._modules.get("module")
        inner = next_inner


def class_names(module: nn.Module) -> set[str]:
    """Return the names of a module's class and all its base classes."""
    return {kind.__name__ for kind in type(module).__mro__}


def check_not_merged(model: nn.Module) -> None:
    """Refuse a model with adapters merged into its weights.

    Raises:
        EvaRuntimeError: some adapter is merged, maybe not the requested one; the pass would
            unmerge it, since it runs with all adapters off.
    """
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise EvaRuntimeError(
                f"layer {name_in_base_model(path)} has merged adapters {module.merged_adapters}; "
                "call model.unmerge_adapter() first (for a diffusers model unfuse_lora())"
            )


def find_targets(model: nn.Module, config: LoraConfig, adapter_name: str) -> list[Target]:
    """List the layers to initialise, in module order.

    Args:
        model: with adapters (layers that have ``adapter_name``) or a base model (layers that PEFT
            would adapt under ``config``), without wrappers.

    Raises:
        EvaValueError: no layer found, or a row of ``lora_A`` would not read all of its input.
        EvaRuntimeError: an adapter is merged into the weights.
    """
    check_not_merged(model)
    requested = config.target_modules
    excluding_options = [
        name for name in _EXCLUDING_OPTIONS if getattr(config, name, None) is not None
    ]
    adapted_modules: Iterator[_AdaptedModule]
    if has_adapters(model):
        adapter_config = adapter_configs(model)[adapter_name]
        adapted_modules = _adapted_modules(model, config, adapter_name)
    else:
        adapter_config = config = resolved_config(model, config)
        if isinstance(config.target_modules, set):
            config.target_modules = set(map(_without_fsdp, config.target_modules))
        adapted_modules = _matching_modules(model, config)
    tied_names = {_INSERTED_WRAPPER.sub("", path) for path in tied_modules(model, adapter_config)}
    targets: list[Target] = []
    unsupported: list[str] = []
    attention_prefixes: list[str] = []
    tied: list[str] = []
    for adapted in adapted_modules:
        if adapted.name in tied_names:
            tied.append(adapted.name)
            continue
        if isinstance(adapted.module, nn.MultiheadAttention):
            attention_prefixes.append(f"{adapted.name}.")
        if adapted.name.startswith(tuple(attention_prefixes)):
            continue  # it is part of an attention, and adapted with it
        new_targets = (
            _expert_targets(adapted) if adapted.parameter is not None else _layer_targets(adapted)
        )
        targets += new_targets
        if not new_targets:
            unsupported.append(adapted.name)
    if not targets:
        requested = config.target_modules or requested  # "all-linear" may have become an empty set
        raise EvaValueError(
            f"no layer to initialise: target_modules={requested!r} matches no linear layer of "
            f"{type(model).__name__}" + _no_target_hint(model, unsupported, tied, excluding_options)
        )
    if getattr(adapter_config, "use_qalora", False):
        _check_reads_all_features(targets)
    _warn_of_skipped(unsupported, tied)
    return targets


def _check_reads_all_features(targets: list[Target]) -> None:
    # on layers of other classes PEFT puts plain LoRA
    averaged = [t.name for t in targets if _GPTQ_CLASS in class_names(t.module)]
    if averaged:
        raise EvaValueError(
            f"use_qalora makes lora_A of {listed(averaged)} read averages over groups of "
            "features, but EVA's rows read every feature. Leave use_qalora out"
        )


def _warn_of_skipped(unsupported: list[str], tied_names: list[str]) -> None:
    if tied_names:
        warn(
            f"the adapter of {listed(tied_names)} keeps the default initialisation, since "
            "ensure_weight_tying ties it to the adapter of the embeddings",
        )
    if unsupported:
        warn(
            "EVA reads the inputs of linear layers and convolutions; these keep the default "
            f"initialisation: {listed(unsupported)}",
        )


@dataclass(frozen=True)
class _AdaptedModule:
    """A module that PEFT adapts, or a parameter of it, with its name in the base model."""

    name: str
    module: nn.Module
    rank: int
    alpha: float
    parameter: str | None = None


def _rank_and_alpha(config: LoraConfig, path: str, parameter: str | None) -> tuple[int, float]:
    key = path if parameter is None else f"{path}.{parameter}"
    rank = int(pattern_value(config.rank_pattern, key, config.r))
    return rank, plain_number(pattern_value(config.alpha_pattern, key, config.lora_alpha))


def _matching_modules(model: nn.Module, config: LoraConfig) -> Iterator[_AdaptedModule]:
    def as_adapted(path: str, module: nn.Module, parameter: str | None = None) -> _AdaptedModule:
        name = _INSERTED_WRAPPER.sub("", path)
        return _AdaptedModule(name, module, *_rank_and_alpha(config, path, parameter), parameter)

    # PEFT matches the full paths, including what torch.compile has inserted
    for path, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            continue
        path = _without_fsdp(path)
        if matches_target(config, path):
            yield as_adapted(path, module)
        for parameter, _ in module.named_parameters(recurse=False):
            if matches_parameter(config, f"{path}.{parameter}"):
                yield as_adapted(path, module, parameter)


def _adapted_modules(
    model: nn.Module, config: LoraConfig, adapter_name: str
) -> Iterator[_AdaptedModule]:
    adapter_config = adapter_configs(model)[adapter_name]
    config_unchanged = all(
        getattr(config, option) == getattr(adapter_config, option) for option in _SIZE_OPTIONS
    )
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter_name not in module.lora_A and adapter_name not in module.lora_embedding_A:
            continue
        name, parameter = layer_name(path, module), None
        if isinstance(module, ParamWrapper):
            name, _, parameter = name.rpartition(".")
        # PEFT's own numbers take precedence: it converts patterns of fused experts
        if config_unchanged:
            rank = int(module.r[adapter_name])
            alpha = plain_number(module.lora_alpha[adapter_name])
        else:
            rank, alpha = _rank_and_alpha(config, peft_key(path), parameter)
        yield _AdaptedModule(name, module.get_base_layer(), rank, alpha, parameter)


def _layer_targets(adapted: _AdaptedModule) -> list[Target]:
    size = in_out_features(adapted.module)
    if size is None:
        return []
    if isinstance(adapted.module, nn.MultiheadAttention):
        return _attention_targets(adapted, *size)
    patches = patches_of(adapted.module)
    groups = int(adapted.module.groups) if patches is not None else 1  # type: ignore[arg-type]
    if adapted.rank % groups:
        raise EvaValueError(
            f"layer {adapted.name}: PEFT adapts a convolution with {groups} groups only where the "
            f"rank is a multiple of them, and r is {adapted.rank}; give it another in "
            "rank_pattern, or name it in exclude_modules"
        )
    return [
        Target(adapted.name, adapted.module, *size, adapted.rank, adapted.alpha, patches, groups)
    ]


def _attention_targets(adapted: _AdaptedModule, width: int, out: int) -> list[Target]:
    common: dict[str, Any] = {"owner": adapted.name, "owner_parts": 2}
    in_proj_name, out_proj_name = adapted.name, f"{adapted.name}.{OUT_PROJ}"
    return [
        Target(
            in_proj_name,
            adapted.module,
            width,
            out,
            adapted.rank,
            adapted.alpha,
            inputs_from_call=in_proj_inputs,
            **common,
        ),
        Target(
            out_proj_name,
            adapted.module,
            width,
            width,
            adapted.rank,
            adapted.alpha,
            inputs_from_call=out_proj_inputs,
            **common,
        ),
    ]


def _expert_targets(adapted: _AdaptedModule) -> list[Target]:
    assert adapted.parameter is not None
    owner, module = f"{adapted.name}.{adapted.parameter}", adapted.module
    experts = expert_weights(module, adapted.parameter)
    dimensions = getattr(module, adapted.parameter).dim()
    if experts is None:
        raise EvaValueError(
            f"target_parameters: {owner} has {dimensions} dimensions; LoRA and EVA support "
            "matrices (2) and stacks of matrices (3)"
        )
    weights, (width, out) = experts
    names = expert_names(owner, dimensions == 3, len(weights))
    common: dict[str, Any] = {"owner": owner, "owner_parts": len(weights)}
    return [
        Target(name, module, width, out, adapted.rank, adapted.alpha, weight=weight, **common)
        for name, weight in zip(names, weights, strict=True)
    ]


def _no_target_hint(
    model: nn.Module, unsupported: list[str], tied_names: list[str], excluding_options: list[str]
) -> str:
    if unsupported:
        return f"; it matches {listed(unsupported)}, whose inputs EVA cannot read"
    if tied_names:
        return (
            f"; it matches {listed(tied_names)}, which ensure_weight_tying ties to the embeddings"
        )
    kinds = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if in_out_features(m)})
    hint = f"; layers that it can name are {listed(kinds)}" if kinds else ""
    return hint + (
        f", and {' and '.join(excluding_options)} may leave them out" if excluding_options else ""
    )
