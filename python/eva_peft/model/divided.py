"""Models whose weights or layers are partitioned among processes."""

from __future__ import annotations

from torch import Tensor, nn

from .._peft_compat import LoraConfig, ParamWrapper, carries_adapters, resolved_config
from ..errors import EvaRuntimeError
from ..options import AUTO
from .targets import ENGINE, base_name, class_names, unwrap

__all__ = [
    "check_experts",
    "check_undivided",
    "check_whole",
    "is_sharded",
    "may_stop_early",
    "sharded_by",
]

_FSDP = frozenset(["FullyShardedDataParallel", "FSDPModule"])
_NEVER_CUT = frozenset([ENGINE, "PipelineParallel"])
# The class that transformers puts in place of a layer of another pipeline stage.
_NOT_OF_THIS_STAGE = "PipelineIdentityLayer"


def _class_names(model: nn.Module) -> set[str]:
    """Return the names of all classes of a model and its parts, base classes included."""
    return set().union(*map(class_names, model.modules()))


def sharded_by(model: nn.Module) -> str | None:
    """Return what shards each weight over the processes and gathers it while a layer runs.

    FSDP of either kind, or DeepSpeed's ZeRO-3; ``None`` if nothing does. The processes synchronise
    in every forward pass of such a model; the inputs of its layers are whole.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed (ZeRO-3)"
    return "FSDP" if _class_names(model) & _FSDP else None


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the weights of a model are sharded: see :func:`sharded_by`."""
    return sharded_by(model) is not None


def may_stop_early(model: nn.Module, asked: bool | str, sharded: bool) -> bool:
    """Tell whether a forward pass may be ended after the last layer that is needed.

    Args:
        model: to be run.
        asked: the option ``early_exit``.
        sharded: see :func:`is_sharded`; the other processes would wait.
    """
    if asked != AUTO:
        return bool(asked)
    offloaded = set(map(str, getattr(model, "hf_device_map", {}).values()))
    unsafe = sharded or _class_names(model) & _NEVER_CUT
    return not unsafe and not offloaded & {"cpu", "disk"}


def check_undivided(model: nn.Module) -> None:
    """Refuse a model whose layers themselves are partitioned among processes.

    In tensor or expert parallelism each process has a part of a layer, and maybe of its inputs, and
    all see the same batch, which a pass over several processes would count several times. A stage
    of a pipeline would stop on its own, and leave the others waiting.

    Raises:
        EvaRuntimeError: it is such a model.
    """
    shards = 1 if is_sharded(model) else 0
    where = None
    for name, module in model.named_modules():
        if type(module).__name__ == _NOT_OF_THIS_STAGE:
            where = f"layer {base_name(name)} is on another stage of a pipeline"
        elif _is_parallel(module, shards):
            layer = base_name(name)
            where = f"layer {layer} is divided among processes (tensor or expert parallelism)"
        if where is not None:
            raise EvaRuntimeError(
                f"{where}, and EVA reads the inputs of whole layers. Initialise the model loaded "
                "whole (without tp_plan and the like), in one process or each with a copy; save "
                "the adapter, and load it into the divided model by PeftModel.from_pretrained "
                "(of PEFT 0.21.1 or newer)"
            )


def check_experts(model: nn.Module, config: LoraConfig) -> None:
    """Refuse parameters as targets in a sharded model.

    Their products are recognised by the memory of the weights, which differs while a layer runs.

    Raises:
        EvaRuntimeError: there are such targets.
    """
    kind = sharded_by(model)
    if kind is None:
        return
    if carries_adapters(model):
        some = any(isinstance(module, ParamWrapper) for module in model.modules())
    else:
        some = bool(resolved_config(model, config).target_parameters)
    if some:
        raise EvaRuntimeError(
            "target_parameters, or experts in one parameter, in a model that is sharded by "
            f"{kind}: EVA does not see what they are multiplied with. Calibrate the model before "
            "it is sharded, or name other layers in target_modules"
        )


def _is_parallel(module: nn.Module, shards: int) -> bool:
    """Tell whether a layer is partitioned along more mesh dimensions than by sharding."""
    if getattr(module, "_hf_tp_plan", None) is not None:  # set by transformers, and by PEFT
        return True
    return any(_divisions(part) > shards for part in module.parameters(recurse=False))


def _divisions(parameter: Tensor) -> int:
    """Return along how many dimensions of a device mesh a parameter is partitioned."""
    mesh = getattr(parameter, "device_mesh", None)
    placements = getattr(parameter, "placements", ())
    return sum(
        mesh is not None and mesh.size(i) > 1 and not placement.is_replicate()
        for i, placement in enumerate(placements)
    )


def check_whole(model: nn.Module) -> None:
    """Refuse a model, maybe in a wrapper, to whose adapters nothing can be written any more.

    Raises:
        EvaRuntimeError: it is partitioned or sharded, which fixes its set of parameters; or an
            optimizer has copies of them.
    """
    inner = unwrap(model)
    check_undivided(inner)
    kind = sharded_by(inner)
    if kind is not None:
        raise EvaRuntimeError(
            f"the model is sharded by {kind}, which would not notice adapters that are added or "
            "resized now. Initialise before sharding; or calibrate() the sharded model, and apply "
            "the result to one that is not"
        )
    # ZeRO-1 and ZeRO-2 make weights views of one buffer; 16 bits without ZeRO go undetected by that
    adapters = (p for name, p in inner.named_parameters() if "lora_" in name)
    parts = (p.untyped_storage() for p in adapters if p.untyped_storage().nbytes() > p.nbytes)
    places = [memory.data_ptr() for memory in parts]
    if len(set(places)) < len(places) or ENGINE in _class_names(model):
        raise EvaRuntimeError(
            "an optimizer of DeepSpeed has copies of the weights, which its first step puts in "
            "place of EVA's. Initialise before deepspeed.initialize (accelerator.prepare calls it)"
        )
