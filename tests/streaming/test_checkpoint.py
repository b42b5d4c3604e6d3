"""A stream that is exported and restored continues with the same bits."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eva_kernels.errors import EvaValueError
from eva_kernels.streaming import (
    InputStream,
    compare_streams,
    export_stream,
    fold_streams,
    restore_stream,
)
from helpers import decaying, make_stream, with_spectrum

# (D, K, Q): even, odd (so that rows are not aligned), and as many components as features
SIZES = [(32, 4, 8), (19, 3, 5), (6, 6, 6)]
KINDS = [*((size, torch.float32) for size in SIZES), (SIZES[1], torch.float64)]
# History: tokens of each step, and whether the last step is not folded yet.
HISTORIES = {
    "nothing": ([], False),
    "an open first step": ([3], True),
    "one step": ([40], False),
    "several steps": ([40, 17, 33], False),
    "an open later step": ([40, 33, 4], True),
}


def tokens_of(features: int, sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    values = decaying(min(features, 12))
    x = with_spectrum(max(sum(sizes), 40), features, values, offset=3, dtype=dtype)
    return list(x[: sum(sizes)].split(sizes)) if sizes else []


def step(stream: InputStream, x: Tensor, needed: int = 2) -> None:
    """Run a step with its check, as a pass does."""
    stream.add(x)
    compare_streams(fold_streams([stream]), [needed], tau=0.9)


def stream_after(history: str, size: tuple[int, int, int], **options: Any) -> InputStream:
    # The Triton interpreter is slow, and the exported state does not depend on the backend.
    stream = make_stream(*size, backend="torch", **options)
    sizes, is_open = HISTORIES[history]
    batches = tokens_of(size[0], sizes, stream.dtype)
    for x in batches[: len(batches) - is_open]:
        step(stream, x)
    if is_open:
        stream.add(batches[-1])
        assert 0 < stream.pending < stream.width
    return stream


def restored_through_json(stream: InputStream, **options: Any) -> InputStream:
    """Export, convert the record to JSON and back, and restore."""
    record, tensors = export_stream(stream)
    size = (stream.features, stream.components, stream.width)
    method = stream.options.method
    options = {"backend": "torch", **options}
    copy = make_stream(*size, method=method, dtype=stream.dtype, **options)
    restore_stream(copy, json.loads(json.dumps(record)), {k: t.clone() for k, t in tensors.items()})
    return copy


def differing(left: Any, right: Any, name: str = "stream") -> list[str]:
    """Return the names of the attributes that differ in any bit."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.dtype == right.dtype and torch.equal(left, right)
        return [] if same else [name]
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return [] if left.dtype == right.dtype and np.array_equal(left, right) else [name]
    if isinstance(left, InputStream):
        assert vars(left).keys() == vars(right).keys()
        kept = vars(left).keys() - {"_shared_start_basis"}  # kept only for other streams
        return [d for k in kept for d in differing(getattr(left, k), getattr(right, k), k)]
    if is_dataclass(left) and type(left) is type(right):
        pairs = ((f.name, getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
        return [d for key, a, b in pairs for d in differing(a, b, f"{name}.{key}")]
    if isinstance(left, float) and math.isnan(left):
        return [] if math.isnan(right) else [name]
    return [] if left == right else [name]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(("size", "dtype"), KINDS)
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_restored_stream_continues_with_the_same_bits(
    method: str, size: tuple[int, int, int], history: str, dtype: torch.dtype
) -> None:
    stream = stream_after(history, size, method=method, dtype=dtype)
    stream.skipped = 3
    copy = restored_through_json(stream)
    assert differing(stream, copy) == []
    for x in tokens_of(size[0], [5, 1, 30, 30], dtype):
        for one in (stream, copy):
            step(one, x)
    assert differing(stream, copy) == []
    assert stream.folds >= 2
    assert stream.similarity is not None
    assert differing(stream.spectrum(), copy.spectrum()) == []


@pytest.mark.parametrize(("size", "dtype"), KINDS)
def test_streams_folded_together_continue_with_the_same_bits(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    streams = [make_stream(*size, backend="torch", dtype=dtype) for _ in range(4)]
    for x in tokens_of(size[0], [40, 17], dtype):
        for i, stream in enumerate(streams):
            stream.add(x + i)
        compare_streams(fold_streams(streams), [2] * 4, tau=0.9)
    copies = [restored_through_json(stream) for stream in streams]
    for x in tokens_of(
        size[0], [1, 5, 30], dtype
    ):  # a single token uses a different matrix product
        for group in (streams, copies):
            for i, stream in enumerate(group):
                stream.add(x + i)
            compare_streams(fold_streams(group), [2] * 4, tau=0.9)
    for stream, copy in zip(streams, copies, strict=True):
        assert differing(stream, copy) == []


def test_gram_stream_exports_its_sums_once() -> None:
    copy = restored_through_json(stream_after("several steps", SIZES[0], method="gram"))
    assert copy.state is not None
    assert copy.sums is copy.state.sums


def pending_stream(method: str) -> InputStream:
    """Return a stream in its fullest state: a convergence check and a step are pending."""
    stream = stream_after("several steps", SIZES[0], method=method)
    for count in (20, 3):
        stream.add(tokens_of(SIZES[0][0], [count])[0])
        fold_streams([stream])
    if method == "gram":
        stream.sums.bad = torch.zeros_like(stream.sums.square)
    return stream


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_exported_tensors_share_no_memory_with_the_stream(method: str) -> None:
    record, tensors = export_stream(pending_stream(method))
    copy = make_stream(*SIZES[0], method=method)
    restore_stream(copy, record, tensors)
    again = export_stream(copy)[1]
    assert again.keys() == tensors.keys() >= {"previous", "cosines", "sums.products"}
    held, given = ({t.data_ptr() for t in part.values()} for part in (again, tensors))
    assert held.isdisjoint(given)


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_stream_is_restored_on_its_own_device(method: str) -> None:
    record, tensors = export_stream(pending_stream(method))
    copy = make_stream(*SIZES[0], method=method, device=torch.device("meta"))
    with torch.device("meta"):
        restore_stream(copy, record, tensors)
    sums, sketch = copy.sums, copy.sketch
    away = [sums.shift, sums.square, sums.products, sketch.basis, sketch.mean, copy.previous]
    if method == "gram":
        away += [copy.state.pivot, sums.bad]
    assert {tensor.device.type for tensor in away} == {"meta"}
    assert copy.cosines.device.type == "cpu"
    closed = make_stream(*SIZES[0], method=method, device=torch.device("meta"))
    restore_stream(closed, *export_stream(stream_after("one step", SIZES[0], method=method)))
    assert closed.sums.products.device.type == "meta"


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_restoring_ignores_the_default_device(method: str) -> None:
    stream = pending_stream(method)
    with torch.device("meta"):
        _, tensors = export_stream(stream)
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}


def test_large_token_counts_are_kept_exactly() -> None:
    stream = pending_stream("sketch")
    stream.state = replace(stream.state, count=2**24 + 1)
    stream.sums.count = stream.pending = 2**24 + 3
    assert differing(stream, restored_through_json(stream)) == []


def test_pending_convergence_check_is_kept() -> None:
    stream = stream_after("several steps", SIZES[0])
    stream.add(tokens_of(SIZES[0][0], [20])[0])
    folded = fold_streams([stream])
    copy = restored_through_json(stream)
    for one in (folded[0], copy):
        assert one.previous is not None
        compare_streams([one], [2], tau=0.9)
    assert differing(stream, copy) == []


def test_folded_sums_are_not_exported() -> None:
    assert not any("sums" in key for key in export_stream(stream_after("one step", SIZES[0]))[1])
    assert "sums.products" in export_stream(stream_after("an open later step", SIZES[0]))[1]


def test_restoring_with_different_options() -> None:
    stream = stream_after("several steps", SIZES[0])
    copy = restored_through_json(stream, backend="auto", skip_nonfinite=True)
    assert differing(stream, copy) == ["options.backend", "options.skip_nonfinite"]


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((33, 4, 8), {}, "features 32 instead of 33"),
        ((32, 5, 8), {}, "components 4 instead of 5"),
        ((32, 4, 9), {}, "width 8 instead of 9"),
        ((32, 4, 8), {"method": "gram"}, "method 'sketch' instead of 'gram'"),
        ((32, 4, 8), {"dtype": torch.float64}, "dtype 'float32' instead of 'float64'"),
    ],
)
def test_restoring_to_another_shape_raises(
    size: tuple[int, int, int], options: dict[str, Any], message: str
) -> None:
    record, tensors = export_stream(stream_after("one step", SIZES[0]))
    other = make_stream(*size, **options)
    with pytest.raises(EvaValueError, match=message):
        restore_stream(other, record, tensors)
    assert other.state is None


@pytest.mark.parametrize("part", ["sketch.mean", "pivot", "sums.shift"])
def test_error_names_a_missing_tensor(part: str) -> None:
    record, tensors = export_stream(stream_after("one step", SIZES[0], method="gram"))
    del tensors[part]
    with pytest.raises(EvaValueError, match=f"has no {part}"):
        restore_stream(make_stream(*SIZES[0], method="gram"), record, tensors)


@pytest.mark.parametrize("name", export_stream(make_stream(*SIZES[0]))[0])
def test_error_names_a_missing_number(name: str) -> None:
    record, tensors = export_stream(stream_after("one step", SIZES[0]))
    del record[name]
    other = make_stream(*SIZES[0])
    with pytest.raises(EvaValueError, match=f"has no {name}|has {name} None instead of"):
        restore_stream(other, record, tensors)
    assert other.state is None
