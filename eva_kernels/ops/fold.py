"""The passes of a fold over (Q, D), for all layer inputs of one shape at once: native code.

Without native code, ``streaming.batch`` does the same with PyTorch; the plain twins are in
``reference``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _native
from ..errors import EvaTypeError, EvaValueError
from ._dispatch import define_operator

__all__ = [
    "HEADER_SIZE",
    "MAX_WIDTH",
    "FoldLayers",
    "check_layers",
    "columns_per_split",
    "fold_layers",
    "fold_measure",
    "fold_prepare",
    "fold_rows",
    "runs_natively",
]

# Two tiles of csrc/fold.h: the limit of a block's shared memory on any GPU.
MAX_WIDTH = 128
TILE = 64
HEADER_SIZE = 4  # numbers of a layer before its squares
# Enough blocks to fill a GPU a few times over. Each writes 64 KiB of partial sums.
TARGET_BLOCKS = 768
MIN_COLUMNS = 256


def runs_natively(basis: Tensor) -> bool:
    """Tell whether there is native code for a basis (Q, D) on an accelerator.

    On a simulated GPU there always is: simulated is a machine with the module.
    """
    if basis.device.type != "cuda" or basis.dtype != torch.float32 or len(basis) > MAX_WIDTH:
        return False
    return isinstance(basis, FakeTensor) or _native.load_or_none(basis.device) is not None


@dataclass(frozen=True)
class FoldLayers:
    """Layer inputs of one shape, prepared for the passes of a fold; see :func:`fold_layers`.

    Attributes:
        count, width, features: L, Q and D.
        num_saved: how many leading rows of each basis are saved.
        table: addresses, int64 (L, 7), see csrc/fold.h.
        memory: float32; the partial sums of :func:`fold_measure`, then the saved rows.
        columns: features that a block of the kernel sums over.
        tensors: the tensors that the table points to, kept alive.
    """

    count: int
    width: int
    features: int
    num_saved: list[int]
    table: Tensor
    memory: Tensor
    columns: int
    tensors: list[list[Tensor]]

    @property
    def saved(self) -> Tensor:
        """The saved rows of all layers, (sum of num_saved, D); :func:`fold_rows` writes them."""
        rows = sum(self.num_saved)
        return self.memory[: rows * self.features].view(rows, self.features)


@torch.no_grad()
def fold_layers(
    bases: Sequence[Tensor],
    products: Sequence[Tensor],
    shifts: Sequence[Tensor],
    squares: Sequence[Tensor],
    means: Sequence[Tensor],
    num_saved: Sequence[int],
) -> FoldLayers:
    """Describe layer inputs of one shape for the passes of a fold, without touching them.

    Args:
        bases: V, one (Q, D) per layer, float32 and contiguous, Q at most 128. Here and below, all
            tensors are checked for contiguity, for the rest only those of the first layer.
        products: of the step about the old mean, the same shape and dtype.
        shifts, squares: of the step, float64 (D,) and (); see :func:`reference.sketch`.
        means: before the step, float32 (D,).
        num_saved: how many leading rows of each basis :func:`fold_rows` saves.

    Raises:
        EvaValueError, EvaTypeError: lengths, shapes, devices or dtypes do not fit.
        EvaRuntimeError: the module for this device was not built.

    Cost: one copy of 56 bytes a layer; memory for the saved rows, or for the partial sums (64 KiB
        for each of some 768 blocks), whichever is more.
    """
    tensors = [list(given) for given in (bases, products, shifts, squares, means)]
    check_layers(tensors, num_saved)
    count, (q, d) = len(bases), bases[0].shape
    columns = columns_per_split(count, q, d)
    blocks = count * _num_tile_pairs(q) * -(-d // columns) if bases[0].is_cuda else 0
    memory = bases[0].new_empty(max(sum(num_saved) * d, blocks * 4 * TILE * TILE))
    table = _layer_table(tensors, memory, num_saved)
    return FoldLayers(count, q, d, list(num_saved), table, memory, columns, tensors)


@torch.no_grad()
def fold_prepare(layers: FoldLayers, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how the step changes the means; see :func:`reference.fold_prepare`.

    Args:
        layers: see :func:`fold_layers`.
        numbers: float64 (L, 4 + Q): ``added``, the tokens of the step; ``added / count``; an upper
            bound of the rank; ``added^2 / count``; and the squares s^2.

    Returns:
        ``delta`` float64 (L, D); the new means, float32 (L, D); ``scalars`` float64 (L, 3): sum of
        squares of the step, how much it increases the total variance, norm of the new mean.

    Numerics: float64 in a fixed order; like all passes, bitwise reproducible.
    """
    _check_tensor(
        "numbers",
        numbers,
        (layers.count, HEADER_SIZE + layers.width),
        torch.float64,
        layers.table.device,
    )
    return _prepare(layers.table, numbers, layers.features)


