"""The errors of the package, under the name that the PEFT layer uses."""

from eva_kernels.errors import (
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

__all__ = [
    "EvaError",
    "EvaRuntimeError",
    "EvaTypeError",
    "EvaValueError",
    "EvaWarning",
    "NonFiniteError",
    "NotConvergedError",
    "NotConvergedWarning",
    "NotInitializedError",
]
