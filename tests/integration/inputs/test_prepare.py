"""Batches prepared ahead while an accelerator works; here the CPU takes the same path."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_kernels import EvaWarning
from eva_kernels.streaming import _host
from eva_peft.calibrate import CalibrationPass
from eva_peft.inputs.prepare import Prefetcher, Preparer
from eva_peft.inputs.token_mask import TokenMask
from integration.conftest import VOCABULARY, lora, make_llama, make_mlp, run, text_batches, vectors

calibrate = import_module("eva_peft.calibrate")
OPTIONS = {"method": "sketch", "backend": "torch"}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Treat the CPU as an accelerator, and list its reads; tests append further events."""
    records: list[str] = []
    read = _host.read

    def recorded(tensors: Sequence[Tensor]) -> list[_host.Array]:
        if tensors:
            records.append("read")
        return read(tensors)

    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    monkeypatch.setattr(_host, "read", recorded)
    return records


def record_batches(data: Sequence[Any], events: list[str]) -> Iterator[Any]:
    for number, batch in enumerate(data):
        events.append(f"batch {number}")
        yield batch
    events.append("end")


def config(tau: float = 1.0) -> Any:
    return lora(tau=tau, target_modules=["0", "2"])


def test_next_batch_is_fetched_before_the_host_waits(events: list[str]) -> None:
    run(make_mlp(), record_batches(vectors(3, rows=60), events), config(), **OPTIONS)
    assert events == ["batch 0", "batch 1", "read", "batch 2", "read", "end", "read"]


@pytest.mark.parametrize(
    ("limit", "steps"),
    [({"max_steps": 2}, 2), ({"max_tokens": 100}, 2), ({"max_seconds": 1e-9}, 1)],
)
def test_no_batch_is_taken_beyond_a_limit(
    limit: dict[str, Any], steps: int, events: list[str]
) -> None:
    data = record_batches(vectors(4, rows=60), events)
    result = run(make_mlp(), data, config(), **limit, **OPTIONS)
    assert result.steps == steps
    assert events == [f"batch {i}" for i in range(steps)] + ["read"] * steps


def test_nothing_is_fetched_ahead_where_the_host_does_not_wait() -> None:
    events: list[str] = []
    result = run(
        make_mlp(), record_batches(vectors(4, rows=60), events), config(tau=0.0), **OPTIONS
    )
    assert result.steps == 2
    assert events == ["batch 0", "batch 1"]


