"""Errors and interrupts in one of several processes, of which the others hear first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ..errors import EvaRuntimeError, HeldError
from ..surroundings.interrupts import Interrupts
from .channel import Channel
from .meeting import Meeting

__all__ = ["Together", "in_words"]

P = ParamSpec("P")
T = TypeVar("T")


class Together:
    """The processes of a group, seen from one of them, which holds what it raises until all know.

    Args:
        group: of at least two processes.

    Attributes:
        channel: what travels between them.
        meeting: where all begin, or none.
        interrupts: around the pass, which is told of them where it lets them through.
        held: the error of this process, if there is one.
    """

    def __init__(self, group: Any) -> None:
        self.interrupts, self.held = Interrupts(), HeldError()
        self.channel, self.meeting = Channel(group, self.held), Meeting(group)

    def attempt(self, do: Callable[P, T], *of: P.args, **named: P.kwargs) -> T | None:
        """Do what may fail, or be interrupted, and hold that until the others are told."""

        def interruptible() -> T:
            with self.interrupts.let_through():
                return do(*of, **named)

        return self.held.catch(interruptible)

    def unless_held(self, do: Callable[[], T]) -> T:
        """Do what comes after something that may have failed; to be attempted."""
        self.held.release()  # to be held again by who attempts this
        return do()

    def interrupted(self) -> bool:
        """Tell whether this process has failed, or is interrupted now."""
        self.attempt(lambda: None)  # whoever handles interrupts may not raise anything
        return self.held.error is not None

    def told(self) -> str | None:
        """Return what the others are to be told of this process's error, if it has one."""
        return None if self.held.error is None else in_words(self.held.error)

    def of_all(self, own: T) -> list[T]:
        """Return what each process gives, by rank; raise if something has gone wrong in one."""
        every = self.channel.of_all((own, self.told()))
        for rank, (_, told) in enumerate(every):
            self.raise_if(told, rank)
        return [thing for thing, _ in every]

    def raise_if(self, told: str | None, rank: int) -> None:
        """Raise what this process holds, or else what another one has told.

        Raises:
            EvaRuntimeError: process ``rank`` has failed.
        """
        if told is None:
            return
        self.held.release()
        raise EvaRuntimeError(f"process {rank} {told}")


def in_words(error: BaseException) -> str:
    """Return what the other processes are told of an error."""
    if isinstance(error, Exception):
        return f"failed: {type(error).__name__}: {error}"
    return f"was interrupted ({type(error).__name__})"
