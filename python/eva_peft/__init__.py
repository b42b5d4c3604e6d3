"""EVA initialisation of LoRA adapters, compatible with PEFT, on top of ``eva_kernels``.

Names load on first use, so that the command line starts without torch and transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check_padding import PaddingCheck, check_padding
    from .initialize import calibrate, default_config, estimate, initialize
    from .lora.pad import pad_ranks
    from .lora.training import EvaCallback, NotInitializedWarning, is_initialized, watch
    from .options import CalibrateOptions
    from .passes.planning import Estimate
    from .peft_api import get_eva_state_dict, initialize_lora_eva_weights, patch_peft
    from .results.result import EvaResult
    from .surroundings.memory import OutOfMemoryError

__all__ = [
    "CalibrateOptions",
    "Estimate",
    "EvaCallback",
    "EvaResult",
    "NotInitializedWarning",
    "OutOfMemoryError",
    "PaddingCheck",
    "calibrate",
    "check_padding",
    "default_config",
    "estimate",
    "get_eva_state_dict",
    "initialize",
    "initialize_lora_eva_weights",
    "is_initialized",
    "pad_ranks",
    "patch_peft",
    "watch",
]

_MODULES = {
    "CalibrateOptions": "options",
    "Estimate": "passes.planning",
    "EvaCallback": "lora.training",
    "EvaResult": "results.result",
    "NotInitializedWarning": "lora.training",
    "OutOfMemoryError": "surroundings.memory",
    "PaddingCheck": "check_padding",
    "calibrate": "initialize",
    "check_padding": "check_padding",
    "default_config": "initialize",
    "estimate": "initialize",
    "get_eva_state_dict": "peft_api",
    "initialize": "initialize",
    "initialize_lora_eva_weights": "peft_api",
    "is_initialized": "lora.training",
    "pad_ranks": "lora.pad",
    "patch_peft": "peft_api",
    "watch": "lora.training",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule binds its name here, in whatever order modules are imported; the
        # public function of that name must win.
        if not (isinstance(value, ModuleType) and name in _MODULES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
