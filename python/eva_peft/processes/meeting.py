"""Where the processes of a group meet before a pass: all begin it, or none does."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from ..errors import EvaRuntimeError, listed

__all__ = ["Meeting"]

_LOGGER = logging.getLogger("eva_kernels")
PATIENCE = 30.0  # seconds after which a process says for whom it waits
_LONGEST_PAUSE = 0.1  # seconds, between two looks at the store
_ALL = "all are there"
_REMEDY = "all of them must make the call; pass group=None to calibrate in one process alone"

Word = tuple[int, str]  # of which process, and what has become of it


class Meeting:
    """One meeting of the processes of a group, to which each comes, or sends word that it failed.

    In the store of the group, so that who fails need not wait for the others, and Ctrl-C is heard
    while waiting. Where torch does not show the store, or it can do too little, by a collective,
    which is neither.

    Args:
        group: a ``torch.distributed`` process group that this process is in.

    Attributes:
        over: this process has come.
    """

    def __init__(self, group: Any) -> None:
        self._group, self.over = group, False
        self._rank, self._size = distributed.get_rank(group), distributed.get_world_size(group)

    def come(self, interrupted: Callable[[], bool]) -> Word | None:
        """Wait for the others; returns the word of one that failed, ``None`` if all have come.

        Args:
            interrupted: asked while waiting; if so this process has failed, unless all are there.

        Raises:
            EvaRuntimeError: the store is gone.
        """
        self.over = True
        with _impatient(self._rank, self._size):
            try:
                store = _store_of(self._group)
                if store is not None:
                    return self._wait(store, interrupted)
            except RuntimeError as error:
                raise EvaRuntimeError(
                    f"process {self._rank} can no longer reach the store of its process group: the "
                    "process that keeps it, mostly the first, has ended. It says why"
                ) from error
            return self._exchange(None)

    def fail(self, told: str) -> None:
        """Send word that this process will not come.

        Args:
            told: what has become of it.
        """
        store = _store_of(self._group)
        if store is None:
            with _impatient(self._rank, self._size, f" to be told that this one {told}"):
                self._exchange(told)
        else:
            self._settle(store, self._count(store), self._word(told))

    def _wait(self, store: Any, interrupted: Callable[[], bool]) -> Word | None:
        """Wait as long as the processes of the group wait for each other anywhere."""
        number, limit = self._count(store), store.timeout.total_seconds()
        if store.add(f"eva_kernels/{number}/there", 1) == self._size:
            self._settle(store, number, _ALL)
        end, pause = time.monotonic() + (limit or math.inf), 0.001  # 0 is none
        while not store.check([f"eva_kernels/{number}/word"]):
            if interrupted():
                return self._settle(store, number, self._word("was interrupted"))
            if time.monotonic() > end:
                late = [i for i in range(self._size) if store.add(_counter(i), 0) < number]
                told = (
                    f"has waited for {limit:g} seconds, the time limit of its process group, for "
                    f"the others to begin the EVA pass (not there: {listed(map(str, late))}): "
                )
                return self._settle(store, number, self._word(told + _REMEDY))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._settle(store, number, _ALL)

    def _count(self, store: Any) -> int:
        """Return which meeting this is: each process has come as often as the others."""
        number: int = store.add(_counter(self._rank), 1)
        return number

    def _settle(self, store: Any, number: int, word: str) -> Word | None:
        """Write what has come of the meeting, and return it: the word that came first holds."""
        said = store.compare_set(f"eva_kernels/{number}/word", "", word).decode()
        return None if said == _ALL else tuple(json.loads(said))

    def _word(self, told: str) -> str:
        return json.dumps([self._rank, told])

    def _exchange(self, told: str | None) -> Word | None:
        every: list[Any] = [None] * self._size
        distributed.all_gather_object(every, told, group=self._group)
        return next(((rank, word) for rank, word in enumerate(every) if word is not None), None)


def _counter(rank: int) -> str:
    return f"eva_kernels/of/{rank}"


def _store_of(group: Any) -> Any:
    """Return the store of a group; ``None`` where torch does not show one that can do all of this.

    Stores of users' own, and the one of MPI, cannot.

    Raises:
        DistError: it is gone.
    """
    try:
        store = group.get_group_store()
        store.compare_set("eva_kernels/probe", "", "here")
        store.check(["eva_kernels/probe"])
    except distributed.DistError:
        raise
    except (AttributeError, RuntimeError):
        return None
    return store


@contextmanager
def _impatient(rank: int, size: int, what: str = "") -> Iterator[None]:
    """Say for whom a process waits, if that takes long: some may never come."""
    told = (
        "process %d of %d has been waiting for %g seconds for the others to begin the EVA pass%s: "
        f"{_REMEDY}"
    )
    timer = threading.Timer(PATIENCE, _LOGGER.warning, [told, rank, size, PATIENCE, what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
