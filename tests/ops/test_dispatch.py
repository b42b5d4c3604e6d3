"""Which backend an operation runs on, and what is said of it."""

from __future__ import annotations

import logging

import pytest
import torch

from eva_kernels import EvaRuntimeError, EvaValueError
from eva_kernels.ops import _dispatch

TOKENS = torch.zeros(4, 32)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Collect what the log says, as if nothing had been said before."""
    monkeypatch.setattr(_dispatch, "_reasons_logged", set())
    caplog.set_level(logging.INFO, "eva_kernels")
    return caplog.messages


def test_auto_interprets_no_kernel_on_a_cpu(told: list[str]) -> None:
    assert _dispatch.choose_backend("sketch", "auto", TOKENS, torch.float32, 32) == "torch"


def test_a_reason_is_told_once(told: list[str], caplog: pytest.LogCaptureFixture) -> None:
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
def test_what_kernels_do_not_take(
    dtype: torch.dtype, state: torch.dtype, width: int, reason: str
) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = TOKENS.to(device, dtype)
    with pytest.raises(EvaRuntimeError, match=f"cannot run sketch: {reason}"):
        _dispatch.choose_backend("sketch", "triton", x, state, width)


def test_an_unknown_backend() -> None:
    with pytest.raises(EvaValueError, match="backend='cuda' is unknown"):
        _dispatch.choose_backend("sketch", "cuda", TOKENS, torch.float32)
