"""Ctrl-C at any line of entering and leaving a pass, the clean-up included, changes nothing."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

import eva_kernels
from eva_peft import world
from eva_peft.hooks import InputCollector
from eva_peft.interrupts import completed, temporarily, undone_on_failure
from eva_peft.routing import EagerExperts
from eva_peft.snapshot import ModelSnapshot, restored, restored_on_failure
from eva_peft.wrapping import wrap_model
from integration.conftest import QUIET, lora, run, same_state, state_of, vectors, wrapped

FILES = {f"/eva_peft/{name}.py" for name in ("snapshot", "world", "interrupts")}
# what of hooks.py and routing.py runs before and behind the batches
FUNCTIONS = {"__enter__", "__exit__", "remove"}
DATA = vectors(3, rows=30, features=8)
CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["a", "b"]}


class Small(nn.Module):
    """Two layers, one of them in eval mode and one frozen, a user's hook and a cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.config = PretrainedConfig()
        self.config.use_cache = True
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.a.eval()
        self.b.weight.requires_grad_(False)
        self.b.register_forward_pre_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def look(model: nn.Module) -> dict[str, Any]:
    modules = dict(model.named_modules())
    return {
        "kinds": {n: type(m) for n, m in modules.items()},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {n: list(m._forward_pre_hooks) for n, m in modules.items()},
        "hooks with names": {n: list(m._forward_pre_hooks_with_kwargs) for n, m in modules.items()},
        "flags": {n: (id(p), p.requires_grad) for n, p in model.named_parameters()},
        "cache": model.config.use_cache,
        "adapters": {n: getattr(m, "_disable_adapters", None) for n, m in modules.items()},
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "compiler": torch._dynamo.eval_frame._stance.stance,
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "attributes": sorted(vars(model)),
    }


class Interrupter:
    """Counts the lines that run in some files, and raises KeyboardInterrupt at some of them.

    Args:
        first: number of the line at which it does; 0 for never.
        again: how often it does so afterwards, at every third line that is not of the helper (where
            only one interrupt is survived).
    """

    def __init__(self, first: int = 0, again: int = 0) -> None:
        self.first, self.again = first, again
        self.lines: list[tuple[str, int]] = []
        self._last = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        if any(map(name.endswith, FILES)):
            return self._line
        hooks = name.endswith(("/eva_peft/hooks.py", "/eva_peft/routing.py"))
        return self._line if hooks and function in FUNCTIONS else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            name = frame.f_code.co_filename.rpartition("/")[2]
            self.lines.append((name, frame.f_lineno))
            count = len(self.lines)
            more = self.again and self._last and count >= self._last + 3 and "interr" not in name
            if count == self.first or more:
                self.again -= bool(more)
                self._last = count
                raise KeyboardInterrupt
        return self._line


def changed(before: dict[str, Any], values: Any, model: nn.Module) -> list[str]:
    now = look(model)
    bad = [key for key, value in before.items() if now[key] != value]
    if not same_state(values, state_of(model)):
        bad.append("values")
    if world._PROCESS._claims or world._PROCESS._passes or world._PROCESS._undo:
        bad.append("process")
        world._PROCESS.__init__()  # type: ignore[misc]  # the next one is to be judged alone
    return [*bad, "locked"] if _is_locked() else bad


def _is_locked() -> bool:
    """Tell whether a lock was left locked, which only other threads notice."""
    lock, free = world._PROCESS._lock, []

    def look() -> None:
        if lock.acquire(timeout=0):
            free.append(1)
            lock.release()

    other = threading.Thread(target=look)
    other.start()
    other.join()
    return not free


def places(lines: list[tuple[str, int]]) -> list[int]:
    """Return the first and the last time that each line runs, counted from 1."""
    times: dict[tuple[str, int], list[int]] = {}
    for number, line in enumerate(lines, 1):
        times.setdefault(line, []).append(number)
    return sorted({time for each in times.values() for time in (each[0], each[-1])})


def survives(
    make: Callable[[], nn.Module],
    act: Callable[[nn.Module], Any],
    afterwards: Callable[[nn.Module], Any] = lambda model: None,
    every: bool = False,
    again: int = 0,
) -> None:
    """Interrupt an action in all places, and look whether the model is as before.

    Args:
        make: makes the model, the same one each time.
        act: the action.
        afterwards: what must work afterwards; it is tried after each fifth.
        every: at every line that runs, however often.
        again: see :class:`Interrupter`.
    """
    counted = Interrupter()
    with counted.running():
        act(make())
    numbers = range(1, len(counted.lines) + 1) if every else places(counted.lines)
    assert len(numbers) > 20
    failures = {}
    for number in numbers:
        model = make()
        before, values = look(model), state_of(model)
        interrupter = Interrupter(number, again)
        try:
            with interrupter.running():
                act(model)
        except KeyboardInterrupt:
            pass
        else:
            failures[counted.lines[number - 1]] = ["no interrupt was told"]
            continue
        bad = changed(before, values, model)
        if bad:
            failures[interrupter.lines[number - 1]] = bad
        elif number % 5 == 0:
            afterwards(model)
    assert not failures


def initialize(model: nn.Module) -> Any:
    config = None if hasattr(model, "peft_config") else lora(**CONFIG)
    return eva_kernels.initialize(model, iter(DATA), config, max_steps=2, **QUIET)


def adapted() -> nn.Module:
    random.seed(0)
    return wrapped(Small().train(False).train(), lora(**CONFIG))


@pytest.fixture(autouse=True)
def compiler_is_loaded() -> None:
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))


@pytest.mark.parametrize("make", [Small, adapted])
@pytest.mark.parametrize("again", [0, 3])
def test_initialize(make: Callable[[], nn.Module], again: int) -> None:
    survives(make, initialize, initialize, again=again)


@contextmanager
def wrapped_for_a_moment(model: nn.Module) -> Iterator[None]:
    with restored(model):
        wrap_model(model, lora(**CONFIG), "default", on_meta=True)
        yield


@contextmanager
def collected(model: nn.Module) -> Iterator[None]:
    targets: Any = [SimpleNamespace(module=m, weight=None) for m in (model.a, model.b)]
    collector = InputCollector(targets, lambda *_: None, [None, None])  # type: ignore[arg-type]
    try:
        with collector:
            assert look(model)["hooks"] != look(Small())["hooks"]
            yield
    finally:
        completed(collector.remove)  # as the pass does


CONTEXTS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "structure": wrapped_for_a_moment,
    "modes": world.quiet_model,
    "claim": world.claimed,
    "random state": lambda model: world.random_state_kept(),
    "hooks": collected,
}


def within(name: str) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        with CONTEXTS[name](model):
            random.random()

    return act


@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "structure"])
@pytest.mark.parametrize("again", [0, 1, 5])
def test_every_line_of_a_context(name: str, again: int) -> None:
    def small() -> nn.Module:
        random.seed(0)
        return Small()

    survives(small, within(name), lambda m: within(name)(m), every=True, again=again)
