"""KeyboardInterrupt at any line of the set-up and clean-up of a pass leaves no change."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

import eva_kernels
from eva_peft.lora.wrapping import wrap_model
from eva_peft.model.routing import EagerExperts
from eva_peft.passes import model_modes
from eva_peft.passes.hooks import InputCollector
from eva_peft.surroundings.interrupts import run_to_completion, temporarily, undone_on_failure
from eva_peft.surroundings.random_state import preserved_random_state
from eva_peft.surroundings.snapshot import ModelSnapshot, restored, restored_on_failure
from integration.conftest import QUIET, lora, same_state, state_of, vectors, wrapped

FILES = {
    "/eva_peft/passes/model_modes.py",
    *(f"/eva_peft/surroundings/{name}.py" for name in ("interrupts", "random_state", "snapshot")),
}
# functions of hooks.py and routing.py that run before and after the batches
FUNCTIONS = {"__enter__", "__exit__", "remove"}
DATA = vectors(1, rows=30, features=8)
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


def describe(model: nn.Module) -> dict[str, Any]:
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
        first: number of the line at which to raise; 0 for never.
        again: how often to raise afterwards, at every third line outside the helper module (in
            which only one interrupt is survived)."""

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
        hooks = name.endswith(("/eva_peft/passes/hooks.py", "/eva_peft/model/routing.py"))
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


def find_changes(before: dict[str, Any], values: Any, model: nn.Module) -> list[str]:
    now = describe(model)
    bad = [key for key, value in before.items() if now[key] != value]
    if not same_state(values, state_of(model)):
        bad.append("values")
    switches = model_modes._SWITCHES
    if switches._claims or switches._passes or switches._undo:
        bad.append("process")
        switches.__init__()  # type: ignore[misc]  # so that the next run is checked alone
    return [*bad, "locked"] if _is_locked() else bad


def _is_locked() -> bool:
    """Return whether a lock is still held, which only another thread can detect."""
    lock, free = model_modes._SWITCHES._lock, []

    def try_lock() -> None:
        if lock.acquire(timeout=0):
            free.append(1)
            lock.release()

    other = threading.Thread(target=try_lock)
    other.start()
    other.join()
    return not free


def last_runs_of_lines(lines: list[tuple[str, int]]) -> list[int]:
    """Return the number of the last run of each line, counted from 1."""
    return sorted({line: number for number, line in enumerate(lines, 1)}.values())


def check_interrupts(
    make: Callable[[], nn.Module],
    act: Callable[[nn.Module], Any],
    afterwards: Callable[[nn.Module], Any] = lambda model: None,
    every: bool = False,
    again: int = 0,
) -> None:
    """Interrupt an action at all lines, and check that the model is unchanged.

    Args:
        make: makes the model, the same one each time.
        act: the action.
        afterwards: what must work afterwards; it is tried for every tenth line.
        every: interrupt at every run of a line, not just at its last.
        again: see :class:`Interrupter`."""
    counted = Interrupter()
    with suppress(KeyboardInterrupt), counted.running():
        act(make())
    numbers = range(1, len(counted.lines) + 1) if every else last_runs_of_lines(counted.lines)
    assert len(numbers) > 20
    failures = {}
    for number in numbers:
        model = make()
        before, values = describe(model), state_of(model)
        interrupter = Interrupter(number, again)
        try:
            with interrupter.running():
                act(model)
        except KeyboardInterrupt:
            pass
        else:
            failures[counted.lines[number - 1]] = ["no interrupt was raised"]
            continue
        bad = find_changes(before, values, model)
        if bad:
            failures[interrupter.lines[number - 1]] = bad
        elif number % 10 == 0:
            afterwards(model)
    assert not failures


def initialize(model: nn.Module) -> Any:
    config = None if hasattr(model, "peft_config") else lora(**CONFIG)
    return eva_kernels.initialize(model, iter(DATA), config, max_steps=2, **QUIET)


def wrapped_small() -> nn.Module:
    return wrapped(Small(), lora(**CONFIG))


