"""Errors and warnings that the package raises.

Every error is an ``EvaError`` and, at the same time, the built-in that PEFT or scikit-learn raises
in the same case, so that existing ``except`` clauses keep working.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "EvaError",
    "EvaRuntimeError",
    "EvaTypeError",
    "EvaValueError",
    "EvaWarning",
    "NonFiniteError",
    "NotConvergedError",
    "NotConvergedWarning",
    "NotFittedError",
    "NotInitializedError",
    "warnings_caught",
]

_CATCH_LOCK = threading.RLock()


class EvaError(Exception):
    """Base of all errors of this package."""


class EvaValueError(EvaError, ValueError):
    """An argument, option, batch or file has a value that cannot be used."""


class EvaTypeError(EvaError, TypeError):
    """An argument, batch or layer input has a type that cannot be used."""


class EvaRuntimeError(EvaError, RuntimeError):
    """The machine, the model or the data prevented the work from being done."""


class NonFiniteError(EvaRuntimeError, FloatingPointError):
    """A layer input holds NaN or infinity."""


class NotConvergedError(EvaRuntimeError):
    """A limit was reached before every layer had converged (``on_not_converged="raise"``)."""


class NotFittedError(EvaValueError, AttributeError):
    """An estimator was used before it was fitted; same base classes as in scikit-learn."""


class NotInitializedError(EvaRuntimeError):
    """Training was about to start on an adapter configured for EVA but never initialised."""


class EvaWarning(UserWarning):
    """Base of all warnings of this package."""


class NotConvergedWarning(EvaWarning):
    """A limit was reached before every layer had converged; the best estimate is used."""


@contextmanager
def warnings_caught(*, record: bool = False) -> Iterator[None]:
    """Do what ``warnings.catch_warnings`` does, in one thread at a time.

    Warning filters are shared by all threads: if two blocks overlap in time, the filters of one are
    never restored, and warnings that it should have recorded are lost.
    """
    with _CATCH_LOCK, warnings.catch_warnings(record=record):
        yield
