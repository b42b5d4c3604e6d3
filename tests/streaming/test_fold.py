"""The fold against float64 linear algebra, on low-rank, graded and degenerate data."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eva_kernels import reference
from eva_kernels.streaming import _host, fold_streams, step
from eva_kernels.streaming import batch as batch_module
from eva_kernels.streaming._basis import (
    complete_basis,
    orthonormalise,
    random_basis,
    repair_basis,
)
from eva_kernels.streaming.batch import GramBatch, HostNumbers, SketchBatch
from eva_kernels.streaming.fold import fold, fold_gram, lost_shares
from eva_kernels.streaming.nystrom import (
    CUT,
    _orthonormality_corrected,
    _whitener,
    nystrom,
    orthogonalisation,
)
from eva_kernels.streaming.spectrum import centred_scatter
from eva_kernels.streaming.state import SketchState, StepSums, clear_sums, empty_sketch, zero_sums
from helpers import (
    CPU,
    EPS64,
    TOLERANCES,
    decaying,
    exact,
    feed,
    make_stream,
    orthonormality,
    principal_cosine,
    relative,
    with_spectrum,
)

METHODS = ["sketch", "gram"]
REAL = [torch.float32, torch.float64]
SPECTRA = {0: [0.0], 1: [50.0], 3: [50.0, 20.0, 3.0]}


def sums_of(x: Tensor, state: SketchState) -> StepSums:
    sums = zero_sums(*state.basis.shape, state.basis.dtype, CPU)
    reference.sketch(x, state.basis, state.mean, sums.products, sums.shift, sums.square)
    sums.count = len(x)
    return sums


def empty_state(width: int, features: int, dtype: torch.dtype, seed: int) -> SketchState:
    basis = random_basis(width, features, seed).to(dtype)
    return empty_sketch(basis, torch.zeros(features, dtype=dtype))


def one_step(x: Tensor, width: int, seed: int = 0) -> SketchState:
    state = empty_state(width, x.shape[1], x.dtype, seed)
    return fold([state], [sums_of(x, state)])[0][0]


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("rank", SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_exact_on_low_rank_data(method: str, rank: int, offset: float, dtype: torch.dtype):
    x = with_spectrum(240, 48, SPECTRA[rank], offset=offset, dtype=dtype)
    answer = feed(make_stream(48, 6, method=method, dtype=dtype), x.split(60)).spectrum()
    limit = TOLERANCES[dtype]
    # The tokens as rounded to the dtype: rounding of the offset adds variance.
    rounding = limit.values * (1 + offset / 20)
    values, rows, total = exact(x)
    found = answer.singular_values
    assert answer.rank == rank
    assert float((found[:rank] - values[:rank]).abs().max() if rank else 0.0) <= rounding * 50
    assert found[rank:].tolist() == [0.0] * (6 - rank)
    assert answer.ratio[rank:].tolist() == [0.0] * (6 - rank)
    assert orthonormality(answer.components) <= limit.orthonormal
    if rank:
        assert 1 - principal_cosine(answer.components[:rank], rows[:rank]) <= limit.cosine
        assert abs(answer.total / total - 1) <= rounding


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("features", [1, 2, 5, 8])
@pytest.mark.parametrize("method", METHODS)
def test_exact_if_the_sketch_is_as_wide_as_the_data(method: str, features: int, dtype: torch.dtype):
    x = with_spectrum(200, features, decaying(features), dtype=dtype)
    stream = make_stream(features, features, method=method, dtype=dtype)
    answer = feed(stream, x.split(40)).spectrum()
    assert relative(answer.singular_values, exact(x)[0]) <= TOLERANCES[dtype].values
    assert orthonormality(answer.components) <= TOLERANCES[dtype].orthonormal


@pytest.mark.parametrize(("count", "lowest"), [(40, 1e-3), (40, 1e-5), (100, 1e-1), (100, 1e-7)])
@pytest.mark.parametrize("dtype", REAL)
def test_orthonormal_for_graded_spectra(dtype: torch.dtype, count: int, lowest: float):
    exponents = torch.linspace(0, 1, count, dtype=torch.float64)
    x = with_spectrum(600, 128, 10 * lowest**exponents, dtype=dtype)
    stream = feed(make_stream(128, 32, dtype=dtype), x.split(150))
    # All rows are checked, including those beyond the requested components.
    assert orthonormality(stream.sketch.basis) <= TOLERANCES[dtype].orthonormal


@pytest.mark.parametrize("decades", [2.8, 3.0, 3.3])
@pytest.mark.parametrize("dtype", REAL)
def test_orthonormal_after_steps_of_few_tokens(dtype: torch.dtype, decades: float):
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x * torch.logspace(0, -decades, 8, dtype=torch.float64)).to(dtype)
    stream = make_stream(8, 6, width=6, dtype=dtype)
    for tokens in x.split([3, 2, 2, 2]):
        stream.add(tokens)
        fold_streams([stream], final=True)
        assert orthonormality(stream.sketch.basis) <= TOLERANCES[dtype].orthonormal


@pytest.mark.parametrize("dtype", REAL)
def test_count_mean_and_total(dtype: torch.dtype):
    x = with_spectrum(500, 64, decaying(64), offset=200.0, dtype=dtype)
    state = one_step(x[:130], 8)
    for batch in (x[130:131], x[131:300], x[300:]):
        state = fold([state], [sums_of(batch, state)])[0][0]
    limit = TOLERANCES[dtype].sums
    assert float(state.count) == 500
    assert relative(state.mean, x.double().mean(0)) <= limit
    # The mean between steps is rounded to the dtype, an error of eps * 200 against deviations of 5.
    assert abs(float(state.total) / exact(x)[2] - 1) <= limit * 40


def test_equal_tokens_have_no_negative_variance():
    for row in torch.randn(20, 1, 40, dtype=torch.float64):
        assert one_step(row.expand(7, 40), 4).total >= 0
        stream = make_stream(40, 2, 4, method="gram", dtype=torch.float64)
        stream.add(torch.randn(7, 40, dtype=torch.float64))
        sums, pivot = stream.state.sums, stream.state.pivot
        clear_sums([sums])
        reference.gram(row.expand(7, 40), pivot, sums.products, sums.shift, sums.square)
        sums.count = 7
        assert fold_gram(stream.state)[0].sketch.total >= 0


def test_mean_whose_square_overflows_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    x = 4e18 + 1e16 * torch.randn(100, 64)
    stream = feed(make_stream(64, 4, backend="torch"), x.split(50))
    assert stream.sketch.mean_norm == pytest.approx(8 * 4e18, rel=1e-3)
    assert stream.spectrum().rank == 4


def test_layers_of_one_width_and_dtype_are_decomposed_in_one_call(monkeypatch: pytest.MonkeyPatch):
    calls, nystrom_of_layers = [], batch_module.nystrom

    def remember(*given: object) -> object:
        calls.append((len(given[0]), given[-1]))
        return nystrom_of_layers(*given)

    kinds = [(20, torch.float32), (20, torch.float64), (24, torch.float64)]
    streams = [make_stream(features, 3, dtype=dtype) for features, dtype in kinds]
    for stream in streams:
        stream.add(torch.randn(30, stream.features))
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    monkeypatch.setattr(batch_module, "nystrom", remember)
    fold_streams(streams)
    assert calls == [(1, torch.float32), (2, torch.float64)]


def test_other_features_are_found_beside_outliers():
    x = with_spectrum(400, 64, [60.0, 30.0, 10.0], dtype=torch.float64)
    x[:, 5] += 800 * torch.randn(400, dtype=torch.float64)
    answer = feed(make_stream(64, 6, dtype=torch.float64), x.split(100)).spectrum()
    assert answer.rank == 4
    torch.testing.assert_close(answer.singular_values[:4], exact(x)[0][:4], rtol=1e-9, atol=0)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_scale_of_the_data_does_not_matter(method: str, factor: float):
    x = with_spectrum(300, 48, decaying(48), dtype=torch.float64)
    plain, scaled = (
        feed(make_stream(48, 6, method=method), (scale * x).float().split(75)).spectrum()
        for scale in (1, factor)
    )
    assert plain.rank == scaled.rank == 6
    assert relative(scaled.singular_values, factor * plain.singular_values) <= 1e-5
    assert relative(scaled.ratio, plain.ratio) <= 1e-5
    assert scaled.lost == pytest.approx(plain.lost, rel=1e-3)
    assert (plain.lost > 0) == (method == "sketch")


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, REAL[0]), (2, REAL[0]), (5, REAL[0]), (12, REAL[1])]
)
def test_rank_is_less_than_the_number_of_tokens(tokens: int, dtype: torch.dtype):
    x = torch.randn(tokens, 40, dtype=dtype)
    state = one_step(x, 12)
    assert int(state.rank) == tokens - 1
    assert orthonormality(state.basis) <= TOLERANCES[dtype].orthonormal
    expected = exact(x)[0][: tokens - 1]
    torch.testing.assert_close(state.singular_values[: tokens - 1], expected, rtol=2e-6, atol=0)


def test_folding_together_equals_folding_alone(monkeypatch: pytest.MonkeyPatch):
    kinds = [
        with_spectrum(50, 32, [9e9], dtype=torch.float64),  # others are below its rounding error
        torch.zeros(50, 32, dtype=torch.float64),
        with_spectrum(50, 32, decaying(32), dtype=torch.float64),
        torch.randn(1, 32, dtype=torch.float64),
        with_spectrum(50, 32, [4.0, 3.0, 2.0], offset=50.0, dtype=torch.float64),
    ]
    states = [empty_state(6, 32, torch.float64, seed) for seed in range(len(kinds))]
    sums = [sums_of(x, state) for x, state in zip(kinds, states, strict=True)]
    alone = [fold([s], [u])[0][0] for s, u in zip(states, sums, strict=True)]
    together = [state for state, _ in fold(states, sums)]
    monkeypatch.setattr(batch_module, "CHUNK_BYTES", 2 * 6 * 32 * 8)
    chunked = [state for state, _ in fold(states, sums)]
    for expected, *found in zip(alone, together, chunked, strict=True):
        for state in found:
            assert int(state.rank) == int(expected.rank)
            torch.testing.assert_close(state.singular_values, expected.singular_values)
            torch.testing.assert_close(state.basis, expected.basis, rtol=0, atol=1e-10)
            # in memory of its own: its alignment decides the bits of the next products
            assert state.basis.untyped_storage().nbytes() == state.basis.nbytes


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_chunk_has_as_many_layers_as_fit_its_bytes(
    method: str, free: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_host, "reads_are_free", lambda device: free)
    streams = [make_stream(32, 3, 6, method=method, backend="torch") for _ in range(5)]
    for stream in streams:
        stream.add(torch.randn(9, 32))
    states = [stream.state for stream in streams]
    # A sketch needs memory for its basis in float64, exact sums for (D, D) numbers.
    rows = 6 if method == "sketch" else 32
    name = "CHUNK_BYTES" if free else "CHUNK_BYTES_ACCELERATOR"
    monkeypatch.setattr(batch_module, name, 2 * rows * 32 * 8)
    sums = [stream.sums for stream in streams]
    batch = SketchBatch(states, sums) if method == "sketch" else GramBatch(states)
    assert [chunk.stop - chunk.start for chunk in batch.chunks] == [2, 2, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", range(9))
def test_layer_is_sound_if_all_its_numbers_are_finite(column: int, bad: float):
    scalars, statistics = np.zeros((2, 3)), np.zeros((2, 2 + 2 * 3))
    if column < 3:
        scalars[1, column] = bad
    else:
        statistics[1, column - 1] = bad  # after rank and uneven, which are always finite
    assert HostNumbers.from_columns(scalars, statistics).is_finite.tolist() == [True, False]


def test_lost_is_the_gain_of_the_leading_rows():
    now = np.array([[4.0, 1.0, 7.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    before = np.array([[3.0, 0.5, 9.0], [2.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    # by rounding the gain may be negative
    assert lost_shares(now, before, [2, 1, 3]) == [pytest.approx(1 - 3.5 / 5), 0.0, 0.0]


def test_step_is_complete_from_as_many_tokens_as_the_sketch_width():
    x = with_spectrum(80, 48, decaying(48, 0.5))
    stream = feed(make_stream(48, 6, 12), [x[:40]])
    first = stream.lost
    for count, updated in ((11, False), (12, True)):
        other = stream.clone()
        other.add(x[40 : 40 + count])
        fold_streams([other], final=True)
        assert (other.lost != first) == updated


def test_folding_no_streams():
    assert fold([], []) == []


def test_folding_does_not_change_the_old_states():
    x = torch.randn(60, 20)
    state = one_step(x, 6)
    sums = sums_of(x, state)
    before = deepcopy((state, sums))
    fold([state], [sums])
    for old, now in zip(before, (state, sums), strict=True):
        for name, value in vars(now).items():
            was = vars(old)[name]
            same = torch.equal(was, value) if isinstance(value, Tensor) else was == value
            assert np.all(same), name


def nystrom_of(matrix: Tensor, width: int, count: float = 1e6) -> tuple[Tensor, ...]:
    basis = random_basis(width, len(matrix), seed=3)
    image = (basis @ matrix)[None]
    ceiling = torch.tensor([count - 1], dtype=torch.float64)
    trace = matrix.trace()[None]
    found = nystrom(image @ basis.mT, image @ image.mT, ceiling, trace, torch.float64)
    rows, rank = (found.mixing.mT @ image)[0], int(found.rank[0])
    rows = repair_basis(rows, rank) if found.uneven[0] else rows
    return rows, found.squares[0], found.rank[0], found.captured[0]


def test_nystrom_recovers_a_low_rank_matrix():
    rows = random_basis(4, 50, seed=9)
    matrix = rows.mT @ torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.5]).double()) @ rows
    basis, squares, rank, captured = nystrom_of(matrix, 10)
    assert int(rank) == 4
    assert relative(basis[:4].mT @ torch.diag(squares[:4]) @ basis[:4], matrix) <= 1e-12
    assert (captured >= 0).all()


def test_nystrom_does_not_overestimate_eigenvalues():
    x = with_spectrum(300, 60, decaying(60), dtype=torch.float64)
    matrix = x.mT @ x
    _, squares, _, _ = nystrom_of(matrix, 12)
    true = torch.linalg.eigvalsh(matrix).flip(0)[:12]
    assert (squares <= true * (1 + 1e-9)).all()
    assert squares.sum() >= 0.9 * true.sum()


def test_nystrom_detects_uneven_rows_by_their_overlaps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
    rows = random_basis(8, 50, seed=9)
    spectrum = torch.logspace(0, -3, 8, dtype=torch.float64)
    basis, _, rank, _ = nystrom_of(rows.mT @ torch.diag(spectrum) @ rows, 8)
    assert int(rank) == 8
    assert orthonormality(basis) <= 1e-13  # without the correction they miss it by some 1e-10


def test_nystrom_corrects_rows_twice():
    mixing = torch.eye(6, dtype=torch.float64) + 1e-3 * torch.randn(1, 6, 6, dtype=torch.float64)
    metric = torch.eye(6, dtype=torch.float64)[None]
    found, loose = _orthonormality_corrected(mixing, metric, torch.ones(1, 6, dtype=torch.bool))
    assert orthonormality(found[0].mT) <= 1e-9
    assert loose.tolist() == [pytest.approx(orthonormality(found[0].mT), rel=1e-3)]


def test_nystrom_of_a_zero_matrix():
    basis, squares, rank, _ = nystrom_of(torch.zeros(20, 20, dtype=torch.float64), 5)
    assert int(rank) == 0
    assert squares.tolist() == [0.0] * 5
    assert orthonormality(basis) <= 1e-14


def test_whitener_uses_cholesky_only_if_well_conditioned():
    vectors = random_basis(6, 6, seed=2)
    spectra = [[1, 0.9, 0.8, 0.5, 0.2, 1e-2], [1, 1, 1, 1, 1e-3, 1e-9], [1, 1, 1, 1, 0.5, -1]]
    spectra = torch.tensor(spectra, dtype=torch.float64)
    cores = vectors.mT @ torch.diag_embed(spectra) @ vectors
    whitener = _whitener(cores)
    kept = torch.where(spectra > CUT, 1 / spectra, 0.0)
    expected = vectors.mT @ torch.diag_embed(kept) @ vectors
    torch.testing.assert_close(whitener @ whitener.mT, expected, rtol=1e-9, atol=1e-9)
    # The cheap one, a Cholesky factor, is triangular.
    assert not bool(whitener[0].tril(-1).any())
    assert bool(whitener[1].tril(-1).any())


def test_orthogonalisation_is_triangular_or_gives_rank_zero():
    overlaps = torch.ones(2, 3, 3, dtype=torch.float64)
    overlaps[0] += torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    found = orthogonalisation(overlaps)
    assert found.rank.tolist() == [3, 0]
    one = found.mixing[0].mT @ overlaps[0] @ found.mixing[0]
    torch.testing.assert_close(one, torch.eye(3, dtype=torch.float64))
    assert torch.equal(found.mixing[0], found.mixing[0].triu())


@pytest.mark.parametrize("size", [1e-4, 10.0])
def test_orthonormalise_keeps_the_leading_span(size: float):
    generator = torch.Generator().manual_seed(5)
    rows = random_basis(6, 20, seed=4)
    rows = rows + size * torch.randn(6, 20, generator=generator, dtype=torch.float64)
    if size > 1:  # so far from orthonormal that the overlaps have no Cholesky factor
        rows[5] = 0
    polished = orthonormalise(rows)
    assert orthonormality(polished) <= 1e-12
    assert 1 - principal_cosine(polished[:3], rows[:3]) <= 1e-12


@pytest.mark.parametrize(
    ("kept", "width", "features"), [(0, 5, 9), (3, 5, 9), (4, 9, 9), (5, 5, 6)]
)
def test_complete_basis_keeps_the_leading_rows(kept: int, width: int, features: int):
    rows = random_basis(width, features, seed=4)
    broken = rows.clone()
    broken[kept:] = float("nan")
    full = complete_basis(broken, kept)
    assert torch.equal(full[:kept], rows[:kept])
    assert orthonormality(full) <= 16 * EPS64
    assert torch.equal(full, complete_basis(broken, kept))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_sums_on_one_device_stop_all_folds(bad: float):
    """On accelerators, no stream is folded then, and each keeps its sums."""

    def batch(device: torch.device, number: float) -> Any:
        decomposition = SimpleNamespace(summary=torch.tensor([number, 1.0]))
        return SimpleNamespace(device=device, scalars=torch.ones(2), decomposition=decomposition)

    devices = [CPU, torch.device("cpu", 0)]  # not equal
    for numbers, expected in (([3.0, 2.0], True), ([3.0, bad], False), ([bad, -bad], False)):
        batches = [batch(*pair) for pair in zip(devices, numbers, strict=True)]
        found = step._all_finite(batches)
        assert {device: bool(sound) for device, sound in found.items()} == dict.fromkeys(
            devices, expected
        )


def test_gram_scatter_is_about_the_mean():
    x = with_spectrum(300, 30, decaying(30), offset=50.0, dtype=torch.float64)
    stream = make_stream(30, 5, method="gram", dtype=torch.float64)
    for batch in x.split(77):
        stream.add(batch)
    assert batch_module.GramBatch([stream.state]).ceiling.tolist() == [299]
    state, _ = fold_gram(stream.state)
    centred = x - x.mean(0)
    assert relative(centred_scatter([state])[0], centred.mT @ centred) <= 1e-12
    assert relative(state.sketch.mean, x.mean(0)) <= 4 * EPS64


@pytest.mark.parametrize("method", METHODS)
def test_trace_is_that_of_the_matrix_that_is_decomposed(method: str):
    x = 9 + torch.randn(110, 20)
    stream = feed(make_stream(20, 10, 20, method=method), [x[:60]])
    stream.add(x[60:])
    exact = method == "gram"
    batch = GramBatch([stream.state]) if exact else SketchBatch([stream.state], [stream.sums])
    core = batch.measure()[0][0]  # of a basis of all directions
    assert batch.trace.item() == pytest.approx(core.trace().item(), rel=1e-5)
