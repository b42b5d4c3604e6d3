"""Where the processes of a group meet before a pass: all begin it, or none does."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

__all__ = ["Meeting"]

_LOGGER = logging.getLogger("eva_kernels")
PATIENCE = 30.0  # seconds after which a process says for whom it waits
_LONGEST_PAUSE = 0.1  # seconds, between two looks at the store
_ALL = "all are there"

Word = tuple[int, str]  # of which process, and what has become of it


class Meeting:
    """One meeting of the processes of a group, to which each comes, or sends word that it failed.

    In the store of the group, so that who fails need not wait for the others, and Ctrl-C is heard
    while waiting. Where torch does not show the store, by a collective, which is neither.

    Args:
        group: a ``torch.distributed`` process group that this process is in.

    Attributes:
        over: this process has come, or sent word.
    """

    def __init__(self, group: Any) -> None:
        self._group, self.over = group, False
        self._rank, self._size = distributed.get_rank(group), distributed.get_world_size(group)
        self._store = _store_of(group)

    def come(self, interrupted: Callable[[], bool]) -> Word | None:
        """Wait for the others; returns the word of one that failed, ``None`` if all have come.

        Args:
            interrupted: asked while waiting; if so this process has failed, unless all are there.
        """
        self.over = True
        with _impatient(self._rank, self._size):
            if self._store is None:
                return self._exchange(None)
            key = self._key()
            if self._store.add(f"{key}/there", 1) == self._size:
                self._settle(key, _ALL)
            pause = 0.001
            while not self._store.check([f"{key}/word"]):
                if interrupted():
                    return self._settle(key, self._word("was interrupted"))
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            return self._settle(key, _ALL)

    def fail(self, told: str) -> None:
        """Send word that this process will not come.

        Args:
            told: what has become of it.
        """
        self.over = True
        if self._store is None:
            with _impatient(self._rank, self._size, f" to be told that this one {told}"):
                self._exchange(told)
        else:
            self._settle(self._key(), self._word(told))

    def _key(self) -> str:
        """Return where the processes meet this time: each has come as often as the others."""
        assert self._store is not None
        return f"eva_kernels/{self._store.add(f'eva_kernels/of/{self._rank}', 1)}"

    def _settle(self, key: str, word: str) -> Word | None:
        """Write what has come of the meeting, and return it: the word that came first holds."""
        assert self._store is not None
        said = self._store.compare_set(f"{key}/word", "", word).decode()
        return None if said == _ALL else tuple(json.loads(said))

    def _word(self, told: str) -> str:
        return json.dumps([self._rank, told])

    def _exchange(self, told: str | None) -> Word | None:
        every: list[Any] = [None] * self._size
        distributed.all_gather_object(every, told, group=self._group)
        return next(((rank, word) for rank, word in enumerate(every) if word is not None), None)


def _store_of(group: Any) -> Any:
    """Return the store of a group, or ``None`` where torch does not show it or there is none."""
    try:
        return group.get_group_store()
    except (AttributeError, RuntimeError):
        return None


@contextmanager
def _impatient(rank: int, size: int, what: str = "") -> Iterator[None]:
    """Say for whom a process waits, if that takes long: some may never come."""
    told = (
        "process %d of %d has been waiting for %g seconds until the others begin the EVA pass, "
        "too%s: all of them must make the call. One that is to run by itself takes group=None"
    )
    timer = threading.Timer(PATIENCE, _LOGGER.warning, [told, rank, size, PATIENCE, what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
