"""Tokens of several dtypes and tensor classes, some not finite, on CPU and accelerator paths."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from eva_kernels import IncrementalPCA
from eva_kernels.reference import TILE_ROWS
from eva_kernels.streaming import _host
from helpers import TOLERANCES, decaying, exact, feed, make_stream, relative, with_spectrum


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_tokens_of_another_dtype_than_the_state(
    method: str, dtype: torch.dtype, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "reads_are_free", lambda device: free)
    x = with_spectrum(200, 16, decaying(16), dtype=torch.float64).to(dtype)
    stream = make_stream(16, 4, 16, method=method, backend="torch")
    answer = feed(stream, x.split(50)).spectrum()
    assert answer.components.dtype == stream.sketch.basis.dtype == torch.float32
    limit = TOLERANCES[torch.float32].values
    assert relative(answer.singular_values, exact(x)[0][:4]) <= limit


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_short_floats_are_widened_tile_by_tile(method: str, chosen: bool) -> None:
    x = torch.randn(8 * TILE_ROWS, 32).bfloat16()
    rows = torch.arange(0, len(x), 2) if chosen else None
    stream = feed(make_stream(32, 4, method=method), [x])
    with profile(profile_memory=True) as profiled:
        stream.add(x, rows)
    largest = max(event.cpu_memory_usage for event in profiled.function_events)
    assert largest <= TILE_ROWS * 32 * 4


def test_tokens_whose_features_are_far_apart_in_memory_are_checked_as_fast() -> None:
    x = torch.randn(2048, 2048)
    stream = feed(make_stream(2048, 4), [x])

    def seconds(tokens: Tensor) -> float:
        begin = time.perf_counter()
        stream._finite_rows(tokens, None)
        return time.perf_counter() - begin

    transposed = x.mT.contiguous().mT
    times = [(seconds(x), seconds(transposed)) for _ in range(9)]
    usual, found = map(min, zip(*times, strict=True))
    assert found <= 8 * usual  # row by row it takes 50 times as long


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_large_finite_tokens_are_kept_beside_a_bad_one(method: str) -> None:
    # The norm of the finite tokens overflows in half precision, no entry does.
    x = 3e4 * torch.randn(64, 24).sign().half()
    x[9, 3] = torch.nan
    stream = make_stream(24, 4, 24, method=method, skip_nonfinite=True)
    assert stream.add(x) == 63
    assert stream.skipped == 1
    kept = torch.cat([x[:9], x[10:]])
    found = stream.spectrum().singular_values
    assert relative(found[:1], exact(kept)[0][:1]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_no_gradient_is_tracked(method: str, dtype: torch.dtype) -> None:
    parts = [part.to(dtype) for part in with_spectrum(100, 16, decaying(16)).split(50)]
    found, expected = (
        feed(make_stream(16, 4, 8, method=method, backend="torch"), given).spectrum().components
        for given in ([part.clone().requires_grad_() for part in parts], parts)
    )
    assert not found.requires_grad
    assert torch.equal(found, expected)


class CustomTensor(Tensor):
    """A subclass whose methods differ and whose copies inherit them, as MONAI's images."""

    def new_empty(self, size: tuple[int, ...]) -> Tensor:
        raise TypeError("there is none without a name")


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_tokens_of_a_tensor_subclass(method: str) -> None:
    parts = with_spectrum(200, 16, decaying(16)).split(50)
    found, expected = (
        feed(make_stream(16, 4, 8, method=method, backend="torch"), given).spectrum().components
        for given in ([part.as_subclass(CustomTensor) for part in parts], parts)
    )
    assert type(found) is Tensor
    assert torch.equal(found, expected)
    pca = IncrementalPCA(4, method=method).fit(torch.cat(parts).as_subclass(CustomTensor))
    assert {type(pca.components_), type(pca.mean_), type(pca.var_)} == {Tensor}
    assert type(pca.transform(parts[0].as_subclass(CustomTensor))) is Tensor
