"""The gram op against the same sums in float64, the same tests for every backend."""

import pytest
import torch
from torch import Tensor

from eva_kernels.errors import EvaValueError
from eva_kernels.ops import gram
from helpers import BACKENDS, KINDS, PLANES, TOLERANCES, products_limit, relative

SHAPES = [(1, 33), (127, 250), (513, 33), (521, 400)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def state(x: Tensor, pivot: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return pivot and empty sums for x, in the dtype of its stream."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    d = x.shape[1]
    pivot = (torch.zeros(d) if pivot is None else pivot).to(dtype)
    sums = (torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    return tuple(t.to(x.device) for t in (pivot, torch.zeros(d, d, dtype=dtype), *sums))


def check(x: Tensor, backend: str, pivot: Tensor | None = None, rows: Tensor | None = None):
    pivot, scatter, shift, square = state(x, pivot)
    gram(x, pivot, scatter, shift, square, rows, backend=backend)
    centred = (x if rows is None else x[rows]).double() - pivot.double()
    limit = TOLERANCES[x.dtype]
    assert relative(scatter, centred.mT @ centred) <= products_limit(backend, x.dtype)
    magnitude = centred.abs().sum(0).clamp_min(1e-300)
    assert float(((shift - centred.sum(0)).abs() / magnitude).max()) <= limit.sums
    assert relative(square, centred.square().sum()) <= limit.sums


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_sums(n: int, d: int, dtype: torch.dtype, backend: str, device: torch.device):
    check(torch.randn(n, d, device=device).to(dtype), backend)


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_outliers_and_offset(dtype: torch.dtype, backend: str, device: torch.device):
    x = torch.randn(301, 250, device=device)
    x[:, 7], x[:, 100], x[0] = 800.0, -800.0, 800.0 * x[0].sign()
    check(x.to(dtype), backend)
    offset = (torch.randn(301, 250, device=device) + 800).to(dtype)
    check(offset, backend, pivot=torch.full((250,), 800.0))


def test_requested_precision_is_used(backend: str, device: torch.device):
    x, error = torch.randn(127, 40, device=device), {}
    for precision in PLANES:
        pivot, *sums = state(x)
        gram(x, pivot, *sums, backend=backend, precision=precision)
        error[precision] = relative(sums[0], x.double().mT @ x.double())
        assert error[precision] <= products_limit(backend, x.dtype, precision)
    assert (error["fast"] > 10 * error["high"]) == (backend == "triton")


def test_pivot_that_differs_by_feature(backend: str, device: torch.device):
    x = torch.randn(127, 250, device=device)
    check(x, backend, pivot=torch.linspace(-3, 3, 250))


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_strided_tokens(dtype: torch.dtype, backend: str, device: torch.device):
    wide = torch.full((600, 80), float("nan"), device=device, dtype=dtype)
    wide[1::3, 3:70:2] = torch.randn(200, 34, device=device).to(dtype)
    check(wide[1::3, 3:70:2], backend)
    check(torch.randn(34, 200, device=device).to(dtype).mT, backend)


# Whole tiles, in splits of 17 and 16 tiles; and tiles that are whole along one side only.
@pytest.mark.parametrize(("n", "d"), [(2112, 256), (128, 250), (127, 256)])
def test_memory_around_the_tokens_is_not_read(n: int, d: int, backend: str, device: torch.device):
    wide = torch.full((n + 128, d + 128), float("nan"), device=device, dtype=torch.bfloat16)
    wide[:n, :d] = torch.randn(n, d, device=device)
    check(wide[:n, :d], backend)


def test_strided_pivot_and_rows(backend: str, device: torch.device):
    x, rows = torch.randn(300, 34, device=device), torch.arange(300, device=device)[::3]
    dense, gaps = [state(x, torch.randn(34)) for _ in range(2)]
    gram(x, *dense, rows.contiguous(), backend=backend)
    gram(x, torch.stack([dense[0]] * 2, -1)[:, 0], *gaps[1:], rows, backend=backend)
    assert all(map(torch.equal, dense[1:], gaps[1:]))


def test_rows_that_are_not_selected_may_be_nan(backend: str, device: torch.device):
    x = torch.randn(1500, 33, device=device)
    keep = torch.rand(1500, device=device) > 0.6
    x[~keep] = float("nan")
    check(x, backend, rows=keep.nonzero().flatten())


def test_empty_rows_add_nothing(backend: str, device: torch.device):
    x = torch.full((5, 33), float("nan"), device=device)
    pivot, *sums = state(x)
    gram(x, pivot, *sums, torch.empty(0, dtype=torch.int64, device=device), backend=backend)
    assert not any(part.any() for part in sums)


def test_results_are_added_to_existing_sums(backend: str, device: torch.device):
    dtype = torch.float64 if backend == "torch" else torch.float32
    x = torch.randn(300, 33, dtype=dtype, device=device)
    pivot, *once = state(x)
    gram(x, pivot, *once, backend=backend)
    _, *parts = state(x)
    for part in (x[:1], x[1:210], x[210:]):
        gram(part, pivot, *parts, backend=backend)
    for found, expected in zip(parts, once, strict=True):
        assert relative(found, expected) <= (1e-12 if backend == "torch" else 1e-6)


def test_small_batch_counts_beside_large_sums(backend: str, device: torch.device):
    x = 1 + torch.rand(1031, 34, device=device)
    pivot, scatter, shift, square = state(x)
    shift.fill_(1e10)
    square.fill_(1e12)
    gram(x, pivot, scatter, shift, square, backend=backend)
    assert relative(shift - 1e10, x.double().sum(0)) <= 1e-6
    assert relative(square - 1e12, x.double().square().sum()) <= 1e-6


def test_same_bits_twice(backend: str, device: torch.device):
    x = torch.randn(1031, 250, device=device).to(torch.bfloat16)
    results = []
    for _ in range(2):
        pivot, *sums = state(x)
        gram(x, pivot, *sums, backend=backend)
        results.append(sums)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_not_tracked(backend: str, device: torch.device):
    x = torch.randn(20, 33, device=device).requires_grad_()
    pivot, *sums = state(x.detach())
    gram(x, pivot, *sums, backend=backend)
    assert float(sums[2]) > 0
    assert not any(t.requires_grad for t in sums)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 9)}, r"x must be \(N, 8\), got \(4, 9\)"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, "floating point, got torch.int64"),
        ({"x": torch.ones(4, 8, device="meta")}, "x is on meta, .* on cpu"),
        ({"pivot": torch.zeros(8, 1)}, r"pivot must be \(8,\)"),
        ({"scatter": torch.zeros(8, 7)}, r"scatter must be \(8, 8\)"),
        ({"scatter": torch.zeros(8, 8, dtype=torch.float64)}, "got .* of torch.float64"),
        ({"shift": torch.zeros(8)}, "shift .* of torch.float32"),
        ({"square": torch.zeros(1, dtype=torch.float64)}, r"square must be \(\)"),
        ({"rows": torch.zeros(3, dtype=torch.int32)}, "rows must be a vector of torch.int64"),
        ({"backend": "cuda"}, "backend='cuda' is unknown; choose one of"),
        ({"precision": "low"}, "precision='low' is unknown; choose one of"),
    ],
)
def test_invalid_arguments(change: dict, message: str):
    names = ("pivot", "scatter", "shift", "square")
    arguments = dict(zip(names, state(torch.ones(4, 8)), strict=True))
    with pytest.raises(EvaValueError, match=message):
        gram(**({"x": torch.ones(4, 8)} | arguments | change))
