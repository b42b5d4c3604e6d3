"""Scenarios in which one process is interrupted, or fails where others cannot notice it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import eva_kernels
from distributed.scenarios import calibrate, group_with_timeout, own_batches, scenario
from distributed.shards import sharded
from eva_peft.passes.hooks import InputCollector
from eva_peft.passes.model_modes import exclusive_use
from eva_peft.processes import barrier
from eva_peft.resume.checkpoint import CheckpointKeeper
from integration.conftest import QUIET, lora, make_llama, wrapped


def error_of(run: Callable[[], Any]) -> tuple[str, str] | None:
    """Return name and message of the exception, possibly an interrupt, that a call raises."""
    try:
        run()
    except BaseException as error:
        return type(error).__name__, str(error)
    return None


def failing_at(step: int, fails: bool, error: BaseException) -> Callable[[nn.Module, Any], None]:
    """Return a forward function that raises at a step if ``fails`` is true."""
    steps = iter(range(1, 1000))

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        if next(steps) == step and fails:
            raise error
        model(**batch)

    return forward


@scenario
def interrupted(rank: int) -> Any:
    """Return what each process raises if one is interrupted in its own code."""
    stop = KeyboardInterrupt("Ctrl-C")

    def loader() -> Iterator[Any]:
        yield from own_batches(rank, 2)
        if rank == 1:
            raise stop

    def callback(numbers: dict[str, Any]) -> None:
        raise stop

    def run(data: Any = None, **options: Any) -> Any:
        data = own_batches(rank) if data is None else data
        return error_of(
            lambda: calibrate(make_llama(), data, group=group_with_timeout(), **options)
        )

    closing = mock.patch.object(CheckpointKeeper, "__exit__", mock.Mock(side_effect=stop))
    with closing if rank == 1 else nullcontext():
        at_the_end = run(max_steps=2)
    return {
        "end of 1": at_the_end,
        "forward of 1": run(forward_fn=failing_at(2, rank == 1, stop)),
        "forward of 0": run(forward_fn=failing_at(2, rank == 0, stop)),
        "loader of 1": run(loader()),
        "callback of 0": run(callback=callback),
        "exit of 1": run(forward_fn=failing_at(2, rank == 1, SystemExit(3))),
    }


def interrupt_after(seconds: float) -> threading.Timer:
    """Send SIGINT to this process after some seconds."""
    timer = threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    return timer


@scenario
def ctrl_c_while_waiting(rank: int) -> Any:
    """Interrupt one process while it waits for the other, which is in its forward pass."""
    steps = iter(range(1000))

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        if next(steps) == 1:
            if rank == 1:
                interrupt_after(0.3)
            else:
                time.sleep(0.8)
        model(**batch)

    before = signal.getsignal(signal.SIGINT)
    options = {"group": group_with_timeout(), "max_steps": 40, "forward_fn": forward}
    found = error_of(lambda: calibrate(make_llama(), own_batches(rank), **options))
    return [found, signal.getsignal(signal.SIGINT) is before]


@scenario
def ctrl_c_before_the_other_arrives(rank: int) -> Any:
    group = group_with_timeout()
    if rank == 1:
        time.sleep(1)
    timer = interrupt_after(0.3) if rank == 0 else None
    begin = time.perf_counter()
    found = error_of(lambda: calibrate(make_llama(), own_batches(rank), group=group, max_steps=1))
    if timer is not None:
        timer.join()
    return [found, time.perf_counter() - begin]


@scenario
def errors_before_the_pass(rank: int) -> Any:
    """Return what each process raises if one fails before the pass."""
    wrong = rank == 1
    data, options = own_batches(rank), {**QUIET, "max_steps": 1}

    def adapted(trained: bool = False, init: Any = "eva") -> Any:
        model = wrapped(make_llama(), lora(init_lora_weights=init))
        for name, parameter in model.named_parameters():
            if trained and "lora_B" in name:
                nn.init.ones_(parameter)
        return model

    def initialise(model: nn.Module, config: Any = None, **other: Any) -> Any:
        group = group_with_timeout()
        both = {**options, "group": group, **other}
        return error_of(lambda: eva_kernels.initialize(model, data, config, **both))

    def by_peft_api(model: nn.Module) -> Any:
        both = {k: v for k, v in options.items() if k != "progress"} | {
            "group": group_with_timeout()
        }
        return error_of(lambda: eva_kernels.initialize_lora_eva_weights(model, data, **both))

    def on_a_busy_model() -> Any:
        model = make_llama()
        with exclusive_use(model) if wrong else nullcontext():
            return initialise(model, lora())

    def without_hooks() -> Any:
        failing = mock.Mock(side_effect=OSError("no hooks"))
        with mock.patch.object(InputCollector, "__enter__", failing) if wrong else nullcontext():
            return initialise(make_llama(), lora())

    found = {
        "option": initialise(make_llama(), lora(), **({"max_step": 1} if wrong else {})),
        "config": initialise(make_llama(), "no config" if wrong else lora()),
        "trained": initialise(adapted(trained=wrong)),
        "not for EVA": by_peft_api(adapted(init=True if wrong else "eva")),
        "busy": on_a_busy_model(),
        "hooks": without_hooks(),
    }
    with mock.patch.object(barrier, "_store_of", return_value=None):
        found["no store"] = initialise(make_llama(), lora(r=-1) if wrong else lora())
        found["no store, well"] = initialise(make_llama(), lora())
    return found


@scenario
def both_fail_then_retry(rank: int) -> Any:
    """Return what each process raises if both fail, and the steps of a second pass."""
    group = group_with_timeout()
    first = error_of(
        lambda: calibrate(make_llama(), own_batches(rank), max_steps=-rank, group=group)
    )
    return first, calibrate(make_llama(), own_batches(rank), max_steps=1, group=group).steps


@scenario
def follower_nan_step_3(rank: int) -> Any:
    """Put NaN into the third step of the second process."""
    model, calls = make_llama(), iter(range(1, 1000))

    def spoil(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * float("nan") if next(calls) == 3 and rank == 1 else out

    model.model.embed_tokens.register_forward_hook(spoil)
    return calibrate(model, own_batches(rank))


@scenario
def prepare_fails_in_shards(rank: int) -> Any:
    def prepare(batch: Any, config: Any) -> Any:
        return batch["nothing"] if rank == 1 else batch

    data = own_batches(rank)
    return calibrate(sharded(make_llama()), data, prepare_model_inputs_fn=prepare)


def sharded_over(group: Any) -> nn.Module:
    model = make_llama()
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=DeviceMesh.from_group(group, "cpu"))
    return model


@scenario
def ctrl_c_in_shards(rank: int) -> Any:
    """Interrupt one process while it waits to begin a forward pass, and within one."""

    def slow(data: Any) -> Iterator[Any]:
        yield data[0]
        if rank == 1:
            interrupt_after(0.3)
        else:
            time.sleep(0.8)
        yield from data[1:]

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        model(**batch)

    def run(data: Any, **options: Any) -> Any:
        group = group_with_timeout()
        both = {"group": group, "max_steps": 4, **options}
        return error_of(lambda: calibrate(sharded_over(group), data, **both))

    data = own_batches(rank)
    return {"before": run(slow(data)), "within": run(data, forward_fn=forward)}


@scenario
def forward_fails_in_shards(rank: int) -> Any:
    """Return error, duration and log if one fails in a forward pass in which the other waits."""
    group, messages = group_with_timeout(2), []
    model = sharded_over(group)
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("eva_kernels")
    logger.addHandler(handler)
    options = {"group": group, "forward_fn": failing_at(2, rank == 1, KeyError("field"))}
    begin = time.perf_counter()
    try:
        found = error_of(lambda: calibrate(model, own_batches(rank), **options))
    finally:
        logger.removeHandler(handler)
    return found, time.perf_counter() - begin, messages


class CalledAgain(nn.Module):
    """Two layers that read one tensor; the second is called again if the first value is large."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x)
        return y + self.b(y) if x[0, 0] > 100 else y


def calibrate_with_repeated_call(rank: int, shards: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(CalledAgain(), nn.Linear(24, 24), CalledAgain())
    if shards:
        for part in (*model, model):
            fully_shard(part)
    torch.manual_seed(rank)
    data = [torch.randn(80, 24) * torch.linspace(3, 0.1, 24) for _ in range(3)]
    if rank == 1:
        data[0][0, 0] = 200
    config = lora(target_modules=["a", "b"])
    return eva_kernels.calibrate(model, data, config, max_steps=3, **QUIET)


@scenario
def batch_run_again(rank: int) -> Any:
    return calibrate_with_repeated_call(rank, shards=False)


@scenario
def batch_run_again_in_shards(rank: int) -> Any:
    return calibrate_with_repeated_call(rank, shards=True)
