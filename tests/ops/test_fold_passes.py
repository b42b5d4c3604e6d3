"""The native and plain passes of a fold against dense algebra, alone and in a whole fold."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from eva_kernels import _native, reference
from eva_kernels.errors import EvaRuntimeError, EvaTypeError, EvaValueError
from eva_kernels.ops import fold as module
from eva_kernels.ops.fold import (
    MAX_WIDTH,
    columns_per_split,
    fold_layers,
    fold_measure,
    fold_prepare,
    fold_rows,
)
from eva_kernels.streaming import _host, compare_streams, fold_streams
from eva_kernels.streaming import fold as fold_module
from eva_kernels.streaming import nystrom as nystrom_module
from fake_cuda import DEVICE, compiler_missing, fake_cuda
from helpers import decaying, make_stream, with_spectrum

SHAPES = [(1, 1, 1), (3, 4, 40), (2, 16, 513), (2, 64, 300), (3, 70, 96), (2, 128, 1030)]
needs_module = pytest.mark.skipif(
    _native.unavailable_reason("cpu") is not None, reason="the C++ module is not built"
)


@pytest.fixture(params=["native", "plain"])
def passes(request: pytest.FixtureRequest, device: torch.device) -> type[Passes]:
    if request.param == "native" and (reason := _native.unavailable_reason(device.type)):
        # tests/packaging builds the C++ module, so a broken build fails there.
        pytest.skip(reason)
    return {"native": Passes, "plain": PlainPasses}[request.param]


class Problem:
    """Layers to be folded, and the expected results by dense float64 algebra."""

    def __init__(self, count: int, q: int, d: int, device: torch.device) -> None:
        wide = torch.float64
        self.bases = [torch.randn(q, d, device=device) for _ in range(count)]
        self.products = [torch.randn(q, d, device=device) for _ in range(count)]
        self.means = [torch.randn(d, device=device) for _ in range(count)]
        self.shifts = [torch.randn(d, dtype=wide, device=device) for _ in range(count)]
        # In the first layer all squares are due to the shift of the mean: no variance is added.
        self.squares = [torch.tensor(1e4 * i, dtype=wide, device=device) for i in range(count)]
        self.numbers = 0.5 + torch.rand(count, 4 + q, dtype=wide, device=device)
        self.mixing = torch.randn(count, q, q, dtype=wide, device=device)
        self.ranks = [q if i == 0 else i % (q + 1) for i in range(count)]
        self.summary = torch.full((count, 2 + 2 * q), torch.nan, dtype=wide, device=device)
        self.summary[:, 0] = torch.tensor(self.ranks)
        self.kept = [q if i == count - 1 else i % (q + 1) for i in range(count)]

    @property
    def layers(self) -> tuple:
        return self.bases, self.products, self.shifts, self.squares, self.means, self.kept

    def delta(self, i: int) -> Tensor:
        return self.shifts[i] / self.numbers[i, 0]

    def image(self, i: int) -> Tensor:
        basis, weight = self.bases[i].double(), self.numbers[i, 3]
        carried = self.numbers[i, 4:].diag() @ basis
        delta = self.delta(i)[:, None]
        return self.products[i].double() + carried - weight * (basis @ delta) @ delta.mT


class Passes:
    """The three native passes of a problem, in order."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.layers = problem, fold_layers(*problem.layers)

    def prepare(self) -> tuple[Tensor, Tensor, Tensor]:
        return fold_prepare(self.layers, self.problem.numbers)

    def measure(self) -> tuple[Tensor, Tensor, Tensor]:
        return fold_measure(self.layers, self.problem.numbers, self.prepare()[0])

    def rows(self, sound: Tensor) -> Tensor:
        p, (delta, mean, _) = self.problem, self.prepare()
        along = fold_measure(self.layers, p.numbers, delta)[0]
        fold_rows(self.layers, p.numbers, delta, along, mean, p.mixing, p.summary, sound)
        return self.layers.saved


