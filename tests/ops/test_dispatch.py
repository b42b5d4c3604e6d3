"""The choice of backend, its log messages, and loading of the native modules."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eva_kernels import EvaRuntimeError, EvaValueError, _native
from eva_kernels.ops import _dispatch

TOKENS = torch.zeros(4, 32)


@pytest.fixture
def log_messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log messages, with none of them logged before."""
    monkeypatch.setattr(_dispatch, "_reasons_logged", set())
    caplog.set_level(logging.INFO, "eva_kernels")
    return caplog.messages


def test_auto_does_not_interpret_kernels_on_cpu(log_messages: list[str]) -> None:
    assert _dispatch.choose_backend("sketch", "auto", TOKENS, torch.float32, 32) == "torch"


def test_each_reason_is_logged_once(
    log_messages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for op in ("sketch", "gram", "sketch"):
        _dispatch.choose_backend(op, "auto", TOKENS, torch.float32)
    assert caplog.messages == ["sketch runs on plain PyTorch: tensors are on the CPU"]
    _dispatch.choose_backend("gram", "auto", TOKENS.to("meta"), torch.float32)
    assert len(caplog.messages) == 2
    assert "no Triton kernels for device type 'meta'" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("dtype", "state", "width", "reason"),
    [
        (torch.float32, torch.float64, 32, "tokens of torch.float32 with sums of torch.float64"),
        (torch.float64, torch.float32, 32, "tokens of torch.float64 with sums of torch.float32"),
        (torch.bfloat16, torch.float32, 257, "a width of 257 is above 256"),
    ],
)
def test_unsupported_tokens_raise_with_the_reason(
    dtype: torch.dtype, state: torch.dtype, width: int, reason: str
) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = TOKENS.to(device, dtype)
    with pytest.raises(EvaRuntimeError, match=f"cannot run sketch: {reason}"):
        _dispatch.choose_backend("sketch", "triton", x, state, width)


def test_reasons_why_triton_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    chip: list[Any] = [object()]
    interpreted = SimpleNamespace(value=False)
    modules = {
        "sketch": SimpleNamespace(),
        "primitives": SimpleNamespace(INTERPRET=interpreted),
        "launch": SimpleNamespace(arch_of=lambda device: chip[0]),
    }
    monkeypatch.setattr(_dispatch, "kernel_module", modules.__getitem__)
    monkeypatch.setattr(
        _dispatch, "_triton_import_error", _dispatch._triton_import_error.__wrapped__
    )
    assert "needs TRITON_INTERPRET=1" in str(_dispatch.triton_unavailable("cpu"))
    assert _dispatch.triton_unavailable("cuda:1") is None
    chip[0], interpreted.value = "there are no launch parameters for sm_75", True
    assert _dispatch.triton_unavailable("cpu") is None
    assert _dispatch.triton_unavailable("cuda:1") == chip[0]

    def missing(name: str) -> None:
        raise ImportError("no triton here")

    monkeypatch.setattr(_dispatch, "kernel_module", missing)
    for device in ("cpu", "cuda:1"):
        assert "imported (no triton here)" in str(_dispatch.triton_unavailable(device))


def test_unknown_backend_raises() -> None:
    with pytest.raises(EvaValueError, match="backend='cuda' is unknown"):
        _dispatch.choose_backend("sketch", "cuda", TOKENS, torch.float32)


