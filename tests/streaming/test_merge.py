"""Merged streams against one stream that was given all tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eva_kernels.errors import EvaValueError
from eva_kernels.streaming import InputStream, _host, compare_streams
from eva_kernels.streaming.merge import merge_gram, merge_sketch
from eva_kernels.streaming.state import clear_sums
from helpers import (
    EPS32,
    TOLERANCES,
    decaying,
    exact,
    feed,
    lost_variance,
    make_stream,
    orthonormality,
    principal_cosine,
    relative,
    with_spectrum,
)

METHODS = ["sketch", "gram"]
examples = settings(max_examples=12, deadline=None, derandomize=True, database=None)
counts = st.tuples(*[st.integers(1, 90)] * 3)


def stream_of(x: Tensor, method: str = "sketch", k: int = 8) -> InputStream:
    stream = feed(make_stream(x.shape[1], k, method=method, dtype=x.dtype), x.split(50))
    stream.spectrum()
    return stream


def parts_of_low_rank(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return batches that all lie in one span of 5 directions, each about a mean of its own."""
    x = with_spectrum(300, 32, [30.0, 20.0, 10.0, 5.0, 2.0], dtype=torch.float64)
    return x[: sum(sizes)].split(sizes)


@examples
@given(sizes=counts)
def test_sketch_merge_is_commutative(sizes: tuple[int, ...]):
    left, right = (stream_of(part).state for part in parts_of_low_rank(sizes)[:2])
    one, other = merge_sketch(left, right), merge_sketch(right, left)
    assert one.count == other.count
    assert int(one.rank) == int(other.rank)
    torch.testing.assert_close(one.singular_values, other.singular_values, rtol=1e-9, atol=1e-7)
    assert one.total == pytest.approx(other.total, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=1e-12)
    rank = int(one.rank)
    if rank:
        assert 1 - principal_cosine(one.basis[:rank], other.basis[:rank]) <= 1e-9


@examples
@given(sizes=counts)
def test_sketch_merge_is_associative_and_equals_one_stream(sizes: tuple[int, ...]):
    parts = parts_of_low_rank(sizes)
    a, b, c = (stream_of(part).state for part in parts)
    left, right = merge_sketch(merge_sketch(a, b), c), merge_sketch(a, merge_sketch(b, c))
    values, _, total = exact(torch.cat(parts))
    for merged in (left, right):
        assert float(merged.count) == sum(sizes)
        # Within the span the sketch is exact; beyond it there is only rounding.
        kept = min(5, len(values))
        expected = values[:kept]
        torch.testing.assert_close(merged.singular_values[:kept], expected, rtol=1e-6, atol=1e-5)
        assert abs(float(merged.total) - total) <= 1e-10 * (1 + total)
        assert orthonormality(merged.basis) <= TOLERANCES[torch.float64].orthonormal
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-12, atol=1e-12)


def test_merge_of_full_rank_sketches():
    x = with_spectrum(800, 96, decaying(96), offset=30.0)
    left, right = stream_of(x[:300], k=12), stream_of(x[300:], k=12)
    left.merge(right)
    answer = left.spectrum()
    assert answer.count == 800
    assert left.sketch.basis.is_contiguous()
    assert lost_variance(x, answer.components) <= 1e-3
    assert abs(answer.total / exact(x)[2] - 1) <= 40 * EPS32
    assert orthonormality(answer.components) <= TOLERANCES[torch.float32].orthonormal


def test_merge_of_rank_one_below_the_width():
    x = with_spectrum(300, 32, decaying(15), dtype=torch.float64)
    left, right = stream_of(x[:100]).state, stream_of(x[100:]).state
    merged = merge_sketch(left, right)
    assert (merged.rank, len(merged.basis)) == (15, 16)
    assert merged.values[15] == 0
    assert merged.basis.is_contiguous()
    assert orthonormality(merged.basis) <= TOLERANCES[torch.float64].orthonormal


