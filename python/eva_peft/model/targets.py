"""Which layers EVA initialises: matched as by PEFT, with their names in the base model."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .._peft_compat import (
    BaseTunerLayer,
    LoraConfig,
    LoraLayer,
    ParamWrapper,
    adapter_configs,
    carries_adapters,
    matches_parameter,
    matches_target,
    pattern_value,
    resolved_config,
    tied_modules,
)
from ..errors import EvaRuntimeError, EvaTypeError, EvaValueError, listed, warn
from .attention import OUT_PROJ, attended, projected
from .checks import plain_number
from .layers import Patches, patches_of, widths
from .routing import ExpertWeight, expert_names, expert_weights

__all__ = [
    "ENGINE",
    "Target",
    "base_name",
    "check_may_resize",
    "check_not_merged",
    "check_not_replicated",
    "class_names",
    "find_targets",
    "own_layers",
    "peft_key",
    "resolve_name",
    "unwrap",
]

# Wrappers in module paths: DDP and PEFT prefix the names of the base model; torch.compile and
# activation checkpointing insert theirs anywhere; FullyShardedDataParallel does, too, also after
# the last name, where PEFT never sees it.
_PREFIX = re.compile(r"^(?:module\.|base_model\.model\.)")
_WITHIN = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")
_SHARDED = re.compile(r"(?:^|\.)_fsdp_wrapped_module(?=\.|$)")
# PEFT's suffix for a module with an adapter (of one of its parameters, if inside the path).
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")
_REPLICATED = (nn.DataParallel, nn.parallel.DistributedDataParallel)
ENGINE = "DeepSpeedEngine"
_OF_GPTQ = "GPTQQuantLinear"  # gptqmodel's class, the only one to which PEFT applies QA-LoRA
_FABRIC = "_forward_module"  # the model's name in the wrapper of Lightning's Fabric
# Config options that exclude some of the modules matched by target_modules.
_LEAVE_OUT = ("layers_to_transform", "layers_pattern", "exclude_modules")
# Config options that set the size and scaling of the adapters.
_SIZES = ("r", "rank_pattern", "lora_alpha", "alpha_pattern")


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
        step: ranks of this layer are multiples of it (the groups of a convolution).
        weight: set if the layer is no module, but a part of a fused parameter of ``module``.
        inputs: for a layer that is not called as a module: returns its inputs from a call of
            ``module`` and its arguments; ``None`` for the first tensor among the arguments.
        owner: name of that parameter, or of that module; layers of one owner have equal rank.
        parts: number of layers of the owner.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    rank: int
    alpha: float
    patches: Patches | None = None
    step: int = 1
    weight: ExpertWeight | None = None
    inputs: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], list[Tensor]] | None = None
    owner: str = ""
    parts: int = 1


def base_name(name: str) -> str:
    """Return the name in the base model of a module of a PeftModel."""
    return _WITHIN.sub("", peft_key(name))


def peft_key(path: str, module: nn.Module | None = None) -> str:
    """Return PEFT's name of a module of a PeftModel, or of the adapted parameter.

    It is the path in the base model, including ``_orig_mod`` of compiled parts and other wrappers
    that were there when PEFT added its adapters.
    """
    key = _WRAPPED.sub("", _unsharded(path).removeprefix("base_model.model."))
    return f"{key}.{module.parameter_name}" if isinstance(module, ParamWrapper) else key


def _unsharded(path: str) -> str:
    """Return the path of a module without FullyShardedDataParallel wrappers."""
    return _SHARDED.sub("", path).removeprefix(".")


def layer_name(path: str, module: LoraLayer) -> str:
    """Return the base-model name of the module or parameter that a LoRA layer adapts."""
    return _WITHIN.sub("", peft_key(path, module))


def own_layers(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, LoraLayer]]:
    """Return path and LoRA layer of everything an adapter adapts, by the name in the base model.

    If the output projection of an attention is a target as well, PEFT adapts it a second time,
    unused by the attention: of the two the first is returned.
    """
    found: dict[str, tuple[str, LoraLayer]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            found.setdefault(layer_name(path, module), (path, module))
    return found


def resolve_name(name: str, known: Container[str]) -> str:
    """Return the known layer that a key refers to, ignoring the prefixes of wrappers.

    Prefixes are removed one by one, since a base model may itself have a ``module``. A key that
    refers to no known layer is returned unchanged.
    """
    candidate = _WITHIN.sub("", name)
    while candidate not in known:
        shorter = _PREFIX.sub("", candidate)
        if shorter == candidate:
            return name
        candidate = shorter
    return candidate


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model below (Distributed)DataParallel, torch.compile and other wrappers.

    Raises:
        EvaTypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise EvaTypeError(
            f"expected a torch.nn.Module, got {type(model)}; of a pipeline, or another object "
            "around a model, pass the model in it (as pipeline.unet, or model_body)"
        )
    *_, inner = _unwrapped(model)
    return inner


def check_not_replicated(model: nn.Module) -> None:
    """Refuse a model whose adapters cannot be resized.

    Raises:
        EvaRuntimeError: DistributedDataParallel wraps it, even if the inner model is given, as a
            callback of a Trainer gets it.
    """
    around = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in _unwrapped(model))
    if around or _is_replicated(unwrap(model)):
        raise EvaRuntimeError(
            "DistributedDataParallel is around the model and relies on the present sizes of the "
            "adapters, which EVA would change. Initialise before wrapping (accelerator.prepare "
            "wraps, too): drop this wrapper (inner = model.module; del model), pass inner, and "
            "wrap what is returned. Or keep the sizes, with rho=1"
        )


def _is_replicated(model: nn.Module) -> bool:
    """Tell whether a model is inside any existing DistributedDataParallel."""
    if not (dist.is_available() and dist.is_initialized()):
        return False

    def found() -> bool:
        kind = nn.parallel.DistributedDataParallel
        living = [each for each in gc.get_objects() if issubclass(type(each), kind)]
        return any(part is model for each in living for part in each.modules())

    if not found():
        return False
    gc.collect()  # it may be an unreachable cycle
    return found()


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
            "ranks, and would do so again for other ranks. Keep the ranks, with rho=1"
        )
    blocks = getattr(getattr(config, "use_bdlora", None), "target_modules_bd_b", None)
    if blocks:
        raise EvaRuntimeError(
            f"use_bdlora makes lora_B of {listed(blocks)} block-diagonal, with blocks that divide "
            "the present ranks. Keep the ranks, with rho=1"
        )


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        # Not getattr: a PeftModel forwards to the attributes of a compiled base model.
        known = (inner._modules.get(name) for name in ("_orig_mod", _FABRIC))
        below = next((part for part in known if part is not None), None)
        if below is None and (isinstance(inner, _REPLICATED) or ENGINE in class_names(inner)):
            below = inner._modules.get("module")
        inner = below


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
                f"layer {base_name(path)} has merged adapters {module.merged_adapters}; "
                "call model.unmerge_adapter() first (of a model of diffusers unfuse_lora())"
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
    asked = config.target_modules
    leave_out = [name for name in _LEAVE_OUT if getattr(config, name, None) is not None]
    found: Iterator[_Found]
    if carries_adapters(model):
        own = adapter_configs(model)[adapter_name]
        found = _adapted(model, config, adapter_name)
    else:
        own = config = resolved_config(model, config)
        if isinstance(config.target_modules, set):
            config.target_modules = set(map(_unsharded, config.target_modules))
        found = _matching(model, config)
    elsewhere = {_WITHIN.sub("", path) for path in tied_modules(model, own)}
    targets: list[Target] = []
    unsupported: list[str] = []
    attentions: list[str] = []
    tied: list[str] = []
    for each in found:
        if each.name in elsewhere:
            tied.append(each.name)
            continue
        if isinstance(each.module, nn.MultiheadAttention):
            attentions.append(f"{each.name}.")
        if each.name.startswith(tuple(attentions)):
            continue  # it is part of an attention, and adapted with it
        parts = _experts(each) if each.parameter is not None else _layer(each)
        targets += parts
        if not parts:
            unsupported.append(each.name)
    if not targets:
        asked = config.target_modules or asked  # "all-linear" may have become an empty set
        raise EvaValueError(
            f"no layer to initialise: target_modules={asked!r} matches no linear layer of "
            f"{type(model).__name__}" + _suggest(model, unsupported, tied, leave_out)
        )
    if getattr(own, "use_qalora", False):
        _check_whole_rows(targets)
    _warn_of_others(unsupported, tied)
    return targets


def _check_whole_rows(targets: list[Target]) -> None:
    averaged = [t.name for t in targets if _OF_GPTQ in class_names(t.module)]  # others: plain LoRA
    if averaged:
        raise EvaValueError(
            f"use_qalora makes lora_A of {listed(averaged)} read averages over groups of features; "
            "EVA's rows read every feature. Leave it out"
        )


def _warn_of_others(unsupported: list[str], tied: list[str]) -> None:
    if tied:
        warn(
            f"the adapter of {listed(tied)} keeps the default initialisation, as "
            "ensure_weight_tying makes it that of the embeddings, transposed",
        )
    if unsupported:
        warn(
            "EVA reads the inputs of linear layers and convolutions; these keep the default "
            f"initialisation: {listed(unsupported)}",
        )


@dataclass(frozen=True)
class _Found:
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


def _matching(model: nn.Module, config: LoraConfig) -> Iterator[_Found]:
    def found(path: str, module: nn.Module, parameter: str | None = None) -> _Found:
        name = _WITHIN.sub("", path)
        return _Found(name, module, *_rank_and_alpha(config, path, parameter), parameter)

    # PEFT matches the full paths, including what torch.compile has inserted
    for path, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            continue
        path = _unsharded(path)
        if matches_target(config, path):
            yield found(path, module)
        for parameter, _ in module.named_parameters(recurse=False):
            if matches_parameter(config, f"{path}.{parameter}"):
                yield found(path, module, parameter)


def _adapted(model: nn.Module, config: LoraConfig, adapter_name: str) -> Iterator[_Found]:
    own = adapter_configs(model)[adapter_name]
    as_wrapped = all(getattr(config, each) == getattr(own, each) for each in _SIZES)
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter_name not in module.lora_A and adapter_name not in module.lora_embedding_A:
            continue
        name, parameter = layer_name(path, module), None
        if isinstance(module, ParamWrapper):
            name, _, parameter = name.rpartition(".")
        if as_wrapped:  # PEFT's own numbers take precedence: it converts patterns of fused experts
            rank = int(module.r[adapter_name])
            alpha = plain_number(module.lora_alpha[adapter_name])
        else:
            rank, alpha = _rank_and_alpha(config, peft_key(path), parameter)
        yield _Found(name, module.get_base_layer(), rank, alpha, parameter)


def _layer(found: _Found) -> list[Target]:
    size = widths(found.module)
    if size is None:
        return []
    if isinstance(found.module, nn.MultiheadAttention):
        return _projections(found, *size)
    patches = patches_of(found.module)
    groups = int(found.module.groups) if patches is not None else 1  # type: ignore[arg-type]
    if found.rank % groups:
        raise EvaValueError(
            f"layer {found.name}: PEFT adapts a convolution with {groups} groups only where the "
            f"rank is a multiple of them, and r is {found.rank}; give it another in rank_pattern, "
            "or name it in exclude_modules"
        )
    return [Target(found.name, found.module, *size, found.rank, found.alpha, patches, groups)]


def _projections(found: _Found, width: int, out: int) -> list[Target]:
    common: dict[str, Any] = {"owner": found.name, "parts": 2}
    own, last = found.name, f"{found.name}.{OUT_PROJ}"
    return [
        Target(own, found.module, width, out, found.rank, found.alpha, inputs=projected, **common),
        Target(
            last, found.module, width, width, found.rank, found.alpha, inputs=attended, **common
        ),
    ]


def _experts(found: _Found) -> list[Target]:
    assert found.parameter is not None
    owner, module = f"{found.name}.{found.parameter}", found.module
    known = expert_weights(module, found.parameter)
    dimensions = getattr(module, found.parameter).dim()
    if known is None:
        raise EvaValueError(
            f"target_parameters: {owner} has {dimensions} dimensions; LoRA and EVA take matrices, "
            "and stacks of them"
        )
    weights, (wide, out) = known
    names = expert_names(owner, dimensions == 3, len(weights))
    common: dict[str, Any] = {"owner": owner, "parts": len(weights)}
    return [
        Target(name, module, wide, out, found.rank, found.alpha, weight=weight, **common)
        for name, weight in zip(names, weights, strict=True)
    ]


def _suggest(
    model: nn.Module, unsupported: list[str], tied: list[str], leave_out: list[str]
) -> str:
    if unsupported:
        return f"; it matches {listed(unsupported)}, whose inputs EVA cannot read"
    if tied:
        return f"; it matches {listed(tied)}, which ensure_weight_tying ties to the embeddings"
    kinds = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if widths(m)})
    told = f"; the layers that it can name are called {listed(kinds)}" if kinds else ""
    return told + (f", and {' and '.join(leave_out)} may leave them out" if leave_out else "")
