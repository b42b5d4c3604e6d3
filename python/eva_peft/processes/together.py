"""Errors and interrupts in one of several processes, which are first reported to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ..errors import EvaRuntimeError, HeldError
from ..surroundings.interrupts import DeferredInterrupts
from .channel import Channel
from .meeting import Meeting

__all__ = ["Together", "in_words"]

P = ParamSpec("P")
T = TypeVar("T")


class Together:
    """The processes of a group, seen from one of them, which holds its error until all know it.

    Args:
        group: of at least two processes.

    Attributes:
        channel: the communication between them.
        meeting: the barrier at which all begin, or none.
        interrupts: deferred during the pass, except where they are let through.
        held: the error of this process, if there is one.
    """

    def __init__(self, group: Any) -> None:
        self.interrupts, self.held = DeferredInterrupts(), HeldError()
        self.channel, self.meeting = Channel(group, self.held), Meeting(group)

    def attempt(self, do: Callable[P, T], *of: P.args, **named: P.kwargs) -> T | None:
        """Do what may fail or be interrupted, and hold the error until the others are told."""

        def interruptible() -> T:
            with self.interrupts.let_through():
                return do(*of, **named)

        return self.held.catch(interruptible)

    def unless_held(self, do: Callable[[], T]) -> T:
        """Call a function, or raise the held error instead; to be passed to :meth:`attempt`."""
        self.held.release()  # attempt() holds it again
        return do()

    def interrupted(self) -> bool:
        """Tell whether this process has failed, or is interrupted now."""
        self.attempt(lambda: None)  # runs signal handlers; not all of them raise
        return self.held.error is not None

    def told(self) -> str | None:
        """Return the report to the others of this process's error, if it has one."""
        return None if self.held.error is None else in_words(self.held.error)

    def of_all(self, own: T) -> list[T]:
        """Gather an object from each process, by rank; raise if one of them has failed."""
        every = self.channel.of_all((own, self.told()))
        for rank, (_, told) in enumerate(every):
            self.raise_if(told, rank)
        return [thing for thing, _ in every]

    def raise_if(self, told: str | None, rank: int) -> None:
        """Raise the error that this process holds, or else the one that another has reported.

        Raises:
            EvaRuntimeError: process ``rank`` has failed.
        """
        if told is None:
            return
        self.held.release()
        raise EvaRuntimeError(f"process {rank} {told}")


def in_words(error: BaseException) -> str:
    """Return the report of an error to the other processes."""
    if isinstance(error, Exception):
        return f"failed: {type(error).__name__}: {error}"
    return f"was interrupted ({type(error).__name__})"
