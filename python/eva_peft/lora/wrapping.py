"""Make a PeftModel of a base model, and find out beforehand whether PEFT would refuse it."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from copy import deepcopy

import torch
from peft import get_peft_model
from torch import nn

from .._peft_compat import (
    LoraConfig,
    PeftModel,
    eva_config_of,
    failed_layer_name,
    matches_target,
    resolved_config,
    splits_target_string,
)
from ..errors import EvaError, EvaRuntimeError, EvaTypeError, EvaValueError, warnings_caught
from ..surroundings.memory import is_out_of_memory
from ..surroundings.random_state import preserved_random_state
from ..surroundings.snapshot import restored

__all__ = ["check_wrapping", "wrap_model"]


def wrap_model(
    model: nn.Module, config: LoraConfig, adapter_name: str, *, on_meta: bool = False
) -> PeftModel:
    """Return a PeftModel around a base model, its adapters ready to be written.

    Args:
        model, config, adapter_name: as PEFT; the caller's config is not changed.
        on_meta: create the adapters on the meta device.

    Raises:
        EvaError: PEFT refuses the config or a layer. The model may be wrapped in part then; see
            :func:`eva_peft.surroundings.snapshot.restored_on_failure`.
    """
    config = deepcopy(config)
    config.init_lora_weights, config.eva_config = "eva", eva_config_of(config)
    resolved = resolved_config(model, config)
    config.exclude_modules = resolved.exclude_modules
    takes_resolved_names = isinstance(resolved.target_modules, str) or splits_target_string(
        model, config
    )
    if config.target_modules and takes_resolved_names:
        config.target_modules = resolved.target_modules
    if config.lora_bias or _adapts_convolution(model, resolved):
        # PEFT refuses "eva" with these, also when it loads a saved adapter
        config.init_lora_weights, config.eva_config = True, None
    # parameters made in inference mode could never be trained
    # not low_cpu_mem_usage: PEFT then patches nn.Module for all threads, for good if two overlap
    device = torch.device("meta") if on_meta else nullcontext()
    with preserved_random_state(), torch.inference_mode(False), warnings_caught():
        # PEFT advises low_cpu_mem_usage to save memory, but the weights are written right away
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage=False.*")
        try:
            with device:
                return get_peft_model(model, config, adapter_name=adapter_name)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, EvaError) or is_out_of_memory(error):
                raise
            raise _as_eva_error(error) from error


def _adapts_convolution(model: nn.Module, config: LoraConfig) -> bool:
    conv_class = nn.modules.conv._ConvNd
    return any(
        matches_target(config, n) for n, m in model.named_modules() if isinstance(m, conv_class)
    )


def _as_eva_error(error: Exception) -> EvaError:
    kind: type[EvaError] = EvaValueError
    if isinstance(error, (AttributeError, TypeError)):  # AttributeError: packed weights
        kind = EvaTypeError
    elif isinstance(error, RuntimeError):
        kind = EvaRuntimeError
    name = failed_layer_name(error)
    if name is None:
        return kind(f"PEFT cannot wrap the model with this LoraConfig: {error}")
    return kind(
        f"layer {name}: PEFT cannot wrap it: {str(error).rstrip('.')}. To leave it out, name it in "
        "exclude_modules or choose other target_modules"
    )


def check_wrapping(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """Wrap a base model temporarily, to find out what PEFT refuses before a long pass.

    This takes the real model, because PEFT looks at more than its structure, and restores it.
    Adapters are made on the meta device, which takes no memory.

    Raises:
        EvaError: PEFT refuses the config or a layer.
    """
    # PEFT's warnings are shown when the model is finally wrapped; filters that turn warnings into
    # errors apply here as well.
    with warnings_caught(record=True):
        for on_meta in (True, False):
            try:
                with restored(model):
                    wrap_model(model, config, adapter_name, on_meta=on_meta)
                return
            except Exception:
                if not on_meta:  # some operations fail only on the meta device
                    raise
