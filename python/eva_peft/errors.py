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
    "EvaError",
    "EvaRuntimeError",
    "EvaTypeError",
    "EvaValueError",
    "EvaWarning",
    "HeldError",
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
_OURS = ("eva_kernels", "eva_peft")
MOST_LISTED = 8  # names in a message


class HeldError:
    """An error that is kept to be raised later.

    Attributes:
        error: the error, if any; dropped when it is raised. Its traceback refers to this object,
            and the reference cycle would keep all tensors of the frames alive.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def catch(self, do: Callable[[], T]) -> T | None:
        """Call a function, and keep what it raises; returns ``None`` then."""
        try:
            return do()
        except BaseException as raised:
            self.error = raised
        return None

    def release(self) -> None:
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
        if frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
            caller = level + 1
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=caller)


def counted(number: int, one: str, many: str = "") -> str:
    """Return "1 layer" or "3 layers": a number, then ``one`` or ``many`` (``one`` + "s")."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable[str]) -> str:
    """Join names for a message: all, or the first ones and the number of others."""
    every = list(names)
    more = f" and {len(every) - MOST_LISTED} more" if len(every) > MOST_LISTED else ""
    return ", ".join(every[:MOST_LISTED]) + more
