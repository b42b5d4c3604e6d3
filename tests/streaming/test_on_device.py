"""Streams with kernels and native code, on the GPU if there is one, against a full SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eva_kernels import IncrementalPCA
from eva_kernels.errors import NonFiniteError
from eva_kernels.streaming import (
    InputStream,
    compare_streams,
    export_stream,
    fold_streams,
    restore_stream,
)
from helpers import decaying, exact, lost_variance, make_stream, orthonormality, with_spectrum

# (D, K): two layers of one shape, one of another width, one whose features fill no tile.
SHAPES = [(96, 8), (200, 8), (96, 8), (65, 20)]
TOKENS, STEPS = 640, 5


def add(stream: InputStream, x: Tensor, padded: bool = False) -> None:
    """Add tokens; if ``padded``, among others that are not selected."""
    if not padded:
        stream.add(x.to(stream.device))
        return
    wide = x.new_full((len(x) + 30, x.shape[1]), torch.nan)
    rows = torch.randperm(len(wide))[: len(x)]
    wide[rows] = x
    stream.add(wide.to(stream.device), rows.to(stream.device))


def step(streams: list[InputStream], x: Tensor) -> None:
    """Give streams the same tokens, and fold them."""
    for stream in streams:
        add(stream, x)
    fold_streams(streams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_streams_agree_with_a_full_svd(
    method: str, dtype: torch.dtype, device: torch.device
) -> None:
    data = [
        with_spectrum(TOKENS, d, decaying(2 * k), offset=50, seed=i).to(dtype)
        for i, (d, k) in enumerate(SHAPES)
    ]
    streams = [make_stream(d, k, device=device, method=method) for d, k in SHAPES]
    for number in range(STEPS):
        for stream, x in zip(streams, data, strict=True):
            for i, part in enumerate(x.chunk(STEPS)[number].chunk(2)):
                add(stream, part, padded=i == 1)
        folded = fold_streams(streams)
        assert len(folded) == len(streams)
        compare_streams(folded, [2] * len(streams), tau=0.9)
    for stream, x in zip(streams, data, strict=True):
        answer, (values, _, total) = stream.spectrum(), exact(x)
        assert (answer.count, stream.folds, stream.converged) == (TOKENS, STEPS, True)
        assert answer.components.device == answer.mean.device == device
        components = answer.components.cpu()
        assert orthonormality(components) <= 1e-5
        assert lost_variance(x, components) <= 1e-4
        found = answer.singular_values
        torch.testing.assert_close(found, values[: len(found)], rtol=1e-3, atol=0)
        assert answer.total == pytest.approx(total, rel=1e-4)
        torch.testing.assert_close(
            answer.mean.cpu().double(), x.double().mean(0), rtol=0, atol=1e-4
        )


def test_rank_deficient_data(device: torch.device) -> None:
    x = with_spectrum(TOKENS, 96, [50, 20, 3], offset=2)
    streams = [make_stream(96, 8, device=device) for _ in range(2)]
    for part in x.chunk(STEPS):
        add(streams[0], part)
        add(streams[1], torch.full_like(part, 2.0))
        fold_streams(streams)
    answer, nothing = (stream.spectrum() for stream in streams)
    assert (answer.rank, nothing.rank) == (3, 0)
    assert orthonormality(answer.components.cpu()) <= 1e-5
    assert orthonormality(nothing.components.cpu()) <= 1e-5
    torch.testing.assert_close(answer.singular_values[:3], exact(x)[0][:3], rtol=1e-3, atol=0)
    assert not nothing.ratio.any()


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_bad_step_keeps_the_previous_state(method: str, device: torch.device) -> None:
    x = with_spectrum(TOKENS, 96, decaying(16))
    stream = make_stream(96, 8, device=device, method=method)
    first, *others = x.chunk(STEPS)
    step([stream], first)
    other = stream.clone()
    broken = first.clone()
    broken[3, 5] = torch.inf
    with pytest.raises(NonFiniteError, match=r"1 of 128 tokens hold|some of 128 tokens hold"):
        step([stream], broken)
    if stream.pending:  # an exact stream on a GPU keeps the finite tokens
        assert stream.pending == 127
        add(other, torch.cat([first[:3], first[4:]]))
    for part in others:
        step([stream, other], part)
    assert stream.tokens == other.tokens
    found, expected = stream.spectrum(), other.spectrum()
    torch.testing.assert_close(found.components, expected.components, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.singular_values, expected.singular_values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_stream_restored_from_a_file_continues_with_the_same_bits(
    method: str, device: torch.device
) -> None:
    x = with_spectrum(TOKENS, 96, decaying(96)).bfloat16()
    stream = make_stream(96, 8, device=device, method=method)
    for i, part in enumerate(x.chunk(STEPS)):
        if i == 2:
            other = make_stream(96, 8, device=device, method=method)
            record, tensors = export_stream(stream)
            restore_stream(other, record, {name: t.cpu() for name, t in tensors.items()})
        step([stream, other] if i >= 2 else [stream], part)
    found, expected = other.spectrum(), stream.spectrum()
    assert torch.equal(found.components, expected.components)
    assert torch.equal(found.singular_values, expected.singular_values)


def test_incremental_pca_stays_on_the_device(device: torch.device) -> None:
    x = with_spectrum(TOKENS, 96, decaying(16), offset=5)
    found = IncrementalPCA(n_components=8)
    for part in x.chunk(STEPS):
        found.partial_fit(part.to(device), mask=torch.ones(len(part), dtype=torch.bool))
    assert {found.components_.device, found.var_.device, found.mean_.device} == {device}
    assert lost_variance(x, found.components_.cpu()) <= 1e-4
    near = found.inverse_transform(found.transform(x.to(device))).cpu()
    centred = x.double() - x.double().mean(0)
    miss = (near.double() - x.double()).square().sum() / centred.square().sum()
    values = exact(x)[0].square()
    assert float(miss) == pytest.approx(float(values[8:].sum() / values.sum()), rel=1e-2)
