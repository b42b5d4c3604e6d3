"""The stream of one layer input: steps, state after them, convergence, bad input."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.incremental_pca import IncrementalPCA as PeftIncrementalPCA
from torch import Tensor

from eva_kernels.errors import EvaValueError
from eva_kernels.streaming import InputStream, Options, compare_streams, fold_streams, state
from helpers import (
    DTYPES,
    EPS32,
    TOLERANCES,
    decaying,
    exact,
    feed,
    lost_variance,
    make_stream,
    orthonormality,
    principal_cosine,
    relative,
    with_spectrum,
)

METHODS = ["sketch", "gram"]
SINGLE = TOLERANCES[torch.float32]
few_examples = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, 3.3])
@pytest.mark.parametrize("method", METHODS)
def test_constant_input_has_no_variance(method: str, value: float, dtype: torch.dtype):
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    stream = make_stream(33, 4, method=method, dtype=state_dtype)
    answer = feed(stream, [torch.full((n, 33), value, dtype=dtype) for n in (97, 8, 31)]).spectrum()
    assert answer.rank == 0
    assert answer.ratio.tolist() == [0.0] * 4
    assert orthonormality(answer.components) <= TOLERANCES[dtype].orthonormal
    expected = torch.full((33,), value, dtype=dtype).double()
    assert float((answer.mean.double() - expected).abs().max()) <= TOLERANCES[dtype].sums * value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_basis_is_orthonormal_if_only_one_token_differs(dtype: torch.dtype):
    # Regression: rounding was taken for a second direction, whose row was zero.
    x = torch.zeros(200, 8, dtype=dtype)
    x[108] = 1
    stream = feed(make_stream(8, 4, width=4, dtype=dtype), [x[:8], x[8:]])
    answer = stream.spectrum()
    assert orthonormality(answer.components) <= TOLERANCES[dtype].orthonormal
    assert relative(answer.singular_values[:1], exact(x)[0][:1]) <= TOLERANCES[dtype].values


@pytest.mark.parametrize("method", METHODS)
def test_rounding_of_the_mean_is_not_variance(method: str):
    # Three means that float32 cannot represent: each batch is shifted by a rounding error.
    x = torch.full((90, 64), 3.3) * (1 + EPS32 * torch.arange(3).repeat_interleave(30)[:, None])
    answer = feed(make_stream(64, 4, method=method), x.split(30)).spectrum()
    assert answer.total > 0
    assert answer.rank == 0
    assert not answer.ratio.any()


@pytest.mark.parametrize(("units", "rank"), [(2, 0), (8, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_variance_counts_from_four_units_in_the_last_place(method: str, units: int, rank: int):
    # Deviations are 0 to 6 times half a unit in the last place of the mean.
    steps = torch.arange(400)[:, None] % 7 * (units / 2) * EPS32
    answer = feed(
        make_stream(16, 4, method=method), (1024 + 1024 * steps).expand(-1, 16).split(100)
    )
    assert answer.spectrum().rank == rank


@pytest.mark.parametrize("method", METHODS)
def test_explained_ratios_are_at_most_one(method: str):
    for seed in range(6):  # one component, whose square is the total up to rounding
        x = with_spectrum(200, 24, [50.0], seed=seed)
        answer = feed(make_stream(24, 4, method=method), x.split(50)).spectrum()
        assert 1 - 1e-6 <= answer.ratio[0] <= 1


def test_small_variance_about_a_large_mean_counts():
    x = 10 + with_spectrum(400, 32, [1e-2], dtype=torch.float64)
    answer = feed(make_stream(32, 2, dtype=torch.float64), x.split(100)).spectrum()
    assert answer.rank == 1
    assert answer.ratio.tolist() == pytest.approx([1.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_one_token_per_batch(method: str):
    x = with_spectrum(40, 24, [8.0, 3.0, 1.0], dtype=torch.float64)
    answer = feed(make_stream(24, 4, method=method, dtype=torch.float64), x.split(1)).spectrum()
    assert (answer.count, answer.rank) == (40, 3)
    assert relative(answer.singular_values[:3], exact(x)[0][:3]) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_tokens_than_components(method: str, tokens: int):
    x = torch.randn(tokens, 24)
    answer = feed(make_stream(24, 8, method=method), [x]).spectrum()
    assert (answer.count, answer.rank) == (tokens, tokens - 1)
    assert 0 <= answer.lost <= 1  # not NaN, although no step was complete
    assert (
        relative(answer.singular_values[: tokens - 1], exact(x)[0][: tokens - 1]) <= SINGLE.values
    )
    assert answer.singular_values[tokens - 1 :].tolist() == [0.0] * (9 - tokens)
    assert orthonormality(answer.components) <= SINGLE.orthonormal


@pytest.mark.parametrize("method", METHODS)
def test_duplicated_tokens(method: str):
    x = torch.randn(5, 24, dtype=torch.float64).repeat(30, 1)
    answer = feed(make_stream(24, 8, method=method, dtype=torch.float64), x.split(50)).spectrum()
    assert answer.rank == 4
    assert relative(answer.singular_values[:4], exact(x)[0][:4]) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_of_every_dtype_with_a_float32_state(method: str, dtype: torch.dtype):
    x = with_spectrum(300, 32, decaying(16)).to(dtype)
    answer = feed(make_stream(32, 16, method=method), x.split(75)).spectrum()
    assert answer.components.dtype == torch.float32
    assert relative(answer.singular_values, exact(x)[0][:16]) <= SINGLE.values
    assert abs(answer.total / exact(x)[2] - 1) <= SINGLE.sums


@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_sums_and_total_are_exact_for_any_sketch(offset: float):
    x = with_spectrum(900, 96, decaying(96, power=0.3), offset=offset)
    answer = feed(make_stream(96, 4), x.split(128)).spectrum()
    assert answer.count == 900
    error = (answer.mean.double() - x.double().mean(0)).norm()
    assert float(error) <= SINGLE.sums * (offset + 30)
    # Deviations are 30 per token: the offset costs as many digits as it is larger.
    assert abs(answer.total / exact(x)[2] - 1) <= SINGLE.sums * (1 + offset / 30)
    assert answer.ratio.sum() <= 1


def test_offset_does_not_change_the_components():
    x = with_spectrum(960, 96, decaying(96), dtype=torch.float64)
    plain = feed(make_stream(96, 12), x.float().split(240)).spectrum()
    moved = (x + 100 * x.std()).float()
    answer = feed(make_stream(96, 12), moved.split(240)).spectrum()
    assert 1 - principal_cosine(plain.components, answer.components) <= SINGLE.cosine
    assert relative(answer.singular_values, plain.singular_values) <= 4e-4


@pytest.mark.parametrize("method", METHODS)
def test_same_bits_twice(method: str):
    x = with_spectrum(500, 64, decaying(64))
    first, second = (feed(make_stream(64, 8, method=method), x.split(90)).spectrum() for _ in "ab")
    assert torch.equal(first.components, second.components)
    assert torch.equal(first.singular_values, second.singular_values)


@pytest.fixture(scope="module")
def two_steps() -> tuple[InputStream, Tensor, InputStream]:
    """Return a stream after a first step, the tokens of a second, and the stream after those."""
    x = with_spectrum(400, 64, decaying(64), dtype=torch.float64)
    start = feed(make_stream(64, 8, dtype=torch.float64), [x[:150]])
    return start, x[150:], feed(start.clone(), [x[150:]])


@few_examples
@given(cuts=st.lists(st.integers(0, 250), max_size=12), shuffle=st.integers(0, 99))
def test_split_into_micro_batches_does_not_change_the_step(
    two_steps: tuple, cuts: list[int], shuffle: int
):
    start, tokens, whole = two_steps
    order = torch.randperm(250, generator=torch.Generator().manual_seed(shuffle))
    stream, edges = start.clone(), [0, *sorted(cuts), 250]
    for low, high in pairwise(edges):
        stream.add(tokens[order[low:high]])
    assert fold_streams([stream]) == [stream]
    # Compared with one batch, only the order of additions differs.
    assert 1 - principal_cosine(stream.sketch.basis, whole.sketch.basis) <= 1e-9
    assert relative(stream.sketch.singular_values, whole.sketch.singular_values) <= 1e-9
    assert stream.sketch.total == pytest.approx(whole.sketch.total, rel=1e-13)


def test_order_of_batches_changes_little():
    x = with_spectrum(960, 96, decaying(96))
    batches = list(x.split(240))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        answer = feed(make_stream(96, 12), [batches[i] for i in order]).spectrum()
        assert lost_variance(x, answer.components) <= 1e-4


@pytest.mark.parametrize(("power", "bound"), [(0.5, 5e-3), (1.0, 2e-5), (1.5, 1e-7)])
def test_lost_variance_is_estimated(power: float, bound: float):
    x = with_spectrum(1280, 128, decaying(128, power))
    answer = feed(make_stream(128, 16), x.split(160)).spectrum()
    theirs = PeftIncrementalPCA(16, lowrank=True, lowrank_seed=0)
    for batch in x.split(160):
        theirs.partial_fit(batch)
    lost = lost_variance(x, answer.components)
    assert lost <= bound
    assert lost < lost_variance(x, theirs.components_.float())
    # The estimate is the gain of the last step: of the right size where the loss is like it,
    # and an overestimate where the steps converge fast.
    assert lost / 4 <= answer.lost
    if power == 0.5:
        assert answer.lost <= 4 * lost


@pytest.mark.parametrize("chosen", [False, True])
def test_first_basis_uses_all_tokens_of_the_batch(chosen: bool):
    x = torch.cat([torch.zeros(64, 64), with_spectrum(128, 64, decaying(64, 0.5))])
    stream = make_stream(64, 8)
    stream.add(x, torch.arange(len(x)) if chosen else None)
    # From the first tokens alone, which are equal, it would be random.
    assert lost_variance(x, stream.state.basis[:8]) <= 0.2


def test_incomplete_last_step_does_not_change_the_lost_variance():
    x = with_spectrum(321, 64, decaying(64, 0.5))
    stream = feed(make_stream(64, 8), x[:320].split(80))
    gained = stream.lost
    assert gained > 1e-3
    stream.add(x[320:])
    answer = stream.spectrum()
    assert answer.count == 321
    assert answer.lost == gained


def test_gram_is_exact_for_slowly_decaying_spectra():
    x = with_spectrum(600, 64, decaying(64, 0.3))
    answer = feed(make_stream(64, 8, method="gram"), x.split(100)).spectrum()
    assert abs(lost_variance(x, answer.components)) <= 1e-9
    assert relative(answer.singular_values, exact(x)[0][:8]) <= SINGLE.values
    assert answer.lost == 0.0


def test_gram_is_accurate_beside_an_outlier_feature():
    x = torch.randn(600, 256)
    x[:, 7] *= 800
    answer = feed(make_stream(256, 16, method="gram"), x.split(100)).spectrum()
    assert answer.rank == 16
    assert relative(answer.singular_values[1:], exact(x)[0][1:16]) <= 1e-5


def test_largest_entry_of_each_component_is_positive():
    x = with_spectrum(300, 40, decaying(40))
    for method in METHODS:
        rows = feed(make_stream(40, 6, method=method), x.split(100)).spectrum().components
        assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


def test_step_has_at_least_as_many_tokens_as_the_sketch_width():
    x = with_spectrum(100, 40, decaying(40), dtype=torch.float64)
    stream = make_stream(40, 8, dtype=torch.float64)  # 16 wide
    steps = []
    for batch in x.split(6):
        stream.add(batch)
        steps.append(bool(fold_streams([stream])))
    assert steps == [False, False, True] * 5 + [False, False]
    assert (stream.folds, stream.pending, stream.tokens) == (5, 10, 100)
    answer = stream.spectrum()  # folds the remaining tokens
    assert (answer.count, stream.pending, stream.folds) == (100, 0, 6)
    assert relative(torch.tensor(answer.total), torch.tensor(exact(x)[2])) <= 1e-12
    torch.testing.assert_close(answer.mean, x.mean(0), rtol=0, atol=1e-13)
    assert fold_streams([stream], final=True) == []


def test_streams_of_many_shapes_are_folded_in_one_call():
    shapes = [(24, 4, "sketch"), (40, 4, "sketch"), (24, 4, "sketch"), (24, 3, "gram")]
    shapes += [(24, 3, "sketch"), (24, 4, "gram")]
    data = [with_spectrum(120, d, decaying(d), seed=i) for i, (d, _, _) in enumerate(shapes)]
    streams = [make_stream(d, k, method=method) for d, k, method in shapes]
    for stream, x in zip(streams, data, strict=True):
        stream.add(x)
    folded = fold_streams([*streams, make_stream(24, 4)])
    assert {id(s) for s in folded} == {id(s) for s in streams}
    for stream, x, (d, k, method) in zip(streams, data, shapes, strict=True):
        alone = feed(make_stream(d, k, method=method), [x]).spectrum()
        found = stream.spectrum().singular_values
        torch.testing.assert_close(found, alone.singular_values, rtol=1e-6, atol=0)


def folded_once(method: str = "sketch") -> tuple[InputStream, Tensor]:
    x = with_spectrum(600, 48, decaying(48))
    return feed(make_stream(48, 6, method=method), [x[:200]]), x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
def test_convergence_needs_two_steps(method: str, criterion: str):
    stream, x = folded_once(method)
    compare_streams([stream], [6], tau=0.0, criterion=criterion)
    assert (stream.similarity, stream.converged) == (None, False)
    before = stream.sketch.basis[:6].double()
    feed(stream, [x[200:400]])
    compare_streams([stream], [4], tau=0.0, criterion=criterion)
    after = stream.sketch.basis[:6].double()
    cosines = (before * after).sum(1).abs()
    angles = torch.linalg.svdvals(before[:4] @ after[:4].mT)
    expected = float(cosines[:4].min() if criterion == "cosine" else angles.min())
    assert stream.similarity == pytest.approx(expected, abs=1e-6)
    assert stream.converged
    if criterion == "cosine":
        assert relative(stream.cosines, cosines) <= 1e-6


def test_converged_if_similarity_reaches_tau():
    stream, x = folded_once()
    feed(stream, [x[200:400]])
    level = float((stream.previous * stream.sketch.basis[:6]).sum(1).abs()[:4].min())
    for tau, converged in ((level + 1e-4, False), (level - 1e-4, True)):
        again = stream.clone()
        compare_streams([again], [4], tau=tau)
        assert again.converged is converged
        assert again.previous is None


def compared(previous: Tensor, criterion: str, ranks: int = 6) -> InputStream:
    stream = folded_once()[0]
    stream.previous = previous
    compare_streams([stream], [ranks], tau=0.99, criterion=criterion)
    return stream


def test_signs_do_not_affect_convergence():
    basis = folded_once()[0].sketch.basis[:6]
    for criterion in ("cosine", "subspace"):
        assert compared(-basis, criterion).converged


def test_rotation_within_the_span_affects_only_the_cosine():
    basis = folded_once()[0].sketch.basis[:6]
    rotated = torch.linalg.qr(torch.randn(6, 6)).Q @ basis
    assert compared(rotated, "subspace").converged
    assert compared(rotated, "subspace").similarity == pytest.approx(1, abs=1e-5)
    assert not compared(rotated, "cosine").converged


def test_only_the_required_components_are_compared():
    basis = folded_once()[0].sketch.basis[:6].clone()
    basis[3:] = basis[3:].roll(1, 0)
    assert compared(basis, "cosine", ranks=3).converged
    assert not compared(basis, "cosine", ranks=4).converged
    assert compared(basis, "cosine", ranks=0).similarity == 1.0
    assert not compared(basis, "cosine", ranks=7).converged  # more than the stream has


@pytest.mark.parametrize("criterion", ["cosine", "subspace"])
def test_settled_components_stay_settled(criterion: str):
    stream = folded_once()[0]
    other = torch.linalg.qr(torch.randn(48, 6)).Q.mT
    for previous, converged in ((stream.sketch.basis[:6], True), (other, False)):
        stream.previous = previous
        compare_streams([stream], [6], tau=0.99, criterion=criterion)
        assert (stream.converged, stream.settled) == (converged, 6)
    stream.previous = other
    compare_streams([stream], [0], tau=0.99, criterion=criterion)  # no component is required
    assert (stream.converged, stream.similarity) == (True, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_nan_never_converges(method: str):
    stream, x = folded_once(method)
    feed(stream, [x[200:400]])
    stream.previous = stream.previous.clone()
    stream.previous[2, 5] = float("nan")
    compare_streams([stream], [6], tau=0.0)
    assert not stream.converged


def test_invalid_calls():
    with pytest.raises(EvaValueError, match="1 <= components <= width <= features"):
        make_stream(8, 4, 9)
    with pytest.raises(EvaValueError, match=r"shape \(N, 8\), got \(3, 7\)"):
        make_stream(8, 2).add(torch.ones(3, 7))
    with pytest.raises(EvaValueError, match="no tokens were seen"):
        make_stream(8, 2).spectrum()
    assert make_stream(8, 2).add(torch.ones(3, 8), torch.empty(0, dtype=torch.int64)) == 0


def test_streams_of_one_shape_share_their_random_start_basis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, random_basis = [], state.random_basis
    monkeypatch.setattr(
        state, "random_basis", lambda *size: made.append(size) or random_basis(*size)
    )
    streams = [make_stream(24, 3, seed=77) for _ in range(3)]
    x = torch.randn(60, 24)
    for stream in streams[:2]:
        stream.add(x)
    assert len(made) == 1
    assert torch.equal(streams[0].sketch.basis, streams[1].sketch.basis)
    assert streams[0].sketch.basis.data_ptr() != streams[1].sketch.basis.data_ptr()
    fold_streams(streams[:2])  # afterwards the rows are no longer needed
    streams[2].add(x)
    assert len(made) == 2


@pytest.mark.parametrize("method", ["sketch", "gram"])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    ("x", "rows", "message"),
    [
        (torch.ones(9, 5), None, "shape"),
        (torch.ones(9, 6, dtype=torch.int64), None, "floating point"),
        (torch.ones(9, 6, device="meta"), None, "expected tokens on cpu, got meta"),
        (torch.ones(9, 6), torch.arange(3, dtype=torch.int32), "int64"),
        (torch.ones(9, 6), torch.ones(9, dtype=torch.bool), "int64"),
        (torch.ones(9, 6), torch.zeros(3, 1, dtype=torch.int64), "vector"),
        (torch.ones(9, 6), torch.arange(3, device="meta"), "rows on meta"),
    ],
)
def test_invalid_tokens_and_rows_raise(
    method: str, started: bool, x: Tensor, rows: Tensor | None, message: str
):
    stream = InputStream(6, 2, 3, torch.device("cpu"), options=Options(method))
    if started:
        stream.add(torch.randn(20, 6))
    with pytest.raises(EvaValueError, match=message):
        stream.add(x, rows)
    assert stream.pending == 20 * started


def test_unknown_precision_raises():
    with pytest.raises(EvaValueError, match=r"precision='hihg'.*'high', 'fast'"):
        Options(precision="hihg")
