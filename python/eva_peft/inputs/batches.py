"""Batches: iterated from any loader, moved to the model's device, trimmed of padding."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EvaTypeError, EvaValueError, listed
from ..model.architecture import Architecture
from ..surroundings.devices import copy_to_device
from .mask_contents import is_contiguous
from .media_masks import is_image_key
from .roles import may_be_ids

__all__ = [
    "as_mapping",
    "as_tensors",
    "first_ids",
    "is_tensor_dict",
    "iterate",
    "samples_and_elements",
    "shape_of",
    "to_device",
    "without_padding",
]

# Fixed cost of another forward pass, in padded tokens: work that does not depend on their number,
# or the loss from a device that is not fully used.
FORWARD_OVERHEAD = {"cpu": 128}
FORWARD_OVERHEAD_ACCELERATOR = 4096

_DEFAULT_ARCHITECTURE = Architecture()

# Inputs with one entry per token along dimension 1; columns that are all padding can be cut.
_TOKEN_KEYS = frozenset(
    ["input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "inputs_embeds"]
)


def iterate(
    loader: Iterable[Any],
    another_epoch: Callable[[], bool] = lambda: True,
    begin_epoch: Callable[[], object] = lambda: None,
    on_batch: Callable[[Any], object] = lambda batch: None,
) -> Generator[Any]:
    """Yield batches, starting another epoch whenever a loader can be iterated again.

    Args:
        loader: any iterable.
        another_epoch: called after each epoch; iteration ends if it returns false.
        begin_epoch: called before each epoch.
        on_batch: called with each batch before it is yielded.

    Raises:
        EvaTypeError: not iterable, or a mapping. EvaValueError: it yields no batch at all.
    """
    if isinstance(loader, Mapping):  # iterating it would yield names
        raise EvaTypeError(
            f"the loader is a mapping with the keys {listed(map(repr, loader))}. If it is a single "
            "batch, pass [batch]; if it holds several data sets, pass one of them"
        )
    begin_epoch()
    try:
        epoch = iter(loader)
    except TypeError as error:
        raise EvaTypeError(f"the loader must be iterable, got {type(loader)}") from error
    nothing_yet = True
    try:
        while True:
            empty = True
            for batch in epoch:
                empty = nothing_yet = False
                on_batch(batch)
                yield batch
                del batch  # no batch is kept while the next one is being made
            if nothing_yet:
                raise EvaValueError("dataloader is empty: it yielded no batch")
            if empty or not another_epoch():  # empty: an exhausted iterator, for example
                return
            begin_epoch()
            epoch = iter(loader)
    finally:
        # Python 3.12.0 to 3.12.3 keep the locals of a generator that is closed while suspended
        # outside a `try`, and with them a loader's workers (cpython issue 118272)
        del epoch
        if hasattr(loader, "gradient_state") and hasattr(loader, "end"):
            # accelerate would take an abandoned loader for the active one of the training, and
            # step the optimizer as at its last batch
            loader.end()


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with every tensor on a device; containers keep their type.

    Objects with a method ``to``, such as packed sequences and graphs, are moved by it; some do so
    in place and return nothing.
    """
    if isinstance(batch, Tensor):
        return copy_to_device(device, batch)
    if isinstance(batch, Mapping) and not is_tensor_dict(batch):
        return _of_type(batch, {k: to_device(v, device) for k, v in batch.items()})
    if callable(getattr(batch, "to", None)) and not isinstance(batch, (type, nn.Module)):
        copied = copy(batch)
        returned = copied.to(device)
        return copied if returned is None else returned
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, (tuple, list)):
        return _of_type(batch, [to_device(v, device) for v in batch])
    if is_dataclass(batch) and not isinstance(batch, type):
        moved = {k: to_device(v, device) for k, v in dataclass_fields(batch).items()}
        return replace(batch, **moved)
    return batch


def _of_type(original: Any, plain: Any) -> Any:
    """Return a dict or a list as the type of the original, if that can be made of it."""
    try:
        return type(original)(plain)
    except TypeError:
        return plain


def dataclass_fields(batch: Any) -> dict[str, Any]:
    """Return the fields that the constructor of a dataclass object takes."""
    return {f.name: getattr(batch, f.name) for f in fields(batch) if f.init}


def shape_of(batch: Any) -> tuple[int, int] | None:
    """Return (samples, tokens) of a batch's first tensor, or ``None`` if it has none."""
    for value in _values(batch):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0], value.shape[1] if value.dim() in (2, 3) else 1
    return None


