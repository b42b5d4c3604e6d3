"""A pass of several processes that is stopped, and goes on from its checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import eva_kernels
from distributed.data_parallel import Experts, routed_tokens
from distributed.scenarios import calibrate, limited, own_batches, scenario, shared_folder
from eva_peft.resume import checkpoint
from integration.conftest import QUIET, lora, make_llama


class Stopped(Exception):
    """What stops a pass here."""


def shuffled(rank: int, fail_at: int = -1) -> Iterator[dict[str, Tensor]]:
    """Yield batches that global random states decide on, as those of a shuffling loader.

    Their order is drawn when it begins, and what is made of each when its turn comes.
    """
    batches = own_batches(rank, 6)
    for number, which in enumerate(torch.randperm(6)):
        if number == fail_at:
            raise Stopped
        by = [int(torch.randint(24, ())), random.randrange(24), int(np.random.randint(24))]
        yield {k: v.roll(sum(by), 1) for k, v in batches[which].items()}


def drawing(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Run a model that draws random numbers."""
    torch.rand(1), random.random(), np.random.rand()
    model(**batch)


def shuffled_pass(rank: int, seed: int | None = None, fail_at: int = -1, **options: Any) -> Any:
    """Run a pass whose batches and model draw random numbers, other ones in each process."""
    model = make_llama()  # which sets a state of its own
    for begin in (torch.manual_seed, random.seed, np.random.seed):
        begin(rank if seed is None else seed)
    options = {"max_steps": 6, "forward_fn": drawing, **options}
    return calibrate(model, shuffled(rank, fail_at), **options)


def stopped_and_resumed(rank: int, stop: Callable[..., Any], every: int = 1, **options: Any) -> Any:
    """Return the result of a pass in one go, that of one with a stop, and what the stop was."""
    whole = shuffled_pass(rank, **options)
    told = None
    with shared_folder() as folder:
        options |= {"checkpoint": folder / "pass.safetensors", "checkpoint_every": every}
        try:
            stop(options)
        except Exception as error:
            told = type(error).__name__
        resumed = shuffled_pass(rank, seed=100, **options)  # another run has another state
        files = sorted(path.name for path in folder.iterdir())
    return {"whole": whole, "resumed": resumed, "told": told, "files": files}


@scenario
def leader_is_stopped(rank: int) -> Any:
    def stop(options: dict[str, Any]) -> None:
        def after_three(numbers: dict[str, Any]) -> None:
            if numbers["step"] == 3:
                raise Stopped

        shuffled_pass(rank, callback=after_three, **options)

    return stopped_and_resumed(rank, stop, method="sketch")


@scenario
def follower_is_stopped(rank: int) -> Any:
    def stop(options: dict[str, Any]) -> None:
        shuffled_pass(rank, fail_at=4 if rank == 1 else -1, **options)

    return stopped_and_resumed(rank, stop, method="gram", tokens_per_step=50)


@scenario
def limit_is_raised(rank: int) -> Any:
    """Stop where tokens wait that are too few for a step."""

    def stop(options: dict[str, Any]) -> None:
        shuffled_pass(rank, max_steps=2, **options)

    return stopped_and_resumed(rank, stop, every=9, method="sketch", tokens_per_step=5)


@scenario
def goes_on_alone(rank: int) -> Any:
    """Go on in one process with the checkpoint of two."""
    with shared_folder() as folder:
        kept = {"checkpoint": folder / "pass.safetensors"}
        calibrate(make_llama(), own_batches(rank), max_steps=2, **kept)
        if rank == 0:
            calibrate(make_llama(), own_batches(rank), group=None, **kept)


@scenario
def batches_are_missing(rank: int) -> Any:
    with shared_folder() as folder:
        kept = {"checkpoint": folder / "pass.safetensors"} if rank == 0 else {}
        calibrate(make_llama(), iter(own_batches(rank, 3)), max_steps=3, **kept)
        calibrate(make_llama(), iter(own_batches(rank, 2 - rank)), max_steps=5, **kept)


def stopped_at_three(loader: Callable[[], Any], tau: float = 0.99, **options: Any) -> Any:
    """Return the result of a pass in one go, and that of one which goes on after three batches."""

    def until(steps: int, **kept: Any) -> Any:
        both = {"max_steps": steps, **options, **kept, **QUIET}
        return eva_kernels.calibrate(make_llama(), loader(), lora(tau=tau), **both)

    whole = until(4)
    with shared_folder() as folder:
        kept = {"checkpoint": folder / "pass.safetensors"}
        until(3, **kept)
        return {"whole": whole, "resumed": until(4, **kept)}


