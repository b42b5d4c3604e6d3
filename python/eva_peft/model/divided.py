"""Models whose weights or layers are partitioned among processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, distributed, nn

from .._peft_compat import LoraConfig, ParamWrapper, has_adapters, resolved_config
from ..errors import EvaRuntimeError
from ..options import AUTO
from .names import name_in_base_model
from .wrappers import DEEPSPEED_ENGINE, class_names, unwrap

__all__ = [
    "check_adapters_writable",
    "check_no_sharded_experts",
    "check_not_partitioned",
    "is_sharded",
    "may_stop_early",
    "sharded_by",
    "sharding_ranks",
]

_FSDP_CLASSES = frozenset(["FullyShardedDataParallel", "FSDPModule"])
_NEVER_STOP_EARLY = frozenset([DEEPSPEED_ENGINE, "PipelineParallel"])
# The class that transformers puts in place of a layer of another pipeline stage.
_OTHER_STAGE_CLASS = "PipelineIdentityLayer"


def _all_class_names(model: nn.Module) -> set[str]:
    """Return the names of all classes of a model and its parts, base classes included."""
    return set().union(*map(class_names, model.modules()))


def sharded_by(model: nn.Module) -> str | None:
    """Return what shards each weight over the processes and gathers it while a layer runs.

    FSDP of either kind, or DeepSpeed's ZeRO-3; ``None`` if nothing does. The processes synchronise
    in every forward pass of such a model; the inputs of its layers are whole.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed (ZeRO-3)"
    return "FSDP" if _all_class_names(model) & _FSDP_CLASSES else None


def sharding_ranks(model: nn.Module) -> set[int]:
    """Return the ranks among which a model is sharded and this process waits for the others.

    None, if its parameters and wrappers do not tell: FSDP2 leaves the weights of its outermost
    module whole after a forward pass.

    Args:
        model: a sharded one, see :func:`sharded_by`.
    """
    groups = _sharding_groups(model)
    return {rank for group in groups for rank in distributed.get_process_group_ranks(group)}


def _sharding_groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if "FullyShardedDataParallel" in class_names(module):
            yield module.process_group
    parameters: Iterator[Any] = model.parameters()
    for parameter in parameters:
        if getattr(parameter, "ds_process_group", None) is not None:
            yield parameter.ds_process_group
        for i, placement in enumerate(getattr(parameter, "placements", ())):
            if not placement.is_replicate():
                yield parameter.device_mesh.get_group(i)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the weights of a model are sharded: see :func:`sharded_by`."""
    return sharded_by(model) is not None


def may_stop_early(model: nn.Module, early_exit: bool | str, sharded: bool) -> bool:
    """Tell whether a forward pass may be ended after the last layer that is needed.

    Args:
        model: to be run.
        early_exit: the option ``early_exit``.
        sharded: see :func:`is_sharded`; the other processes would wait.
    """
    if early_exit != AUTO:
        return bool(early_exit)
    devices = set(map(str, getattr(model, "hf_device_map", {}).values()))
    unsafe = sharded or _all_class_names(model) & _NEVER_STOP_EARLY
    return not unsafe and not devices & {"cpu", "disk"}


def check_not_partitioned(model: nn.Module) -> None:
    """Refuse a model whose layers themselves are partitioned among processes.

    In tensor or expert parallelism each process has a part of a layer, and maybe of its inputs, and
    all see the same batch, which a pass over several processes would count several times. A stage
    of a pipeline would stop on its own, and leave the others waiting.

    Raises:
        EvaRuntimeError: it is such a model.
    """
    num_shard_dims = 1 if is_sharded(model) else 0
    reason = None
    for name, module in model.named_modules():
        if type(module).__name__ == _OTHER_STAGE_CLASS:
            reason = f"layer {name_in_base_model(name)} is on another stage of a pipeline"
        elif _is_partitioned(module, num_shard_dims):
            layer = name_in_base_model(name)
            reason = f"layer {layer} is divided among processes (tensor or expert parallelism)"
        if reason is not None:
            raise EvaRuntimeError(
                f"{reason}, and EVA reads the inputs of whole layers. Initialise the model loaded "
                "whole (without tp_plan and the like), in one process or each with a copy; save "
                "the adapter, and load it into the divided model by PeftModel.from_pretrained "
                "(of PEFT 0.21.1 or newer)"
            )


def check_no_sharded_experts(model: nn.Module, config: LoraConfig) -> None:
    """Refuse parameters as targets in a sharded model.

    Their products are recognised by the memory of the weights, which differs while a layer runs.

    Raises:
        EvaRuntimeError: there are such targets.
    """
    sharding = sharded_by(model)
    if sharding is None:
        return
    if has_adapters(model):
        has_fused_targets = any(isinstance(module, ParamWrapper) for module in model.modules())
    else:
        has_fused_targets = bool(resolved_config(model, config).target_parameters)
    if has_fused_targets:
        raise EvaRuntimeError(
            "target_parameters, or experts in one parameter, cannot be calibrated in a model that "
            f"is sharded by {sharding}: EVA cannot observe their inputs there. Calibrate the "
            "model before it is sharded, or name other layers in target_modules"
        )


def _is_partitioned(module: nn.Module, num_shard_dims: int) -> bool:
    """Tell whether a layer is partitioned along more mesh dimensions than by sharding."""
    if getattr(module, "_hf_tp_plan", None) is not None:  # set by transformers, and by PEFT
        return True
    return any(
        _num_partitioned_dims(part) > num_shard_dims for part in module.parameters(recurse=False)
    )


def _num_partitioned_dims(parameter: Tensor) -> int:
    """Return along how many dimensions of a device mesh a parameter is partitioned."""
    mesh = getattr(parameter, "device_mesh", None)
    placements = getattr(parameter, "placements", ())
    return sum(
        mesh is not None and mesh.size(i) > 1 and not placement.is_replicate()
        for i, placement in enumerate(placements)
    )


def check_adapters_writable(model: nn.Module) -> None:
    """Refuse a model, maybe in a wrapper, to whose adapters nothing can be written any more.

    Raises:
        EvaRuntimeError: it is partitioned or sharded, which fixes its set of parameters; or an
            optimizer has copies of them.
    """
    inner = unwrap(model)
    check_not_partitioned(inner)
    sharding = sharded_by(inner)
    if sharding is not None:
        raise EvaRuntimeError(
            f"the model is sharded by {sharding}, and adapters cannot be added or resized any "
            "more. Initialise before sharding; or calibrate() the sharded model, and apply the "
            "result to one that is not"
        )
    # ZeRO-1 and ZeRO-2 make weights views of one buffer; 16 bits without ZeRO go undetected by that
    adapters = (p for name, p in inner.named_parameters() if "lora_" in name)
    views = (p.untyped_storage() for p in adapters if p.untyped_storage().nbytes() > p.nbytes)
    addresses = [memory.data_ptr() for memory in views]
    if len(set(addresses)) < len(addresses) or DEEPSPEED_ENGINE in _all_class_names(model):
        raise EvaRuntimeError(
            "an optimizer of DeepSpeed holds copies of the weights, and its first step would "
            "overwrite EVA's with them. Initialise before deepspeed.initialize "
            "(accelerator.prepare calls it)"
        )
