"""The eigen-decomposition against LAPACK and exact arithmetic, the same tests for every backend."""

import logging
import sys
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from eva_kernels import _native
from eva_kernels.errors import EvaRuntimeError, EvaTypeError, EvaValueError
from eva_kernels.ops import _dispatch
from eva_kernels.ops.eigh import MAX_WIDTH, eigh, lapack_eigh

MODULE = sys.modules["eva_kernels.ops.eigh"]  # the package may export a function of this name

WIDTHS = [1, 2, 3, 7, 16, 33, 64, 128]


needs_module = pytest.mark.skipif(
    _native.unavailable_reason("cpu") is not None, reason="the C++ module is not built"
)


def symmetric(count: int, width: int) -> Tensor:
    x = torch.randn(count, width, width, dtype=torch.float64)
    return x + x.mT


def with_spectrum(values: Tensor) -> Tensor:
    """Return (L, Q, Q) matrices with the given eigenvalues (L, Q) in random directions."""
    q = torch.linalg.qr(torch.randn(*values.shape, values.shape[1], dtype=torch.float64)).Q
    matrices = (q * values[:, None, :]) @ q.mT
    return (matrices + matrices.mT) / 2


def check(matrices: Tensor, device: torch.device, backend: str) -> tuple[Tensor, Tensor]:
    """Compare with LAPACK on the CPU, and return values and vectors."""
    given = matrices.to(device)
    values, vectors = eigh(given, backend=backend)
    assert torch.equal(given.cpu(), matrices)
    assert values.device == vectors.device == given.device
    assert values.dtype == vectors.dtype == torch.float64
    assert values.shape == matrices.shape[:2]
    assert vectors.shape == matrices.shape
    values, vectors = values.cpu(), vectors.cpu()
    width = matrices.shape[-1]
    norm = torch.linalg.matrix_norm(matrices, 2)[:, None]
    assert (values.diff(dim=1) >= 0).all()
    assert ((values - torch.linalg.eigvalsh(matrices)).abs() <= 1e-13 * norm).all()
    # Scaled first: the square of 1e300 overflows, that of 1e-300 underflows.
    scale = torch.where(norm > 0, norm, 1.0)
    residual = (matrices / scale[:, :, None]) @ vectors - vectors * (values / scale)[:, None, :]
    assert (residual.norm(dim=1) <= 1e-13).all()
    identity = torch.eye(width, dtype=torch.float64)
    assert (vectors.mT @ vectors - identity).abs().max() <= 1e-13 * width
    return values, vectors


@pytest.mark.parametrize("width", WIDTHS)
def test_random_matrices(width: int, backend: str, device: torch.device) -> None:
    check(symmetric(3, width), device, backend)


@pytest.mark.parametrize("width", [2, 7, 33, 128])
def test_difficult_spectra(width: int, backend: str, device: torch.device) -> None:
    position = torch.arange(width, dtype=torch.float64)
    spectra = torch.stack(
        [
            10 ** (-14 * position / width),
            1 + 1e-12 * position,
            (position % 3) - 1,
            (position < width / 4).double(),
            1e-300 * (position - width / 2),
            1e300 * 0.5**position,
        ]
    )
    values, _ = check(with_spectrum(spectra), device, backend)
    scale = spectra.abs().amax(1, keepdim=True)
    assert ((values - spectra.sort().values).abs() <= 1e-13 * scale).all()


@pytest.mark.parametrize("exponent", [1000, -1000])
def test_extreme_magnitudes(exponent: int, backend: str, device: torch.device) -> None:
    matrix = torch.tensor([[-1.5e7, 0.0, 0.0], [1e5, 1.5e7, 0.0], [1.0, 2.0, 3.0]]).double()
    expected = torch.linalg.eigvalsh(matrix) * 2.0**exponent
    values, _ = eigh((matrix * 2.0**exponent)[None].to(device), backend=backend)
    torch.testing.assert_close(values[0].cpu(), expected, rtol=1e-9, atol=0)


