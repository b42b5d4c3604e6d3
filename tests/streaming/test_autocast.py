"""Autocast around the engine changes nothing: the same bits as without."""

from __future__ import annotations

from collections.abc import Iterator
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
from helpers import decaying, make_stream, with_spectrum

METHODS = ["sketch", "gram"]


@contextmanager
def cast(on: bool) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext():
        yield


def lives(method: str, criterion: str, on: bool) -> tuple[list[InputStream], list[Tensor]]:
    """Return streams with a past and their answers' components, each call under autocast or not."""
    x = with_spectrum(300, 40, decaying(40))
    streams = [make_stream(40, 6, method=method, backend="torch") for _ in range(3)]
    for part in x.split(100):
        for i, stream in enumerate(streams):
            with cast(on):
                stream.add(part * (i + 1))
        with cast(on):
            begun = begin_fold(streams)
        with cast(on):
            folded = begun.finish()
        with cast(on):
            compare_streams(folded, [4] * 3, tau=0.5, criterion=criterion)
    with cast(on):
        streams[0].merge(streams.pop())
    streams[0].add(x[:50])
    with cast(on):
        answers = spectra(streams)
    return streams, [answer.components for answer in answers]


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
@pytest.mark.parametrize("method", METHODS)
def test_streams(method: str, criterion: str, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host, "reads_are_free", lambda device: free)
    (found, components), (expected, wanted) = (lives(method, criterion, on) for on in (True, False))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.sketch.basis, other.sketch.basis)
        assert one.similarity == other.similarity
    assert all(map(torch.equal, components, wanted))


@pytest.mark.parametrize("method", METHODS)
def test_incremental_pca(method: str) -> None:
    x = with_spectrum(300, 40, decaying(40))
    results = []
    for on in (True, False):
        with cast(on):
            pca = IncrementalPCA(6, method=method).fit(x[:200])
            pca.merge(IncrementalPCA(6, method=method).fit(x[200:]))
            reduced = pca.transform(x)
            results.append((reduced, pca.inverse_transform(reduced), pca.get_covariance()))
    assert all(map(torch.equal, *results))
