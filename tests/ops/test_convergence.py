"""The convergence check against float64 PyTorch, the same tests for every backend."""

import logging

import pytest
import torch

from eva_kernels import _native, reference
from eva_kernels.errors import EvaRuntimeError, EvaTypeError, EvaValueError
from eva_kernels.ops.convergence import convergence, cosines

SHAPES = [(4, 256), (1, 7), (3, 1000), (2, 513), (5, 64), (1, 1), (8, 33)]


def batch(device: torch.device, noise: float = 0.1) -> tuple[list, list]:
    previous = [torch.randn(shape) for shape in SHAPES]
    current = [before + noise * torch.randn_like(before) for before in previous]
    return [x.to(device) for x in previous], [x.to(device) for x in current]


def expected_counts(previous: list, current: list) -> torch.Tensor:
    pairs = zip(previous, current, strict=True)
    return torch.cat(
        [
            torch.nn.functional.cosine_similarity(u.cpu().double(), v.cpu().double(), eps=1e-300)
            for u, v in pairs
        ]
    ).abs()


def check(previous: list, current: list, ranks: list, tau: float, backend: str) -> None:
    similarity, unconverged = convergence(previous, current, ranks, tau, backend=backend)
    expected = expected_counts(previous, current)
    assert similarity.dtype == torch.float32
    assert unconverged.dtype == torch.int32
    assert similarity.device == unconverged.device == current[0].device
    torch.testing.assert_close(similarity.cpu().double(), expected, rtol=2e-7, atol=2e-7)
    rows = expected.split([len(u) for u in previous])
    counts = [int((~(row[:r] >= tau)).sum()) for row, r in zip(rows, ranks, strict=True)]
    assert unconverged.tolist() == counts


@pytest.mark.parametrize("tau", [0.0, 0.9, 0.995, 1.0])
def test_ragged_batch(tau: float, backend: str, device: torch.device) -> None:
    previous, current = batch(device)
    check(previous, current, [len(u) for u in previous], tau, backend)


def test_only_the_leading_rows_are_counted(backend: str, device: torch.device) -> None:
    previous, current = batch(device, noise=10.0)
    ranks = [2, 0, 3, 1, 4, 1, 7]
    check(previous, current, ranks, 0.999999, backend)
    assert convergence(previous, current, ranks, 0.999999, backend=backend)[1][0] == 2


def test_row_strides(backend: str, device: torch.device) -> None:
    # NaN between the rows exposes reads outside a row.
    wide = torch.full((2, 12, 80), float("nan"), device=device)
    wide[:, :, 3:70] = torch.randn(2, 12, 67, device=device)
    u, v = wide[0, ::3, 3:70], wide[1, ::3, 3:70]
    check([u, v], [v.clone(), u], [4, 2], 0.5, backend)


def test_rows_at_any_alignment(backend: str, device: torch.device) -> None:
    buffer = torch.randn(2, 5 * 37, device=device)
    previous = [buffer[0, start : start + 5 * 32].view(5, 32) for start in range(5)]
    current = [buffer[1, start : start + 5 * 32].view(5, 32) for start in range(5)]
    check(previous, current, [5] * 5, 0.1, backend)


def test_columns_that_are_not_contiguous(backend: str, device: torch.device) -> None:
    u, v = torch.randn(2, 50, 6, device=device)
    check([u.mT], [v.mT], [6], 0.2, backend)
    check([u.mT], [v.mT.contiguous()], [6], 0.2, backend)
    check([u.mT[:, :1]], [v.mT[:, 7:8]], [6], 0.2, backend)


def test_broadcast_rows(backend: str, device: torch.device) -> None:
    u = torch.randn(1, 40, device=device).expand(6, 40)
    check([u], [torch.randn(6, 40, device=device)], [6], 0.3, backend)


def test_sign_flips_do_not_matter(backend: str, device: torch.device) -> None:
    u = torch.randn(6, 100, device=device)
    similarity, unconverged = convergence([u], [-u], [6], 1.0, backend=backend)
    assert similarity.tolist() == [1.0] * 6
    assert unconverged.tolist() == [0]


def test_scale_does_not_matter(backend: str, device: torch.device) -> None:
    u, v = torch.randn(2, 3, 90, device=device)
    check([u * 1e-30, u * 1e-30], [v * 1e30, v * 1e-30], [3, 3], 0.1, backend)


