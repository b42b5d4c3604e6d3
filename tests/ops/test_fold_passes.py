"""The two passes of a fold against their plain twins, on every backend, and in a whole fold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from eva_kernels import _native, reference
from eva_kernels.errors import EvaRuntimeError, EvaTypeError, EvaValueError
from eva_kernels.ops import fold as module
from eva_kernels.ops.fold import MAX_WIDTH, columns_of_a_split, fold_measure, fold_rows
from eva_kernels.streaming import _host, compare_streams, fold_streams
from eva_kernels.streaming import batch as batch_module
from fake_cuda import DEVICE, compiler_missing, fake_cuda
from helpers import decaying, make_stream, with_spectrum

SHAPES = [(1, 1, 1), (3, 4, 40), (2, 16, 513), (2, 64, 300), (3, 70, 96), (2, 128, 1030)]
needs_module = pytest.mark.skipif(
    _native.unavailable("cpu") is not None, reason="the C++ module is not built"
)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "native" and (reason := _native.unavailable(device.type)):
        # tests/packaging builds the C++ module, so a broken build fails there.
        pytest.skip(reason)
    return request.param


class Problem:
    """Layers with a fold to be done, and the answer by dense float64 algebra."""

    def __init__(self, count: int, q: int, d: int, device: torch.device) -> None:
        wide = torch.float64
        self.bases = [torch.randn(q, d, device=device) for _ in range(count)]
        self.products = [torch.randn(q, d, device=device) for _ in range(count)]
        self.delta = torch.randn(count, d, dtype=wide, device=device)
        # As in a fold: a part of a wider table.
        table = torch.rand(count, q + 4, dtype=wide, device=device)
        self.numbers = table[:, 3:]
        self.mixing = torch.randn(count, q, q, dtype=wide, device=device)
        self.kept = [q if i == count - 1 else i % (q + 1) for i in range(count)]
        self.before = [basis.new_full((k, d), torch.nan) for basis, k in self.layers()]

    def layers(self) -> Iterator[tuple[Tensor, int]]:
        return zip(self.bases, self.kept, strict=True)

    @property
    def inputs(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        return self.bases, self.products, self.delta, self.numbers

    def image(self, i: int) -> Tensor:
        basis, weight = self.bases[i].double(), self.numbers[i, 0]
        carried = self.numbers[i, 1:].diag() @ basis
        delta = self.delta[i][:, None]
        return self.products[i].double() + carried - weight * (basis @ delta) @ delta.mT


@pytest.mark.parametrize("shape", SHAPES)
def test_measure(shape: tuple[int, int, int], backend: str, device: torch.device) -> None:
    problem = Problem(*shape, device)
    along, core, metric = fold_measure(*problem.inputs, backend=backend)
    for i, basis in enumerate(problem.bases):
        wide, image = basis.double(), problem.image(i)
        weight = problem.numbers[i, 0]
        scale = float(image.abs().max()) ** 2 * basis.shape[1]
        torch.testing.assert_close(along[i], weight * (wide @ problem.delta[i]))
        torch.testing.assert_close(
            core[i].tril(), (image @ wide.mT).tril(), rtol=0, atol=1e-13 * scale
        )
        torch.testing.assert_close(metric[i], image @ image.mT, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape: tuple[int, int, int], sound: bool, backend: str, device: torch.device) -> None:
    problem = Problem(*shape, device)
    along = fold_measure(*problem.inputs, backend=backend)[0]
    old = [basis.clone() for basis in problem.bases]
    wanted = [(problem.mixing[i].mT @ problem.image(i)).float() for i in range(len(old))]
    flag = torch.tensor(sound, device=device)
    fold_rows(*problem.inputs, along, problem.mixing, flag, problem.before, backend=backend)
    for i, (basis, kept) in enumerate(problem.layers()):
        if not sound:
            assert torch.equal(basis, old[i])
            continue
        assert torch.equal(problem.before[i], old[i][:kept])
        scale = float(wanted[i].abs().max())
        torch.testing.assert_close(basis, wanted[i], rtol=0, atol=2e-7 * scale)


def test_mixing_of_any_strides(backend: str, device: torch.device) -> None:
    one, other = Problem(2, 8, 50, device), Problem(2, 8, 50, device)
    other.__dict__.update(bases=[b.clone() for b in one.bases], products=one.products)
    other.delta, other.numbers = one.delta, one.numbers
    along = fold_measure(*one.inputs, backend=backend)[0]
    sound = torch.ones((), dtype=torch.bool, device=device)
    strided = one.mixing.mT.contiguous().mT
    fold_rows(*one.inputs, along, one.mixing, sound, one.before, backend=backend)
    fold_rows(*other.inputs, along, strided, sound, other.before, backend=backend)
    for i in range(2):
        torch.testing.assert_close(other.bases[i], one.bases[i], rtol=0, atol=1e-6)


def test_same_bits_twice_and_alone(backend: str, device: torch.device) -> None:
    problem = Problem(4, 33, 700, device)
    first, second = (fold_measure(*problem.inputs, backend=backend) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@needs_module
def test_native_results_are_symmetric(device: torch.device) -> None:
    problem = Problem(2, 70, 130, device)
    for found in fold_measure(*problem.inputs, backend="native")[1:]:
        assert torch.equal(found, found.mT)


@needs_module
def test_operators_are_well_formed(device: torch.device) -> None:
    problem = Problem(2, 5, 20, device)
    ops = torch.ops.eva_kernels
    partial = problem.delta.new_empty(0 if device.type == "cpu" else 4 * 64 * 64)
    measured = opcheck(ops.fold_measure.default, (*problem.inputs, partial, 32))
    along = fold_measure(*problem.inputs, backend="native")[0]
    sound = torch.ones((), dtype=torch.bool, device=device)
    written = opcheck(
        ops.fold_rows.default,
        (*problem.inputs, along, problem.mixing, sound, problem.before),
    )
    assert {*measured.values(), *written.values()} == {"SUCCESS"}


@pytest.mark.parametrize(
    ("count", "width", "features"),
    [(1, 16, 64), (96, 64, 4096), (32, 64, 11008), (1, 128, 300_000), (500, 1, 1)],
)
def test_splits_fill_a_gpu_and_hold_all_features(count: int, width: int, features: int) -> None:
    columns = columns_of_a_split(count, width, features)
    splits = -(-features // columns)
    pairs = 3 if width > 64 else 1
    assert columns % 16 == 0
    assert (splits - 1) * columns < features <= splits * columns
    assert splits == 1 or columns >= 0.9 * module.LEAST_COLUMNS
    assert count * pairs * splits <= module.BLOCKS + count * pairs


@pytest.fixture
def compiled_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of a GPU on the CPU, with the compiled twins for its kernels."""
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    monkeypatch.setattr(batch_module, "runs_natively", lambda basis: True)
    monkeypatch.setattr(module, "runs_natively", lambda basis: True)


