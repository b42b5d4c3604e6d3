"""``spectra``, which computes the results of many streams in few calls."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
import torch

import helpers
from eva_kernels.errors import EvaValueError
from eva_kernels.streaming import InputStream, Spectrum, _host, leading_ratios, spectra
from eva_kernels.streaming import batch as batch_module
from eva_kernels.streaming.spectrum import EIGEN_ARRAYS, _chunks, _values_and_ranks
from helpers import CPU, decaying, feed, with_spectrum
from host_reads import counted

# The Triton interpreter is slow, and nothing here depends on the backend.
make_stream = functools.partial(helpers.make_stream, backend="torch")
FIELDS = ("components", "values", "ratios", "mean", "count", "total", "rank", "lost")


def mixed_streams() -> list[InputStream]:
    """Return streams of several shapes, methods and dtypes, unsorted, with a step pending."""
    single, double = torch.float32, torch.float64
    shapes = [
        (48, 6, 12, "sketch", single),
        (24, 4, 8, "gram", single),
        (48, 6, 12, "sketch", single),
        (48, 4, 12, "sketch", single),
        (48, 6, 12, "sketch", double),
        (24, 4, 8, "gram", single),
        (24, 4, 8, "gram", double),
        (48, 6, 12, "sketch", single),
        (24, 4, 8, "sketch", single),
        (48, 6, 10, "sketch", single),
    ]
    streams = []
    for i, (d, k, width, method, dtype) in enumerate(shapes):
        # one is of low rank, one is constant, one is much larger than the others
        values = [9.0, 3.0] if i == 5 else decaying(d, scale=1e12 if i == 1 else 100)
        x = with_spectrum(100, d, values, dtype=dtype, seed=i) if i != 7 else torch.full((90, d), 2)
        stream = feed(make_stream(d, k, width, method=method, dtype=dtype), [x.to(dtype)[:60]])
        stream.add(x.to(dtype)[60:])
        streams.append(stream)
    return streams


def assert_same(one: Spectrum, other: Spectrum) -> None:
    """Compare two results up to rounding, since LAPACK's depends on memory alignment."""
    for name in FIELDS:
        found, expected = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-6, msg=name)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("chunk", [1, 3 * 12 * 48 * 8, 1 << 20])
def test_spectra_equal_those_of_single_streams(
    free: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "reads_are_free", lambda device: free)
    expected = [stream.spectrum() for stream in mixed_streams()]
    assert [a.rank for a in expected] == [6, 4, 6, 4, 6, 2, 4, 0, 4, 6]
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_ACCELERATOR"):
        monkeypatch.setattr(batch_module, name, chunk)
    for device in (None, CPU):
        streams = mixed_streams()
        found = spectra(streams, device)
        assert [s.pending for s in streams] == [0] * len(streams)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_chunk_has_as_many_layers_as_fit_its_bytes(
    method: str, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "reads_are_free", lambda device: free)
    x = with_spectrum(60, 12, decaying(12))
    streams = [feed(make_stream(12, 4, 8, method=method), [x]) for _ in "abcde"]
    rows = 8 if method == "sketch" else 12 * EIGEN_ARRAYS
    name = "CHUNK_BYTES" if free else "CHUNK_BYTES_ACCELERATOR"
    monkeypatch.setattr(batch_module, name, 2 * rows * 12 * 8)
    assert [len(chunk) for chunk in _chunks(streams)] == [2, 2, 1]


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_each_result_has_its_own_memory(
    method: str, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "reads_are_free", lambda device: free)
    x = with_spectrum(60, 12, decaying(12))
    streams = [feed(make_stream(12, 4, method=method), [x]) for _ in "abcd"]
    for answer in [*spectra(streams), streams[0].spectrum()]:
        for tensor in (answer.components, answer.mean):
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert len(pickle.dumps(tensor)) < tensor.nbytes + 2000
    before = streams[0].sketch.basis.clone()
    answer = streams[0].spectrum()
    for changed in (answer.components, answer.mean, answer.singular_values):
        changed.zero_()
    assert torch.equal(streams[0].sketch.basis, before)
    assert streams[0].spectrum().singular_values.all()
    assert streams[0].spectrum().mean.any()