def test_zero_rank_one_and_diagonal(backend: str, device: torch.device) -> None:
    diagonal = torch.tensor([2.0, -1.0, 0.0, 5.0, -1.0], dtype=torch.float64)
    matrices = torch.stack([torch.zeros(5, 5), torch.ones(5, 5), diagonal.diag()]).double()
    values, vectors = check(matrices, device, backend)
    assert values[0].tolist() == [0.0] * 5
    assert values[2].tolist() == [-1.0, -1.0, 0.0, 2.0, 5.0]
    for i in (0, 2):
        assert vectors[i].abs().sum(0).tolist() == [1.0] * 5


@pytest.mark.parametrize(("count", "width"), [(0, 0), (0, 4), (3, 0)])
def test_empty_batches(count: int, width: int, backend: str, device: torch.device) -> None:
    empty = torch.zeros(count, width, width, dtype=torch.float64, device=device)
    values, vectors = eigh(empty, backend=backend)
    assert values.shape == (count, width)
    assert vectors.shape == (count, width, width)


def test_only_the_lower_triangle_is_read(backend: str, device: torch.device) -> None:
    matrices = symmetric(2, 20)
    expected = eigh(matrices.to(device), backend=backend)
    poisoned = torch.where(torch.ones(20, 20).triu(1).bool(), torch.nan, matrices)
    for other in (matrices.tril(), poisoned):
        result = eigh(other.to(device), backend=backend)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_matrices_do_not_affect_others(
    bad: float, backend: str, device: torch.device
) -> None:
    good = symmetric(4, 9)
    mixed = good.clone()
    mixed[0, 8, 0], mixed[2, 4, 4] = bad, bad
    expected = eigh(good.to(device), backend=backend)
    for result, clean in zip(eigh(mixed.to(device), backend=backend), expected, strict=True):
        assert result[[0, 2]].isnan().all()
        assert torch.equal(result[[1, 3]], clean[[1, 3]])


def test_strided_input(backend: str, device: torch.device) -> None:
    buffer = torch.randn(3, 40, 40, dtype=torch.float64, device=device)
    view = (buffer + buffer.mT)[:, ::4, ::4]
    expected = eigh(view.contiguous(), backend=backend)
    for other in (view, view.mT.contiguous().mT):
        assert torch.equal(eigh(other, backend=backend)[0], expected[0])
    one = view[:1].expand(3, 10, 10)
    assert torch.equal(eigh(one, backend=backend)[1][2], expected[1][0])


def test_same_bits_twice_and_in_any_batch(backend: str, device: torch.device) -> None:
    matrices = symmetric(4, 31).to(device)
    first, second = (eigh(matrices, backend=backend) for _ in range(2))
    alone = eigh(matrices[2:3], backend=backend)
    for i in range(2):
        assert torch.equal(first[i], second[i])
        assert torch.equal(first[i][2], alone[i][0])


def test_gradients_are_not_tracked(backend: str, device: torch.device) -> None:
    matrices = symmetric(1, 3).to(device).requires_grad_()
    assert not any(x.requires_grad for x in eigh(matrices, backend=backend))


@needs_module
def test_native_sign_convention(device: torch.device) -> None:
    _, vectors = eigh(symmetric(3, 24).to(device), backend="native")
    peak = vectors.abs().argmax(1, keepdim=True)
    assert (vectors.gather(1, peak) > 0).all()


@needs_module
def test_native_orders_equal_values_as_on_the_diagonal(device: torch.device) -> None:
    ones = torch.arange(40) % 3 == 1  # enough that an unstable sort would reorder them
    diagonal = torch.where(ones, 1.0, 2.0).double().diag()
    _, vectors = eigh(diagonal[None].to(device), backend="native")
    order = torch.cat([ones.nonzero(), (~ones).nonzero()]).flatten()
    assert vectors[0].cpu().argmax(0).tolist() == order.tolist()


