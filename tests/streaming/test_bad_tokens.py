"""Tokens with NaN or infinity: found at once on a CPU, and by the fold on an accelerator."""

from __future__ import annotations

import functools

import pytest
import torch

import helpers
from eva_kernels import IncrementalPCA
from eva_kernels.errors import NonFiniteError
from eva_kernels.streaming import (
    NonFiniteStepError,
    export_stream,
    fold_streams,
    restore_stream,
)
from helpers import (
    TOLERANCES,
    decaying,
    feed,
    principal_cosine,
    same,
    snapshot,
    with_spectrum,
)

METHODS = ["sketch", "gram"]
# The Triton interpreter is slow, and nothing here depends on the backend.
make_stream = functools.partial(helpers.make_stream, backend="torch")
SINGLE = TOLERANCES[torch.float32]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_bad_token_raises_and_changes_nothing(method: str, bad: float):
    x = with_spectrum(400, 48, decaying(48))
    stream = feed(make_stream(48, 6, method=method), [x[:200]])
    expected = feed(stream.clone(), [x[200:400]]).spectrum()
    broken = x[200:400].clone()
    broken[[3, 70, 71], 5] = bad
    with pytest.raises(NonFiniteError, match="3 of 200 tokens hold NaN or infinity"):
        stream.add(broken)
    assert torch.equal(feed(stream, [x[200:400]]).spectrum().components, expected.components)


@pytest.mark.parametrize("method", METHODS)
def test_skip_nonfinite_leaves_out_exactly_the_bad_tokens(method: str):
    x = with_spectrum(400, 48, decaying(48))
    rows = torch.arange(0, 400, 2)
    broken = x.clone()
    broken[[4, 100, 101], 5] = torch.tensor([float("nan"), float("inf"), float("nan")])
    stream = make_stream(48, 6, method=method, skip_nonfinite=True)
    assert stream.add(broken, rows) == 198  # 101 is not selected
    assert stream.skipped == 2
    plain = make_stream(48, 6, method=method)
    plain.add(x, rows[(rows != 4) & (rows != 100)])
    assert torch.equal(stream.spectrum().components, plain.spectrum().components)
    assert stream.add(torch.full((7, 48), float("nan"))) == 0
    assert (stream.skipped, stream.tokens) == (9, 198)


@pytest.mark.parametrize("method", METHODS)
def test_bad_tokens_outside_the_selected_rows_are_ignored(method: str):
    x = with_spectrum(300, 48, decaying(48))
    broken = x.clone()
    broken[200:] = float("nan")
    stream, rows = make_stream(48, 6, method=method), torch.arange(200)
    assert stream.add(broken, rows) == 200
    expected = make_stream(48, 6, method=method)
    expected.add(x, rows)
    assert stream.skipped == 0
    assert torch.equal(stream.spectrum().components, expected.spectrum().components)


def test_overflow_in_float16_raises():
    x = torch.randn(40, 24).half()
    x[7] *= 60000
    x[7] *= 60000
    with pytest.raises(NonFiniteError, match="1 of 40"):
        make_stream(24, 4).add(x)


def test_large_finite_tokens_are_accepted():
    # The norm of the batch overflows in half precision, no entry does.
    x = torch.full((64, 24), 3e4).half() * torch.randn(64, 24).sign().half()
    stream = make_stream(24, 4)
    assert stream.add(x) == 64
    assert stream.skipped == 0
    assert stream.spectrum().rank == 4


def test_error_of_overflowing_squares_names_the_remedy():
    stream = make_stream(16, 2)
    with pytest.raises(NonFiniteError, match=r"squares overflow torch.float32; .* float64"):
        stream.add(torch.full((50, 16), 1e20))
    assert stream.tokens == 0


@pytest.mark.usefixtures("accelerator_path")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("method", METHODS)
def test_fold_raises_for_bad_tokens_and_changes_no_state(method: str, value: float) -> None:
    x = with_spectrum(400, 48, decaying(48))
    bad, good = (feed(make_stream(48, 6, method=method), [x[:200]]) for _ in "ab")
    other = feed(make_stream(32, 6), [x[:200, :32]])
    before, others = snapshot(bad), snapshot(other)
    broken = x[200:300].clone()
    broken[[3, 70], 5] = value
    for part in broken.split(80):  # the last part is finite
        bad.add(part)
    other.add(x[200:300, :32])
    open_ = snapshot(other)
    message = "2 of 100 tokens hold NaN" if method == "gram" else "some of 100 tokens hold NaN"
    if value == 1e25:
        message = "squares overflow torch.float32" + "; .* float64" * (method == "sketch")
    with pytest.raises(NonFiniteStepError, match=message) as caught:
        fold_streams([other, bad])
    assert caught.value.stream is bad
    # Every state is as before; the other stream still has its tokens, bit for bit.
    assert same(snapshot(other), open_)
    assert not same(open_, others)
    if method == "sketch":
        assert same(snapshot(bad), before)
        assert bad.tokens == 200
    else:
        assert (bad.tokens, bad.pending) == (298, 98)
        keep = torch.ones(100, dtype=torch.bool)
        keep[[3, 70]] = False
        good.add(x[200:300][keep])
    for stream in (bad, good):
        stream.add(x[300:])
    assert {id(s) for s in fold_streams([other, bad])} == {id(other), id(bad)}
    assert other.tokens == 300
    fold_streams([good])
    found, expected = bad.spectrum(), good.spectrum()
    assert found.count == expected.count
    torch.testing.assert_close(
        found.singular_values, expected.singular_values, rtol=SINGLE.values, atol=0
    )
    assert 1 - principal_cosine(found.components, expected.components) <= SINGLE.cosine


