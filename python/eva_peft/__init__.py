"""EVA initialisation of LoRA adapters, compatible with PEFT, on top of ``eva_kernels``.

Names load on first use, so that the command line starts without torch and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .initialize import calibrate, default_config, estimate, initialize
    from .options import CalibrateOptions
    from .peft_api import get_eva_state_dict, initialize_lora_eva_weights, patch_peft
    from .planning import Estimate
    from .result import EvaResult

__all__ = [
    "CalibrateOptions",
    "Estimate",
    "EvaResult",
    "calibrate",
    "default_config",
    "estimate",
    "get_eva_state_dict",
    "initialize",
    "initialize_lora_eva_weights",
    "patch_peft",
]

_MODULES = {
    "CalibrateOptions": "options",
    "Estimate": "planning",
    "EvaResult": "result",
    "calibrate": "initialize",
    "default_config": "initialize",
    "estimate": "initialize",
    "get_eva_state_dict": "peft_api",
    "initialize": "initialize",
    "initialize_lora_eva_weights": "peft_api",
    "patch_peft": "peft_api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    # Importing a submodule binds its own name here; a function of that name must win.
    for key, origin in _MODULES.items():
        if origin == _MODULES[name]:
            globals()[key] = getattr(module, key)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
