"""A barrier of the processes of a group before a pass: all begin it, or none does."""

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
PATIENCE = 30.0  # seconds after which a process logs that it waits for others
_LONGEST_PAUSE = 0.1  # seconds, between two polls of the store
_ALL = "all are there"
_REMEDY = "all of them must make the call; pass group=None to calibrate in one process alone"

Word = tuple[int, str]  # the rank of a process that failed, and what happened to it


class Meeting:
    """A barrier of the processes of a group, where each arrives or reports that it failed.

    It uses the store of the group, so that a failed process need not wait for the others, and
    Ctrl-C works while waiting. If torch does not expose the store, or the store lacks operations,
    it uses a collective, without these two properties.

    Args:
        group: a ``torch.distributed`` process group that this process is in.

    Attributes:
        over: this process has arrived.
    """

    def __init__(self, group: Any) -> None:
        self._group, self.over = group, False
        self._rank, self._size = distributed.get_rank(group), distributed.get_world_size(group)

    def come(self, interrupted: Callable[[], bool]) -> Word | None:
        """Wait for the others; returns the report of one that failed, ``None`` if all arrived.

        Args:
            interrupted: polled while waiting; if true this process has failed, unless all arrived.

        Raises:
            EvaRuntimeError: the store cannot be reached any more.
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
        """Report that this process will not arrive.

        Args:
            told: what happened to it.
        """
        store = _store_of(self._group)
        if store is None:
            with _impatient(self._rank, self._size, f" to be told that this one {told}"):
                self._exchange(told)
        else:
            self._settle(store, self._count(store), self._word(told))

    def _wait(self, store: Any, interrupted: Callable[[], bool]) -> Word | None:
        """Wait for the others, up to the time limit of the process group."""
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
        """Return the number of this meeting: each process counts, and all arrive equally often."""
        number: int = store.add(_counter(self._rank), 1)
        return number

    def _settle(self, store: Any, number: int, word: str) -> Word | None:
        """Write the outcome of the meeting, and return it: the first one written counts."""
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
    """Return the store of a group; ``None`` if torch exposes none with all operations needed.

    User-defined stores, and that of MPI, lack some.

    Raises:
        DistError: it cannot be reached any more.
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
    """Log that a process waits for the others, if that takes long: some may never arrive."""
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
