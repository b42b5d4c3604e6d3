"""EVA initialisation of LoRA adapters by a streaming, mean-centred SVD of layer inputs.

``eva_kernels.initialize(model, loader)`` is the whole job. This module is the front door: it hands
the PEFT layer (package ``eva_peft``) on, which is loaded on first use, so that importing the
engine stays light.
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
    "estimate",
    "get_eva_state_dict",
    "initialize",
    "initialize_lora_eva_weights",
    "is_initialized",
    "pad_ranks",
    "patch_peft",
    "watch",
]

_LAZY = {
    "EvaCallback": "eva_peft",
    "NotInitializedWarning": "eva_peft",
    "OutOfMemoryError": "eva_peft",
    "is_initialized": "eva_peft",
    "watch": "eva_peft",
    "IncrementalPCA": "eva_kernels._pca",
    "EvaResult": "eva_peft",
    "calibrate": "eva_peft",
    "estimate": "eva_peft",
    "get_eva_state_dict": "eva_peft",
    "initialize": "eva_peft",
    "initialize_lora_eva_weights": "eva_peft",
    "pad_ranks": "eva_peft",
    "patch_peft": "eva_peft",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