@scenario
def one_loader_had_ended(rank: int) -> Any:
    return stopped_at_three(lambda: iter(own_batches(rank, 4 - 2 * rank)))


@scenario
def an_epoch_had_ended(rank: int) -> Any:
    """Go on where most layers have converged, and are frozen."""
    return stopped_at_three(lambda: own_batches(rank, 3), tau=0.8, freeze_converged=True)


@scenario
def a_second_epoch_had_begun(rank: int) -> Any:
    """Go on where the order of the second epoch came from numbers behind those of the model."""

    class Shuffling:
        def __iter__(self) -> Iterator[Any]:
            shifts = torch.randint(24, (2,)).tolist()
            for batch, shift in zip(own_batches(rank, 2), shifts, strict=True):
                yield {k: v.roll(shift, 1) for k, v in batch.items()}

    return stopped_at_three(Shuffling, forward_fn=drawing)


def gone_on(model: Callable[[], nn.Module], data: Any, names: list[str], stop: int) -> Any:
    """Return the result of a pass in one go over all data, and that of one with a stop."""
    options = {**QUIET, "prepare_model_inputs_fn": None, "method": "sketch"}

    def until(steps: int, **kept: Any) -> Any:
        config = lora(target_modules=names)
        return eva_kernels.calibrate(model(), data, config, max_steps=steps, **kept, **options)

    whole = until(len(data))
    with shared_folder() as folder:
        kept = {"checkpoint": folder / "pass.safetensors"}
        until(stop, **kept)
        return {"whole": whole, "resumed": until(len(data), **kept)}


@scenario
def one_had_too_few_tokens(rank: int) -> Any:
    """Go on where one process has tokens of a layer, too few for a basis, and the other has none.

    Both have some later.
    """
    data = [routed_tokens(rank, step) for step in range(3)]
    if rank == 0:
        data[0][:3, 0] = 3
    return gone_on(Experts, data, [f"expert.{i}" for i in range(4)], stop=1)


def called_twice(data: list[Tensor]) -> Any:
    """Go on, behind two batches, where a large number makes a layer be called once more."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            return self.a(y) if x[0, 0] > 100 else y

    return gone_on(Again, data, ["a"], stop=2)


@scenario
def one_called_a_layer_twice(rank: int) -> Any:
    """Go on where one process alone knows that a forward pass may not be cut behind a layer."""
    torch.manual_seed(rank)
    data = [*torch.randn(4, 80, 24)]
    for step in (0, 3) if rank == 1 else ():
        data[step][0, 0] = 200
    return called_twice(data)


@scenario
def one_would_call_a_layer_twice(rank: int) -> Any:
    """Go on where one process alone has seen the largest batch, behind which passes are cut."""
    torch.manual_seed(rank)
    data = [torch.randn(80 + 40 * (rank == 1 and step in (0, 2)), 24) for step in range(4)]
    if rank == 1:
        data[2][0, 0] = 200
    return called_twice(data)


@scenario
def asked_for_again(rank: int) -> Any:
    """Return the result of a pass whose last tokens are no step, and that of its checkpoint."""
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
        if numbers["step"] == 2:  # of the tokens that are no step
            raise OSError("the report is gone")

    options = {"max_steps": 2, "method": "sketch", "tokens_per_step": 5}
    return calibrate(make_llama(), own_batches(rank), callback=callback, **options)


@scenario
def writing_fails_at_the_end(rank: int) -> Any:
    failing = mock.Mock(side_effect=ValueError("no such state"))
    with shared_folder() as folder, mock.patch.object(checkpoint, "write_checkpoint", failing):
        kept = {"checkpoint": folder / "pass.safetensors", "checkpoint_every": 9}
        try:
            calibrate(make_llama(), own_batches(rank), max_steps=2, group=limited(), **kept)
        except Exception as error:
            return type(error).__name__, str(error)


@scenario
def checkpoint_cannot_be_written(rank: int) -> Any:
    return calibrate(make_llama(), own_batches(rank), checkpoint="/proc/nothing/here")
