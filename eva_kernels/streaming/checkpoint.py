"""Convert a stream to numbers and plain tensors, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaValueError
from .state import GramState, SketchState, StepSums, zero_sums
from .stream import InputStream

__all__ = ["export_stream", "restore_stream"]

_NUMBERS = ("pending", "skipped", "folds", "similarity", "converged", "settled", "lost")
_OPTIONAL_TENSORS = ("previous", "cosines")
CPU = torch.device("cpu")


def export_stream(stream: InputStream) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take a stream apart into what a file can hold.

    Args:
        stream: between two calls of ``add`` and ``fold_streams``.

    Returns:
        A JSON-able record, and tensors by name. The tensors are the stream's own: write or copy
        them before the stream goes on.
    """
    record = {**_size_record(stream), **{name: getattr(stream, name) for name in _NUMBERS}}
    tensors: dict[str, Tensor] = {}
    if stream.sketch is not None:
        tensors |= _sketch_tensors(stream.sketch)
    if isinstance(stream.state, GramState):
        tensors["pivot"] = stream.state.pivot
    # A sketch starts its sums at zero after a fold; those of a Gram stream are its state.
    exact = isinstance(stream.state, GramState)
    if stream.sums is not None and (exact or stream.pending):
        tensors |= _sums_tensors(stream.sums)
    for name in _OPTIONAL_TENSORS:
        value = getattr(stream, name)
        if value is not None:
            tensors[name] = value
    return record, tensors


def restore_stream(
    stream: InputStream, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Put what :func:`export_stream` returned into an empty stream of the same sizes.

    Args:
        stream: a new one; its device and options, except the method, may differ.
        record, tensors: as exported; the tensors are copied.

    Raises:
        EvaValueError: sizes, dtype or method differ, or a part is missing.
    """
    differing = [
        f"{name} {record.get(name)!r} instead of {value!r}"
        for name, value in _size_record(stream).items()
        if record.get(name) != value
    ]
    if differing:
        raise EvaValueError(f"the stored stream has {', '.join(differing)}")
    try:
        numbers = {name: record[name] for name in _NUMBERS}
        if "sketch.basis" in tensors:
            _restore_state(stream, tensors)
    except KeyError as error:
        raise EvaValueError(f"the stored stream has no {error.args[0]}") from error
    for name, number in numbers.items():
        setattr(stream, name, number)
    if "previous" in tensors:
        stream.previous = _copy_to(tensors["previous"], stream.device)
    if "cosines" in tensors:
        stream.cosines = _copy_to(tensors["cosines"], CPU)


def _restore_state(stream: InputStream, tensors: Mapping[str, Tensor]) -> None:
    sketch = _sketch_from(stream, tensors)
    if stream.options.method == "gram":
        sums = _sums_from(stream, tensors)
        pivot = _copy_to(tensors["pivot"], stream.device)
        # The same object in both places: the sums of a Gram stream are accumulated in place.
        stream.state, stream.sums = GramState(sums, pivot, sketch), sums
    elif "sums.products" in tensors:
        stream.state, stream.sums = sketch, _sums_from(stream, tensors)
    else:
        size = (stream.width, stream.features, stream.dtype, stream.device)
        stream.state, stream.sums = sketch, zero_sums(*size)


def _size_record(stream: InputStream) -> dict[str, Any]:
    return {
        "features": stream.features,
        "components": stream.components,
        "width": stream.width,
        "dtype": str(stream.dtype).removeprefix("torch."),
        "method": stream.options.method,
    }


def _sketch_tensors(sketch: SketchState) -> dict[str, Tensor]:
    return {
        "sketch.count": torch.tensor(sketch.count, dtype=torch.float64, device="cpu"),
        "sketch.mean": sketch.mean,
        "sketch.basis": sketch.basis,
        "sketch.singular_values": sketch.singular_values,
        "sketch.total": torch.tensor(sketch.total, dtype=torch.float64, device="cpu"),
        "sketch.rank": torch.tensor(sketch.rank, device="cpu"),
        "sketch.mean_norm": torch.tensor(sketch.mean_norm, dtype=torch.float64, device="cpu"),
    }


def _sketch_from(stream: InputStream, tensors: Mapping[str, Tensor]) -> SketchState:
    return SketchState(
        count=int(tensors["sketch.count"]),
        mean=_copy_to(tensors["sketch.mean"], stream.device),
        basis=_copy_to(tensors["sketch.basis"], stream.device),
        values=_copy_to(tensors["sketch.singular_values"], CPU).numpy(),
        total=float(tensors["sketch.total"]),
        rank=int(tensors["sketch.rank"]),
        mean_norm=float(tensors["sketch.mean_norm"]),
    )


def _sums_tensors(sums: StepSums) -> dict[str, Tensor]:
    tensors = {
        "sums.count": torch.tensor(sums.count, dtype=torch.float64, device="cpu"),
        "sums.shift": sums.shift,
        "sums.square": sums.square,
        "sums.products": sums.products,
    }
    return tensors if sums.bad is None else {**tensors, "sums.bad": sums.bad}


def _sums_from(stream: InputStream, tensors: Mapping[str, Tensor]) -> StepSums:
    bad = tensors.get("sums.bad")
    return StepSums(
        count=int(tensors["sums.count"]),
        shift=_copy_to(tensors["sums.shift"], stream.device),
        square=_copy_to(tensors["sums.square"], stream.device),
        products=_copy_to(tensors["sums.products"], stream.device),
        bad=None if bad is None else _copy_to(bad, stream.device),
    )


def _copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, copy=True)
