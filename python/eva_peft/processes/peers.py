"""Errors and interrupts in one of several processes, which are first reported to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ..errors import DeferredError, EvaRuntimeError
from ..surroundings.interrupts import DeferredInterrupts
from .barrier import StartBarrier
from .channel import Channel

__all__ = ["Peers", "describe_error"]

P = ParamSpec("P")
T = TypeVar("T")


class Peers:
    """The processes of a group, seen from one of them, which holds its error until all know it.

    Args:
        group: of at least two processes.

    Attributes:
        channel: the communication between them.
        barrier: the one at which all begin, or none.
        interrupts: deferred during the pass, except where they are let through.
        held_error: the error of this process, if there is one.
    """

    def __init__(self, group: Any) -> None:
        self.interrupts, self.held_error = DeferredInterrupts(), DeferredError()
        self.channel, self.barrier = Channel(group, self.held_error), StartBarrier(group)

    def attempt(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call what may fail or be interrupted, and hold the error until the others are told."""

        def interruptible() -> T:
            with self.interrupts.let_through():
                return function(*args, **kwargs)

        return self.held_error.catch(interruptible)

    def attempt_unless_failed(self, function: Callable[[], T]) -> T | None:
        """Do the same if no error is held yet, else nothing."""
        return self.attempt(function) if self.held_error.error is None else None

    def is_interrupted(self) -> bool:
        """Tell whether this process has failed, or is interrupted now."""
        self.attempt(lambda: None)  # runs signal handlers; not all of them raise
        return self.held_error.error is not None

    def failure_report(self) -> str | None:
        """Return the report to the others of this process's error, if it has one."""
        return None if self.held_error.error is None else describe_error(self.held_error.error)

    def gather(self, value: T) -> list[T]:
        """Gather an object from each process, by rank; raise if one of them has failed."""
        replies = self.channel.gather_objects((value, self.failure_report()))
        for rank, (_, report) in enumerate(replies):
            self.raise_if_failed(report, rank)
        return [each for each, _ in replies]

    def raise_if_failed(self, report: str | None, rank: int) -> None:
        """Raise the error that this process holds, or else the one that another has reported.

        Raises:
            EvaRuntimeError: process ``rank`` has failed.
        """
        if report is None:
            return
        self.held_error.reraise()
        raise EvaRuntimeError(f"process {rank} {report}")


def describe_error(error: BaseException) -> str:
    """Return the report of an error to the other processes."""
    if isinstance(error, Exception):
        return f"failed: {type(error).__name__}: {error}"
    return f"was interrupted ({type(error).__name__})"