def test_nan_and_infinity_never_converge(backend: str, device: torch.device) -> None:
    u = torch.randn(4, 300, device=device)
    v = u.clone()
    v[1, 299], v[2, 0] = float("nan"), float("inf")
    similarity, unconverged = convergence([v], [u], [4], 0.0, backend=backend)
    assert similarity.isnan().tolist() == [False, True, True, False]
    assert unconverged.tolist() == [2]


def test_zero_rows(backend: str, device: torch.device) -> None:
    u = torch.randn(3, 20, device=device)
    zero = torch.zeros_like(u)
    similarity, unconverged = convergence([u, zero], [zero, zero], [3, 2], 0.5, backend=backend)
    assert similarity.tolist() == [0.0] * 6
    assert unconverged.tolist() == [3, 2]


def test_empty_matrices_among_others(backend: str, device: torch.device) -> None:
    full, none = torch.randn(2, 8, device=device), torch.empty(0, 8, device=device)
    matrices = [none, full, none, none, full, none]
    ranks = [0, 2, 0, 0, 1, 0]
    check(matrices, matrices, ranks, 0.5, backend)
    check(matrices, [x.roll(1, 0) for x in matrices], ranks, 0.999, backend)


def test_no_matrices(backend: str) -> None:
    similarity, unconverged = convergence([], [], [], 0.5, backend=backend)
    assert similarity.shape == unconverged.shape == (0,)
    assert unconverged.dtype == torch.int32


