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

__all__ = ["StartBarrier"]

_LOGGER = logging.getLogger("eva_kernels")
LOG_WAIT_AFTER = 30.0  # seconds after which a process logs that it waits for others
_MAX_PAUSE = 0.1  # seconds, between two polls of the store
_ALL_ARRIVED = "all are there"
_REMEDY = (
    "every process of the group must make the same call; pass group=None to calibrate in this "
    "process alone"
)

FailureReport = tuple[int, str]  # the rank of a process that failed, and what happened to it


class StartBarrier:
    """A barrier of the processes of a group, where each arrives or reports that it failed.

    It uses the store of the group, so that a failed process need not wait for the others, and
    Ctrl-C works while waiting. If torch does not expose the store, or the store lacks operations,
    it uses a collective, without these two properties.

    Args:
        group: a ``torch.distributed`` process group that this process is in.

    Attributes:
        has_arrived: this process has arrived.
    """

    def __init__(self, group: Any) -> None:
        self._group, self.has_arrived = group, False
        self._rank, self._size = distributed.get_rank(group), distributed.get_world_size(group)

    def arrive(self, is_interrupted: Callable[[], bool]) -> FailureReport | None:
        """Wait for the others; returns the report of one that failed, ``None`` if all arrived.

        Args:
            is_interrupted: polled while waiting; if true this process has failed, unless all
                arrived.

        Raises:
            EvaRuntimeError: the store cannot be reached any more.
        """
        self.has_arrived = True
        with _logging_long_waits(self._rank, self._size):
            try:
                store = _store_of(self._group)
                if store is not None:
                    return self._wait(store, is_interrupted)
            except RuntimeError as error:
                raise EvaRuntimeError(
                    f"process {self._rank} can no longer reach the store of its process group: the "
                    "process that hosts it, usually the first, has ended; its output says why"
                ) from error
            return self._gather_reasons(None)

    def report_failure(self, reason: str) -> None:
        """Report that this process will not arrive.

        Args:
            reason: what happened to it.
        """
        store = _store_of(self._group)
        if store is None:
            with _logging_long_waits(self._rank, self._size, f", to tell them that it {reason}"):
                self._gather_reasons(reason)
        else:
            self._write_outcome(store, self._next_number(store), self._failure_outcome(reason))

    def _wait(self, store: Any, is_interrupted: Callable[[], bool]) -> FailureReport | None:
        """Wait for the others, up to the time limit of the process group."""
        number, limit = self._next_number(store), store.timeout.total_seconds()
        if store.add(f"eva_kernels/{number}/there", 1) == self._size:
            self._write_outcome(store, number, _ALL_ARRIVED)
        end, pause = time.monotonic() + (limit or math.inf), 0.001  # 0 is none
        while not store.check([f"eva_kernels/{number}/word"]):
            if is_interrupted():
                return self._write_outcome(store, number, self._failure_outcome("was interrupted"))
            if time.monotonic() > end:
                missing = [i for i in range(self._size) if store.add(_count_key(i), 0) < number]
                reason = (
                    f"has waited for {limit:g} seconds, the time limit of its process group, for "
                    "the others to begin the EVA pass (missing ranks: "
                    f"{listed(map(str, missing))}): "
                )
                return self._write_outcome(store, number, self._failure_outcome(reason + _REMEDY))
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)
        return self._write_outcome(store, number, _ALL_ARRIVED)

    def _next_number(self, store: Any) -> int:
        """Return the number of this barrier: each process counts, and all arrive equally often."""
        number: int = store.add(_count_key(self._rank), 1)
        return number

    def _write_outcome(self, store: Any, number: int, outcome: str) -> FailureReport | None:
        """Write the outcome of the barrier, and return it: the first one written counts."""
        written = store.compare_set(f"eva_kernels/{number}/word", "", outcome).decode()
        return None if written == _ALL_ARRIVED else tuple(json.loads(written))

    def _failure_outcome(self, reason: str) -> str:
        return json.dumps([self._rank, reason])

    def _gather_reasons(self, reason: str | None) -> FailureReport | None:
        reasons: list[Any] = [None] * self._size
        distributed.all_gather_object(reasons, reason, group=self._group)
        return next(((rank, each) for rank, each in enumerate(reasons) if each is not None), None)


def _count_key(rank: int) -> str:
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
def _logging_long_waits(rank: int, size: int, to_do: str = "") -> Iterator[None]:
    """Log that a process waits for the others, if that takes long: some may never arrive."""
    message = (
        "process %d of %d has been waiting for %g seconds for the others to begin the EVA pass%s: "
        f"{_REMEDY}"
    )
    timer = threading.Timer(
        LOG_WAIT_AFTER, _LOGGER.warning, [message, rank, size, LOG_WAIT_AFTER, to_do]
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
