"""The first basis of a stream on the accelerator path, where no values are read on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eva_kernels import _native
from eva_kernels.errors import NonFiniteError
from eva_kernels.streaming import InputStream, _host, fold_streams
from eva_kernels.streaming import fold as fold_module
from eva_kernels.streaming import nystrom as nystrom_module
from helpers import make_stream, orthonormality, principal_cosine

WIDTH = 32


@pytest.fixture(params=["native", "native folds", "plain"], autouse=True)
def accelerator_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the code path of a GPU, with the compiled CPU kernels or PyTorch in place of its kernels.

    "native folds" mixes both, as where (Q, Q) matrices do not fit into shared memory.
    """
    folds, decomposes = request.param != "plain", request.param == "native"
    if folds and (reason := _native.unavailable_reason("cpu")):
        pytest.skip(reason)
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    monkeypatch.setattr(fold_module, "runs_natively", lambda basis: folds)
    monkeypatch.setattr(fold_module, "starts_natively", lambda basis: decomposes)
    monkeypatch.setattr(nystrom_module, "runs_natively", lambda core: decomposes)


def few_tokens() -> Tensor:
    return torch.randn(8, 300, dtype=torch.float64)


def dead_features() -> Tensor:
    x = torch.randn(200, 300, dtype=torch.float64)
    x[:, 6:] = 0
    return x


def low_rank() -> Tensor:
    return torch.randn(200, 20, dtype=torch.float64) @ torch.randn(20, 300, dtype=torch.float64)


def started(x: Tensor) -> InputStream:
    stream = make_stream(x.shape[1], WIDTH // 2, WIDTH, backend="torch")
    stream.add(x.float())
    return stream


@pytest.mark.parametrize("scale", [1e-10, 1e-6, 1.0, 1e6, 1e8])
@pytest.mark.parametrize(("data", "rank"), [(few_tokens, 7), (dead_features, 6), (low_rank, 20)])
def test_rank_deficient_data_at_any_scale(data, rank: int, scale: float) -> None:
    x = data()
    stream = started(x * scale)
    basis = stream.sketch.basis
    assert orthonormality(basis) < 5e-7
    exact = torch.linalg.svd(x - x.mean(0))[2][:rank].float()
    assert 1 - principal_cosine(basis[:rank], exact) < 1e-6
    fold_streams([stream], final=True)
    assert stream.sketch.rank == rank
    expected = torch.linalg.svdvals(x - x.mean(0))[:rank] * scale
    torch.testing.assert_close(
        stream.sketch.singular_values[:rank], expected, rtol=1e-5, atol=1e-6 * float(expected[0])
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("outlier", [1e3, 1e5])
def test_outlier_feature_at_any_scale(outlier: float, scale: float) -> None:
    spread = torch.logspace(0, -2, 300, dtype=torch.float64)
    spread[0] = outlier
    x = torch.randn(600, 300, dtype=torch.float64) * spread + 1
    stream = started(x * scale)
    assert orthonormality(stream.sketch.basis) < 5e-7
    fold_streams([stream], final=True)
    assert stream.sketch.rank == WIDTH
    # The direction of the outlier is exact; the rest captures most of what 15 components can.
    rest = x - x.mean(0)
    first = torch.linalg.svd(rest, full_matrices=False)[2][:1]
    rest = rest - (rest @ first.mT) @ first
    found = torch.linalg.qr(torch.cat([first, stream.sketch.basis[:16].double()]).mT).Q
    best = float(torch.linalg.svdvals(rest)[:15].square().sum())
    assert float((rest @ found).square().sum()) > 0.8 * best


def test_first_basis_after_nonfinite_tokens_is_that_of_a_new_stream() -> None:
    x = torch.randn(100, 40)
    stream, other = (make_stream(40, 4, backend="torch") for _ in range(2))
    bad = x.clone()
    bad[3, 5] = torch.nan
    stream.add(bad)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        fold_streams([stream])
    for one in (stream, other):
        one.add(x)
        fold_streams([one])
    assert torch.equal(stream.sketch.basis, other.sketch.basis)


def test_merged_stream_is_folded_with_others() -> None:
    streams = [make_stream(40, 4, backend="torch") for _ in range(3)]
    batches = [torch.randn(100, 40) * torch.logspace(0, -1, 40) for _ in streams]
    for stream, x in zip(streams, batches, strict=True):
        stream.add(x)
    streams[1].merge(streams.pop())
    for stream, x in zip(streams, batches, strict=False):
        stream.add(x)
    fold_streams(streams)
    merged = torch.cat([batches[1], batches[2], batches[1]]).double()
    exact = torch.linalg.svdvals(merged - merged.mean(0))[:4]
    torch.testing.assert_close(streams[1].sketch.singular_values[:4], exact, rtol=0.1, atol=0)
    assert streams[1].pending_cosines is not None