@needs_module
@pytest.mark.parametrize("spectrum", [decaying(48), [50.0, 20.0, 3.0]])
def test_a_whole_fold_gives_the_same_answers(
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
    monkeypatch.setattr(batch_module, "runs_natively", lambda basis: False)
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
def test_simulated_gpu_sees_two_calls() -> None:
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "eva_kernels":
                seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with fake_cuda():
        problem = Problem(2, 8, 600, DEVICE)
        with Recorder():
            along, core, metric = fold_measure(*problem.inputs)
            sound = torch.ones((), dtype=torch.bool, device=DEVICE)
            fold_rows(*problem.inputs, along, problem.mixing, sound, problem.before)
    assert seen == ["eva_kernels::fold_measure", "eva_kernels::fold_rows"]
    assert (along.shape, core.shape, metric.shape) == ((2, 8), (2, 8, 8), (2, 8, 8))
    assert {t.device.type for t in (along, core, metric)} == {"cuda"}


@needs_fake_cuda
def test_auto_is_torch_where_native_code_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not module.runs_natively(torch.empty(2, 8))
    with fake_cuda():
        assert module.runs_natively(torch.empty(2, 8, device=DEVICE))
        assert not module.runs_natively(torch.empty(2, 8, device=DEVICE).double())
        assert not module.runs_natively(torch.empty(MAX_WIDTH + 1, 200, device=DEVICE))
    monkeypatch.setattr(reference, "fold_measure", lambda *inputs: "plain")
    assert fold_measure(*Problem(1, 2, 8, torch.device("cpu")).inputs) == "plain"


def _bad(**changes: object) -> tuple:
    problem = Problem(2, 3, 10, torch.device("cpu"))
    problem.__dict__.update(changes)
    return problem.inputs


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bases": []}, EvaValueError, "at least one, not 0 and 2"),
        ({"products": [torch.ones(3, 10)]}, EvaValueError, "not 2 and 1"),
        ({"bases": [torch.ones(3, 10).half()] * 2}, EvaTypeError, "float32 or float64"),
        ({"products": [torch.ones(3, 10), torch.ones(3, 9)]}, EvaValueError, r"products\[1\]"),
        ({"bases": [torch.ones(3, 10), torch.ones(10, 3).mT]}, EvaValueError, r"bases\[1\].*cont"),
        ({"products": [torch.ones(3, 10).double()] * 2}, EvaTypeError, r"products\[0\] must be"),
        ({"delta": torch.ones(2, 10)}, EvaTypeError, "delta must be torch.float64"),
        ({"numbers": torch.ones(2, 3).double()}, EvaValueError, r"numbers must be .*\(2, 4\)"),
        ({"numbers": torch.ones(4, 2).double().mT}, EvaValueError, "numbers must be contiguous"),
        ({"delta": torch.ones(2, 10, device="meta").double()}, EvaValueError, "delta is on meta"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fold_measure(*_bad(**changes))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("along", torch.ones(2, 2).double(), EvaValueError),
        ("mixing", torch.ones(2, 3, 3), EvaTypeError),
        ("sound", torch.ones(()), EvaTypeError),
        ("before", [torch.ones(0, 10)], EvaValueError),
        ("before", [torch.ones(4, 10), torch.ones(0, 10)], EvaValueError),
    ],
)
def test_bad_input_of_rows(name: str, value: object, error: type) -> None:
    problem = Problem(2, 3, 10, torch.device("cpu"))
    given = {
        "along": torch.ones(2, 3).double(),
        "mixing": problem.mixing,
        "sound": torch.ones((), dtype=torch.bool),
        "before": problem.before,
    }
    with pytest.raises(error, match=name):
        fold_rows(*problem.inputs, **{**given, name: value})


def test_explicit_native_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaValueError, match="one of auto, native, torch, not 'triton'"):
        fold_measure(*_bad(), backend="triton")
    wide = Problem(1, MAX_WIDTH + 1, 130, torch.device("cpu"))
    with pytest.raises(EvaValueError, match="Q up to 128, not 129"):
        fold_measure(*wide.inputs, backend="native")
    doubled = _bad(
        bases=[torch.ones(3, 10).double()] * 2, products=[torch.ones(3, 10).double()] * 2
    )
    with pytest.raises(EvaTypeError, match=r"float32 bases, not torch\.float64"):
        fold_measure(*doubled, backend="native")
    monkeypatch.setattr(_native, "MODULES", {"cpu": "eva_kernels._absent"})
    _native._import.cache_clear()
    with pytest.raises(EvaRuntimeError, match=r"backend='native' cannot run.*_absent"):
        fold_measure(*_bad(), backend="native")
    _native._import.cache_clear()