def test_time_of_prefetching_does_not_count_as_fold(
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
    seconds["forward"] += seconds.pop("accumulate")  # measured by another clock
    assert seconds == {"forward": 30, "fold": 0, "check": 0, "total": 33}


def test_prepared_masks_are_freed_before_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_no_prefetching_with_a_checkpoint(events: list[str], tmp_path: Path) -> None:
    data, file = record_batches(vectors(3, rows=60), events), tmp_path / "pass.safetensors"
    run(make_mlp(), data, config(), checkpoint=file, **OPTIONS)
    without_read = [event for event in events if event != "read"]
    assert without_read == ["batch 0", "batch 1", "batch 2", "end"]
    assert events.index("batch 1") > events.index("read")


def test_loader_error_is_raised_when_its_batch_is_due(events: list[str]) -> None:
    def failing() -> Iterator[Tensor]:
        yield from record_batches(vectors(2, rows=60), events)
        raise OSError("the file is gone")

    def callback(numbers: dict[str, Any]) -> None:
        events.append(f"step {numbers['step']}")

    with pytest.raises(OSError, match="the file is gone"):
        run(make_mlp(), failing(), config(), callback=callback, **OPTIONS)
    assert events[-3:] == ["end", "read", "step 2"]


def test_loader_error_behind_the_last_needed_batch_is_ignored(events: list[str]) -> None:
    def failing() -> Iterator[Tensor]:
        yield from vectors(2, rows=60)
        events.append("failed")
        raise OSError("the file is gone")

    result = run(make_mlp(), failing(), config(tau=0.0), **OPTIONS)
    assert (result.steps, set(result.converged.values())) == (2, {True})
    assert "failed" in events


def test_ignored_loader_error_does_not_keep_the_pass_alive(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[weakref.ref[CalibrationPass]] = []
    original = CalibrationPass.run

    def recorded(self: CalibrationPass, loader: Any) -> Any:
        passes.append(weakref.ref(self))
        return original(self, loader)

    def failing() -> Iterator[Tensor]:
        yield from vectors(2, rows=60)
        raise OSError("the file is gone")

    monkeypatch.setattr(CalibrationPass, "run", recorded)
    gc.collect()
    gc.disable()
    try:
        run(make_mlp(), failing(), config(tau=0.0), **OPTIONS)
        assert [ref() for ref in passes] == [None]
    finally:
        gc.enable()


def test_autocast_applies_to_the_loader_and_not_to_the_fold(events: list[str]) -> None:
    data, records = vectors(3, rows=60), []

    def record_autocast() -> Iterator[Tensor]:
        for batch in data:
            records.append(torch.is_autocast_enabled("cpu"))
            yield batch

    def components(loader: Iterator[Tensor]) -> Tensor:
        return run(make_mlp(), loader, config(), **OPTIONS).components["0"]

    plain = components(iter(data))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_autocast = components(record_autocast())
    assert records == [True] * 3
    assert torch.equal(with_autocast, plain)


def test_prefetching_does_not_change_the_result(
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


def test_pass_leaves_no_reference_cycle_with_its_batches(events: list[str]) -> None:
    data = vectors(3, rows=60)
    batch_refs = [weakref.ref(batch) for batch in data]
    gc.collect()
    gc.disable()
    try:
        run(make_mlp(), iter(data), config(), **OPTIONS)
        del data
        assert [ref() for ref in batch_refs] == [None] * 3
    finally:
        gc.enable()


def test_prefetcher_fetches_once_and_raises_an_error_once() -> None:
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


PADDED = text_batches(2)
END = torch.zeros(4, 1, dtype=torch.long)


def _with(change: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    return [change(batch["input_ids"], batch["attention_mask"]) for batch in PADDED]


@pytest.mark.parametrize(
    "texts",
    [
        _with(lambda ids, mask: {"input_ids": ids}),
        _with(lambda ids, mask: {"input_ids": ids, "attention_masks": mask}),
        _with(lambda ids, mask: {"input_ids": ids, "attention_mask": torch.ones_like(mask)}),
        _with(lambda ids, mask: {"input_ids": ids.flip(1)}),
        _with(lambda ids, mask: ids),
        _with(lambda ids, mask: (ids, mask.sum(1))),
    ],
    ids=["no mask", "unknown name", "ones", "left", "tensor", "lengths"],
)
@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id"])
def test_padding_that_counts_is_warned_of_once(texts: list[Any], name: str) -> None:
    model = make_llama()
    model.config.pad_token_id = model.config.eos_token_id = None
    setattr(model.config, name, [5, 0] if name == "eos_token_id" else 0)
    with pytest.warns(EvaWarning, match=rf"several tokens 0, the model's {name}") as caught:
        run(model, texts, lora(target_modules=["q_proj"]))
    assert len(caught) == 1


def test_padding_that_a_mask_hides_is_not_warned_of() -> None:
    model = make_llama()
    unlabelled = _with(
        lambda ids, mask: {"input_ids": ids, "labels": torch.where(mask > 0, ids, -100)}
    )
    ended = [{"input_ids": torch.cat([b["input_ids"][:, :8], END], 1)} for b in PADDED]
    by_function = {"forward_fn": lambda model, batch: model(*batch)}
    for texts, options in (
        (PADDED, {}),
        (unlabelled, {}),
        (ended, {}),
        (_with(lambda *parts: parts), by_function),
    ):
        run(model, texts, lora(target_modules=["q_proj"]), **options)


class Pairs(nn.Module):
    """Images and texts, of which the model hides no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.words = nn.Linear(8, 8), nn.Embedding(VOCABULARY, 16)
        self.texts = nn.Linear(16, 8)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.images(images) @ self.texts(self.words(texts)).mean(1).mT


@pytest.mark.parametrize("layer", ["texts", "images"])
def test_padding_that_counts_in_an_own_model_is_warned_of_once(layer: str) -> None:
    pairs = _with(lambda ids, mask: (torch.randn(4, 8), ids))
    masked = _with(
        lambda ids, mask: {"images": torch.randn(4, 8), "ids": ids, "attention_mask": mask}
    )
    by_function = {"forward_fn": lambda model, b: model(b["images"], b["ids"])}
    run(Pairs(), masked, lora(target_modules=[layer]), **by_function)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EvaWarning)
        run(Pairs(), pairs, lora(target_modules=[layer]))
    found = [str(w.message) for w in caught if "seem to be padding" in str(w.message)]
    assert len(found) == (layer == "texts")
