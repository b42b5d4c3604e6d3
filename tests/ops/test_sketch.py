"""The sketch op against the same sums in float64, the same tests for every backend."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eva_kernels.errors import EvaValueError
from eva_kernels.ops import sketch
from eva_kernels.ops._dispatch import is_observed
from eva_kernels.streaming._basis import random_basis
from helpers import BACKENDS, KINDS, TOLERANCES, products_limit, relative

# One token, primes, one more than a tile, the widths for 8, 20 and 32 components.
SHAPES = [(1, 33, 17), (127, 250, 40), (513, 33, 17), (521, 1024, 64), (64, 1024, 17)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def state(x: Tensor, q: int, pivot: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return basis, pivot and empty sums for x, in the dtype of its stream."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    d = x.shape[1]
    basis = random_basis(q, d, seed=1).to(x.device, dtype)
    pivot = torch.zeros(d) if pivot is None else pivot
    sums = (torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    products = torch.zeros(q, d, dtype=dtype)
    return basis, pivot.to(x.device, dtype), *(t.to(x.device) for t in (products, *sums))


def check(x: Tensor, q: int, backend: str, pivot: Tensor | None = None, rows: Tensor | None = None):
    basis, pivot, products, shift, square = state(x, q, pivot)
    sketch(x, basis, pivot, products, shift, square, rows, backend=backend)
    tokens = (x if rows is None else x[rows]).double()
    centred = tokens - pivot.double()
    limit = TOLERANCES[x.dtype]
    assert relative(products, basis.double() @ centred.mT @ centred) <= products_limit(
        backend, x.dtype
    )
    magnitude = centred.abs().sum(0).clamp_min(1e-300)
    assert float(((shift - centred.sum(0)).abs() / magnitude).max()) <= limit.sums
    assert relative(square, centred.square().sum()) <= limit.sums


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize(("n", "d", "q"), SHAPES)
def test_sums(n: int, d: int, q: int, dtype: torch.dtype, backend: str, device: torch.device):
    check(torch.randn(n, d, device=device).to(dtype), q, backend)


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_outlier_features_and_tokens(dtype: torch.dtype, backend: str, device: torch.device):
    x = torch.randn(301, 250, device=device)
    x[:, 7], x[:, 100], x[0] = 800.0, -800.0, 800.0 * x[0].sign()
    check(x.to(dtype), 40, backend)
    check(x.to(dtype), 40, backend, pivot=x.mean(0).cpu())


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_constant_offset_is_subtracted_before_the_products(
    dtype: torch.dtype, backend: str, device: torch.device
):
    x = (torch.randn(301, 250, device=device) + 800).to(dtype)
    check(x, 40, backend, pivot=torch.full((250,), 800.0))


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_strided_tokens(dtype: torch.dtype, backend: str, device: torch.device):
    # NaN around the tokens exposes reads outside of them.
    wide = torch.full((600, 80), float("nan"), device=device, dtype=dtype)
    wide[1::3, 3:70:2] = torch.randn(200, 34, device=device).to(dtype)
    check(wide[1::3, 3:70:2], 17, backend)
    check(torch.randn(34, 200, device=device).to(dtype).mT, 17, backend)
    check(torch.randn(1, 34, device=device).to(dtype).expand(77, 34), 17, backend)


# Whole tiles, in splits of which the last is shorter; and tiles that are whole along one side.
@pytest.mark.parametrize(("n", "d"), [(576, 128), (64, 896), (128, 250), (127, 256)])
def test_memory_around_the_tokens_is_not_read(n: int, d: int, backend: str, device: torch.device):
    wide = torch.full((n + 128, d + 128), float("nan"), device=device, dtype=torch.bfloat16)
    wide[:n, :d] = torch.randn(n, d, device=device)
    check(wide[:n, :d], 17, backend)
    check(wide[:n, :d], 17, backend, pivot=torch.full((d,), 50.0))  # centred, tile by tile


def test_strided_state_and_rows(backend: str, device: torch.device):
    x, rows = torch.randn(300, 34, device=device), torch.arange(300, device=device)[::3]
    dense, gaps = [state(x, 17, torch.randn(34)) for _ in range(2)]
    apart = [torch.stack([t, t], -1)[..., 0] for t in dense[:2]]
    sketch(x, *dense, rows.contiguous(), backend=backend)
    sketch(x, *apart, *gaps[2:], rows, backend=backend)
    # a GPU's library uses other kernels for a strided basis
    other_kernels = backend == "torch" and device.type == "cuda"
    assert relative(gaps[2], dense[2]) <= other_kernels * products_limit(backend, x.dtype)
    assert all(map(torch.equal, dense[3:], gaps[3:]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_selected_may_be_nan(bad: float, backend: str, device: torch.device):
    x = torch.randn(1500, 33, device=device)
    keep = torch.rand(1500, device=device) > 0.6
    x[~keep] = bad
    check(x, 17, backend, rows=keep.nonzero().flatten())


def test_empty_rows_add_nothing(backend: str, device: torch.device):
    x = torch.full((5, 33), float("nan"), device=device)
    basis, pivot, *sums = state(x, 17)
    rows = torch.empty(0, dtype=torch.int64, device=device)
    sketch(x, basis, pivot, *sums, rows, backend=backend)
    assert all(not bool(part.any()) for part in sums)


def test_results_are_added_to_existing_sums(backend: str, device: torch.device):
    dtype = torch.float64 if backend == "torch" else torch.float32
    x = torch.randn(300, 33, dtype=dtype, device=device)
    basis, pivot, *once = state(x, 17)
    sketch(x, basis, pivot, *once, backend=backend)
    *_, products, shift, square = state(x, 17)
    for part in (x[:1], x[1:210], x[210:]):
        sketch(part, basis, pivot, products, shift, square, backend=backend)
    for found, expected in zip((products, shift, square), once, strict=True):
        assert relative(found, expected) <= (1e-12 if backend == "torch" else 1e-6)


def test_small_batch_counts_beside_large_sums(backend: str, device: torch.device):
    x = 1 + torch.rand(1031, 34, device=device)
    basis, pivot, products, shift, square = state(x, 17)
    shift.fill_(1e10)
    square.fill_(1e12)
    sketch(x, basis, pivot, products, shift, square, backend=backend)
    assert relative(shift - 1e10, x.double().sum(0)) <= 1e-6
    assert relative(square - 1e12, x.double().square().sum()) <= 1e-6


def test_autocast_does_not_round(backend: str, device: torch.device):
    with torch.autocast(device.type, dtype=torch.bfloat16):
        check(torch.randn(70, 33, device=device), 17, backend)


def test_nan_in_a_selected_row_propagates(backend: str, device: torch.device):
    x = torch.randn(50, 33, device=device)
    x[20, 3] = float("nan")
    basis, pivot, products, shift, square = state(x, 17)
    sketch(x, basis, pivot, products, shift, square, backend=backend)
    assert products.isnan().any()
    assert shift.isnan().nonzero().flatten().tolist() == [3]
    assert square.isnan()


@pytest.mark.parametrize("precision", ["high", "fast"])
def test_same_bits_twice(precision: str, backend: str, device: torch.device):
    x = torch.randn(1031, 250, device=device).to(torch.bfloat16)
    results = []
    for _ in range(2):
        basis, pivot, *sums = state(x, 40)
        sketch(x, basis, pivot, *sums, backend=backend, precision=precision)
        results.append(sums)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_not_tracked(backend: str, device: torch.device):
    x = torch.randn(20, 33, device=device).requires_grad_()
    basis, pivot, *sums = state(x.detach(), 17)
    sketch(x, basis, pivot, *sums, backend=backend)
    assert float(sums[2]) > 0
    assert not any(t.requires_grad for t in sums)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 9)}, r"x must be \(N, 8\), got \(4, 9\)"),
        ({"x": torch.ones(8)}, r"x must be \(N, 8\), got \(8,\)"),
        ({"x": torch.ones(4, 2, 8)}, r"x must be \(N, 8\)"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, "floating point, got torch.int64"),
        ({"x": torch.ones(4, 8, device="meta")}, "x is on meta, .* on cpu"),
        ({"pivot": torch.zeros(1)}, r"pivot must be \(8,\)"),
        ({"pivot": torch.zeros(8, device="meta")}, "pivot"),
        ({"products": torch.zeros(4, 8)}, r"products must be \(3, 8\)"),
        ({"products": torch.zeros(3, 8, dtype=torch.float64)}, "got .* of torch.float64"),
        ({"shift": torch.zeros(8)}, "shift .* of torch.float32"),
        ({"square": torch.zeros(1, dtype=torch.float64)}, r"square must be \(\)"),
        ({"backend": "cuda"}, "backend='cuda' is unknown; choose one of"),
        ({"precision": "low"}, "precision='low' is unknown; choose one of"),
    ],
)
def test_invalid_arguments(change: dict, message: str):
    names = ("basis", "pivot", "products", "shift", "square")
    arguments = dict(zip(names, state(torch.ones(4, 8), 3), strict=True))
    with pytest.raises(EvaValueError, match=message):
        sketch(**({"x": torch.ones(4, 8)} | arguments | change))


class OperatorRecorder(TorchDispatchMode):
    """Records the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    """A torch function mode that changes nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return func(*args, **(kwargs or {}))


def test_operator_is_visible_to_modes_profiler_and_tracers(device: torch.device):
    if "triton" not in BACKENDS:
        pytest.skip("the kernels do not run here")
    x, basis = torch.randn(20, 16, device=device), torch.eye(4, 16, device=device)
    wide = torch.zeros(16, dtype=torch.float64, device=device)

    def run(x: Tensor, basis: Tensor, wide: Tensor) -> Tensor:
        products = torch.zeros_like(basis)
        sums = products, wide.clone(), wide.new_zeros(())
        sketch(x, basis, basis.new_zeros(16), *sums, backend="triton")
        return products

    with OperatorRecorder() as recorder:
        run(x, basis, wide)
    assert recorder.names.count("eva_kernels::sketch") == 1
    with torch.profiler.profile() as profile:
        run(x, basis, wide)
    assert "eva_kernels::sketch" in {event.name for event in profile.events()}
    traced = make_fx(run, tracing_mode="symbolic")(x, basis, wide)
    assert "torch.ops.eva_kernels.sketch" in traced.code
    # functorch hides a tensor without storage behind a plain Tensor
    torch.func.jvp(lambda x: run(x, basis, wide), (x,), (torch.ones_like(x),))
    assert not is_observed(x)
    with torch.device("cpu"):
        assert not is_observed(x)
        with FunctionMode():
            assert is_observed(x)
    watched = torch.compile(lambda x: x + is_observed(x), backend="eager", fullgraph=True)
    assert torch.equal(watched(x), x + 1)
