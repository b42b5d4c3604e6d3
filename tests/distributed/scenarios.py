"""The registry of scenarios that every process runs, and their common helpers."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
