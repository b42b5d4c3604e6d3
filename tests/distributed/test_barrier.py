"""Processes meet in the store of their group, of any kind, and wait no longer than it allows."""

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
def meetings(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[StartBarrier]]:
    """Return what makes the meetings of all processes, from the store that each of them sees."""
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
def test_all_come_or_are_told(
    kind: str, meetings: Callable[[Any], list[StartBarrier]], tmp_path: Path
) -> None:
    stores = stores_of(kind, tmp_path)
    with ThreadPoolExecutor(SIZE) as pool:
        for _ in range(2):
            words = [pool.submit(each.arrive, never) for each in meetings(stores)]
            assert [word.result(timeout=20) for word in words] == [None] * SIZE
        one, other, third = meetings(stores)
        other.report_failure("failed: OSError: the disk is gone")
        for each in (one, third):
            assert each.arrive(never) == (1, "failed: OSError: the disk is gone")
        assert [each.has_arrived for each in (one, other, third)] == [True, False, True]
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)  # nobody says that he waits


def test_who_waits_in_vain_says_for_whom(
    meetings: Callable[[Any], list[StartBarrier]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the group allows: the others may have ended without a word."""
    slept: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda pause: (slept.append(pause), sleep(pause)))
    stores = stores_of("hash", tmp_path)
    for store in stores:
        store.set_timeout(datetime.timedelta(seconds=0.2))
    one, other, third = meetings(stores)
    with ThreadPoolExecutor(2) as pool:
        told, again = (
            word.result() for word in [pool.submit(m.arrive, never) for m in (one, third)]
        )
    assert told is not None
    assert told == again
    assert told[0] in (0, 2)
    assert told[1].startswith("has waited for 0.2 seconds, the time limit of its process group")
    assert "(missing ranks: 1): every process of the group must make the same call" in told[1]
    assert other.arrive(never) == told
    assert max(slept) <= 0.1  # or it would hear late that all are there, or Ctrl-C


def test_a_store_that_is_gone_is_told_of(
    meetings: Callable[[Any], list[StartBarrier]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: Any) -> None:
        raise distributed.DistNetworkError("Connection reset by peer")

    one, *_ = meetings(stores_of("hash", tmp_path))
    monkeypatch.setattr(distributed.PrefixStore, "check", gone)
    with pytest.raises(EvaRuntimeError, match="process 0 can no longer reach the store of its"):
        one.arrive(never)


def test_stores_that_can_do_too_little_are_left_alone() -> None:
    class Own(distributed.Store):
        """As that of a user, or of MPI."""

        def check(self, keys: list[str]) -> bool:
            return False

    class Other(distributed.Store):
        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            return desired.encode()

    for store in (Own(), Other(), distributed.Store(), None):
        group = SimpleNamespace(get_group_store=lambda own=store: own)
        assert barrier._store_of(group) is None
    assert barrier._store_of(SimpleNamespace()) is None  # an older torch