@pytest.fixture(autouse=True)
def load_compiler() -> None:
    """Load the compiler, so that a pass changes its stance."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))


@pytest.mark.parametrize(("make", "again"), [(Small, 0), (wrapped_small, 3)])
def test_initialize_interrupted_at_any_line_changes_nothing(
    make: Callable[[], nn.Module], again: int
) -> None:
    check_interrupts(make, initialize, initialize, again=again)


def wrap_temporarily(model: nn.Module) -> None:
    with restored(model):
        wrap_model(model, lora(**CONFIG), "default", on_meta=True)


def wrap_and_fail(model: nn.Module) -> None:
    with restored_on_failure(model):
        wrap_model(model, lora(**CONFIG), "default", on_meta=True)
        raise KeyboardInterrupt


@pytest.mark.parametrize("act", [wrap_temporarily, wrap_and_fail])
@pytest.mark.parametrize("again", [0, 5])
def test_interrupted_wrapping_restores_the_structure(
    act: Callable[[nn.Module], None], again: int
) -> None:
    check_interrupts(Small, act, initialize, again=again)


def draw_with_preserved_state(model: nn.Module) -> None:
    with preserved_random_state():
        random.random()
        torch.rand(1)


def enter_calibration_mode(model: nn.Module) -> None:
    with model_modes.calibration_mode(model):
        assert not model.training


def claim_model(model: nn.Module) -> None:
    with model_modes.exclusive_use(model):
        assert model_modes._SWITCHES._claims


def collect_inputs(model: nn.Module) -> None:
    targets: Any = [
        SimpleNamespace(module=m, weight=None, inputs_from_call=None) for m in (model.a, model.b)
    ]
    collector = InputCollector(targets, lambda *_: None, [None, None])  # type: ignore[arg-type]
    try:
        with collector:
            assert len(model.a._forward_pre_hooks) == 1
    finally:
        run_to_completion(collector.remove)  # as a pass does


@pytest.mark.parametrize(
    "act", [draw_with_preserved_state, enter_calibration_mode, claim_model, collect_inputs]
)
@pytest.mark.parametrize("again", [0, 1, 5])
def test_context_managers_interrupted_at_every_line(
    act: Callable[[nn.Module], None], again: int
) -> None:
    check_interrupts(Small, act, act, every=True, again=again)


def test_exit_restores_experts_even_if_not_entered() -> None:
    name = "_experts_implementation_internal"
    module: Any = SimpleNamespace(config=SimpleNamespace(**{name: "grouped_mm"}))
    experts = EagerExperts([module, module, SimpleNamespace()])  # type: ignore[list-item]
    experts.__exit__()
    with experts:
        assert getattr(module.config, name) == "eager"
    experts.__exit__()
    assert getattr(module.config, name) == "grouped_mm"


@pytest.fixture
def sigint_interrupts() -> Iterator[None]:
    """Let SIGINT interrupt; shells ignore it in background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_during_the_trial_wrap_restore_the_model(
    sigint_interrupts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sent = Small(), []
    before, original = describe(model), ModelSnapshot.restore

    def restore(self: ModelSnapshot) -> None:
        if len(sent) < 3:
            sent.append(1)
            signal.raise_signal(signal.SIGINT)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(ModelSnapshot, "restore", restore)
        with pytest.raises(KeyboardInterrupt):
            initialize(model)
    assert describe(model) == before
    assert initialize(model).eva_result.steps


def test_only_interrupts_repeat_a_step() -> None:
    calls: list[int] = []

    def step(error: type[BaseException] | None, until: int) -> None:
        calls.append(1)
        if error is not None and len(calls) < until:
            raise error

    run_to_completion(lambda: step(None, 0))
    assert len(calls) == 1
    for error in (KeyboardInterrupt, SystemExit):
        calls.clear()
        with pytest.raises(error):
            run_to_completion(lambda kind=error: step(kind, 4))  # type: ignore[misc]
        assert len(calls) == 4
    calls.clear()
    with pytest.raises(ValueError):
        run_to_completion(lambda: step(ValueError, 4))
    assert len(calls) == 1
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # with a limit on the attempts
        run_to_completion(lambda: step(KeyboardInterrupt, 10**9), attempts=7)
    assert len(calls) == 7


def test_successful_actions_are_not_undone() -> None:
    calls: list[str] = []
    with undone_on_failure(lambda: calls.append("undone")):
        pass
    assert not calls
    with temporarily(lambda: calls.append("undone"), lambda: calls.append("changed")):
        pass
    assert calls[:2] == ["changed", "undone"]


def test_one_of_several_simultaneous_claims_succeeds() -> None:
    """Of passes that start at once in several threads, one runs."""
    model, start, outcomes = Small(), threading.Barrier(8), []

    def claim() -> None:
        start.wait()
        try:
            with model_modes.exclusive_use(model):
                outcomes.append("runs")
                done.wait(20)
        except eva_kernels.EvaRuntimeError:
            outcomes.append("refused")

    done = threading.Event()
    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 8:
        threads[0].join(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["runs"]
    assert not model_modes._SWITCHES._claims


def test_first_of_two_registered_claims_holds() -> None:
    """Also if the second arrives while the first checks for others."""
    process, first, second = model_modes._ProcessSwitches(), object(), object()
    modules = frozenset([1, 2])
    process._claims = {first: modules, second: modules}
    process._claim(first, modules)
    with pytest.raises(eva_kernels.EvaRuntimeError, match="another calibration pass"):
        process._claim(second, modules)
