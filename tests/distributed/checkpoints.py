"""Scenarios of a pass of several processes that is stopped and resumed from its checkpoint."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import eva_kernels
from distributed.data_parallel import Experts, routed_tokens
from distributed.scenarios import (
    calibrate,
    group_with_timeout,
    own_batches,
    scenario,
    shared_folder,
)
from eva_peft.resume import checkpoint
from integration.conftest import QUIET, lora, make_llama


class Stopped(Exception):
    """Raised to stop a pass."""


def shuffled_batches(rank: int, fail_at: int = -1) -> Iterator[dict[str, Tensor]]:
    """Yield batches that depend on global random states, as those of a shuffling loader do.

    Their order is drawn at the start, and the augmentation of each batch when it is yielded.
    """
    batches = own_batches(rank, 6)
    for number, which in enumerate(torch.randperm(6)):
        if number == fail_at:
            raise Stopped
        by = [int(torch.randint(24, ())), random.randrange(24), int(np.random.randint(24))]
        yield {k: v.roll(sum(by), 1) for k, v in batches[which].items()}


def forward_with_random_numbers(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Run a model that draws random numbers."""
    torch.rand(1), random.random(), np.random.rand()
    model(**batch)


def shuffled_pass(rank: int, seed: int | None = None, fail_at: int = -1, **options: Any) -> Any:
    """Run a pass whose batches and model draw random numbers, different ones in each process."""
    model = make_llama()  # before the seeds, as it sets a random state itself
    for begin in (torch.manual_seed, random.seed, np.random.seed):
        begin(rank if seed is None else seed)
    options = {"max_steps": 6, "forward_fn": forward_with_random_numbers, **options}
    return calibrate(model, shuffled_batches(rank, fail_at), **options)


def stopped_and_resumed(rank: int, stop: Callable[..., Any], every: int = 1, **options: Any) -> Any:
    """Return the results of an uninterrupted and a resumed pass, and what error stopped it."""
    whole = shuffled_pass(rank, **options)
    error_name = None
    with shared_folder() as folder:
        options |= {"checkpoint": folder / "pass.safetensors", "checkpoint_every": every}
        try:
            stop(options)
        except Exception as error:
            error_name = type(error).__name__
        resumed = shuffled_pass(rank, seed=100, **options)  # a new process has another random state
        files = sorted(path.name for path in folder.iterdir())
    return {"whole": whole, "resumed": resumed, "error_name": error_name, "files": files}


@scenario
def callback_stops_leader(rank: int) -> Any:
    def stop(options: dict[str, Any]) -> None:
        def after_three(numbers: dict[str, Any]) -> None:
            if numbers["step"] == 3:
                raise Stopped

        shuffled_pass(rank, callback=after_three, **options)

    return stopped_and_resumed(rank, stop, method="sketch")


@scenario
def loader_stops_follower(rank: int) -> Any:
    def stop(options: dict[str, Any]) -> None:
        shuffled_pass(rank, fail_at=4 if rank == 1 else -1, **options)

    return stopped_and_resumed(rank, stop, method="gram", tokens_per_step=50)


@scenario
def max_steps_is_raised(rank: int) -> Any:
    """Stop while pending tokens are too few for a step."""

    def stop(options: dict[str, Any]) -> None:
        shuffled_pass(rank, max_steps=2, **options)

    return stopped_and_resumed(rank, stop, every=9, method="sketch", tokens_per_step=5)


@scenario
def resumed_by_one_process(rank: int) -> Any:
    """Resume in one process from the checkpoint of two."""
    with shared_folder() as folder:
        kept = {"checkpoint": folder / "pass.safetensors"}
        calibrate(make_llama(), own_batches(rank), max_steps=2, **kept)
        if rank == 0:
            calibrate(make_llama(), own_batches(rank), group=None, **kept)


@scenario
def resumed_with_fewer_batches(rank: int) -> Any:
    with shared_folder() as folder:
        kept = {"checkpoint": folder / "pass.safetensors"} if rank == 0 else {}
        calibrate(make_llama(), iter(own_batches(rank, 3)), max_steps=3, **kept)
        calibrate(make_llama(), iter(own_batches(rank, 2 - rank)), max_steps=5, **kept)


