"""The registry of scenarios that every process runs, and their common helpers."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed, nn

import eva_kernels
from integration.conftest import QUIET, lora, text_batches

SCENARIOS: dict[str, Callable[[int], Any]] = {}


def scenario(run: Callable[[int], Any]) -> Callable[[int], Any]:
    SCENARIOS[run.__name__] = run
    return run


def calibrate(model: nn.Module, data: Any, **options: Any) -> eva_kernels.EvaResult:
    return eva_kernels.calibrate(model, data, lora(), **{**QUIET, **options})


def own_batches(rank: int, count: int = 4) -> list[dict[str, Tensor]]:
    return text_batches(count, padded=False, seed=10 + rank)


def union(count: int = 4) -> list[dict[str, Tensor]]:
    """Return the batches of both processes joined step by step."""
    parts = [own_batches(rank, count) for rank in (0, 1)]
    return [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]


def failing_batches(rank: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches; the loader of the second process fails after two."""
    yield from own_batches(rank, 2)
    if rank == 1:
        raise OSError("the disk is gone")
    yield from own_batches(rank, 2)


def group_with_timeout(seconds: int = 15) -> Any:
    """Return a group of all processes with a short timeout."""
    return distributed.new_group([0, 1], timeout=datetime.timedelta(seconds=seconds))


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Create a temporary folder in the first process and share its path."""
    with TemporaryDirectory() as own:
        folder = [own]
        distributed.broadcast_object_list(folder)
        try:
            yield Path(folder[0])
        finally:
            distributed.barrier()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    return bool(one == other)
