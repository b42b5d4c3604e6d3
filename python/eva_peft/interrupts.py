"""Clean-up that Ctrl-C does not cut short, however often and wherever it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["completed", "temporarily", "undone_on_failure"]

# Far more interrupts than anybody sends; a step that raises one by itself must end, too.
_TRIES = 100


def completed(step: Callable[[], object], tries: int = _TRIES) -> None:
    """Run a step to its end: if an interrupt comes while it runs, begin it again.

    No signal is held back, so this works in any thread. An interrupt may still come at the few
    instructions before the step; whoever must be sure of it calls this in a ``finally``, and in
    another one around that.

    Args:
        step: may be broken off anywhere and begun again, and may be run twice.
        tries: how often at most.

    Raises:
        BaseException: an interrupt that came, after the step has been completed. An
            ``Exception`` of the step itself, which is not run again.
    """
    try:
        step()
    except BaseException as error:
        # KeyboardInterrupt, or what a signal handler raises in its place, as SystemExit
        if tries > 1 and not isinstance(error, Exception):
            completed(step, tries - 1)
        raise


@contextmanager
def temporarily(
    undo: Callable[[], object], change: Callable[[], object] | None = None
) -> Iterator[None]:
    """Undo what a block changed, however the block is left.

    Args:
        undo: as the step of :func:`completed`. It is run twice, since an interrupt may come right
            before the first time.
        change: what to do on entering; ``undo`` is also run where it did not get to its end.
    """
    try:
        try:
            if change is not None:
                change()
            yield
        finally:
            completed(undo)
    finally:
        completed(undo)


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
            completed(undo)
            raise
    except BaseException:
        completed(undo)
        raise
