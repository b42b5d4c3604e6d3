"""Models whose weights or layers are divided among processes."""

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
# What transformers puts where a stage of a pipeline has no layer.
_NOT_OF_THIS_STAGE = "PipelineIdentityLayer"


def _class_names(model: nn.Module) -> set[str]:
    """Return the names of all classes that a model and its parts are of."""
    return set().union(*map(class_names, model.modules()))


def sharded_by(model: nn.Module) -> str | None:
    """Return what keeps a share of each weight in every process, and whole ones while a layer runs.

    FSDP of either kind, or DeepSpeed's ZeRO-3. The processes wait for each other in every forward
    pass of such a model; the inputs of its layers are whole.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed (ZeRO-3)"
    return "FSDP" if _class_names(model) & _FSDP else None


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the weights of a model are sharded: see :func:`sharded_by`."""
    return sharded_by(model) is not None


def may_stop_early(model: nn.Module, asked: bool | str, sharded: bool) -> bool:
    """Tell whether a forward pass may be cut behind the last layer that is needed.

    Args:
        model: to be run.
        asked: the option ``early_exit``.
        sharded: see :func:`is_sharded`; the others would wait.
    """
    if asked != AUTO:
        return bool(asked)
    offloaded = set(map(str, getattr(model, "hf_device_map", {}).values()))
    unsafe = sharded or _class_names(model) & _NEVER_CUT
    return not unsafe and not offloaded & {"cpu", "disk"}


def check_undivided(model: nn.Module) -> None:
    """Refuse a model whose layers themselves are divided among processes.

    By tensor or expert parallelism each process has a part of a layer, and maybe of its inputs, and
    all of them see the same batch, which a pass over several processes would count several times.
    A stage of a pipeline would stop by itself, and leave the others waiting.

    Raises:
        EvaRuntimeError: it is one of these.
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

    Their products are known by the memory of the weights, which is another while a layer runs.

    Raises:
        EvaRuntimeError: there are some.
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
    """Tell whether a layer is divided in more ways than it is sharded."""
    if getattr(module, "_hf_tp_plan", None) is not None:  # of transformers, and of PEFT
        return True
    return any(_divisions(part) > shards for part in module.parameters(recurse=False))


def _divisions(parameter: Tensor) -> int:
    """Return along how many dimensions of a device mesh a parameter is divided."""
    mesh = getattr(parameter, "device_mesh", None)
    placements = getattr(parameter, "placements", ())
    return sum(
        mesh is not None and mesh.size(i) > 1 and not placement.is_replicate()
        for i, placement in enumerate(placements)
    )


def check_whole(model: nn.Module) -> None:
    """Refuse a model, maybe in a wrapper, to whose adapters nothing can be written any more.

    Raises:
        EvaRuntimeError: it is divided, or sharded, and what did that knows the parameters of then
            only; or an optimizer has copies of them.
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
    # ZeRO-1 and ZeRO-2 make weights parts of one memory; nothing of 16 bits without ZeRO is seen
    adapters = (p for name, p in inner.named_parameters() if "lora_" in name)
    parts = (p.untyped_storage() for p in adapters if p.untyped_storage().nbytes() > p.nbytes)
    places = [memory.data_ptr() for memory in parts]
    if len(set(places)) < len(places) or ENGINE in _class_names(model):
        raise EvaRuntimeError(
            "an optimizer of DeepSpeed has copies of the weights, which its first step puts in "
            "place of EVA's. Initialise before deepspeed.initialize (accelerator.prepare calls it)"
        )