def samples_and_elements(batch: Any) -> tuple[int, int]:
    """Return the number of samples, and of elements per sample summed over all tensors.

    With more of either, a model may split a batch (texts, images, lists) into more parts.
    """
    tensors = [tensor for tensor in _tensors(batch) if tensor.dim()]
    elements = sum(-(-tensor.numel() // max(len(tensor), 1)) for tensor in tensors)
    return max(map(len, tensors), default=0), elements


def first_ids(batch: Any) -> Tensor | None:
    """Return the first tensor of several samples in a batch, (B, T), that may be token ids."""
    return next((v for v in _tensors(batch) if may_be_ids(v) and v.numel() and len(v) > 1), None)


def _tensors(batch: Any) -> Iterator[Tensor]:
    parts = as_mapping(batch)
    for part in _values(parts):
        if isinstance(part, Tensor):
            yield part
        elif part is not parts:
            yield from _tensors(part)


def is_empty(batch: Any) -> bool:
    """Tell whether a batch has tensors (scalars aside), none of which has elements."""
    tensors = [value for value in _values(batch) if isinstance(value, Tensor) and value.dim()]
    return bool(tensors) and not any(tensor.numel() for tensor in tensors)


def _values(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    # iterating other iterables may exhaust them
    return batch if isinstance(batch, (tuple, list)) else [batch]


def as_mapping(batch: Any) -> Any:
    """Return the fields of a dataclass object, or a TensorDict, as a dict, all else as it is."""
    if is_tensor_dict(batch):
        return dict(batch.items())
    if is_dataclass(batch) and not isinstance(batch, (type, Mapping)):
        return dataclass_fields(batch)
    return batch


def is_tensor_dict(batch: Any) -> bool:
    """Tell whether a mapping is a TensorDict, which iterates over its samples, not its names."""
    return isinstance(batch, Mapping) and hasattr(type(batch), "batch_size")


def as_tensors(batch: Any) -> Any:
    """Convert a mapping's arrays and lists of numbers to tensors, and a single sample to a batch.

    Streaming datasets yield lists, and uncollated single samples. Lists are left as they are if
    the mapping has tensors as well.

    Raises:
        EvaValueError: samples of different lengths, which need a collator; or positions.
    """
    if not isinstance(batch, Mapping):
        return batch
    _raise_if_positions_listed(batch)
    converted: dict[str, Any] = {}
    only_lists = not any(isinstance(value, Tensor) for value in batch.values())
    for key, value in batch.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            native = value.dtype.newbyteorder("=")
            # a copy: torch takes no negative stride, not even of a single sample
            converted[key] = torch.from_numpy(np.array(value, native, order="C"))
        elif only_lists and isinstance(value, (list, tuple)) and _becomes_tensor(key, value):
            try:
                converted[key] = _stacked(value)
            except (RuntimeError, ValueError) as error:
                raise EvaValueError(
                    f"the samples of {key!r} in a batch have different lengths; give the loader a "
                    "collator that pads them, such as transformers' DataCollatorWithPadding"
                ) from error
    ids = converted.get("input_ids", batch.get("input_ids"))
    single_sample = isinstance(ids, Tensor) and ids.dim() == 1
    if not converted and not single_sample:
        return batch
    whole = {**batch, **converted}
    if single_sample:
        whole = {k: v[None] if isinstance(v, Tensor) else v for k, v in whole.items()}
    return whole


def _becomes_tensor(key: str, values: Sequence[Any]) -> bool:
    """Tell whether a list is to become one tensor; some models take lists of tensors."""
    if not values:
        return False
    element = values[0]
    if _is_array(element):
        return key in _TOKEN_KEYS
    while isinstance(element, (list, tuple)) and element:
        element = element[0]
    return isinstance(element, (int, float))


def _raise_if_positions_listed(batch: Mapping[str, Any]) -> None:
    """Refuse lists of tensors with a position of all samples each, not with a sample.

    A text is taken to have at least as many positions as a batch has samples, unless the mask of
    its padding shows that it does not.
    """
    rows = {key: _stacked_rows(value) for key, value in batch.items() if key in _TOKEN_KEYS}
    mask = rows.get("attention_mask")
    for key, value in rows.items():
        if value is None:
            continue
        kept = torch.ones_like(value) != 0 if mask is None else mask != 0
        more_rows = len(kept) > kept.shape[1]
        if is_contiguous(kept.mT) and (more_rows or not is_contiguous(kept)):
            raise EvaValueError(
                f"the tensors of {key!r} in a batch hold one position of all samples each, as "
                "torch's default collation makes them of lists; let the dataset yield tensors, by "
                'with_format("torch") for example, or give the loader a collator'
            )


def _stacked_rows(value: Any) -> Tensor | None:
    listed = isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value)
    if not listed or len({v.shape for v in value}) != 1 or value[0].dim() != 1:
        return None
    return torch.stack(list(value))


def _is_array(value: Any) -> bool:
    array = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return array or isinstance(value, Tensor)


def _stacked(values: Sequence[Any]) -> Tensor:
    if all(map(_is_array, values)):
        return torch.stack([torch.as_tensor(value) for value in values])
    return torch.as_tensor(values, device="cpu")


def without_padding(
    batch: Any,
    device: torch.device,
    architecture: Architecture = _DEFAULT_ARCHITECTURE,
    split_by_length: bool = True,
) -> list[Any]:
    """Split a batch into one or more that hold less padding, and the same tokens.

    Columns at the end that are padding in every sample are cut. Short samples are run separately
    from long ones if that saves more than another forward pass costs and every value is known to
    have one entry per sample; the number of images may equal it by chance. Exact for right
    padding: no token attends to a masked position, nor to another sample. A batch with padding
    elsewhere, another kind of mask, or an unknown tensor is returned unchanged.

    Args:
        batch: on the CPU, as it came from the loader.
        device: where the model will run it.
        architecture: of the model. In an encoder-decoder ``labels`` belong to another stream than
            ``attention_mask``; some models depend on padding, and custom ones may.
        split_by_length: short samples may be run separately.
    """
    # custom layers may pool over padding, or flatten inputs of one fixed length
    padding_matters = architecture.tokens_depend_on_padding or architecture.has_own_layers
    if padding_matters or not isinstance(batch, Mapping) or is_tensor_dict(batch):
        return [batch]
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.device.type != "cpu":
        return [batch]
    if isinstance(ids, Tensor) and ids.shape[:2] != mask.shape:
        return [batch]  # cut, the mask might become one of ones, which a model ignores
    samples, columns = mask.shape
    splits = split_by_length
    for key, value in batch.items():
        if isinstance(value, (Mapping, list, tuple)):
            return [batch]
        if not isinstance(value, Tensor):
            continue
        per_token = value.dim() >= 2 and columns in value.shape[1:]
        unknown = key not in _TOKEN_KEYS or (architecture.encoder_decoder and key == "labels")
        if per_token and (unknown or value.shape[1] != columns):
            return [batch]
        several = _has_several_per_column(value, columns)
        if several and key not in _TOKEN_KEYS and not is_image_key(key):
            return [batch]
        if value.dim() == 0 or value.shape[0] != samples:
            return [batch]
        splits &= key in _TOKEN_KEYS or value.dim() == 1
    kept = mask > 0  # nothing of an additive mask, where 0 means keep: it is left as it is
    lengths = kept.sum(1)
    right_padded = torch.arange(columns, device="cpu") < lengths[:, None]
    if not torch.equal(kept, right_padded) or not kept.any():
        return [batch]
    overhead = FORWARD_OVERHEAD.get(device.type, FORWARD_OVERHEAD_ACCELERATOR)
    all_rows = list(range(samples))
    groups = _group_by_length(lengths.tolist(), overhead) if splits else [all_rows]
    if len(groups) == 1 and int(lengths.max()) == columns:
        return [batch]
    return [_cut_batch(batch, rows, columns, int(lengths[rows].max())) for rows in groups]


def _has_several_per_column(value: Tensor, columns: int) -> bool:
    """Tell whether values may be several per column: Voxtral reads sound and text in step."""
    is_spectrum = value.is_floating_point() and value.dim() == 3
    return is_spectrum and any(size and size % columns == 0 for size in value.shape[1:])


def _group_by_length(lengths: list[int], overhead: int) -> list[list[int]]:
    """Partition samples to minimise the padded tokens plus ``overhead`` per group."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    ordered = [lengths[i] for i in order]
    best = {0: (0, 0)}  # number of samples -> cost, and where the last group begins
    # splitting samples of equal length saves nothing, and there may be thousands of them
    for end in (i for i in range(1, len(order) + 1) if ordered[i - 1 : i] != ordered[i : i + 1]):
        longest = max(ordered[end - 1], 1)
        best[end] = min((cost + (end - b) * longest + overhead, b) for b, (cost, _) in best.items())
    groups, end = [], len(order)
    while end:
        begin = best[end][1]
        groups.append(sorted(order[begin:end]))
        end = begin
    return groups[::-1]


def _cut_batch(batch: Mapping[str, Any], rows: list[int], columns: int, num_kept: int) -> Any:
    cut = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            value = value if len(rows) == len(value) else value[rows]
            if key in _TOKEN_KEYS and value.dim() >= 2 and value.shape[1] == columns:
                value = value[:, : max(num_kept, 1)]
        cut[key] = value
    return _of_type(batch, cut)  # as a user's forward may read attributes of a BatchEncoding
