"""Single-threaded processes that compute rows ahead of a consumer that takes them in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from ..rows import Key, error_row, key_text

Make = Callable[[Key], Mapping[str, Any]]


class Workers:
    """A process pool, as a context manager; such small models gain nothing from a second thread.

    Args:
        count: number of processes; 0 makes the rows in this process, with one thread.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = (os.cpu_count() or 1) if count is None else count
        self._pool: ProcessPoolExecutor | None = None
        self._other_children: set[BaseProcess] = set()

    def __enter__(self) -> Workers:
        if self.count:
            self._other_children = set(multiprocessing.active_children())
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _initialize_worker)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        children: set[BaseProcess] = set()
        if kind is not None:  # the pool by itself would first finish all work already handed out
            children = set(multiprocessing.active_children()) - self._other_children
        for child in children:
            child.terminate()
        # its thread, if started, waits for them: only one of two waiters would get the exit status
        self._pool.shutdown(cancel_futures=True)
        for child in children:
            child.join()

    def precompute(self, keys: Sequence[Key], make: Make) -> Make:
        """Return ``f(key)`` for ``Rows.make``; its first call starts that key and all after it.

        Rows are stored in the order of the keys, so those kept from an earlier run precede the
        first key requested.

        Args:
            keys: in the order in which they are requested.
            make: function that the processes run; must be importable.
        """
        if self._pool is None:
            return lambda key: _in_one_thread(make, key)
        pool = self._pool
        futures: dict[str, Future[Mapping[str, Any]]] = {}

        def get(key: Key) -> Mapping[str, Any]:
            if not futures:
                remaining_keys = list(keys)[list(keys).index(key) :]
                futures.update(
                    {key_text(k): pool.submit(_row_or_error, make, k) for k in remaining_keys}
                )
            try:
                return futures[key_text(key)].result()
            except BrokenProcessPool as error:
                # not an Exception: the row must not be stored as one that cannot be made
                raise SystemExit("a worker process has died; the rows so far are kept") from error

        return get


def _row_or_error(make: Make, key: Key) -> Mapping[str, Any]:
    try:
        return make(key)
    except Exception as error:  # not every exception can be pickled
        return error_row(error)


def _in_one_thread(make: Make, key: Key) -> Mapping[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _row_or_error(make, key)
    finally:
        torch.set_num_threads(threads)


def _initialize_worker() -> None:
    """Prepare a process: one thread; ignore Ctrl-C, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