@contextmanager
def recorded_warnings(about: str) -> Iterator[Callable[[], list[str]]]:
    """Yield a function that returns the package's warnings so far with some text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", eva_kernels.EvaWarning)
        yield lambda: [str(w.message) for w in caught if about in str(w.message)]


@scenario
def resumed_with_other_batches_in_one(rank: int) -> Any:
    """Return the warnings of a resumed pass whose second process gets its batches in reverse."""
    with shared_folder() as folder, recorded_warnings("not yield") as messages:
        kept = {"checkpoint": folder / "pass.safetensors"}
        calibrate(make_llama(), own_batches(rank), max_steps=2, **kept)
        batches = own_batches(rank)[:: 1 - 2 * rank]
        calibrate(make_llama(), batches, max_steps=3, **kept)
        return messages()


@scenario
def checkpoint_in_follower_only(rank: int) -> Any:
    """Return the warnings of a pass, and the files that it wrote."""
    with shared_folder() as folder, recorded_warnings("checkpoint") as messages:
        kept = {"checkpoint": folder / "pass.safetensors"} if rank == 1 else {}
        calibrate(make_llama(), own_batches(rank), max_steps=1, **kept)
        return messages(), list(folder.iterdir())


def resumed_after_three_batches(
    loader: Callable[[], Any], tau: float = 0.99, **options: Any
) -> Any:
    """Return the results of an uninterrupted pass and of one resumed after three batches."""

    def run_until(steps: int, **kept: Any) -> Any:
        both = {"max_steps": steps, **options, **kept, **QUIET}
        return eva_kernels.calibrate(make_llama(), loader(), lora(tau=tau), **both)

    whole = run_until(4)
    with shared_folder() as folder:
        kept = {"checkpoint": folder / "pass.safetensors"}
        run_until(3, **kept)
        return {"whole": whole, "resumed": run_until(4, **kept)}


@scenario
def resumed_after_one_loader_ended(rank: int) -> Any:
    return resumed_after_three_batches(lambda: iter(own_batches(rank, 4 - 2 * rank)))


@scenario
def resumed_after_an_epoch(rank: int) -> Any:
    """Resume while most layers have converged and are frozen."""
    return resumed_after_three_batches(lambda: own_batches(rank, 3), tau=0.8, freeze_converged=True)


@scenario
def resumed_in_second_epoch(rank: int) -> Any:
    """Resume where the order of the second epoch was drawn after the model's random numbers."""

    class Shuffling:
        def __iter__(self) -> Iterator[Any]:
            shifts = torch.randint(24, (2,)).tolist()
            for batch, shift in zip(own_batches(rank, 2), shifts, strict=True):
                yield {k: v.roll(shift, 1) for k, v in batch.items()}

    return resumed_after_three_batches(Shuffling, forward_fn=forward_with_random_numbers)


def resumed_after(model: Callable[[], nn.Module], data: Any, names: list[str], stop: int) -> Any:
    """Return the results of an uninterrupted pass over all data and of a resumed one."""
    options = {**QUIET, "prepare_model_inputs_fn": None, "method": "sketch"}

    def run_until(steps: int, **kept: Any) -> Any:
        config = lora(target_modules=names)
        return eva_kernels.calibrate(model(), data, config, max_steps=steps, **kept, **options)

    whole = run_until(len(data))
    with shared_folder() as folder:
        kept = {"checkpoint": folder / "pass.safetensors"}
        run_until(stop, **kept)
        return {"whole": whole, "resumed": run_until(len(data), **kept)}


@scenario
def resumed_with_too_few_tokens_in_one(rank: int) -> Any:
    """Resume where one process has too few tokens of a layer for a basis, and the other has none.

    Both get some later.
    """
    data = [routed_tokens(rank, step) for step in range(3)]
    if rank == 0:
        data[0][:3, 0] = 3
    return resumed_after(Experts, data, [f"expert.{i}" for i in range(4)], stop=1)


def resumed_with_repeated_call(data: list[Tensor]) -> Any:
    """Resume after two batches a model that calls its layer twice if a value is large."""

    class RepeatedCall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            return self.a(y) if x[0, 0] > 100 else y

    return resumed_after(RepeatedCall, data, ["a"], stop=2)


@scenario
def resumed_after_one_called_a_layer_twice(rank: int) -> Any:
    """Resume where only one process knows that a forward pass must not stop at the last layer."""
    torch.manual_seed(rank)
    data = [*torch.randn(4, 80, 24)]
    for step in (0, 3) if rank == 1 else ():
        data[step][0, 0] = 200
    return resumed_with_repeated_call(data)


@scenario
def resumed_before_one_calls_a_layer_twice(rank: int) -> Any:
    """Resume where only one process has seen the largest batch, after which passes stop early."""
    torch.manual_seed(rank)
    data = [torch.randn(80 + 40 * (rank == 1 and step in (0, 2)), 24) for step in range(4)]
    if rank == 1:
        data[2][0, 0] = 200
    return resumed_with_repeated_call(data)


@scenario
def pass_repeated(rank: int) -> Any:
    """Return the results of a pass that ends within a step, and of repeating the completed pass."""
    options = {"max_steps": 2, "method": "sketch", "tokens_per_step": 5}
    with shared_folder() as folder:
        options["checkpoint"] = folder / "pass.safetensors"
        first = calibrate(make_llama(), own_batches(rank), **options)
        again = calibrate(make_llama(), own_batches(rank), **options)
    return {
        "whole": first,
        "resumed": again,
        "history": [r.history["step"] for r in (first, again)],
    }


@scenario
def callback_fails_at_the_end(rank: int) -> Any:
    def callback(numbers: dict[str, Any]) -> None:
        if numbers["step"] == 2:  # the last, incomplete step
            raise OSError("the report is gone")

    options = {"max_steps": 2, "method": "sketch", "tokens_per_step": 5}
    return calibrate(make_llama(), own_batches(rank), callback=callback, **options)


@scenario
def checkpoint_fails_at_the_end(rank: int) -> Any:
    failing = mock.Mock(side_effect=ValueError("no such state"))
    with shared_folder() as folder, mock.patch.object(checkpoint, "write_checkpoint", failing):
        kept = {"checkpoint": folder / "pass.safetensors", "checkpoint_every": 9}
        try:
            calibrate(
                make_llama(), own_batches(rank), max_steps=2, group=group_with_timeout(), **kept
            )
        except Exception as error:
            return type(error).__name__, str(error)


@scenario
def checkpoint_cannot_be_written(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), checkpoint="/proc/nothing/here")
