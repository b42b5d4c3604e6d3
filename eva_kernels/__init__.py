"""EVA initialisation of LoRA adapters by a streaming, mean-centred SVD of layer inputs.

``eva_kernels.initialize(model, loader)`` does everything. This module is the public entry point: it
re-exports the PEFT layer (package ``eva_peft``), which is loaded on first use, so that importing
the engine stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    EvaError,
    EvaRuntimeError,
    EvaTypeError,
    EvaValueError,
    EvaWarning,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    NotInitializedError,
)

if TYPE_CHECKING:
    from eva_peft import (
        EvaCallback,
        EvaResult,
        NotInitializedWarning,
        OutOfMemoryError,
        calibrate,
        check_padding,
        estimate,
        get_eva_state_dict,
        initialize,
        initialize_lora_eva_weights,
        is_initialized,
        pad_ranks,
        patch_peft,
        watch,
    )

    from ._pca import IncrementalPCA

__version__ = "0.1.0"

__all__ = [
    "EvaCallback",
    "EvaError",
    "EvaResult",
    "EvaRuntimeError",
    "EvaTypeError",
    "EvaValueError",
    "EvaWarning",
    "IncrementalPCA",
    "NonFiniteError",
    "NotConvergedError",
    "NotConvergedWarning",
    "NotInitializedError",
    "NotInitializedWarning",
    "OutOfMemoryError",
    "__version__",
    "calibrate",
    "check_padding",
    "estimate",
    "get_eva_state_dict",
    "initialize",
    "initialize_lora_eva_weights",
    "is_initialized",
    "pad_ranks",
    "patch_peft",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "eva_kernels._pca" if name == "IncrementalPCA" else "eva_peft"
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