def test_merge_whose_squared_mean_overflows_float32():
    far = torch.full((32,), 4e18)
    states = [replace(stream_of(torch.randn(60, 32)).state, mean=far) for _ in "ab"]
    assert merge_sketch(*states).mean_norm == pytest.approx(4e18 * 32**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_of_grams_is_exact(dtype: torch.dtype):
    x = with_spectrum(800, 48, decaying(48, 0.3), offset=3.0, dtype=dtype)
    x[300:] += 1
    left, right = (stream_of(part, "gram") for part in (x[:300], x[300:]))
    pivot = left.state.pivot.clone()
    left.merge(right)
    assert torch.equal(left.state.pivot, pivot)
    assert left.sums.products.dtype == dtype
    answer = left.spectrum()
    assert answer.count == 800
    assert relative(answer.singular_values, exact(x)[0][:8]) <= TOLERANCES[dtype].values
    assert abs(lost_variance(x, answer.components)) <= 1e-9
    assert relative(answer.mean, x.double().mean(0)) <= TOLERANCES[dtype].sums


def test_merged_gram_sums_are_relative_to_the_left_pivot():
    x = torch.randn(90, 12, dtype=torch.float64)
    left, right = stream_of(x[:40], "gram", k=4), stream_of(x[40:], "gram", k=4)
    merged = merge_gram(left.state, right.state)
    centred = x - left.state.pivot
    torch.testing.assert_close(merged.sums.products, centred.mT @ centred)
    torch.testing.assert_close(merged.sums.shift, centred.sum(0))
    torch.testing.assert_close(merged.sums.square, centred.square().sum())
    assert merged.sketch is left.state.sketch


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("method", METHODS)
def test_merged_stream_accepts_more_tokens(method: str, scale: float):
    x = scale * with_spectrum(400, 32, [30.0, 20.0, 10.0], dtype=torch.float64)
    left, right = stream_of(x[:100], method), stream_of(x[100:250], method)
    left.merge(right)
    assert left.sketch.rank == 3
    answer = feed(left, [x[250:]]).spectrum()
    assert (answer.count, answer.rank) == (400, 3)
    assert relative(answer.singular_values[:3], exact(x)[0][:3]) <= 1e-9


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_merged_stream_is_compared_with_its_merged_basis(
    method: str, free: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_host, "reads_are_free", lambda device: free)
    left, right = (stream_of(torch.randn(100, 32), method) for _ in "ab")
    before = left.previous.clone()
    left.merge(right)
    cosines = (before * left.sketch.basis[:8]).sum(1).abs()
    compare_streams([left], [8], tau=0.5)
    torch.testing.assert_close(left.cosines, cosines, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_pending_tokens_are_merged(method: str):
    x = with_spectrum(210, 32, [30.0, 20.0, 10.0], dtype=torch.float64)
    left, right = stream_of(x[:100], method), stream_of(x[100:200], method)
    left.add(x[200:205])
    right.add(x[205:])
    left.skipped, right.skipped = 2, 3
    left.merge(right)
    assert (left.spectrum().count, left.skipped) == (210, 5)
    assert relative(left.spectrum().singular_values[:3], exact(x)[0][:3]) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_merge_with_empty_streams(method: str):
    x = torch.randn(60, 32)
    full, empty, other = stream_of(x, method), *(make_stream(32, 8, method=method) for _ in "ab")
    empty.skipped, other.skipped = 7, 5  # all tokens that they were given
    expected = full.spectrum()
    full.merge(other)
    empty.merge(full)
    for stream in (full, empty):
        assert stream.spectrum().count == 60
        assert torch.equal(stream.spectrum().components, expected.components)
    assert (full.skipped, empty.skipped) == (5, 12)
    feed(empty, [torch.randn(60, 32)])
    assert torch.equal(full.spectrum().components, expected.components)  # no memory is shared


@pytest.mark.parametrize("method", METHODS)
def test_merge_of_a_compared_stream_resets_convergence(method: str):
    x = with_spectrum(300, 32, decaying(32))
    stream, other = stream_of(x[:200], method), stream_of(x[200:], method)
    compare_streams([stream], [4], tau=0.0)
    assert stream.converged
    stream.merge(other)
    compare_streams([stream], [4], tau=0.0)
    assert (stream.similarity, stream.converged, stream.settled) == (None, False, 8)


def test_merge_of_gram_streams_with_cleared_sums():
    left, right = (stream_of(torch.randn(60, 32), "gram") for _ in "ab")
    clear_sums([left.sums, right.sums])  # as after an overflow
    left.merge(right)
    assert (left.tokens, left.sketch.total, left.spectrum().rank) == (0, 0.0, 0)
    assert orthonormality(left.sketch.basis) <= TOLERANCES[torch.float32].orthonormal


def test_merge_of_all_zero_streams():
    left, right = (stream_of(torch.zeros(60, 32)) for _ in "ab")
    left.merge(right)
    assert (left.sketch.rank, left.sketch.total) == (0, 0.0)
    assert orthonormality(left.sketch.basis) <= TOLERANCES[torch.float32].orthonormal


def test_merge_of_constant_streams():
    left, right = stream_of(torch.full((60, 32), 3.3)), stream_of(torch.full((20, 32), 3.3))
    left.merge(right)
    assert (left.spectrum().rank, left.spectrum().count) == (0, 80)
    far = stream_of(torch.full((20, 32), 5.3))
    left.merge(far)
    assert left.spectrum().rank == 1
    assert left.spectrum().ratio[0] == pytest.approx(1.0, abs=1e-5)
    assert not left.sketch.values[1:].any()
    assert left.sketch.mean_norm == pytest.approx(float(left.sketch.mean.norm()))


def test_merge_of_sketch_and_gram_raises():
    x = torch.randn(60, 32)
    with pytest.raises(EvaValueError, match=r"a sketch and an exact \(gram\) stream cannot be"):
        stream_of(x).merge(stream_of(x, "gram"))