def test_same_bits_twice(backend: str, device: torch.device) -> None:
    previous, current = batch(device)
    ranks = [len(u) for u in previous]
    first, second = (convergence(previous, current, ranks, 0.9, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_registered_operator_passes_opcheck(backend: str, device: torch.device) -> None:
    previous, current = batch(device)
    ranks = [len(matrix) for matrix in current]
    arguments = (previous, current, ranks, 0.99, backend == "torch")
    torch.library.opcheck(torch.ops.eva_kernels.convergence, arguments)


def test_gradients_are_not_tracked(backend: str, device: torch.device) -> None:
    u = torch.randn(2, 5, device=device, requires_grad=True)
    assert not convergence([u], [u], [2], 0.5, backend=backend)[0].requires_grad


MATRIX = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("previous", "current", "ranks", "tau", "error", "message"),
    [
        ([MATRIX], [], [1], 0.5, EvaValueError, "equally long, not 1, 0 and 1"),
        ([MATRIX], [MATRIX], [], 0.5, EvaValueError, "equally long, not 1, 1 and 0"),
        ([MATRIX], [MATRIX[:2]], [1], 0.5, EvaValueError, r"same shape, not \(3, 4\) and \(2, 4\)"),
        ([MATRIX], [MATRIX], [4], 0.5, EvaValueError, r"ranks\[0\] must be between 0 and 3, not 4"),
        ([MATRIX], [MATRIX], [-1], 0.5, EvaValueError, "between 0 and 3, not -1"),
        ([MATRIX], [MATRIX], [1], 1.5, EvaValueError, "tau must be between 0 and 1, not 1.5"),
        ([MATRIX], [MATRIX], [1], float("nan"), EvaValueError, "tau must be .* not nan"),
        ([MATRIX[0]], [MATRIX[0]], [1], 0.5, EvaValueError, "2 dimensions, not 1"),
        ([MATRIX[None]], [MATRIX[None]], [1], 0.5, EvaValueError, "2 dimensions, not 3"),
        ([MATRIX.double()], [MATRIX], [1], 0.5, EvaTypeError, r"previous\[0\] .* torch.float64"),
        ([MATRIX], [[1.0]], [1], 0.5, EvaTypeError, r"current\[0\] must be .* not list"),
        ([MATRIX.to("meta")], [MATRIX], [1], 0.5, EvaValueError, r"previous\[0\] is on meta"),
        ([MATRIX] * 2, [MATRIX, MATRIX.to("meta")], [1, 1], 0.5, EvaValueError, "is on meta"),
    ],
)
def test_bad_input(
    previous: list, current: list, ranks: list, tau: float, error: type, message: str, backend: str
) -> None:
    with pytest.raises(error, match=message):
        convergence(previous, current, ranks, tau, backend=backend)


def groups(device: torch.device) -> tuple[list, list, list]:
    """Return saved rows, bases and the number of kept rows of two groups of layers."""
    kept, shapes = [[2, 0, 6], [5, 1]], [(6, 40), (5, 7)]
    pairs = list(zip(kept, shapes, strict=True))
    bases = [[torch.randn(shape, device=device) for _ in counts] for counts, shape in pairs]
    return [torch.randn(sum(counts), d, device=device) for counts, (_, d) in pairs], bases, kept


@pytest.mark.parametrize("modules", ["all", "absent", "for no device"])
def test_cosines_of_two_groups(
    modules: str,
    device: torch.device,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if modules == "absent":
        request.getfixturevalue("without_modules")
    elif modules == "for no device":
        monkeypatch.setattr(_native, "MODULES", {})
    saved, bases, kept = groups(device)
    before, now = [], []
    for rows, group, counts in zip(saved, bases, kept, strict=True):
        before += rows.split(counts)
        now += [basis[:count] for basis, count in zip(group, counts, strict=True)]
    found = cosines(saved, bases, kept)
    assert (found.dtype, found.device) == (torch.float32, saved[0].device)
    torch.testing.assert_close(
        found.cpu().double(), expected_counts(before, now), rtol=2e-7, atol=2e-7
    )


def test_registered_operator_of_cosines_passes_opcheck(device: torch.device) -> None:
    saved, bases, kept = groups(device)
    flat = [basis for group in bases for basis in group]
    counts = [count for group in kept for count in group]
    arguments = (saved, flat, counts, [len(group) for group in bases])
    torch.library.opcheck(torch.ops.eva_kernels.cosines.default, arguments)


@pytest.mark.parametrize(
    ("saved", "bases", "kept", "error"),
    [
        (torch.ones(5, 4).double(), [MATRIX, MATRIX], [3, 2], EvaTypeError),
        (torch.ones(5, 4), [MATRIX.double(), MATRIX], [3, 2], EvaTypeError),
        (torch.ones(5), [MATRIX, MATRIX], [3, 2], EvaValueError),
        (torch.ones(5, 4), [MATRIX, MATRIX], [5], EvaValueError),
        (torch.ones(5, 4), [MATRIX, MATRIX], [3, 1], EvaValueError),
        (torch.ones(4, 5).mT, [MATRIX, MATRIX], [3, 2], EvaValueError),
        (torch.ones(5, 4), [MATRIX, torch.ones(4, 3).mT], [3, 2], EvaValueError),
        (torch.ones(5, 3), [MATRIX, MATRIX], [3, 2], EvaValueError),
        (torch.ones(5, 4), [MATRIX, MATRIX], [4, 1], EvaValueError),
        (torch.ones(5, 4), [MATRIX] * 3, [3, 3, -1], EvaValueError),
        (torch.ones(0, 4), [], [], EvaValueError),
    ],
)
def test_bad_input_of_cosines(saved: torch.Tensor, bases: list, kept: list, error: type) -> None:
    with pytest.raises(error, match=r"a matrix of cosines|num_saved="):
        cosines([saved], [bases], [kept])


def test_unknown_backend() -> None:
    with pytest.raises(EvaValueError, match="one of auto, native, torch, not 'triton'"):
        convergence([MATRIX], [MATRIX], [1], 0.5, backend="triton")


def test_explicit_native_raises_on_a_device_without_it() -> None:
    meta = MATRIX.to("meta")
    with pytest.raises(EvaRuntimeError, match="no native code for device type 'meta'"):
        convergence([meta], [meta], [1], 0.5, backend="native")


@pytest.mark.usefixtures("without_modules")
def test_auto_falls_back_and_logs_once(caplog: pytest.LogCaptureFixture) -> None:
    u, v = torch.randn(2, 3, 10)
    with caplog.at_level(logging.INFO, logger="eva_kernels"):
        results = [convergence([u], [v], [3], 0.5) for _ in range(2)]
    assert torch.equal(results[0][0], reference.convergence([u], [v], [3], 0.5)[0])
    assert len(caplog.messages) == 1
    assert "eva_kernels._absent cannot be imported" in caplog.messages[0]
    with pytest.raises(EvaRuntimeError, match=r"backend='native' cannot run.*_absent"):
        convergence([u], [v], [3], 0.5, backend="native")


@pytest.mark.skipif(
    _native.unavailable_reason("cpu") is not None, reason="the C++ module is not built"
)
def test_auto_uses_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "convergence", None)
    assert convergence([MATRIX], [MATRIX], [3], 0.5)[1].tolist() == [0]


@pytest.mark.skipif(
    _native.unavailable_reason("cuda") is not None, reason="the CUDA module is not built"
)
def test_error_of_a_missing_cuda_driver() -> None:
    module = _native.load("cuda")
    if module.device_count():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match=r"eva_kernels: cudaGetDevice: .*\(cudaError"):
        module.convergence(0, 1, 1, 0.5, 0, 0, 0, 0)