# Architectures of the module, capabilities of the GPUs, and the expected message.
GPUS = [
    ("80 90", [(8, 0), (8, 6), (9, 0), (10, 3)], None),
    ("90a", [(9, 0)], None),
    ("75 80 86", [(7, 5), (7, 0)], "GPU 1 has compute capability 7.0, but it was built for 75"),
    ("80 86 90", [(8, 0), (7, 5)], "GPU 1 has compute capability 7.5, but it was built for 80"),
    ("86 120", [(8, 0)], "GPU 0 has compute capability 8.0, but it was built for 86 120"),
    ("80 86 120", [(8, 7)], "GPU 0 has compute capability 8.7, but it was built for 80 86 120"),
    ("87 90", [(8, 9)], "GPU 0 has compute capability 8.9, but it was built for 87 90"),
    ("80 86", [(8, 7)], None),  # by PTX
    ("87 90", [(8, 7)], None),
    ("86 120", [(9, 0)], "GPU 0 has compute capability 9.0, but it was built for 86 120"),
    ("80 100", [(12, 0)], None),
    ("80 90a", [(9, 0)], None),
    ("80 90a", [(10, 0)], "GPU 0 has compute capability 10.0, but it was built for 80 90a"),
    ("100a", [(10, 3)], "GPU 0 has compute capability 10.3, but it was built for 100a"),
    ("100f", [(10, 3)], None),
    ("100f", [(12, 0)], "GPU 0 has compute capability 12.0, but it was built for 100f"),
    ("90a 80", [(12, 0)], None),
    ("90", [], "it was built with CUDA 13.1, which finds no GPU"),
]


@pytest.mark.usefixtures("no_cached_modules")
@pytest.mark.parametrize(("archs", "gpus", "message"), GPUS)
def test_cuda_module_is_used_on_gpus_that_can_run_it(
    archs: str, gpus: list[tuple[int, int]], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(archs=archs, toolkit=13010, device_count=lambda: len(gpus))
    monkeypatch.setitem(sys.modules, "eva_kernels._cuda", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for index in range(max(1, len(gpus))):
        device = torch.device("cuda", index)
        if message is None or (message.startswith("GPU") and f"GPU {index}" not in message):
            assert _native.load_or_none(device) is _native.load(device) is module
        else:
            assert _native.load_or_none(device) is None
            with pytest.raises(EvaRuntimeError, match=re.escape(message)):
                _native.load(device)
    on_first = _native.load_or_none(torch.device("cuda", 0))
    assert _native.load_or_none("cuda") is on_first  # the current one


@pytest.mark.usefixtures("no_cached_modules")
def test_module_with_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert _native.load_or_none("cuda") is None
    assert "libcudart.so" in str(_native.unavailable_reason("cuda"))
    for kind, remedy in (("cpu", "compiler$"), ("cuda", "compiler, nvcc and EVA_KERNELS_CUDA=1$")):
        with pytest.raises(EvaRuntimeError, match=rf"libcudart\.so: cannot.*{remedy}"):
            _native.load(kind)


@pytest.mark.usefixtures("no_cached_modules")
@pytest.mark.parametrize("gpus", [False, True])
def test_cpu_module_does_not_check_gpus(gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cuda = SimpleNamespace(), SimpleNamespace(device_count=lambda: 0, toolkit=13010)
    monkeypatch.setitem(sys.modules, "eva_kernels._C", plain)
    monkeypatch.setitem(sys.modules, "eva_kernels._cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    assert _native.load("cpu") is plain
    assert _native.load_or_none("cuda") is (None if gpus else cuda)


def test_native_call_passes_device_and_current_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[float, ...]] = []
    module: Any = SimpleNamespace(fold=lambda *given: calls.append(given))
    stream = {torch.device("cuda", 3): SimpleNamespace(cuda_stream=77)}
    monkeypatch.setattr(torch.cuda, "current_stream", stream.__getitem__)
    for device in (torch.device("cuda", 3), torch.device("cpu")):
        _native.call(module, "fold", 1, 2.5, device=device)
    assert calls == [(1, 2.5, 3, 77), (1, 2.5)]


def test_tokens_are_copied_only_if_features_are_not_adjacent() -> None:
    x = torch.randn(6, 40)[::2, :32]
    assert _dispatch.with_contiguous_columns(x) is x
    apart = _dispatch.with_contiguous_columns(x.mT)
    assert apart.stride(1) == 1
    assert torch.equal(apart, x.mT)