def values_below(matrix: Tensor, x: Fraction) -> int:
    """Count the eigenvalues below x, exactly: the negative pivots of A - x I (Sylvester)."""
    rows = [[Fraction(v) for v in row] for row in matrix.tolist()]
    for i, row in enumerate(rows):
        row[i] -= x
    negative = 0
    for i, row in enumerate(rows):
        negative += row[i] < 0
        for below in rows[i + 1 :]:
            factor = below[i] / row[i]
            below[i:] = [b - factor * r for b, r in zip(below[i:], row[i:], strict=True)]
    return negative


def graded(width: int) -> Tensor:
    """Return D H D with a well conditioned H and D from 1 to 1e-7, shuffled."""
    h = torch.eye(width, dtype=torch.float64) + 0.3 * symmetric(1, width)[0].tanh() / width
    d = torch.logspace(0, -7, width, dtype=torch.float64)[torch.randperm(width)]
    return (d[:, None] * h * d).tril() + (d[:, None] * h * d).tril(-1).mT


@needs_module
def test_small_eigenvalues_of_graded_matrices(device: torch.device) -> None:
    matrix = graded(8)
    values, _ = eigh(matrix[None].to(device), backend="native")
    assert values[0, -1] / values[0, 0] > 1e13
    for k, value in enumerate(values[0].tolist()):
        margin = Fraction(1, 10**14)
        assert values_below(matrix, Fraction(value) * (1 - margin)) == k
        assert values_below(matrix, Fraction(value) * (1 + margin)) == k + 1


@needs_module
@pytest.mark.parametrize("may_fall_back", [False, True])
def test_operator_passes_opcheck(may_fall_back: bool, device: torch.device) -> None:
    matrices = symmetric(2, 5).to(device)
    done = opcheck(torch.ops.eva_kernels.eigh.default, (matrices, may_fall_back))
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["auto", "native"])
def test_simulated_gpu_dispatches_one_operator(kind: str) -> None:
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func.name(), *args[1:]))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        matrices = torch.empty(3, MAX_WIDTH, MAX_WIDTH, device="cuda", dtype=torch.float64)
        with Recorder():
            values, vectors = eigh(matrices, backend=kind)
    assert calls == [("eva_kernels::eigh", kind == "auto")]  # may fall back
    assert (values.shape, vectors.shape) == ((3, MAX_WIDTH), (3, MAX_WIDTH, MAX_WIDTH))
    assert values.device.type == vectors.device.type == "cuda"
    assert vectors.stride() == (MAX_WIDTH**2, 1, MAX_WIDTH)


def test_auto_uses_lapack_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", None)
    matrices = symmetric(2, 6)
    for result, expected in zip(eigh(matrices), torch.linalg.eigh(matrices), strict=True):
        assert torch.equal(result, expected)


def test_auto_uses_torch_for_wide_matrices_and_logs_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_dispatch, "_reasons_logged", set())
    with caplog.at_level(logging.INFO, logger="eva_kernels"), FakeTensorMode():
        matrices = torch.empty(1, MAX_WIDTH + 1, MAX_WIDTH + 1, device="cuda").double()
        for _ in range(2):
            assert eigh(matrices)[0].shape == (1, MAX_WIDTH + 1)
    assert caplog.messages == ["eigh runs on plain PyTorch: Q = 129 is above 128"]


def test_gpu_with_little_shared_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_dispatch, "_reasons_logged", set())
    monkeypatch.setattr(MODULE, "max_native_width", lambda index: 5)
    monkeypatch.setattr(MODULE, "_launch", lambda module, matrices: "launched")
    for name in ("load", "load_or_none"):
        monkeypatch.setattr(_native, name, lambda kind: MODULE)
    small, large = symmetric(1, 5), symmetric(1, 6)
    assert MODULE._decompose_cuda(small, True) == MODULE._decompose_cuda(small, False) == "launched"
    with caplog.at_level(logging.INFO, logger="eva_kernels"):
        values = [MODULE._decompose_cuda(large, True)[0] for _ in range(2)][1]
    assert torch.equal(values, torch.linalg.eigh(large)[0])
    reason = "a block of this GPU has shared memory for Q up to 5"
    assert caplog.messages == [f"eigh runs on plain PyTorch: {reason}"]
    with pytest.raises(EvaRuntimeError, match=reason):
        MODULE._decompose_cuda(large, False)