@pytest.mark.usefixtures("accelerator_path")
def test_error_names_the_first_bad_stream() -> None:
    streams = [make_stream(d, 6) for d in (48, 32, 48)]
    for i, stream in enumerate(streams):
        stream.add(torch.randn(40 + i, stream.features))
        if i:
            stream.add(torch.full((1, stream.features), torch.nan))
    with pytest.raises(NonFiniteStepError, match="some of 42 tokens") as caught:
        fold_streams(streams)
    assert caught.value.stream is streams[1]


@pytest.mark.usefixtures("accelerator_path")
def test_bad_tokens_beside_a_stream_checked_at_every_add() -> None:
    streams = [make_stream(48, 6, method="gram", check_every_add=looks) for looks in (True, False)]
    for stream in streams:
        stream.add(torch.randn(40, 48))
    streams[1].add(torch.full((1, 48), float("nan")))  # one is enough
    resumed = make_stream(48, 6, method="gram")
    restore_stream(resumed, *export_stream(streams[1]))
    for bad in (streams[1], resumed):
        with pytest.raises(NonFiniteStepError, match="1 of 41 tokens") as caught:
            fold_streams([streams[0], bad])
        assert caught.value.stream is bad


@pytest.mark.usefixtures("accelerator_path")
@pytest.mark.parametrize("method", METHODS)
def test_overflowing_sums_raise_and_change_no_other_stream(method: str) -> None:
    x = with_spectrum(400, 40, decaying(40))
    stream, other = (feed(make_stream(40, 6, method=method), [x[:200]]) for _ in "ab")
    stream.add(1e18 * x[200:])  # each token can be squared, their sum cannot
    other.add(x[200:])
    open_ = snapshot(other)
    with pytest.raises(NonFiniteStepError, match=r"squares overflow torch.float32; .* float64"):
        fold_streams([other, stream])
    assert same(snapshot(other), open_)


@pytest.mark.usefixtures("accelerator_path")
@pytest.mark.parametrize("method", METHODS)
def test_large_finite_half_precision_tokens_are_accepted(method: str) -> None:
    x = torch.full((64, 24), 3e4).half() * torch.randn(64, 24).sign().half()
    stream = feed(make_stream(24, 4, method=method), [x])
    assert (stream.tokens, stream.spectrum().rank) == (64, 4)


@pytest.mark.usefixtures("accelerator_path")
@pytest.mark.parametrize("method", METHODS)
def test_bad_first_batch_leaves_the_stream_empty(method: str) -> None:
    x = with_spectrum(200, 48, decaying(48))
    stream, expected = (make_stream(48, 6, method=method) for _ in "ab")
    broken = x[:100].clone()
    broken[[0, 50]] = float("nan")
    stream.add(broken)
    with pytest.raises(NonFiniteStepError):
        fold_streams([stream])
    assert (stream.tokens, stream.pending, stream.state) == (0, 0, None)
    answers = [feed(s, [x[100:]]).spectrum() for s in (stream, expected)]
    assert torch.equal(answers[0].components, answers[1].components)


@pytest.mark.usefixtures("accelerator_path")
@pytest.mark.parametrize("method", METHODS)
def test_fold_ignores_bad_tokens_outside_the_selected_rows(method: str) -> None:
    x = with_spectrum(300, 48, decaying(48))
    x[200:] = float("nan")
    stream, expected = (make_stream(48, 6, method=method) for _ in "ab")
    stream.add(x, torch.arange(200))
    expected.add(x[:200], torch.arange(200))
    answers = [s.spectrum() for s in (stream, expected)]
    assert torch.equal(answers[0].components, answers[1].components)


@pytest.mark.usefixtures("accelerator_path")
@pytest.mark.parametrize("option", ["skip_nonfinite", "check_every_add"])
@pytest.mark.parametrize("method", METHODS)
def test_options_that_check_at_every_add(method: str, option: str) -> None:
    x = with_spectrum(100, 24, decaying(24))
    x[7] = float("nan")
    stream = make_stream(24, 4, method=method, **{option: True})
    if option == "skip_nonfinite":
        assert stream.add(x) == 99
        assert stream.spectrum().rank == 4
    else:
        with pytest.raises(NonFiniteError, match="1 of 100 tokens"):
            stream.add(x)
        assert stream.tokens == 0


@pytest.mark.usefixtures("accelerator_path")
def test_incremental_pca_refuses_bad_rows_immediately() -> None:
    x = with_spectrum(200, 24, decaying(24))
    bad = x[100:].clone()
    bad[4, 2] = float("nan")
    found, expected = (IncrementalPCA(4, backend="torch").partial_fit(x[:100]) for _ in "ab")
    with pytest.raises(NonFiniteError, match="1 of 100 tokens"):
        found.partial_fit(bad)
    for pca in (found, expected):
        pca.partial_fit(x[100:])
    assert found.n_samples_seen_ == 200
    assert torch.equal(found.components_, expected.components_)
    assert torch.equal(found.var_, expected.var_)
