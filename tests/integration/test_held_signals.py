"""Signals that come while a process is at work together with others wait, and none is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from eva_peft.surroundings.interrupts import DeferredInterrupts

NAMES = ["SIGINT", "SIGTERM", "SIGCHLD", "SIGALRM", "SIGUSR1"]
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Came(Exception):
    """What the handlers of these tests raise: no interrupt of Python's own."""


def fail(number: int, frame: Any) -> None:
    raise Came(number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Let the signals raise, in this process."""
    before = {number: signal.signal(number, fail) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def all_are_back() -> bool:
    return all(signal.getsignal(number) is fail for number in NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_may_raise_waits(number: int) -> None:
    """A time limit, and what torch's handler says of a loader whose worker was killed, too."""
    reached = []
    with DeferredInterrupts() as interrupts:
        signal.raise_signal(number)
        reached.append("together")
        with pytest.raises(Came), interrupts.let_through():
            reached.append("own")
        reached.append("together again")
    assert reached == ["together", "together again"]
    assert all_are_back()


def test_each_of_several_is_handed_on_at_the_end() -> None:
    def send() -> None:
        for number in NUMBERS * 2:
            signal.raise_signal(number)

    with pytest.raises(Came) as raised, DeferredInterrupts():
        send()
    came: list[int] = []
    error: BaseException | None = raised.value
    while error is not None:
        came.append(error.args[0])
        error = error.__context__
    assert came == NUMBERS[::-1]
    assert all_are_back()


def test_a_signal_before_all_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    original, sent = signal.signal, []

    def signal_and_send(number: int, handler: Any) -> Any:
        before = original(number, handler)
        if not sent:
            sent.append(number)
            signal.raise_signal(signal.SIGTERM)  # whose turn has not come
        return before

    monkeypatch.setattr(signal, "signal", signal_and_send)
    with pytest.raises(Came), DeferredInterrupts():
        pytest.fail("entered")
    monkeypatch.undo()
    assert all_are_back()


def test_a_signal_while_handlers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original, sent = signal.signal, []

    def signal_and_send(number: int, handler: Any) -> Any:
        before = original(number, handler)
        if not sent:
            sent.append(number)
            signal.raise_signal(number)
        return before

    with pytest.raises(Came), DeferredInterrupts():
        monkeypatch.setattr(signal, "signal", signal_and_send)
    monkeypatch.undo()
    assert sent
    assert all_are_back()


def test_a_signal_before_all_are_held_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original, reached = signal.signal, []

    def signal_and_send(number: int, handler: Any) -> Any:
        before = original(number, handler)
        if signal.getsignal(signal.SIGTERM) is fail:
            signal.raise_signal(signal.SIGTERM)
        return before

    def send(interrupts: DeferredInterrupts) -> None:
        with pytest.raises(Came), interrupts.let_through():
            monkeypatch.setattr(signal, "signal", signal_and_send)
        monkeypatch.undo()
        for number in NUMBERS:
            signal.raise_signal(number)
        reached.append("together again")

    with pytest.raises(Came), DeferredInterrupts() as interrupts:
        send(interrupts)
    assert reached
    assert all_are_back()


def test_a_handler_that_is_set_meanwhile_stays() -> None:
    def own(number: int, frame: Any) -> None:
        pass

    with DeferredInterrupts():
        signal.signal(signal.SIGTERM, own)
    assert signal.getsignal(signal.SIGTERM) is own


def test_other_threads_hold_nothing() -> None:
    def held() -> bool:
        with DeferredInterrupts() as interrupts, interrupts.let_through():
            pass
        with DeferredInterrupts():
            return not all_are_back()

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(held).result()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_ignored_or_left_to_the_system_stays_so(handler: Any) -> None:
    signal.signal(signal.SIGTERM, handler)
    with DeferredInterrupts() as interrupts:
        assert signal.getsignal(signal.SIGTERM) == handler
        with interrupts.let_through():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