def test_gpu_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load_or_none", lambda kind: None)
    matrices = symmetric(1, 4)
    values = MODULE._decompose_cuda(matrices, True)[0]
    assert torch.equal(values, torch.linalg.eigh(matrices)[0])
    monkeypatch.setattr(_native, "_module_or_reason", lambda kind: "it was not built")
    with pytest.raises(EvaRuntimeError, match="it was not built"):
        MODULE._decompose_cuda(matrices, False)


def failing_lapack(matrices: Tensor) -> None:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_numpy_is_used_if_torch_does_not_converge(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = torch.cat([symmetric(2, 9) * size, torch.zeros(1, 9, 9, dtype=torch.float64)])
    expected = torch.linalg.eigvalsh(matrices)
    monkeypatch.setattr(torch.linalg, "eigh", failing_lapack)
    values, vectors = lapack_eigh(matrices)
    assert ((values - expected).abs() <= 1e-14 * expected.abs().amax(1, keepdim=True)).all()
    again = (vectors * values[:, None, :]) @ vectors.mT
    torch.testing.assert_close(again, matrices, rtol=0, atol=1e-13 * size)
    upper = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for given in (matrices, matrices.masked_fill(upper, torch.nan)):
        for result, truth in zip(eigh(given), (values, vectors), strict=True):
            assert torch.equal(result, truth)


def test_nonfinite_input_of_the_numpy_fallback_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", failing_lapack)
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        lapack_eigh(torch.full((1, 3, 3), torch.nan, dtype=torch.float64))


MATRIX = torch.ones(1, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("matrices", "error", "message"),
    [
        (MATRIX.float(), EvaTypeError, "float64 tensor, not torch.float32"),
        ([[1.0]], EvaTypeError, "float64 tensor, not list"),
        (MATRIX[0], EvaValueError, r"\(L, Q, Q\), not \(3, 3\)"),
        (MATRIX[:, :2], EvaValueError, r"\(L, Q, Q\), not \(1, 2, 3\)"),
    ],
)
def test_bad_input(matrices: Tensor, error: type, message: str, backend: str) -> None:
    with pytest.raises(error, match=message):
        eigh(matrices, backend=backend)


def test_unknown_backend() -> None:
    with pytest.raises(EvaValueError, match="one of auto, native, torch, not 'triton'"):
        eigh(MATRIX, backend="triton")


@pytest.mark.usefixtures("without_modules")
def test_explicit_native_raises_for_unsupported_input() -> None:
    with pytest.raises(EvaRuntimeError, match="no native code for device type 'meta'"):
        eigh(MATRIX.to("meta"), backend="native")
    wide = torch.zeros(1, MAX_WIDTH + 1, MAX_WIDTH + 1, dtype=torch.float64)
    with pytest.raises(EvaValueError, match="Q up to 128, not 129"):
        eigh(wide, backend="native")
    with pytest.raises(EvaRuntimeError, match=r"backend='native' cannot run.*_absent"):
        eigh(MATRIX, backend="native")


@pytest.mark.skipif(
    _native.unavailable_reason("cuda") is not None, reason="the CUDA module is not built"
)
def test_error_of_a_missing_cuda_driver() -> None:
    module = _native.load("cuda")
    if module.device_count():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match=r"eva_kernels: cudaGetDevice: .*\(cudaError"):
        module.eigh(0, 1, 1, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"eigh: cudaDeviceGetAttribute: .*\(cudaError"):
        module.eigh_max_width(0)
