"""Scenarios in which each process has a copy of the model and its own batches."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn

import eva_kernels
from distributed.scenarios import calibrate, failing_batches, own_batches, scenario
from distributed.shards import nan_input_in_shards
from eva_kernels.streaming import InputStream, _host
from eva_peft.passes.hooks import InputCollector
from eva_peft.processes import barrier, cells
from integration.conftest import QUIET, lora, make_llama


def collectors_kept_by(run: Callable[[], Any]) -> list[bool]:
    """Return for every hook collector of a failing pass whether it is still alive afterwards."""
    made: list[weakref.ref[InputCollector]] = []
    original = InputCollector.__init__

    def noting(self: InputCollector, *arguments: Any) -> None:
        made.append(weakref.ref(self))
        original(self, *arguments)

    gc.collect()
    gc.disable()
    try:
        with mock.patch.object(InputCollector, "__init__", noting), suppress(Exception):
            run()
        return [collector() is not None for collector in made]
    finally:
        gc.enable()


class CallCounter(AbstractContextManager["CallCounter"]):
    """Counts the calls of a method."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name, self.calls = kind, name, 0

    def __enter__(self) -> CallCounter:
        self.original = original = getattr(self.kind, self.name)

        def counting(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return original(*arguments, **options)

        setattr(self.kind, self.name, counting)
        return self

    def __exit__(self, *exception: object) -> None:
        setattr(self.kind, self.name, self.original)


@scenario
def sketch(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=4, method="sketch")


@scenario
def gram(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=4, method="gram")


@scenario
def merge_and_add_calls(rank: int) -> Any:
    """Return the number of merges and of adds of a pass with freezing."""
    merged, added = CallCounter(InputStream, "merge"), CallCounter(InputStream, "add")
    with merged, added:
        options = {"max_steps": 8, "freeze_converged": True, "tokens_per_step": 40}
        calibrate(make_llama(), own_batches(rank), **options)
    return {"merged": merged.calls, "added": added.calls}


@scenario
def memory_budgets_differ(rank: int) -> Any:
    # A plan may depend on the memory of a device: enough for exact streams in process 0 alone.
    budget = 1 << 30 if rank == 0 else 200_000
    return calibrate(make_llama(), own_batches(rank), max_steps=3, memory_budget=budget)


@scenario
def explicit_group(rank: int) -> Any:
    group = distributed.new_group([0, 1])
    return calibrate(make_llama(), own_batches(rank), max_steps=4, method="sketch", group=group)


@scenario
def group_of_one(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=4, group=distributed.new_group([0]))


@scenario
def alone(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=4, group=None)


@scenario
def leader_has_fewer_batches(rank: int) -> Any:
    return calibrate(make_llama(), iter(own_batches(rank, 2 if rank == 0 else 5)))


@scenario
def leader_has_more_batches(rank: int) -> Any:
    return calibrate(make_llama(), iter(own_batches(rank, 5 if rank == 0 else 2)))


@scenario
def converged_and_frozen(rank: int) -> Any:
    config = lora(tau=0.5)
    options = {"max_steps": 30, "freeze_converged": True, **QUIET}
    return eva_kernels.calibrate(make_llama(), own_batches(rank), config, **options)


BAD = ((1, 0, 3), (40, 5, 2))  # non-finite tokens by process and step


@scenario
def skipped(rank: int) -> Any:
    """Return the skipped tokens with the BAD counts of this process, and of the other."""

    def skip(numbers: tuple[int, ...], method: str) -> int:
        data = [*torch.randn(3, 40, 24)]
        for x, bad in zip(data, numbers, strict=True):
            x[:bad, 7] = torch.nan
        options = {**QUIET, "prepare_model_inputs_fn": None, "on_nonfinite": "skip"}
        options["method"] = method
        model, config = nn.Sequential(nn.Linear(24, 24)), lora(target_modules=["0"])
        return eva_kernels.calibrate(model, data, config, max_steps=3, **options).skipped_tokens

    torch.manual_seed(0)
    return [skip(BAD[i], method) for method in ("sketch", "gram") for i in (rank, 1 - rank)]


def calibrate_with_nan(wrong: bool, step: int) -> Any:
    """Calibrate on the accelerator path, where the fold detects non-finite tokens."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(24, 24)), [*torch.randn(3, 40, 24)]
    if wrong:
        data[step][:5, 7] = torch.nan
    options = {**QUIET, "prepare_model_inputs_fn": None, "backend": "torch", "method": "gram"}
    with mock.patch.object(_host, "reads_are_free", return_value=False):
        return eva_kernels.calibrate(model, data, lora(target_modules=["0"]), **options)


@scenario
def leader_nan_step_1(rank: int) -> Any:
    return calibrate_with_nan(rank == 0, step=0)


@scenario
def follower_nan_step_1(rank: int) -> Any:
    return calibrate_with_nan(rank == 1, step=0)


@scenario
def follower_nan_step_2(rank: int) -> Any:
    """The NaN reaches the merged sums of both."""
    return calibrate_with_nan(rank == 1, step=1)


class Experts(nn.Module):
    """Routes each token to the layer given by its first feature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.expert = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.expert):
            rows = (x[:, 0] == i).nonzero().flatten()
            if len(rows):
                out[rows] = expert(x[rows])
        return out


def routed_tokens(rank: int, step: int) -> Tensor:
    """Return tokens for experts 0 and 1 in process 0, 1 and 2 in process 1; 3 in step 2 only."""
    torch.manual_seed(100 * rank + step)
    x = torch.randn(120, 24) * torch.linspace(3, 0.1, 24)
    x[:, 0] = torch.arange(120) % 2 + rank
    if step == 2:
        x[:40, 0] = 3
    return x


