"""The first basis by one native call, against the separate passes of two folds."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from eva_kernels import _native, reference
from eva_kernels.errors import EvaTypeError, EvaValueError
from eva_kernels.ops import fold_layers, fold_measure, fold_prepare, fold_rows, nystrom, start
from eva_kernels.ops.start import runs_natively
from fake_cuda import DEVICE, compiler_missing, fake_cuda

# tests/packaging builds the C++ module, so a broken build fails there.
pytestmark = pytest.mark.skipif(
    _native.unavailable_reason("cpu") is not None, reason="the C++ module is not built"
)
SHAPES = [(1, 16), (7, 40), (32, 300), (64, 700), (100, 260)]


class Problem:
    """A random basis and the sums of tokens about their mean.

    Args:
        q, d: of the basis.
        device: of all tensors.
        rank: of the tokens, if not full.
    """

    def __init__(self, q: int, d: int, device: torch.device, rank: int | None = None) -> None:
        self.tokens = 4 * q
        x = torch.randn(self.tokens, d) + 3
        if rank is not None:
            x = torch.randn(self.tokens, rank) @ torch.randn(rank, d) + 3
        self.mean = x.double().mean(0).float().to(device)
        self.basis = torch.linalg.qr(torch.randn(d, q)).Q.mT.contiguous().to(device)
        self.sums = (
            torch.zeros(q, d, device=device),
            torch.zeros(d, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )
        reference.sketch(x.to(device), self.basis, self.mean, *self.sums)

    def copy(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return copies of basis, sums and mean, which the call changes in place."""
        return tuple(t.to(device, copy=True) for t in (self.basis, *self.sums, self.mean))

    def by_passes(self) -> tuple[Tensor, Tensor]:
        """Return the first basis and mean from the passes of two folds."""
        device = self.basis.device
        basis, products, shift, square, mean = self.copy(device)
        layers = fold_layers([basis], [products], [shift], [square], [mean], [0])
        sound = torch.ones((), dtype=torch.bool, device=device)
        n, q = float(self.tokens), len(basis)
        for goal, head in (("whiten", (n, 1.0, n - 1, n)), ("orthogonalise", (1.0, 1, 1, 1))):
            squares = [float(goal == "orthogonalise")] * q
            numbers = torch.tensor([[*head, *squares]], dtype=torch.float64, device=device)
            delta, new_mean, _ = fold_prepare(layers, numbers)
            along, core, _ = fold_measure(layers, numbers, delta)
            mixing, summary = nystrom(core, core, numbers[:, 2], 0.0, goal=goal)
            fold_rows(layers, numbers, delta, along, new_mean, mixing, summary, sound)
            for one in (products, shift, square):
                one.zero_()
        return basis, mean


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize(("q", "d"), SHAPES)
def test_native_start_equals_the_separate_passes(
    q: int, d: int, rank: int | None, device: torch.device
) -> None:
    problem = Problem(q, d, device, rank)
    basis, products, shift, square, mean = given = problem.copy(device)
    start(*given, problem.tokens)
    wanted_basis, wanted_mean = problem.by_passes()
    assert torch.equal(basis, wanted_basis)
    assert torch.equal(mean, wanted_mean)
    assert not torch.equal(basis, problem.basis)
    for one in (products, shift, square):
        assert not one.any()
    known = q if rank is None else min(q, rank)
    overlaps = basis[:known].double() @ basis[:known].double().mT
    identity = torch.eye(known, dtype=torch.float64, device=device)
    torch.testing.assert_close(overlaps, identity, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("q", "d"), SHAPES)
def test_workspace_holds_all_parts(q: int, d: int) -> None:
    tiles, splits = -(-q // 64), -(-d // 128)
    sums = tiles * (tiles + 1) // 2 * splits * 2 * 64 * 64  # core and metric, by pairs of tiles
    doubles = (2 * (4 + q), d, q, 3, sums, q * q, q * q, 3 * q * q, q * q, 2 + 2 * q)
    parts = (7 * 8, *(8 * count for count in doubles), 4 * d, 1)
    aligned = sum(-(-part // 16) * 16 for part in parts)
    assert _native.load("cpu").start_bytes(q, d, 128) == aligned


@pytest.mark.gpu
@pytest.mark.parametrize(("q", "d"), [(32, 300), (64, 4096)])
def test_native_code_of_cpu_and_gpu_agree(q: int, d: int) -> None:
    problem = Problem(q, d, torch.device("cpu"))
    here, there = problem.copy(torch.device("cpu")), problem.copy(torch.device("cuda"))
    start(*here, problem.tokens)
    start(*there, problem.tokens)
    torch.testing.assert_close(there[0].cpu(), here[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(there[4].cpu(), here[4])


def test_nonfinite_tokens_are_left_to_the_fold(device: torch.device) -> None:
    problem = Problem(7, 40, device)
    given = problem.copy(device)
    given[2][3] = float("nan")
    start(*given, problem.tokens)
    assert given[4].isnan().any()  # the fold reports it, as the sketch of the step is not finite


def test_bad_input(device: torch.device) -> None:
    problem = Problem(7, 40, device)
    basis, products, shift, square, mean = problem.copy(device)
    with pytest.raises(EvaTypeError, match=r"shifts.*float64"):
        start(basis, products, shift.float(), square, mean, 28)
    with pytest.raises(EvaValueError, match="products"):
        start(basis, products[:, 1:], shift, square, mean, 28)
    with pytest.raises(
        EvaValueError, match=r"not empty, .* not \(7, 0\)"
    ):  # regression: it ended the process
        start(basis[:, :0], products[:, :0], shift[:0], square, mean[:0], 28)


def test_operator_passes_opcheck(device: torch.device) -> None:
    problem = Problem(7, 40, device)
    operator = torch.ops.eva_kernels.start.default
    tests = ("test_schema", "test_faketensor")
    given = problem.copy(device)
    given[2].add_(problem.tokens)  # opcheck does not detect a write that changes nothing
    opcheck(operator, (*given, problem.tokens), test_utils=tests)


class BasisOnGpu:
    """The attributes of a basis (Q, D) on a GPU that are read."""

    device, dtype = torch.device("cuda", 3), torch.float32

    def __init__(self, width: int) -> None:
        self.width = width

    def __len__(self) -> int:
        return self.width


def test_gpu_width_limit_depends_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, asked = sys.modules["eva_kernels.ops.start"], []
    # the limit of compute capability 7.5
    monkeypatch.setattr(module, "max_native_width", lambda index: asked.append(index) or 120)
    monkeypatch.setattr(_native, "load_or_none", lambda kind: kind)
    bases: list[Any] = [BasisOnGpu(q) for q in (120, 121, 129)]
    assert [runs_natively(basis) for basis in bases] == [True, False, False]
    assert set(asked) == {3}
    monkeypatch.setattr(_native, "load_or_none", lambda kind: None)
    assert not runs_natively(bases[0])


@pytest.mark.skipif(compiler_missing(), reason="needs g++ for a device guard")
def test_simulated_gpus_start_natively() -> None:
    assert not runs_natively(torch.empty(2, 8))
    with fake_cuda():
        assert runs_natively(torch.empty(128, 200, device=DEVICE))
        assert not runs_natively(torch.empty(129, 200, device=DEVICE))
