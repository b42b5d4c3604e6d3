"""Passes to stop and to resume; run as a script, it kills each of them at several points."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_kernels import EvaResult
from eva_peft.resume.checkpoint_file import read_checkpoint
from integration.conftest import (
    hooks_of,
    lora,
    make_llama,
    make_mlp,
    run,
    text_batches,
    vectors,
)

FORWARDS = 13
EPOCH = 5  # batches; the pass takes more than two epochs


class ChangingSharing(nn.Module):
    """Layers whose sharing changes: ``c`` leaves ``a`` in batch 3, ``b`` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.a, self.b, self.c = (nn.Linear(20, 6) for _ in range(3))

    def forward(self, x: Tensor, apart: bool) -> Tensor:
        y = self.a(x) + self.b(x) + self.b(x * 2)
        return y + self.c(x + 1 if apart else x)


class Noisy(nn.Module):
    """A model that draws random numbers in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = make_mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + 0.1 * torch.randn_like(x))


def changing_sharing_batches() -> list[Any]:
    return [(x, i >= 2) for i, x in enumerate(vectors(EPOCH))]


@dataclass
class Case:
    """A pass to stop and to resume."""

    model: Callable[[], nn.Module] = make_llama
    batches: Callable[[], list[Any]] = lambda: text_batches(EPOCH)
    tau: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def result(self, loader: Any = None, **options: Any) -> EvaResult:
        loader = self.batches() if loader is None else loader
        options = {"max_steps": FORWARDS, **self.options, **options}
        return run(self.model(), loader, lora(tau=self.tau), **options)


CASES = {
    "sketch": Case(options={"method": "sketch"}),
    "gram": Case(options={"method": "gram"}),
    # a step of 112 tokens takes two or three batches
    "steps of several batches": Case(options={"method": "sketch", "oversample": 14.0}),
    "frozen layers": Case(tau=0.8, options={"method": "sketch", "freeze_converged": True}),
    "subspace": Case(tau=0.97, options={"method": "sketch", "criterion": "subspace"}),
    "float64": Case(lambda: make_llama(torch.float64), options={"oversample": 3.0}),
    "changing sharing": Case(
        ChangingSharing, changing_sharing_batches, options={"oversample": 2.5}
    ),
    "random forward": Case(Noisy, lambda: vectors(EPOCH)),
}
# Where the process is killed: in the last layer, at a batch, in the callback, in a write.
KILL_POINTS = ("layer", "batch", "callback", "write")
KILLED_EVERYWHERE = ("sketch", "steps of several batches")  # killed at every point


def check_equal(found: EvaResult, expected: EvaResult) -> None:
    """Compare two results bit by bit, except for time and memory."""
    for kind in ("components", "singular_values", "explained_variance_ratio"):
        left, right = getattr(found, kind), getattr(expected, kind)
        assert list(left) == list(right)
        for name in left:
            assert left[name].dtype == right[name].dtype
            assert torch.equal(left[name], right[name]), (kind, name)
    names = ["ranks", "converged", "numerical_rank", "lost_variance", "method", "shared_inputs"]
    for name in [*names, "tokens", "skipped_tokens", "steps", "forwards", "uncalled", "metadata"]:
        assert getattr(found, name) == getattr(expected, name), name
    for key in expected.history:
        if key != "seconds":
            assert found.history[key] == expected.history[key], key
    seconds = found.history["seconds"]
    assert seconds == sorted(seconds)


def forwards_in_checkpoint(path: Path) -> int:
    return read_checkpoint(path)[0]["counts"]["forwards"]


class Stop(Exception):
    pass


def run_until_stopped(
    case: Case, path: Path, after: int, error: type[BaseException] = Stop
) -> None:
    """Run a case whose loader fails after some batches."""

    def loader() -> Iterator[Any]:
        data = case.batches()
        for i in range(after):
            yield data[i % len(data)]
        raise error

    model = case.model()
    with pytest.raises(error):
        run(model, loader(), lora(tau=case.tau), checkpoint=path, **case.options)
    assert hooks_of(model) == 0


def fail_if_called(model: nn.Module, batch: Any) -> None:
    raise AssertionError("a forward pass was run")


def fail_if_iterated() -> Iterator[Any]:
    raise AssertionError("the loader was iterated")
    yield


def kill_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # until the signal arrives


def kill_at_call(count: int) -> Callable[..., None]:
    """Return a function whose call number ``count`` kills the process."""
    calls = iter(range(count - 1))

    def count_down(*args: Any, **kwargs: Any) -> None:
        if next(calls, None) is None:
            kill_process()

    return count_down


def run_until_killed(case: Case, where: str, count: int, path: Path) -> None:
    """Run a pass in this process until it kills itself."""
    kill, options = kill_at_call(count), {"checkpoint": path, "checkpoint_every": 3}
    model, loader = case.model(), case.batches()
    if where == "layer":
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-2]
        last.register_forward_pre_hook(kill)
    elif where == "batch":
        loader = Endless(loader, kill)
    elif where == "callback":
        options["callback"] = kill
    else:
        replace = os.replace
        os.replace = lambda a, b: (kill(), replace(a, b))[1]
    case.model = lambda: model
    case.result(loader, max_steps=1000, **options)


class Endless:
    """Repeat batches, calling a function before each."""

    def __init__(self, data: list[Any], before: Callable[..., None]) -> None:
        self.data, self.before = data, before

    def __iter__(self) -> Iterator[Any]:
        while True:
            for batch in self.data:
                self.before()
                yield batch


def kill_points(name: str) -> dict[str, int]:
    """Choose where to kill, at random but the same in every run of the tests."""
    chosen = random.Random(name)
    latest = {"layer": 9, "batch": 9, "callback": 5, "write": 3}
    places = KILL_POINTS if name in KILLED_EVERYWHERE else ("layer", chosen.choice(KILL_POINTS[1:]))
    return {where: chosen.randint(2, latest[where]) for where in places}


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread in fixtures that outlive a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def checkpoint_of(folder: Path, name: str, where: str) -> Path:
    return folder / f"{name} {where}".replace(" ", "-") / "state.safetensors"


def main(folder: Path) -> None:
    """Fork a process for every case and kill point; print the exit code of each."""
    torch.set_num_threads(1)
    for name in CASES:
        for where, count in kill_points(name).items():
            child = os.fork()
            if child == 0:
                run_until_killed(CASES[name], where, count, checkpoint_of(folder, name, where))
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            sys.stdout.write(f"{name}|{where}|{code}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
