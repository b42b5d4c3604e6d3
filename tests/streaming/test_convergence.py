"""Convergence of streams after a fold, on the code paths of CPUs and accelerators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.linalg import svdvals

from eva_kernels.streaming import (
    InputStream,
    _host,
    compare_streams,
    fold_streams,
    leading_similar,
)
from helpers import decaying, feed, make_stream, with_spectrum

D, K = 24, 6


@pytest.fixture(params=[True, False], autouse=True)
def reads_are_free(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host, "reads_are_free", lambda device: request.param)


def stream_with(previous: Tensor | None = None, seed: int = 0) -> InputStream:
    """Return a folded stream whose previous rows are ``previous``, or its own if ``None``."""
    x = with_spectrum(100, D, decaying(D), seed=seed)
    stream = feed(make_stream(D, K, backend="torch"), [x])
    assert stream.sketch is not None
    stream.previous = stream.sketch.basis[:K].clone() if previous is None else previous
    return stream


def other_rows(seed: int) -> Tensor:
    draw = torch.randn(D, K, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw).Q.mT


@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
def test_similarity_equal_to_tau_converges(criterion: str) -> None:
    level = stream_with(other_rows(1))
    compare_streams([level], [3], tau=0.0, criterion=criterion)
    assert 0 < level.similarity < 1
    for tau, enough in ((level.similarity, True), (level.similarity + 1e-6, False)):
        stream = stream_with(other_rows(1))
        compare_streams([stream], [3], tau=tau, criterion=criterion)
        assert (stream.converged, stream.settled >= 3) == (enough, enough)


def test_leading_similar_stops_at_the_first_component_below_tau() -> None:
    cosines = torch.tensor([0.99, 0.9, 0.2, 0.9])
    assert [leading_similar(cosines, tau) for tau in (0.99, 0.9, 0.2, 1.0)] == [1, 2, 4, 0]
    assert leading_similar(torch.tensor([0.9, torch.nan, 0.9]), 0.0) == 1


@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
def test_each_stream_is_compared_in_its_own_rank(criterion: str) -> None:
    ranks = [1, 5, 0, 3]
    streams = [stream_with(other_rows(seed), seed) for seed in range(len(ranks))]
    streams[3] = stream_with()
    expected = []
    for stream, rank in zip(streams, ranks, strict=True):
        overlap = stream.sketch.basis[:rank].double() @ stream.previous[:rank].double().mT
        cosines = overlap.diagonal().abs() if criterion == "cosine" else svdvals(overlap)
        expected.append(float(cosines.min()) if rank else 1.0)
    compare_streams(streams, ranks, tau=0.5, criterion=criterion)
    assert [s.similarity for s in streams] == pytest.approx(expected, abs=1e-5)
    assert [s.converged for s in streams] == [value >= 0.5 for value in expected]
    assert [s.settled for s in streams[:3]] == [0, 0, 0]
    assert streams[3].settled >= 3


@pytest.mark.parametrize("seed", range(6))
def test_new_direction_in_the_span_gives_similarity_zero(seed: int) -> None:
    stream = stream_with(seed=seed)
    rows = stream.previous.double()
    new = torch.linalg.qr(torch.cat([rows, other_rows(seed).double()]).mT).Q.mT[K:]
    rows[2] = new[0]
    stream.previous = (torch.linalg.qr(torch.randn(K, K, dtype=torch.float64)).Q @ rows).float()
    compare_streams([stream], [K], tau=0.5, criterion="subspace")
    assert stream.similarity == pytest.approx(0, abs=1e-3)
    assert not stream.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_stream_in_its_first_step_is_folded_with_others(method: str, dtype: torch.dtype) -> None:
    x = with_spectrum(100, D, decaying(D), dtype=dtype)
    late, early = (make_stream(D, K, method=method, dtype=dtype) for _ in range(2))
    before = feed(early, [x]).sketch.basis[:K].clone()
    for stream in (late, early):
        stream.add(x)
    folded = fold_streams([late, early])
    compare_streams(folded, [K] * 2, tau=0.9)
    assert late.similarity is None
    turned = (before * early.sketch.basis[:K]).sum(1).abs().min()
    assert early.similarity == pytest.approx(float(turned), abs=1e-5)
