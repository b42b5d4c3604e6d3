"""The errors of the package, imported from here by the PEFT layer, and its warnings."""

import sys
import warnings
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TypeVar

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
    warnings_caught,
)

__all__ = [
    "DeferredError",
    "EvaError",
    "EvaRuntimeError",
    "EvaTypeError",
    "EvaValueError",
    "EvaWarning",
    "NonFiniteError",
    "NotConvergedError",
    "NotConvergedWarning",
    "NotInitializedError",
    "counted",
    "first_line",
    "listed",
    "warn",
    "warnings_caught",
]

T = TypeVar("T")
_OWN_PACKAGES = ("eva_kernels", "eva_peft")
MAX_LISTED_NAMES = 8  # names in a message


class DeferredError:
    """An error that is kept to be raised later.

    Attributes:
        error: the error, if any; dropped when it is raised. Its traceback refers to this object,
            and the reference cycle would keep all tensors of the frames alive.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def catch(self, function: Callable[[], T]) -> T | None:
        """Call a function, and keep what it raises; returns ``None`` then."""
        try:
            return function()
        except BaseException as raised:
            self.error = raised
        return None

    def reraise(self) -> None:
        """Raise what is kept, and drop it."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None


def warn(message: str, category: type[Warning] = EvaWarning) -> None:
    """Warn at the line that called the package, however deep in it or in a hook this is called."""
    frame: FrameType | None = sys._getframe()
    level, caller = 1, 2
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in _OWN_PACKAGES:
            caller = level + 1
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=caller)


def counted(count: int, singular: str, plural: str = "") -> str:
    """Return "1 layer" or "3 layers": a count with ``singular``, or with ``plural`` (adds "s")."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable[str]) -> str:
    """Join names for a message: all, or the first ones and the number of others."""
    all_names = list(names)
    hidden = len(all_names) - MAX_LISTED_NAMES
    return ", ".join(all_names[:MAX_LISTED_NAMES]) + (f" and {hidden} more" if hidden > 0 else "")
