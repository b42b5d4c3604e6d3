"""Out-of-memory errors give numbers and remedies, and leave the model unchanged."""

from __future__ import annotations

import gc
import re
import weakref
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_kernels
from eva_kernels.streaming import InputStream
from eva_peft.inputs.prepare import Preparer
from integration.conftest import (
    QUIET,
    hooks_of,
    lora,
    make_llama,
    run,
    same_state,
    state_of,
    text_batches,
)

ERRORS = {
    "device": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB\nMore"
    ),
    "host": MemoryError,
    "host, by torch": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("where", ["batch", "forward", "accumulate", "fold"])
def test_error_gives_place_sizes_and_advice(
    kind: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama().train()
    before = state_of(model)
    calls = {"n": 0}

    def failing(original: Any, after: int) -> Any:
        def fail(*args: Any, **kwargs: Any) -> Any:
            calls["n"] += 1
            if calls["n"] > after:
                raise ERRORS[kind]()
            return original(*args, **kwargs)

        return fail

    if where == "batch":
        monkeypatch.setattr(Preparer, "prepare", failing(Preparer.prepare, 1))
        place, advice = "the forward of forward pass 2, step 2", "smaller batch"
    elif where == "forward":
        layer = model.model.layers[1].mlp.act_fn
        layer.forward = failing(layer.forward, 1)
        place, advice = "the forward of forward pass 2, step 2", "smaller batch"
    elif where == "accumulate":
        monkeypatch.setattr(InputStream, "add", failing(InputStream.add, 9))
        place, advice = r"layer model\.\S+ of forward pass 2, step 2", "tokens_per_step"
    else:
        module = import_module("eva_peft.calibrate")
        monkeypatch.setattr(module, "begin_fold", failing(module.begin_fold, 1))
        place, advice = "the fold of forward pass 2, step 2", "oversample"
    texts = text_batches(4, samples=4, length=24)
    with pytest.raises(eva_kernels.OutOfMemoryError) as caught:
        run(model, texts, lora(tau=1.0), trim_padding=False)
    message = str(caught.value)
    assert re.search(f"out of memory on cpu in {place}, batch of 4 x 24 tokens", message), message
    assert re.search(r"weights: \S+ GiB \(streaming state \S+ GiB, temporaries \S+ GiB", message)
    assert advice in message
    assert "estimate()" in message
    assert "More" not in message
    for known in (torch.OutOfMemoryError, MemoryError, eva_kernels.EvaRuntimeError):
        assert isinstance(caught.value, known)
    assert caught.value.__cause__ is not None
    assert hooks_of(model) == 0
    assert model.training
    assert same_state(before, state_of(model))
    if where == "forward":
        del layer.forward
    monkeypatch.undo()
    assert run(model, texts, lora(tau=1.0), max_steps=3).forwards == 3


def test_state_is_freed_while_the_error_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = InputStream.add

    def add(self: Any, x: Tensor, rows: Tensor | None = None) -> int:
        kept.append(weakref.ref(self))
        kept.append(weakref.ref(x))
        return original(self, x, rows)

    def fail(model: nn.Module, batch: Any) -> None:
        model(**batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(InputStream, "add", add)
    with pytest.raises(eva_kernels.OutOfMemoryError) as caught:
        run(make_llama(), text_batches(1), lora(), forward_fn=fail)
    gc.disable()
    try:
        assert kept
        alive = [ref for ref in kept if ref() is not None]
        assert not alive, [type(ref()) for ref in alive]
    finally:
        gc.enable()
    assert caught.value.__traceback__ is not None


def test_other_errors_are_not_converted() -> None:
    def fail(model: nn.Module, batch: Any) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else") as caught:
        run(make_llama(), text_batches(1), lora(), forward_fn=fail)
    assert not isinstance(caught.value, eva_kernels.EvaError)


def test_error_in_initialize_leaves_the_base_model() -> None:
    model = make_llama()
    kinds = [type(m) for m in model.modules()]

    def fail(model: nn.Module, batch: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="the forward of forward pass 1, step 1"):
        eva_kernels.initialize(model, text_batches(1), lora(), forward_fn=fail, **QUIET)
    assert [type(m) for m in model.modules()] == kinds
