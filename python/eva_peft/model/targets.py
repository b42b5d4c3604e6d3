"""Which layers EVA initialises: matched as by PEFT, with their names in the base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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
from ..errors import EvaRuntimeError, EvaValueError, listed, warn
from .attention import OUT_PROJ, in_proj_inputs, out_proj_inputs
from .checks import plain_number
from .layers import Patches, in_out_features, patches_of
from .names import layer_name, name_in_base_model, peft_key, without_fsdp, without_inserted_wrappers
from .routing import ExpertWeight, expert_names, expert_weights
from .wrappers import class_names

__all__ = ["Target", "check_not_merged", "find_targets"]

_GPTQ_CLASS = "GPTQQuantLinear"  # gptqmodel's class, the only one to which PEFT applies QA-LoRA
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
            config.target_modules = set(map(without_fsdp, config.target_modules))
        adapted_modules = _matching_modules(model, config)
    tied_names = {without_inserted_wrappers(path) for path in tied_modules(model, adapter_config)}
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
        name = without_inserted_wrappers(path)
        return _AdaptedModule(name, module, *_rank_and_alpha(config, path, parameter), parameter)

    # PEFT matches the full paths, including what torch.compile has inserted
    for path, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            continue
        path = without_fsdp(path)
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
