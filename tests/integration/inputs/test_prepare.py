"""Batches made ready ahead, while an accelerator would be at work; the CPU takes its way here."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eva_kernels.streaming import _host
from eva_peft.calibrate import CalibrationPass
from eva_peft.inputs.prepare import Prefetcher, Preparer
from eva_peft.inputs.token_mask import TokenMask
from integration.conftest import lora, make_llama, make_mlp, run, text_batches, vectors

calibrate = import_module("eva_peft.calibrate")
OPTIONS = {"method": "sketch", "backend": "torch"}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the CPU pass for an accelerator, and list its reads; for others to add to."""
    seen: list[str] = []
    read = _host.read

    def noted(tensors: Sequence[Tensor]) -> list[_host.Array]:
        if tensors:
            seen.append("read")
        return read(tensors)

    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    monkeypatch.setattr(_host, "read", noted)
    return seen


def noting(data: Sequence[Any], events: list[str]) -> Iterator[Any]:
    for number, batch in enumerate(data):
        events.append(f"batch {number}")
        yield batch
    events.append("end")


def config(tau: float = 1.0) -> Any:
    return lora(tau=tau, target_modules=["0", "2"])


def test_the_next_batch_is_fetched_before_the_host_waits(events: list[str]) -> None:
    run(make_mlp(), noting(vectors(3, rows=60), events), config(), **OPTIONS)
    assert events == ["batch 0", "batch 1", "read", "batch 2", "read", "end", "read"]


@pytest.mark.parametrize(
    ("limit", "steps"),
    [({"max_steps": 2}, 2), ({"max_tokens": 100}, 2), ({"max_seconds": 1e-9}, 1)],
)
def test_no_batch_is_taken_beyond_a_limit(
    limit: dict[str, Any], steps: int, events: list[str]
) -> None:
    data = noting(vectors(4, rows=60), events)
    result = run(make_mlp(), data, config(), **limit, **OPTIONS)
    assert result.steps == steps
    assert events == [f"batch {i}" for i in range(steps)] + ["read"] * steps


def test_nothing_is_fetched_ahead_where_the_host_does_not_wait() -> None:
    events: list[str] = []
    result = run(make_mlp(), noting(vectors(4, rows=60), events), config(tau=0.0), **OPTIONS)
    assert result.steps == 2
    assert events == ["batch 0", "batch 1"]


def test_what_is_fetched_meanwhile_is_no_part_of_the_fold(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    original = Preparer.prepare

    def loader() -> Iterator[Tensor]:
        nonlocal now
        for batch in vectors(3, rows=60):
            now += 1  # a second
            yield batch

    def prepare(self: Preparer, *arguments: Any) -> Any:
        nonlocal now
        now += 10
        return original(self, *arguments)

    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Preparer, "prepare", prepare)
    seconds = run(make_mlp(), loader(), config(), **OPTIONS).seconds
    seconds["forward"] += seconds.pop("accumulate")  # which has a clock of its own
    assert seconds == {"forward": 30, "fold": 0, "check": 0, "total": 33}


def test_what_was_prepared_is_let_go_of_before_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[weakref.ref[TokenMask]] = []
    kept: list[bool] = []
    original = Preparer.prepare

    def prepare(self: Preparer, *arguments: Any) -> Any:
        prepared = original(self, *arguments)
        masks.extend(map(weakref.ref, prepared.masks))
        return prepared

    def callback(numbers: dict[str, Any]) -> None:
        kept.extend(mask() is not None for mask in masks)

    monkeypatch.setattr(Preparer, "prepare", prepare)
    run(make_mlp(), iter(vectors(3, rows=60)), config(), callback=callback, **OPTIONS)
    assert kept == [False] * (1 + 2 + 3)


def test_with_a_checkpoint_a_batch_is_made_when_its_turn_comes(
    events: list[str], tmp_path: Path
) -> None:
    data, file = noting(vectors(3, rows=60), events), tmp_path / "pass.safetensors"
    run(make_mlp(), data, config(), checkpoint=file, **OPTIONS)
    without_read = [event for event in events if event != "read"]
    assert without_read == ["batch 0", "batch 1", "batch 2", "end"]
    assert events.index("batch 1") > events.index("read")


def test_what_a_loader_raises_comes_when_its_batch_is_due(events: list[str]) -> None:
    def failing() -> Iterator[Tensor]:
        yield from noting(vectors(2, rows=60), events)
        raise OSError("the file is gone")

    def callback(numbers: dict[str, Any]) -> None:
        events.append(f"step {numbers['step']}")

    with pytest.raises(OSError, match="the file is gone"):
        run(make_mlp(), failing(), config(), callback=callback, **OPTIONS)
    assert events[-3:] == ["end", "read", "step 2"]


def test_a_loader_that_fails_behind_what_was_needed_does_no_harm(events: list[str]) -> None:
    def failing() -> Iterator[Tensor]:
        yield from vectors(2, rows=60)
        events.append("failed")
        raise OSError("the file is gone")

    result = run(make_mlp(), failing(), config(tau=0.0), **OPTIONS)
    assert (result.steps, set(result.converged.values())) == (2, {True})
    assert "failed" in events


def test_an_error_that_nobody_asks_for_does_not_keep_the_pass(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[weakref.ref[CalibrationPass]] = []
    original = CalibrationPass.run

    def noted(self: CalibrationPass, loader: Any) -> Any:
        passes.append(weakref.ref(self))
        return original(self, loader)

    def failing() -> Iterator[Tensor]:
        yield from vectors(2, rows=60)
        raise OSError("the file is gone")

    monkeypatch.setattr(CalibrationPass, "run", noted)
    gc.collect()
    gc.disable()
    try:
        run(make_mlp(), failing(), config(tau=0.0), **OPTIONS)
        assert [ref() for ref in passes] == [None]
    finally:
        gc.enable()


def test_loader_and_fold_have_each_their_own_autocast(events: list[str]) -> None:
    data, seen = vectors(3, rows=60), []

    def looking() -> Iterator[Tensor]:
        for batch in data:
            seen.append(torch.is_autocast_enabled("cpu"))
            yield batch

    def components(loader: Iterator[Tensor]) -> Tensor:
        return run(make_mlp(), loader, config(), **OPTIONS).components["0"]

    plain = components(iter(data))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = components(looking())
    assert seen == [True] * 3
    assert torch.equal(under, plain)


def test_fetched_ahead_or_not_the_result_has_the_same_bits(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "tokens_per_step": 20}  # the draw depends on the number of the batch

    def result() -> Any:
        return run(make_llama(), iter(text_batches(4)), lora(tau=1.0), **options)

    ahead = result()
    monkeypatch.setattr(Prefetcher, "fetch", lambda self: None)
    behind = result()
    assert ahead.ranks == behind.ranks
    assert all(torch.equal(ahead.components[n], behind.components[n]) for n in ahead.components)


def test_a_pass_leaves_no_cycle_that_keeps_its_batches(events: list[str]) -> None:
    data = vectors(3, rows=60)
    gone = [weakref.ref(batch) for batch in data]
    gc.collect()
    gc.disable()
    try:
        run(make_mlp(), iter(data), config(), **OPTIONS)
        del data
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_ahead_fetches_once_and_tells_an_error_once() -> None:
    def numbers() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("no more")

    ahead = Prefetcher(numbers())
    ahead.fetch()
    ahead.fetch()
    assert (next(ahead), next(ahead)) == (0, 1)
    ahead.fetch()
    with pytest.raises(OSError, match="no more"):
        next(ahead)
    ahead.fetch()
    assert list(ahead) == []
