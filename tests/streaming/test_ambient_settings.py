"""Ambient autocast, default dtype and default device do not change any bit of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from eva_kernels import IncrementalPCA
from eva_kernels.streaming import (
    InputStream,
    _host,
    begin_fold,
    compare_streams,
    spectra,
)
from eva_kernels.streaming._autocast import without_autocast
from helpers import decaying, make_stream, with_spectrum

METHODS = ["sketch", "gram"]
OTHER = torch.device("xpu", 7)
full = torch.full
AMBIENT = ["autocast", "another device", "bfloat16", "float64"]


@contextmanager
def ambient(what: str) -> Iterator[None]:
    contexts = {
        "": nullcontext(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "another device": torch.device("meta"),
    }
    if what in contexts:
        with contexts[what]:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, what))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_streams(method: str, criterion: str, what: str) -> tuple[list[InputStream], list[Tensor]]:
    """Return streams after adds, folds and a merge, and their components.

    Every call runs under the ambient setting ``what``.
    """
    x = with_spectrum(300, 40, decaying(40))
    streams = [make_stream(40, 6, method=method, backend="torch") for _ in range(3)]
    for part in x.split(100):
        for i, stream in enumerate(streams):
            with ambient(what):
                stream.add(part * (i + 1))
        with ambient(what):
            pending = begin_fold(streams)
        with ambient(what):
            folded = pending.finish()
        with ambient(what):
            compare_streams(folded, [4] * 3, tau=0.5, criterion=criterion)
    with ambient(what):
        streams[0].merge(streams.pop())
    streams[0].add(x[:50])
    with ambient(what):
        answers = spectra(streams)
    return streams, [answer.components for answer in answers]


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
@pytest.mark.parametrize("what", AMBIENT)
@pytest.mark.parametrize("method", METHODS)
def test_streams_ignore_ambient_settings(
    method: str, what: str, criterion: str, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "reads_are_free", lambda device: free)
    (found, components), (expected, expected_components) = (
        run_streams(method, criterion, w) for w in (what, "")
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.sketch.basis, other.sketch.basis)
        assert one.similarity == other.similarity
    assert all(map(torch.equal, components, expected_components))


@pytest.mark.parametrize("what", AMBIENT)
@pytest.mark.parametrize("method", METHODS)
def test_incremental_pca_ignores_ambient_settings(method: str, what: str) -> None:
    x = with_spectrum(300, 40, decaying(40))
    results = []
    for one in (what, ""):
        with ambient(one):
            pca = IncrementalPCA(6, method=method).fit(x[:200])
            pca.partial_fit(x[:90], mask=[i < 60 for i in range(90)])
            pca.merge(IncrementalPCA(6, method=method).fit(x[200:].numpy()))
            reduced = pca.transform(x)
            results.append((reduced, pca.inverse_transform(reduced), pca.get_covariance()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("made", "home"),
    [
        (lambda x, **like: x.double() + 2.0**-40, OTHER),
        (lambda x, **like: x, torch.device("cpu")),  # accepts float64, but returns float32
        (lambda x, **like: x.new_empty(0).to("no device"), torch.device("cpu")),
    ],
)
def test_device_of_the_state(
    made: Callable[..., Tensor], home: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "full", lambda *like, **where: made(full(*like), **where))
    _host._supports_float64.cache_clear()
    try:
        assert _host.state_device(OTHER) == home
        assert InputStream(8, 2, 4, OTHER).device == home
    finally:
        _host._supports_float64.cache_clear()


def test_autocast_of_an_unknown_accelerator_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    enabled = without_autocast(torch._C._is_any_autocast_enabled)
    with torch.autocast("hpu", dtype=torch.bfloat16):
        assert not enabled()
        assert torch._C._is_any_autocast_enabled()


def test_autocast_is_disabled_where_torch_raises_for_want_of_an_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_available() -> torch.device:
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", none_available)
    enabled = without_autocast(torch._C._is_any_autocast_enabled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not enabled()
