"""Signals that arrive while processes work together are deferred, and none is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from eva_peft.surroundings.interrupts import DeferredInterrupts

NAMES = ["SIGINT", "SIGTERM", "SIGCHLD", "SIGALRM", "SIGUSR1"]
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class SignalReceived(Exception):
    """The exception that the handlers of these tests raise; not one of Python's interrupts."""


def fail(number: int, frame: Any) -> None:
    raise SignalReceived(number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Install handlers that raise, for the length of a test."""
    before = {number: signal.signal(number, fail) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers_restored() -> bool:
    return all(signal.getsignal(number) is fail for number in NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_is_deferred_until_the_end_of_the_section(number: int) -> None:
    """Also SIGALRM of a time limit, and SIGCHLD, for which torch raises if a worker was killed."""
    reached = []
    with DeferredInterrupts() as interrupts:
        signal.raise_signal(number)
        reached.append("together")
        with pytest.raises(SignalReceived), interrupts.let_through():
            reached.append("own")
        reached.append("together again")
    assert reached == ["together", "together again"]
    assert handlers_restored()


def test_several_signals_are_all_delivered_at_the_end() -> None:
    def send() -> None:
        for number in NUMBERS * 2:
            signal.raise_signal(number)

    with pytest.raises(SignalReceived) as raised, DeferredInterrupts():
        send()
    delivered: list[int] = []
    error: BaseException | None = raised.value
    while error is not None:
        delivered.append(error.args[0])
        error = error.__context__
    assert delivered == NUMBERS[::-1]
    assert handlers_restored()


def test_signal_while_handlers_are_installed_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    original, sent = signal.signal, []

    def signal_and_send(number: int, handler: Any) -> Any:
        before = original(number, handler)
        if not sent:
            sent.append(number)
            signal.raise_signal(signal.SIGTERM)  # whose handler is not replaced yet
        return before

    monkeypatch.setattr(signal, "signal", signal_and_send)
    with pytest.raises(SignalReceived), DeferredInterrupts():
        pytest.fail("entered")
    monkeypatch.undo()
    assert handlers_restored()


def test_signal_while_handlers_are_restored_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    original, sent = signal.signal, []

    def signal_and_send(number: int, handler: Any) -> Any:
        before = original(number, handler)
        if not sent:
            sent.append(number)
            signal.raise_signal(number)
        return before

    with pytest.raises(SignalReceived), DeferredInterrupts():
        monkeypatch.setattr(signal, "signal", signal_and_send)
    monkeypatch.undo()
    assert sent
    assert handlers_restored()


def test_signal_while_deferral_resumes_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    original, reached = signal.signal, []

    def signal_and_send(number: int, handler: Any) -> Any:
        before = original(number, handler)
        if signal.getsignal(signal.SIGTERM) is fail:
            signal.raise_signal(signal.SIGTERM)
        return before

    def send(interrupts: DeferredInterrupts) -> None:
        with pytest.raises(SignalReceived), interrupts.let_through():
            monkeypatch.setattr(signal, "signal", signal_and_send)
        monkeypatch.undo()
        for number in NUMBERS:
            signal.raise_signal(number)
        reached.append("together again")

    with pytest.raises(SignalReceived), DeferredInterrupts() as interrupts:
        send(interrupts)
    assert reached
    assert handlers_restored()


def test_handler_set_within_the_section_is_kept() -> None:
    def new_handler(number: int, frame: Any) -> None:
        pass

    with DeferredInterrupts():
        signal.signal(signal.SIGTERM, new_handler)
    assert signal.getsignal(signal.SIGTERM) is new_handler


def test_other_threads_do_not_replace_handlers() -> None:
    def replaces_handlers() -> bool:
        with DeferredInterrupts() as interrupts, interrupts.let_through():
            pass
        with DeferredInterrupts():
            return not handlers_restored()

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(replaces_handlers).result()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_ignored_and_default_handlers_are_kept(handler: Any) -> None:
    signal.signal(signal.SIGTERM, handler)
    with DeferredInterrupts() as interrupts:
        assert signal.getsignal(signal.SIGTERM) == handler
        with interrupts.let_through():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