class PlainPasses(Passes):
    """The same passes by the plain implementation."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def prepare(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        return reference.fold_prepare(p.shifts, p.squares, p.means, p.numbers)

    def measure(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        return reference.fold_measure(p.bases, p.products, p.numbers, self.prepare()[0])

    def rows(self, sound: Tensor) -> Tensor:
        p, (delta, mean, _) = self.problem, self.prepare()
        state = p.bases, p.products, p.means, p.kept, p.numbers, delta
        return reference.fold_rows(*state, self.measure()[0], mean, p.mixing, p.summary, sound)


@pytest.mark.parametrize("shape", SHAPES)
def test_prepare(shape: tuple[int, int, int], passes: type[Passes], device: torch.device) -> None:
    problem = Problem(*shape, device)
    delta, mean, scalars = passes(problem).prepare()
    for i, before in enumerate(problem.means):
        share, weight = problem.numbers[i, 1], problem.numbers[i, 3]
        torch.testing.assert_close(delta[i], problem.delta(i))
        torch.testing.assert_close(mean[i], (before + share * problem.delta(i)).float())
        gain = problem.squares[i] - weight * problem.delta(i).square().sum()
        expected = [problem.squares[i], max(gain, 0 * gain), mean[i].double().norm()]
        torch.testing.assert_close(scalars[i], torch.stack(expected))


def test_scalars_of_nonfinite_sums(passes: type[Passes], device: torch.device) -> None:
    problem = Problem(3, 4, 40, device)
    problem.squares[0].fill_(torch.nan)
    problem.shifts[1][7] = torch.nan
    scalars = passes(problem).prepare()[2]
    expected = [[True, True, False], [False, True, True], [False, False, False]]
    assert scalars.isnan().tolist() == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_measure(shape: tuple[int, int, int], passes: type[Passes], device: torch.device) -> None:
    problem = Problem(*shape, device)
    along, core, metric = passes(problem).measure()
    for i, basis in enumerate(problem.bases):
        wide, image = basis.double(), problem.image(i)
        weight = problem.numbers[i, 3]
        scale = float(image.abs().max()) ** 2 * basis.shape[1]
        torch.testing.assert_close(along[i], weight * (wide @ problem.delta(i)))
        torch.testing.assert_close(
            core[i].tril(), (image @ wide.mT).tril(), rtol=0, atol=1e-13 * scale
        )
        torch.testing.assert_close(metric[i], image @ image.mT, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(
    shape: tuple[int, int, int], sound: bool, passes: type[Passes], device: torch.device
) -> None:
    problem = Problem(*shape, device)
    steps = passes(problem)
    old = [basis.clone() for basis in problem.bases]
    before = [mean.clone() for mean in problem.means]
    new = steps.prepare()[1]
    expected = [(problem.mixing[i].mT @ problem.image(i)).float() for i in range(len(old))]
    saved = steps.rows(torch.tensor(sound, device=device))
    if not sound:
        for found, kept in zip(problem.bases + problem.means, old + before, strict=True):
            assert torch.equal(found, kept)
        return
    rows = [basis[:count] for basis, count in zip(old, problem.kept, strict=True)]
    assert torch.equal(saved, torch.cat(rows))
    for i, (basis, rank) in enumerate(zip(problem.bases, problem.ranks, strict=True)):
        scale = float(expected[i].abs().max())
        torch.testing.assert_close(basis[:rank], expected[i][:rank], rtol=0, atol=2e-7 * scale)
        assert torch.equal(basis[rank:], old[i][rank:])
        assert torch.equal(problem.means[i], new[i])


@needs_module
def test_native_mixing_with_other_strides(device: torch.device) -> None:
    one, other = Problem(2, 8, 50, device), Problem(2, 8, 50, device)
    copied = {key: copy.deepcopy(value) for key, value in vars(one).items()}
    vars(other).update(copied, mixing=one.mixing.mT.contiguous().mT)
    assert not other.mixing.is_contiguous()
    sound = torch.ones((), dtype=torch.bool, device=device)
    for problem in (one, other):
        Passes(problem).rows(sound)
    for i in range(2):
        assert torch.equal(other.bases[i], one.bases[i])


def test_same_bits_twice(passes: type[Passes], device: torch.device) -> None:
    steps = passes(Problem(4, 33, 700, device))
    first, second = ((*steps.prepare(), *steps.measure()) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@needs_module
def test_native_results_are_symmetric(device: torch.device) -> None:
    for found in Passes(Problem(2, 70, 130, device)).measure()[1:]:
        assert torch.equal(found, found.mT)


@needs_module
def test_operators_pass_opcheck(device: torch.device) -> None:
    problem = Problem(2, 5, 20, device)
    layers, numbers = fold_layers(*problem.layers), problem.numbers
    delta, mean, _ = fold_prepare(layers, numbers)
    along = fold_measure(layers, numbers, delta)[0]
    sound = torch.ones((), dtype=torch.bool, device=device)
    mixed = along, mean, problem.mixing, problem.summary, sound
    table, ops = layers.table, torch.ops.eva_kernels
    found = [
        opcheck(ops.fold_prepare.default, (table, numbers, layers.features)),
        opcheck(ops.fold_measure.default, (table, numbers, delta, layers.memory, layers.columns)),
        opcheck(ops.fold_rows.default, (table, numbers, delta, *mixed)),
    ]
    assert {result for checked in found for result in checked.values()} == {"SUCCESS"}


@pytest.mark.parametrize(
    ("count", "width", "features"),
    [(1, 16, 64), (96, 64, 4096), (32, 64, 11008), (1, 128, 300_000), (500, 1, 1)],
)
def test_splits_fill_a_gpu_and_cover_all_features(count: int, width: int, features: int) -> None:
    columns = columns_per_split(count, width, features)
    splits = -(-features // columns)
    pairs = 3 if width > 64 else 1
    assert columns % 16 == 0
    assert (splits - 1) * columns < features <= splits * columns
    assert splits == 1 or columns >= 0.9 * module.MIN_COLUMNS
    assert count * pairs * splits <= module.TARGET_BLOCKS + count * pairs


@pytest.fixture
def compiled_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the code path of a GPU on the CPU, with the compiled CPU kernels."""
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    for where in (fold_module, nystrom_module):
        monkeypatch.setattr(where, "runs_natively", lambda tensor: True)
    monkeypatch.setattr(fold_module, "starts_natively", lambda basis: True)


