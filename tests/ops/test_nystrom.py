"""The (Q, Q) part of a fold: native code against plain PyTorch and the defining equations."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from eva_kernels import _native
from eva_kernels.errors import EvaTypeError, EvaValueError
from eva_kernels.ops import nystrom
from eva_kernels.ops.nystrom import runs_natively
from eva_kernels.streaming import nystrom as nystrom_module
from eva_kernels.streaming.nystrom import OVERLAP_TOLERANCE, Nystrom, nystrom_plain
from fake_cuda import DEVICE, compiler_missing, fake_cuda

# tests/packaging builds the C++ module, so a broken build fails there.
pytestmark = pytest.mark.skipif(
    _native.unavailable_reason("cpu") is not None, reason="the C++ module is not built"
)
LIMIT = OVERLAP_TOLERANCE[torch.float32]


class Problem:
    """Images Y = V C of random bases, or of bases near the eigenvectors of C."""

    def __init__(
        self, q: int, spectrum: Tensor, device: torch.device, near: float | None = None
    ) -> None:
        d = len(spectrum)
        vectors, start = (_orthogonal(d, device, near) for near in (None, near))
        spectrum = spectrum.to(device, torch.float64)
        c = vectors.mT @ torch.diag(spectrum) @ vectors
        self.basis = (start @ vectors if near is not None else start)[:q]
        self.image = self.basis @ c
        self.core = (self.image @ self.basis.mT)[None]
        self.metric = (self.image @ self.image.mT)[None]
        self.ceiling = torch.full((1,), 1e6, dtype=torch.float64, device=device)
        self.trace = spectrum.sum()[None]

    def solve(self, **options: str) -> Nystrom:
        given = self.core, self.metric, self.ceiling, LIMIT
        return Nystrom(*nystrom(*given, trace=self.trace, **options))

    def plain(self) -> Nystrom:
        return nystrom_plain(self.core, self.metric, self.ceiling, self.trace, torch.float32)

    def rows(self, found: Nystrom) -> Tensor:
        return found.mixing[0].mT @ self.image


def _orthogonal(d: int, device: torch.device, near: float | None) -> Tensor:
    draw = torch.randn(d, d, dtype=torch.float64, device=device)
    if near is not None:
        draw = torch.eye(d, dtype=torch.float64, device=device) + near * draw / d**0.5
    return torch.linalg.qr(draw).Q


def decaying(d: int, least: float = 1e-3) -> Tensor:
    return torch.logspace(2, 2 + torch.tensor(least).log10().item(), d, dtype=torch.float64)


@pytest.mark.parametrize("near", [0.01, None])
@pytest.mark.parametrize("q", [1, 7, 32, 64, 100])
def test_native_answer_equals_plain_pytorch(
    q: int, near: float | None, device: torch.device
) -> None:
    problem = Problem(q, decaying(q + 40), device, near)
    found, expected = problem.solve(), problem.plain()
    assert found.rank.tolist() == expected.rank.tolist() == [q]
    assert found.uneven.tolist() == [0.0]
    torch.testing.assert_close(found.captured, expected.captured)
    torch.testing.assert_close(found.squares, expected.squares, rtol=1e-7, atol=1e-9)
    rows = problem.rows(found)
    identity = torch.eye(q, dtype=torch.float64, device=device)
    torch.testing.assert_close(rows @ rows.mT, identity, rtol=0, atol=1e-8)
    overlap = (rows @ problem.rows(expected).mT).abs()
    torch.testing.assert_close(overlap[:3, :3], identity[:3, :3], rtol=0, atol=1e-6)
    problem.core += torch.ones_like(problem.core).triu(1)  # only the lower triangle is read
    assert torch.equal(problem.solve().summary, found.summary)


def test_native_captured_variance_is_not_negative(device: torch.device) -> None:
    problem = Problem(6, decaying(30), device)
    problem.core[0, 4, 4] = -1e-9  # by rounding
    found, expected = problem.solve(), problem.plain()
    assert found.captured[0, 4] == expected.captured[0, 4] == 0
    torch.testing.assert_close(found.captured, expected.captured)


def test_native_rows_above_the_tolerance_are_uneven(device: torch.device) -> None:
    problem = Problem(16, decaying(40), device)
    for loose, uneven in ((0.0, 1), (LIMIT, 0)):
        found = Nystrom(*nystrom(problem.core, problem.metric, problem.ceiling, loose))
        assert (found.rank.item(), found.uneven.item()) == (16, uneven)


@pytest.mark.parametrize("rest", [0.0, 1e-9])  # the core is singular, or just has a Cholesky factor
def test_native_low_rank_is_exact(rest: float, device: torch.device) -> None:
    spectrum = torch.tensor([50.0, 20.0, 3.0] + [rest] * 30)
    problem = Problem(16, spectrum, device)
    found = problem.solve()
    assert (found.rank.item(), found.uneven.item()) == (3.0, 1.0)
    torch.testing.assert_close(found.squares[0, :3].cpu(), spectrum[:3].double())
    assert not found.squares[0, 3:].any()
    assert not found.mixing[0, :, 3:].any()
    problem.ceiling[:] = 2.0  # three tokens
    found = problem.solve()
    assert (found.rank.item(), found.uneven.item()) == (2.0, 1.0)
    assert not found.squares[0, 2:].any()
    assert not found.mixing[0, :, 2:].any()


@pytest.mark.parametrize(("least", "rank"), [(1e-11, 2), (1e-13, 1)])
def test_rank_excludes_squares_below_rounding(
    least: float, rank: int, device: torch.device
) -> None:
    # Rows so near the eigenvectors that the core does not resolve the second eigenvalue.
    angle = torch.tensor(1.4e-6, dtype=torch.float64)
    cosine, sine = angle.cos(), angle.sin()
    basis = torch.stack([cosine, sine, -sine, cosine]).view(2, 2).to(device)
    image = basis * torch.tensor([1.0, least], dtype=torch.float64, device=device)
    core, metric = (image @ basis.mT)[None], (image @ image.mT)[None]
    ceiling = torch.full((1,), 1e6, dtype=torch.float64, device=device)
    trace = torch.full_like(ceiling, 1 + least)
    native = Nystrom(*nystrom(core, metric, ceiling, LIMIT, trace=trace))
    for found in (native, nystrom_plain(core, metric, ceiling, trace, torch.float32)):
        assert found.rank.item() == rank
        assert found.squares[0, 0].item() == pytest.approx(1, rel=1e-9)
        assert found.squares[0, 1].item() == (pytest.approx(least, rel=1e-3) if rank == 2 else 0)


@pytest.mark.parametrize(("dtype", "uneven"), [(torch.float32, 0), (torch.float64, 1)])
def test_native_unevenness_depends_on_the_dtype(
    dtype: torch.dtype, uneven: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(nystrom_module, "runs_natively", lambda core: True)
    problem = Problem(16, decaying(26, 3e-6), device)
    given = problem.core, problem.metric, problem.ceiling, problem.trace
    found = nystrom_module.nystrom(*given, dtype)
    rows = problem.rows(found)
    missed = (rows @ rows.mT - torch.eye(16, dtype=torch.float64, device=device)).abs().max()
    assert 1e-11 < missed < 1e-8  # otherwise the last assertion proves nothing
    assert (found.rank.item(), found.uneven.item()) == (16, uneven)


@pytest.mark.parametrize("noise", [3e-11, 3e-9])
@pytest.mark.parametrize("solver", ["solve", "plain"])
def test_rows_that_the_data_do_not_reach_add_no_eigenvalue(
    solver: str, noise: float, device: torch.device
) -> None:
    """The image of the last row is rounding noise, along the data, and so is its product."""
    spectrum = torch.cat([decaying(5), torch.zeros(19)])
    problem = Problem(8, spectrum, device)
    expected = getattr(problem, solver)().squares
    peak = problem.core.diagonal(dim1=1, dim2=2).max()
    problem.core[0, -1], problem.core[0, :, -1] = 0, 0
    problem.core[0, -1, -1] = noise * peak
    problem.image[-1] = problem.image[0] * (noise * peak * spectrum[0]).sqrt() / 2
    problem.image[-1] /= problem.image[0].norm()
    problem.metric = (problem.image @ problem.image.mT)[None]
    found = getattr(problem, solver)()
    assert found.rank == 5
    torch.testing.assert_close(found.squares, expected, rtol=1e-9, atol=1e-9)
    problem.trace = problem.trace.new_full((1,), torch.inf)  # what the noise would be without
    assert getattr(problem, solver)().squares.sum() > 1.05 * expected.sum()


@pytest.mark.parametrize("solver", ["solve", "plain"])
def test_an_excess_of_the_largest_eigenvalue_costs_no_small_ones(
    solver: str, device: torch.device
) -> None:
    problem = Problem(8, decaying(8, 1e-11), device, 1e-6)
    expected = getattr(problem, solver)()
    problem.trace *= 0.99
    found = getattr(problem, solver)()
    assert found.rank == 8
    assert torch.equal(found.summary, expected.summary)


def test_native_orthogonalisation_of_rows_of_different_lengths(device: torch.device) -> None:
    problem = Problem(8, decaying(20), device)
    lengths = torch.logspace(0, -9, 8, dtype=torch.float64, device=device)
    problem.core *= torch.outer(lengths, lengths)
    found = problem.solve(goal="orthogonalise")
    assert (found.rank.item(), found.uneven.item()) == (8.0, 0.0)
    white = found.mixing[0].mT @ problem.core[0] @ found.mixing[0]
    identity = torch.eye(8, dtype=torch.float64, device=device)
    torch.testing.assert_close(white, identity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("goal", ["solve", "whiten"])
def test_native_layers_are_independent(goal: str, device: torch.device) -> None:
    problems = [Problem(9, decaying(30), device) for _ in range(3)]
    core, metric = (torch.cat([getattr(p, n) for p in problems]) for n in ("core", "metric"))
    core[1, 4, 2] = torch.nan
    found = Nystrom(*nystrom(core, metric, torch.full_like(core[:, 0, 0], 1e6), LIMIT, goal=goal))
    for i in (0, 2):
        alone = problems[i].solve(goal=goal)
        assert torch.equal(found.mixing[i], alone.mixing[0])
        assert torch.equal(found.summary[i], alone.summary[0])
    assert (found.rank[1], found.uneven[1]) == (0, 1)
    assert not found.mixing[1].any()


def test_plain_layers_are_independent(device: torch.device) -> None:
    problems = [Problem(9, decaying(12, least), device, 0.01) for least in (1e-3, 1e-9)]
    problems[1].core *= 1e14
    problems[1].metric *= 1e28
    problems[1].trace *= 1e14
    names = ("core", "metric", "ceiling", "trace")
    given = [torch.cat([getattr(p, name) for p in problems]) for name in names]
    found = nystrom_plain(*given, torch.float32)
    for i, problem in enumerate(problems):
        torch.testing.assert_close(found.summary[i], problem.plain().summary[0], rtol=1e-9, atol=0)
    if device.type == "cpu":  # on other devices rows are corrected by their overlaps
        assert found.uneven.tolist() == [0, 1]


def test_whitened_core_is_the_identity(device: torch.device) -> None:
    problem = Problem(12, decaying(50), device)
    mixing = problem.solve(goal="whiten").mixing[0]
    # a Cholesky factor is triangular: row j does not depend on later rows
    assert torch.equal(mixing, mixing.triu())
    plain = nystrom_module.whitening(problem.core, problem.ceiling).mixing[0]
    identity = torch.eye(12, dtype=torch.float64, device=device)
    for found in (mixing, plain):
        white = found.mT @ problem.core[0] @ found
        torch.testing.assert_close(white, identity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("goal", ["whiten", "orthogonalise"])
def test_whitening_and_orthogonalisation_run_natively(
    goal: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    problem = Problem(12, decaying(50), device)
    monkeypatch.setattr(nystrom_module, "runs_natively", lambda core: True)
    if goal == "whiten":
        problem.ceiling[:] = 5.0
        found = nystrom_module.whitening(problem.core, problem.ceiling)
    else:
        problem.core *= 1e-3  # rows that are not of unit length
        found = nystrom_module.orthogonalisation(problem.core)
    expected = problem.solve(goal=goal)
    assert found.rank.item() == (5 if goal == "whiten" else 12)
    assert torch.equal(found.mixing, expected.mixing)


def test_native_whitening_of_too_few_tokens(device: torch.device) -> None:
    problem = Problem(12, decaying(50), device)
    problem.ceiling[:] = 5.0
    found = problem.solve(goal="whiten")
    assert (found.rank.item(), found.uneven.item()) == (5.0, 1.0)
    # the leading eigenvectors of the scaled core
    leading = found.mixing[0, :, :5]
    white = leading.mT @ problem.core[0] @ leading
    identity = torch.eye(5, dtype=torch.float64, device=device)
    torch.testing.assert_close(white, identity, rtol=0, atol=1e-9)
    scale = problem.core[0].diagonal().rsqrt()
    values = torch.linalg.eigvalsh(problem.core[0] * torch.outer(scale, scale)).flip(0)[:5]
    lengths = (leading / scale[:, None]).square().sum(0)
    torch.testing.assert_close(lengths, 1 / values)


def test_native_orthogonalisation_drops_linearly_dependent_rows(
    device: torch.device,
) -> None:
    problem = Problem(8, decaying(20), device)
    core = problem.core.clone()
    core[:, 2], core[:, :, 2] = core[:, 0].clone(), core[:, :, 0].clone()
    core[:, 2, 2] = core[:, 0, 0]
    found = Nystrom(*nystrom(core, core, problem.ceiling, LIMIT, goal="orthogonalise"))
    assert (found.rank.item(), found.uneven.item()) == (7.0, 1.0)
    mixing = found.mixing[0]
    assert not mixing[2].any()
    assert not mixing[:, 7].any()
    white = mixing.mT @ core[0] @ mixing
    expected = torch.eye(8, dtype=torch.float64, device=device)
    expected[7, 7] = 0
    torch.testing.assert_close(white, expected, rtol=0, atol=1e-9)


def test_native_strided_matrices(device: torch.device) -> None:
    problems = [Problem(9, decaying(30), device) for _ in range(2)]
    problems[1].ceiling[:] = 4.0
    names = ("core", "metric", "ceiling")
    given = [torch.cat([getattr(p, name) for p in problems]) for name in names]
    apart = [torch.stack([tensor] * 2, -1)[..., 0] for tensor in given]
    for found, expected in zip(nystrom(*apart, LIMIT), nystrom(*given, LIMIT), strict=True):
        assert torch.equal(found, expected)


def test_native_orthogonalisation_drops_rounding_noise(device: torch.device) -> None:
    rows = torch.randn(12, 30, dtype=torch.float64, device=device)
    rows[3:] = torch.randn(9, 3, dtype=torch.float64, device=device) @ rows[:3]
    core = (rows @ rows.mT)[None]
    found = Nystrom(*nystrom(core, core, core[:, 0, 0], LIMIT, goal="orthogonalise"))
    assert found.rank.item() == 3.0
    assert not found.mixing[0, :, 3:].any()


def test_native_operator_passes_opcheck(device: torch.device) -> None:
    problem = Problem(5, decaying(20), device)
    for trace in (None, problem.trace):
        given = problem.core, problem.metric, problem.ceiling, trace, LIMIT, 0
        checked = opcheck(torch.ops.eva_kernels.nystrom.default, given)
        assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.skipif(compiler_missing(), reason="needs g++ for a device guard")
def test_simulated_gpu_has_native_code() -> None:
    assert not runs_natively(torch.empty(2, 8, 8))
    with fake_cuda():
        assert runs_natively(torch.empty(2, 128, 128, device=DEVICE))
        assert not runs_natively(torch.empty(2, 129, 129, device=DEVICE))


def test_gpu_width_limit_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["eva_kernels.ops.nystrom"]
    gpu, asked = torch.device("cuda", 3), []
    cores: list[Any] = [SimpleNamespace(shape=(2, q, q), device=gpu) for q in (100, 101)]
    monkeypatch.setattr(_native, "load_or_none", lambda kind: kind)
    monkeypatch.setattr(module, "max_native_width", lambda index: asked.append(index) or 100)
    assert [runs_natively(core) for core in cores] == [True, False]
    assert set(asked) == {3}
    monkeypatch.setattr(_native, "load_or_none", lambda kind: None)
    assert not runs_natively(cores[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"core": torch.ones(2, 3, 3)}, EvaTypeError, "core must be float64"),
        ({"core": torch.ones(2, 3, 4).double()}, EvaValueError, r"both be \(L, Q, Q\)"),
        ({"metric": torch.ones(2, 3, 3)}, EvaTypeError, "metric must be float64"),
        ({"metric": torch.ones(2, 4, 4).double()}, EvaValueError, "core and metric"),
        ({"ceiling": torch.ones(2)}, EvaTypeError, "ceiling must be float64"),
        (dict.fromkeys(("core", "metric"), torch.ones(2, 3, 4).double()), EvaValueError, "both be"),
        (dict.fromkeys(("core", "metric"), torch.ones(3, 3).double()), EvaValueError, "both be"),
        ({"ceiling": torch.ones(1).double()}, EvaValueError, r"ceiling must be \(2,\)"),
        ({"ceiling": torch.ones(3).double()}, EvaValueError, r"ceiling must be \(2,\)"),
        ({"ceiling": torch.ones(2, device="meta").double()}, EvaValueError, "ceiling is on meta"),
    ],
)
def test_bad_input(changes: dict[str, Tensor], error: type, message: str) -> None:
    square = torch.ones(2, 3, 3).double()
    given = {"core": square, "metric": square, "ceiling": torch.ones(2).double(), **changes}
    with pytest.raises(error, match=message):
        nystrom(**given, tolerance=LIMIT)
    with pytest.raises(EvaValueError, match="goal must be one of solve, whiten, orthog"):
        nystrom(square, square, torch.ones(2).double(), LIMIT, goal="span")
    widest = torch.eye(128).double()[None]
    assert nystrom(widest, widest, torch.full((1,), 1e6).double(), LIMIT)[1][0, 0] == 128
    wide = torch.ones(1, 129, 129).double()
    with pytest.raises(EvaValueError, match="Q is at most 128, not 129"):
        nystrom(wide, wide, torch.ones(1).double(), LIMIT)