@scenario
def experts(rank: int) -> Any:
    """Calibrate in float64 experts that one of the processes never calls."""
    data = [routed_tokens(rank, step).double() for step in range(4)]
    config = lora(target_modules=[f"expert.{i}" for i in range(4)])
    options = {**QUIET, "prepare_model_inputs_fn": None, "max_steps": 4}
    return eva_kernels.calibrate(Experts().double(), data, config, **options)


class Sharing(nn.Module):
    """Two layers that read the same tensor, or copies of it."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.shared = shared
        self.a, self.b = nn.Linear(24, 8), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x if self.shared else x.clone())


@scenario
def inputs_shared_in_one_process_only(rank: int) -> Any:
    torch.manual_seed(rank)
    data = [torch.randn(80, 24) * torch.linspace(3, 0.1, 24) for _ in range(3)]
    config = lora(target_modules=["a", "b"])
    return eva_kernels.calibrate(Sharing(rank == 0), data, config, max_steps=3, **QUIET)


@scenario
def initialised(rank: int) -> Any:
    model = eva_kernels.initialize(make_llama(), own_batches(rank), lora(), max_steps=3, **QUIET)
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@scenario
def loader_of_follower_fails(rank: int) -> Any:
    return calibrate(make_llama(), failing_batches(rank))


@scenario
def callback_of_leader_fails(rank: int) -> Any:
    def fail(numbers: Any) -> None:
        raise OSError("the report is gone")

    return calibrate(make_llama(), own_batches(rank), callback=fail)


@scenario
def dispatched(rank: int) -> Any:
    """Return results with batches broadcast by the first process, and with own ones.

    A loader of accelerate broadcasts likewise. Runs on the accelerator path.
    """

    def loader() -> Iterator[Any]:
        for batch in own_batches(0, 4):  # the last batch is not needed
            given = [batch if rank == 0 else None]
            distributed.broadcast_object_list(given)
            yield given[0]

    options = {"method": "sketch", "backend": "torch", "max_steps": 3}
    with mock.patch.object(_host, "reads_are_free", return_value=False):
        return [
            calibrate(make_llama(), batches, **options).state_dict()
            for batches in (loader(), own_batches(0, 4))
        ]


@scenario
def one_process_is_late(rank: int) -> Any:
    """Return what a process logs while it waits for the other."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("eva_kernels")
    logger.addHandler(handler)
    if rank == 1:
        time.sleep(1)
    try:
        with mock.patch.object(barrier, "LOG_WAIT_AFTER", 0.2):
            calibrate(make_llama(), own_batches(rank), max_steps=1)
    finally:
        logger.removeHandler(handler)
    return [message for message in messages if "waiting" in message]


@scenario
def not_converged(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), max_steps=2, on_not_converged="raise")


@scenario
def no_tokens(rank: int) -> Any:
    batches = own_batches(rank, 2)
    for batch in batches:
        batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    return calibrate(make_llama(), batches, max_steps=50)


@scenario
def first_batches_have_no_tokens(rank: int) -> Any:
    """Return the steps and tokens of a pass that begins with a batch of padding only."""
    batches = own_batches(rank, 3)
    batches[0]["attention_mask"] = torch.zeros_like(batches[0]["attention_mask"])
    result = calibrate(make_llama(), batches, max_steps=3)
    return result.history["step"], result.tokens


@scenario
def models_differ(rank: int) -> Any:
    config = lora(target_modules=["q_proj"] if rank == 0 else ["q_proj", "v_proj"])
    return eva_kernels.calibrate(make_llama(), own_batches(rank), config, max_steps=2, **QUIET)


@scenario
def ranks_differ(rank: int) -> Any:
    config = lora(r=8 if rank == 0 else 4)
    return eva_kernels.calibrate(make_llama(), own_batches(rank), config, max_steps=2, **QUIET)


@scenario
def options_differ(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), tokens_per_step=40 * (1 + rank), seed=rank)


@scenario
def follower_fails_early(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), memory_budget=1 if rank == 1 else "auto")


@scenario
def leader_finds_no_layer(rank: int) -> Any:
    config = lora(target_modules=["nothing"] if rank == 0 else ["q_proj"])
    return eva_kernels.calibrate(make_llama(), own_batches(rank), config, **QUIET)


@scenario
def weights_vary(rank: int) -> Any:
    model = make_llama()
    if rank == 1:  # as if the file was only loaded in the first process
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
    return calibrate(model, own_batches(rank), max_steps=2)


@scenario
def dtypes_differ(rank: int) -> Any:
    model = make_llama()
    return calibrate(model.double() if rank == 0 else model, own_batches(rank), max_steps=2)


@scenario
def one_new_layer_differs(rank: int) -> Any:
    model = make_llama()
    torch.manual_seed(rank)
    nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
    return calibrate(model, own_batches(rank), max_steps=2)


@scenario
def merging_fails(rank: int) -> Any:
    def fail(*arguments: Any) -> None:
        raise OSError("the memory is gone")

    with mock.patch.object(cells, "restore_stream", fail):
        return calibrate(make_llama(), own_batches(rank))


@scenario
def invalid_group(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), group="all")


@scenario
def collectors_kept_after_errors(rank: int) -> Any:
    def failing(numbers: dict[str, Any]) -> None:
        raise OSError("the report is gone")

    never = {"max_steps": 2, "on_not_converged": "raise"}
    return {
        "callback": collectors_kept_by(
            lambda: calibrate(make_llama(), own_batches(rank), callback=failing)
        ),
        "loader": collectors_kept_by(lambda: calibrate(make_llama(), failing_batches(rank))),
        "not converged": collectors_kept_by(
            lambda: calibrate(make_llama(), own_batches(rank), **never)
        ),
        "layer in shards": collectors_kept_by(lambda: nan_input_in_shards(rank)),
    }