@pytest.mark.parametrize(("method", "reads"), [("sketch", 0), ("gram", 1)])
def test_number_of_operators_does_not_grow_with_the_streams(
    method: str, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    x = with_spectrum(120, 24, decaying(24))

    def calls(count: int) -> int:
        streams = [feed(make_stream(24, 4, method=method), [x[:60]]) for _ in range(count)]
        with counted(monkeypatch) as counts:
            spectra(streams, CPU)
        assert counts.waits["read"] == reads
        found = counts.calls.total()
        for stream in streams:
            stream.add(x[60:])
        with counted(monkeypatch) as counts:
            spectra(streams, CPU)
        assert counts.waits["read"] == 1 + reads  # all pending steps are folded in one call
        return found

    assert calls(12) == calls(3)


@pytest.mark.parametrize(("alive", "features"), [(0, 24), (3, 24), (9, 24), (24, 24), (5, 7)])
def test_constant_features_are_not_decomposed(
    alive: int, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.full((120, features), 2.0)
    varying = torch.randperm(features)[:alive]
    if alive:
        x[:, varying] = with_spectrum(120, alive, decaying(alive))
    truth = torch.linalg.svdvals((x - x.mean(0)).double())[:6]
    sizes, eigh = [], torch.linalg.eigh

    def recording_eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(matrix.shape[-1])
        return eigh(matrix)

    stream = feed(make_stream(features, 6, method="gram"), [x[:60], x[60:]])
    monkeypatch.setattr(torch.linalg, "eigh", recording_eigh)
    answer = stream.spectrum()
    assert sizes == [alive]
    rank = min(alive, 6)
    assert answer.rank == rank
    torch.testing.assert_close(answer.singular_values[:rank], truth[:rank], rtol=1e-5, atol=0)
    rows = answer.components.double()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(6).double(), rtol=0, atol=1e-6)
    others = torch.ones(features, dtype=torch.bool)
    others[varying] = False
    assert not rows[:rank][:, others].any()


def test_no_component_is_kept_after_one_that_is_noise() -> None:
    stream = feed(make_stream(12, 3, method="gram"), [with_spectrum(60, 12, decaying(12))])
    squares = np.array([[100.0, 1.0, 0.5]])
    spread = np.array([[10.0, 1e4, 0.7]])  # the second has outlier features
    values, kept, rank = _values_and_ranks([stream], [squares, np.sqrt(squares), spread])[0]
    assert (values.tolist(), kept.tolist(), rank) == ([10.0, 0.0, 0.0], [100.0, 0.0, 0.0], 1)


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_variance_below_the_rounding_of_the_mean_is_ignored(method: str) -> None:
    x = 1 + 1e-9 * with_spectrum(60, 12, decaying(12), dtype=torch.float64)
    for dtype, rank in ((torch.float64, 4), (torch.float32, 0)):
        stream = feed(make_stream(12, 4, method=method, dtype=dtype), [x.to(dtype)])
        answer = stream.spectrum()
        assert answer.rank == rank
        assert (answer.ratios > 0).all() == (rank > 0)


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float64, 2), (torch.float32, 1)])
def test_rank_of_gram_depends_on_the_dtype_of_its_sums(dtype: torch.dtype, rank: int) -> None:
    x = with_spectrum(60, 12, [100.0, 1e-3], dtype=dtype)
    assert feed(make_stream(12, 4, method="gram", dtype=dtype), [x]).spectrum().rank == rank


def test_rank_is_less_than_the_number_of_tokens() -> None:
    stream = make_stream(12, 3, method="gram")
    stream.add(torch.randn(3, 12))
    statistics = [np.array([[9.0, 4.0, 1.0]]), np.array([[3.0, 2.0, 1.0]]), np.ones((1, 3))]
    assert _values_and_ranks([stream], statistics)[0][2] == 2


def test_spectra_without_tokens_raises() -> None:
    stream = feed(make_stream(12, 4), [with_spectrum(60, 12, decaying(12))])
    stream.add(torch.randn(5, 12))
    with pytest.raises(EvaValueError, match="no tokens were seen"):
        spectra([stream, make_stream(12, 4)])
    assert (stream.pending, stream.folds) == (5, 1)
    assert spectra([]) == []
    assert leading_ratios([]).size == 0


def test_leading_ratios_are_zero_without_a_component() -> None:
    wide, narrow, unused = (make_stream(12, k, width=12) for k in (4, 2, 3))
    x = with_spectrum(60, 12, decaying(12))
    found = leading_ratios([unused, feed(wide, [x]), feed(narrow, [x])])
    truth = torch.linalg.svdvals(x.double() - x.double().mean(0)).square().numpy()
    expected = np.zeros((3, 4))
    expected[1], expected[2, :2] = truth[:4] / truth.sum(), truth[:2] / truth.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-2)