@needs_module
@pytest.mark.parametrize("spectrum", [decaying(48), [50.0, 20.0, 3.0]])
def test_whole_fold_equals_plain_pytorch(
    spectrum: object, compiled_folds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [with_spectrum(240, 48, spectrum, offset=5.0, seed=i) for i in range(3)]

    def run() -> list:
        streams = [make_stream(48, 6, backend="torch") for _ in data]
        for part in (slice(0, 80), slice(80, 160), slice(160, 240)):
            for stream, x in zip(streams, data, strict=True):
                stream.add(x[part])
            compare_streams(fold_streams(streams), [4] * 3, tau=0.5)
        return streams

    native = run()
    for where in (fold_module, nystrom_module):
        monkeypatch.setattr(where, "runs_natively", lambda tensor: False)
    monkeypatch.setattr(fold_module, "starts_natively", lambda basis: False)
    for one, other in zip(native, run(), strict=True):
        torch.testing.assert_close(
            one.sketch.singular_values, other.sketch.singular_values, rtol=1e-6, atol=1e-4
        )
        assert (one.sketch.rank, one.sketch.count) == (other.sketch.rank, other.sketch.count)
        assert one.sketch.total == pytest.approx(other.sketch.total, rel=1e-9)
        k = min(6, one.sketch.rank)
        overlap = one.sketch.basis[:k] @ other.sketch.basis[:k].mT
        torch.testing.assert_close(overlap.abs(), torch.eye(k), rtol=0, atol=2e-5)
        assert one.similarity == pytest.approx(other.similarity, abs=1e-5)


needs_fake_cuda = pytest.mark.skipif(compiler_missing(), reason="needs g++ for a device guard")


@needs_fake_cuda
def test_simulated_gpu_dispatches_three_operators() -> None:
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "eva_kernels":
                calls.append(func.name().removeprefix("eva_kernels::"))
            return func(*args, **(kwargs or {}))

    with fake_cuda():
        problem = Problem(2, 70, 600, DEVICE)
        layers, numbers = fold_layers(*problem.layers), problem.numbers
        with Recorder():
            delta, mean, scalars = fold_prepare(layers, numbers)
            along, core, metric = fold_measure(layers, numbers, delta)
            sound = torch.ones((), dtype=torch.bool, device=DEVICE)
            mixed = along, mean, problem.mixing, problem.summary, sound
            fold_rows(layers, numbers, delta, *mixed)
    assert calls == ["fold_prepare", "fold_measure", "fold_rows"]
    shapes = [tuple(t.shape) for t in (delta, mean, scalars, along, core, metric, layers.saved)]
    assert shapes == [(2, 600), (2, 600), (2, 3), (2, 70), (2, 70, 70), (2, 70, 70), (70, 600)]
    assert {t.device.type for t in (delta, mean, scalars, along, core, metric)} == {"cuda"}
    # partial sums of twelve blocks (two layers, two splits, three pairs of row tiles); later
    # reused for the saved rows
    assert layers.memory.numel() == 12 * 4 * 64 * 64


@needs_fake_cuda
def test_simulated_gpu_has_memory_for_all_saved_rows() -> None:
    with fake_cuda():
        problem = Problem(2, 64, 500, DEVICE)
        problem.kept = [64, 64]
        layers = fold_layers(*problem.layers)
        assert layers.saved.shape == (128, 500)
        assert layers.memory.numel() == 128 * 500  # more than the partial sums of two blocks


@needs_module
def test_layers_keep_their_tensors_alive(device: torch.device) -> None:
    problem = Problem(2, 3, 10, device)
    given = [weakref.ref(tensor) for tensors in problem.layers[:5] for tensor in tensors]
    layers = fold_layers(*problem.layers)
    assert layers.table[:, 3].tolist() == problem.kept == [0, 3]  # see csrc/fold.h
    del problem
    assert all(tensor() is not None for tensor in given)


@needs_fake_cuda
def test_runs_natively_by_device_dtype_and_width() -> None:
    assert not module.runs_natively(torch.empty(2, 8))
    with fake_cuda():
        assert module.runs_natively(torch.empty(2, 8, device=DEVICE))
        assert module.runs_natively(torch.empty(MAX_WIDTH, 200, device=DEVICE))
        assert not module.runs_natively(torch.empty(2, 8, device=DEVICE).double())
        assert not module.runs_natively(torch.empty(MAX_WIDTH + 1, 200, device=DEVICE))


def _bad(**changes: object) -> tuple:
    problem = Problem(2, 3, 10, torch.device("cpu"))
    problem.__dict__.update(changes)
    return problem.layers


@needs_module
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bases": []}, EvaValueError, r"at least one entry each, not \[0, 2, 2"),
        ({"products": [torch.ones(3, 10)]}, EvaValueError, r"not \[2, 1, 2"),
        ({"kept": [3]}, EvaValueError, r"not \[2, 2, 2, 2, 2, 1\]"),
        ({"bases": [torch.ones(3)] * 2}, EvaValueError, r"must be \(Q, D\) .*, not \(3,\)"),
        ({"bases": [torch.ones(3, 10), torch.ones(10, 3).mT]}, EvaValueError, r"bases\[1\] must"),
        ({"bases": [torch.ones(3, 10).half()] * 2}, EvaTypeError, r"bases\[0\] must be torch.fl"),
        ({"bases": [torch.ones(129, 130)] * 2}, EvaValueError, "Q at most 128"),
        ({"bases": [torch.ones(3, 0)] * 2}, EvaValueError, r"not empty, .* not \(3, 0\)"),
        ({"bases": [torch.ones(0, 10)] * 2}, EvaValueError, r"not empty, .* not \(0, 10\)"),
        ({"products": [torch.ones(3, 9)] * 2}, EvaValueError, r"products\[0\] must be cont"),
        ({"bases": [torch.ones(10, 3).mT] * 2}, EvaValueError, r"bases\[0\].*contiguous"),
        ({"shifts": [torch.ones(10)] * 2}, EvaTypeError, r"shifts\[0\] must be torch.float64"),
        ({"squares": [torch.ones(1).double()] * 2}, EvaValueError, r"squares\[0\] must be"),
        ({"means": [torch.ones(10, device="meta")] * 2}, EvaValueError, r"means\[0\] is on meta"),
        ({"kept": [0, 4]}, EvaValueError, "num_saved must be between 0 and 3"),
        ({"kept": [-1, 3]}, EvaValueError, "num_saved must be between 0 and 3"),
    ],
)  # fmt: skip
def test_bad_layers(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fold_layers(*_bad(**changes))


def test_no_layers() -> None:
    with pytest.raises(EvaValueError, match="at least one entry each"):
        fold_layers([], [], [], [], [], [])


@needs_module
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("numbers", torch.ones(2, 3).double(), EvaValueError),
        ("delta", torch.ones(2, 10), EvaTypeError),
        ("delta", torch.ones(2, 9).double(), EvaValueError),
        ("along", torch.ones(2, 2).double(), EvaValueError),
        ("mean", torch.ones(2, 10).double(), EvaTypeError),
        ("mixing", torch.ones(2, 3, 4).double(), EvaValueError),
        ("summary", torch.ones(2, 2).double(), EvaValueError),
        ("all_finite", torch.ones(()), EvaTypeError),
    ],
)
def test_bad_input_of_rows(name: str, value: Tensor, error: type) -> None:
    problem = Problem(2, 3, 10, torch.device("cpu"))
    given = {
        "numbers": problem.numbers,
        "delta": torch.ones(2, 10).double(),
        "along": torch.ones(2, 3).double(),
        "mean": torch.ones(2, 10),
        "mixing": problem.mixing,
        "summary": problem.summary,
        "all_finite": torch.ones((), dtype=torch.bool),
        name: value,
    }
    layers = fold_layers(*problem.layers)
    with pytest.raises(error, match=name):
        fold_rows(layers, **given)
    if name in ("numbers", "delta"):
        with pytest.raises(error, match=name):
            fold_measure(layers, given["numbers"], given["delta"])
    if name == "numbers":
        with pytest.raises(error, match=name):
            fold_prepare(layers, given["numbers"])


@pytest.mark.usefixtures("without_modules")
def test_missing_native_module_raises() -> None:
    with pytest.raises(EvaRuntimeError, match=r"backend='native' cannot run.*_absent"):
        fold_layers(*_bad())