@torch.no_grad()
def fold_measure(
    layers: FoldLayers, numbers: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of each image with basis and itself; see :func:`reference.fold_measure`.

    Returns:
        ``along`` (L, Q), ``core`` and ``metric`` (L, Q, Q), float64, bitwise symmetric.

    Numerics: float64 throughout, on products and bases as stored.
    Cost: ``2 L Q^2 D`` flops; bases are read twice and products once, and both once more if Q is
        above 64.
    """
    _check_passes(layers, numbers, delta)
    return _measure(layers.table, numbers, delta, layers.memory, layers.columns)


@torch.no_grad()
def fold_rows(
    layers: FoldLayers,
    numbers: Tensor,
    delta: Tensor,
    along: Tensor,
    mean: Tensor,
    mixing: Tensor,
    summary: Tensor,
    all_finite: Tensor,
) -> None:
    """Overwrite bases and means with the new ones, saving rows first: :func:`reference.fold_rows`.

    Args:
        layers, numbers, delta, along, mean: from the preceding passes.
        mixing, summary: from :func:`.nystrom.nystrom`: ``mixing^T Y`` are the new rows; rows from
            the rank on (the first number of ``summary``) are not written. ``mixing`` may have any
            strides.
        all_finite: () bool: if false, nothing is written.

    Numerics: formed in float64 and rounded once.
    Cost: ``2 L Q^2 D`` flops; bases and products are read once, bases written once.
    """
    count, q, d = layers.count, layers.width, layers.features
    mixing = mixing.contiguous()
    _check_passes(layers, numbers, delta)
    _check_tensor("along", along, (count, q), torch.float64, layers.table.device)
    _check_tensor("mean", mean, (count, d), torch.float32, layers.table.device)
    _check_tensor("mixing", mixing, (count, q, q), torch.float64, layers.table.device)
    _check_tensor("summary", summary, (count, 2 + 2 * q), torch.float64, layers.table.device)
    _check_tensor("all_finite", all_finite, (), torch.bool, layers.table.device)
    _rows(layers.table, numbers, delta, along, mean, mixing, summary, all_finite)


def columns_per_split(count: int, width: int, features: int) -> int:
    """Return how many features a block of the kernel sums over, a multiple of 16."""
    splits = max(
        1, min(-(-TARGET_BLOCKS // (count * _num_tile_pairs(width))), features // MIN_COLUMNS)
    )
    return -(-features // (16 * splits)) * 16


def _num_tile_pairs(width: int) -> int:
    tiles = -(-width // TILE)
    return tiles * (tiles + 1) // 2


def _layer_table(
    tensors_by_kind: Sequence[Sequence[Tensor]], memory: Tensor, num_saved: Sequence[int]
) -> Tensor:
    """Build the table of layers for csrc/fold.h, on their device."""
    if isinstance(memory, FakeTensor):  # it has no address
        return memory.new_empty((len(num_saved), 7), dtype=torch.int64)
    entries = np.empty((len(num_saved), 7), np.int64)
    for column, tensors in zip((0, 1, 4, 5, 6), tensors_by_kind, strict=True):
        entries[:, column] = [tensor.data_ptr() for tensor in tensors]
    saved_counts = np.array(num_saved, np.int64)
    row_bytes = tensors_by_kind[0][0].shape[1] * memory.element_size()
    entries[:, 2] = memory.data_ptr() + (saved_counts.cumsum() - saved_counts) * row_bytes
    entries[:, 3] = saved_counts
    return _native.upload(entries, memory.device)


def _run_prepare(table: Tensor, numbers: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    delta, mean, scalars = _empty_prepared(table, numbers, features)
    run_pass = _bound_pass("fold_prepare", table, numbers, delta, 0)
    run_pass(mean.data_ptr(), scalars.data_ptr())
    return delta, mean, scalars


def _empty_prepared(table: Tensor, numbers: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    count = len(numbers)
    mean = numbers.new_empty((count, features), dtype=torch.float32)
    return numbers.new_empty(count, features), mean, numbers.new_empty(count, 3)


_prepare = define_operator(
    "fold_prepare",
    "(Tensor table, Tensor numbers, int features) -> (Tensor, Tensor, Tensor)",
    _run_prepare,
    _empty_prepared,
)


def _run_measure(
    table: Tensor, numbers: Tensor, delta: Tensor, partial: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    along, core, metric = _empty_measured(table, numbers)
    run_pass = _bound_pass("fold_measure", table, numbers, delta, along.data_ptr())
    run_pass(columns, partial.data_ptr(), core.data_ptr(), metric.data_ptr())
    return along, core, metric


def _empty_measured(
    table: Tensor, numbers: Tensor, *given: object
) -> tuple[Tensor, Tensor, Tensor]:
    count, q = len(numbers), numbers.shape[1] - HEADER_SIZE
    empty = numbers.new_empty
    return empty(count, q), empty(count, q, q), empty(count, q, q)


_measure = define_operator(
    "fold_measure",
    "(Tensor table, Tensor numbers, Tensor delta, Tensor(a!) partial, int columns) "
    "-> (Tensor, Tensor, Tensor)",
    _run_measure,
    _empty_measured,
)


def _run_rows(
    table: Tensor,
    numbers: Tensor,
    delta: Tensor,
    along: Tensor,
    mean: Tensor,
    mixing: Tensor,
    summary: Tensor,
    all_finite: Tensor,
) -> None:
    run_pass = _bound_pass("fold_rows", table, numbers, delta, along.data_ptr())
    run_pass(mean.data_ptr(), mixing.data_ptr(), summary.data_ptr(), all_finite.data_ptr())


_rows = define_operator(
    "fold_rows",
    "(Tensor table, Tensor numbers, Tensor delta, Tensor along, Tensor mean, Tensor mixing, "
    "Tensor summary, Tensor all_finite) -> ()",
    _run_rows,
)


def _bound_pass(
    name: str, table: Tensor, numbers: Tensor, delta: Tensor, along_address: int
) -> Callable[..., None]:
    """Return a function of the module with the arguments that all passes share."""
    device, (count, columns) = numbers.device, numbers.shape
    shape = count, columns - HEADER_SIZE, delta.shape[1]
    module = _native.load(device)
    shared_arguments = table.data_ptr(), *shape, numbers.data_ptr(), delta.data_ptr(), along_address
    return functools.partial(_native.call, module, name, *shared_arguments, device=device)


def check_layers(tensors_by_kind: Sequence[Sequence[Tensor]], num_saved: Sequence[int]) -> None:
    """Raise unless bases, products, shifts, squares and means fit; see :func:`fold_layers`."""
    lengths = [*map(len, tensors_by_kind), len(num_saved)]
    if not num_saved or len(set(lengths)) > 1:
        raise EvaValueError(
            "bases, products, shifts, squares, means and num_saved must be equally long, at least "
            f"one entry each, not {lengths}"
        )
    like = tensors_by_kind[0][0]
    if like.dim() != 2 or like.numel() == 0 or len(like) > MAX_WIDTH:
        raise EvaValueError(
            f"bases must be (Q, D) and not empty, with Q at most {MAX_WIDTH}, "
            f"not {tuple(like.shape)}"
        )
    if not isinstance(like, FakeTensor):
        _native.load(like.device)  # raises, and says why
    q, d = like.shape
    float32, float64 = torch.float32, torch.float64
    # A step has hundreds of layers, all alike: only the first tensor of each kind is checked.
    names = ("bases", "products", "shifts", "squares", "means")
    expected = (
        ((q, d), float32),
        ((q, d), float32),
        ((d,), float64),
        ((), float64),
        ((d,), float32),
    )
    for name, tensors, (shape, dtype) in zip(names, tensors_by_kind, expected, strict=True):
        for i, tensor in enumerate(tensors):
            if i == 0 or not tensor.is_contiguous():
                _check_tensor(f"{name}[{i}]", tensor, shape, dtype, like.device)
    if not all(0 <= count <= q for count in num_saved):
        raise EvaValueError(f"num_saved must be between 0 and {q}, not {list(num_saved)}")


def _check_passes(layers: FoldLayers, numbers: Tensor, delta: Tensor) -> None:
    shape = layers.count, HEADER_SIZE + layers.width
    _check_tensor("numbers", numbers, shape, torch.float64, layers.table.device)
    _check_tensor(
        "delta", delta, (layers.count, layers.features), torch.float64, layers.table.device
    )


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.dtype != dtype:
        raise EvaTypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tensor.device != device:
        raise EvaValueError(f"{name} is on {tensor.device}, bases[0] on {device}")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise EvaValueError(
            f"{name} must be contiguous {shape}, not {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
