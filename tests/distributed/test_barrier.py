"""``StartBarrier`` with several kinds of stores, timeouts, and lost connections."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from eva_kernels.errors import EvaRuntimeError
from eva_peft.processes import barrier
from eva_peft.processes.barrier import StartBarrier

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")
SIZE = 3


def never() -> bool:
    return False


@pytest.fixture
def make_barriers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[StartBarrier]]:
    """Return a function that creates the barriers of all processes from their stores."""
    monkeypatch.setattr(distributed, "get_rank", lambda group: group.rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda group: SIZE)

    def make(stores: Any) -> list[StartBarrier]:
        groups = [
            SimpleNamespace(rank=rank, get_group_store=lambda own=own: own)
            for rank, own in enumerate(stores)
        ]
        return [StartBarrier(group) for group in groups]

    return make


def stores_of(kind: str, folder: Path) -> list[Any]:
    if kind == "file":
        return [distributed.FileStore(str(folder / "store"), SIZE) for _ in range(SIZE)]
    store = distributed.HashStore()
    if kind == "no limit":
        store.set_timeout(datetime.timedelta())
    return [distributed.PrefixStore("group", store) for _ in range(SIZE)]


@pytest.mark.parametrize("kind", ["file", "hash", "no limit"])
def test_all_arrive_or_get_the_failure_of_one(
    kind: str, make_barriers: Callable[[Any], list[StartBarrier]], tmp_path: Path
) -> None:
    stores = stores_of(kind, tmp_path)
    with ThreadPoolExecutor(SIZE) as pool:
        for _ in range(2):
            futures = [pool.submit(each.arrive, never) for each in make_barriers(stores)]
            assert [future.result(timeout=20) for future in futures] == [None] * SIZE
        one, other, third = make_barriers(stores)
        other.report_failure("failed: OSError: the disk is gone")
        for each in (one, third):
            assert each.arrive(never) == (1, "failed: OSError: the disk is gone")
        assert [each.has_arrived for each in (one, other, third)] == [True, False, True]
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)  # no waiting message is pending


def test_timeout_names_the_missing_processes(
    make_barriers: Callable[[Any], list[StartBarrier]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time limit is that of the group, as other processes may have ended silently."""
    slept: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda pause: (slept.append(pause), sleep(pause)))
    stores = stores_of("hash", tmp_path)
    for store in stores:
        store.set_timeout(datetime.timedelta(seconds=0.2))
    one, other, third = make_barriers(stores)
    with ThreadPoolExecutor(2) as pool:
        failure, again = (
            future.result() for future in [pool.submit(m.arrive, never) for m in (one, third)]
        )
    assert failure is not None
    assert failure == again
    assert failure[0] in (0, 2)
    assert failure[1].startswith("has waited for 0.2 seconds, the time limit of its process group")
    assert "(missing ranks: 1): every process of the group must make the same call" in failure[1]
    assert other.arrive(never) == failure
    assert max(slept) <= 0.1  # longer pauses would delay the start, or Ctrl-C


def test_lost_connection_to_the_store_raises(
    make_barriers: Callable[[Any], list[StartBarrier]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any) -> None:
        raise distributed.DistNetworkError("Connection reset by peer")

    one, *_ = make_barriers(stores_of("hash", tmp_path))
    monkeypatch.setattr(distributed.PrefixStore, "check", fail)
    with pytest.raises(EvaRuntimeError, match="process 0 can no longer reach the store of its"):
        one.arrive(never)


def test_stores_without_needed_operations_are_not_used() -> None:
    class StoreWithCheckOnly(distributed.Store):
        """A store of a user or of MPI."""

        def check(self, keys: list[str]) -> bool:
            return False

    class StoreWithCompareSetOnly(distributed.Store):
        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            return desired.encode()

    for store in (StoreWithCheckOnly(), StoreWithCompareSetOnly(), distributed.Store(), None):
        group = SimpleNamespace(get_group_store=lambda own=store: own)
        assert barrier._store_of(group) is None
    assert barrier._store_of(SimpleNamespace()) is None  # an older torch without get_group_store
