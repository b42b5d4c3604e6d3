"""Clean-up that is completed in spite of Ctrl-C, however often and wherever it comes."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["DeferredInterrupts", "run_to_completion", "temporarily", "undone_on_failure"]

# Signals whose Python handlers may raise: Ctrl-C, a scheduler's termination or warning of it, time
# limits, and torch's own handler for loader workers that were killed.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

# Far more interrupts than anybody sends; finite, since a step may itself raise one every time.
_MAX_ATTEMPTS = 100


def run_to_completion(step: Callable[[], object], attempts: int = _MAX_ATTEMPTS) -> None:
    """Run a step to its end: if an interrupt comes while it runs, restart it.

    No signal is blocked, so this works in any thread. An interrupt may still come in the few
    instructions before the step; to exclude that, call this in a ``finally``, and again in another
    one around it.

    Args:
        step: can be interrupted anywhere and restarted, and can be run twice.
        attempts: maximum number of attempts.

    Raises:
        BaseException: an interrupt that came, after the step has been completed. An
            ``Exception`` of the step itself, which is not run again.
    """
    try:
        step()
    except BaseException as error:
        # KeyboardInterrupt, or what a signal handler raises instead, such as SystemExit
        if attempts > 1 and not isinstance(error, Exception):
            run_to_completion(step, attempts - 1)
        raise


@contextmanager
def temporarily(
    undo: Callable[[], object], change: Callable[[], object] | None = None
) -> Iterator[None]:
    """Undo what a block changed, however the block is left.

    Args:
        undo: as the step of :func:`run_to_completion`. It is run twice, since an interrupt may
            come right before the first time.
        change: called on entering; ``undo`` is also run if it does not complete.
    """
    try:
        try:
            if change is not None:
                change()
            yield
        finally:
            run_to_completion(undo)
    finally:
        run_to_completion(undo)


@contextmanager
def undone_on_failure(undo: Callable[[], object]) -> Iterator[None]:
    """Undo what a block did if it is left by an exception, Ctrl-C included.

    Args:
        undo: see :func:`temporarily`.
    """
    try:
        try:
            yield
        except BaseException:
            run_to_completion(undo)
            raise
    except BaseException:
        run_to_completion(undo)
        raise


class DeferredInterrupts(AbstractContextManager["DeferredInterrupts"]):
    """Defer interrupts within a context, except where they are let through.

    For work shared with other processes, which would wait for one that stopped at any point. An
    interrupt is any signal whose handler may raise. Python runs handlers only in the main thread,
    between two bytecodes: other threads, and calls that block in C, are not interrupted.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._pending: list[int] = []

    def __enter__(self) -> DeferredInterrupts:
        with undone_on_failure(self._stop_deferring):  # one may come before all are deferred
            self._defer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run_to_completion(self._stop_deferring)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Let interrupts through in a block, including those deferred until then."""
        try:
            self._stop_deferring()
            yield
        finally:
            try:
                self._defer()
            finally:
                self._defer()  # an interrupt may have come right before the line above

    def _defer(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler == self._record:
                continue
            if callable(handler):  # one of Python's, which may raise
                self._handlers[number] = handler
                signal.signal(number, self._record)

    def _stop_deferring(self) -> None:
        try:
            self._restore_handlers()
        finally:
            try:
                self._restore_handlers()  # a restored handler may have raised
            finally:
                self._deliver_pending()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._record:
                signal.signal(number, handler)

    def _deliver_pending(self) -> None:
        """Call the handlers of all deferred signals, even if some raise."""
        if self._pending:
            number = self._pending.pop(0)
            try:
                self._handlers[number](number, sys._getframe())
            finally:
                self._deliver_pending()

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number not in self._pending:
            self._pending.append(number)
