"""Wrappers around a model: what is below them, and what they do not allow."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from .._peft_compat import LoraConfig
from ..errors import EvaRuntimeError, EvaTypeError, listed

__all__ = ["DEEPSPEED_ENGINE", "check_may_resize", "check_not_replicated", "class_names", "unwrap"]

_DATA_PARALLEL_CLASSES = (nn.DataParallel, nn.parallel.DistributedDataParallel)
DEEPSPEED_ENGINE = "DeepSpeedEngine"
_FABRIC_MODEL_ATTRIBUTE = "_forward_module"  # the model's name in the wrapper of Lightning's Fabric


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
