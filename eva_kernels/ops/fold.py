"""The two passes of a fold over (Q, D), for all layer inputs of one shape at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _native, reference
from ..errors import EvaTypeError, EvaValueError
from ._dispatch import define_operator

__all__ = ["BACKENDS", "MAX_WIDTH", "fold_measure", "fold_rows", "runs_natively"]

BACKENDS = ("auto", "native", "torch")
# Two tiles of csrc/fold.h: what a block of any GPU holds in shared memory.
MAX_WIDTH = 128
TILE = 64
# Blocks that fill a GPU a few times over. Each leaves 64 KiB of partial sums.
BLOCKS = 768
LEAST_COLUMNS = 256


def runs_natively(basis: Tensor) -> bool:
    """Tell whether ``"auto"`` runs native code for a basis (Q, D).

    On a simulated GPU it does: what a simulation is asked for is a machine with the module.
    """
    if basis.device.type != "cuda" or basis.dtype != torch.float32 or len(basis) > MAX_WIDTH:
        return False
    return isinstance(basis, FakeTensor) or _native.load_or_none("cuda") is not None


@torch.no_grad()
def fold_measure(
    bases: Sequence[Tensor],
    products: Sequence[Tensor],
    delta: Tensor,
    numbers: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how the image of each basis lies to the basis; see :func:`reference.fold_measure`.

    Args:
        bases, products, delta, numbers: as the reference; native code takes float32 bases.
        backend: "native" (compiled C++ or CUDA, Q at most 128), "torch", or "auto": native on CUDA
            where it was built and the bases fit, otherwise torch.

    Returns:
        ``along`` (L, Q), ``core`` and ``metric`` (L, Q, Q), float64, on the device of the bases,
        without a synchronisation.

    Raises:
        EvaValueError: lengths, shapes, devices or ``backend`` do not fit.
        EvaTypeError: another dtype.
        EvaRuntimeError: ``backend="native"`` and the module for this device was not built.

    Numerics: float64 throughout, on products and bases as they are; native core and metric are
        symmetric to the bit. The same bits for the same input, backend and device.
    Cost: ``4 L Q^2 D`` flops (half of it native); bases are read twice and products once, both
        once more where Q is above 64. Native scratch memory: 64 KiB for each of some 768 blocks.
    """
    _check(bases, products, delta, numbers)
    if not _is_native(bases[0], backend):
        return reference.fold_measure(bases, products, delta, numbers)
    count, (q, d) = len(bases), bases[0].shape
    columns = columns_of_a_split(count, q, d)
    blocks = count * _pairs(q) * -(-d // columns)
    partial = delta.new_empty(2 * TILE * TILE * blocks if delta.device.type == "cuda" else 0)
    return _measure(list(bases), list(products), delta, numbers, partial, columns)


@torch.no_grad()
def fold_rows(
    bases: Sequence[Tensor],
    products: Sequence[Tensor],
    delta: Tensor,
    numbers: Tensor,
    along: Tensor,
    mixing: Tensor,
    sound: Tensor,
    before: Sequence[Tensor],
    *,
    backend: str = "auto",
) -> None:
    """Put the new bases in place of the old; see :func:`reference.fold_rows`.

    Args:
        bases, products, delta, numbers, along, mixing, sound, before: as the reference.
        backend: as :func:`fold_measure`.

    Raises:
        As :func:`fold_measure`.

    Numerics: formed in float64 and rounded once; the same bits for the same input.
    Cost: ``2 L Q^2 D`` flops; bases and products are read once, bases written once.
    """
    _check(bases, products, delta, numbers)
    _check_rows(bases, along, mixing, sound, before)
    if not _is_native(bases[0], backend):
        reference.fold_rows(bases, products, delta, numbers, along, mixing, sound, before)
        return
    _rows(
        list(bases), list(products), delta, numbers, along, mixing.contiguous(), sound, list(before)
    )


def columns_of_a_split(count: int, width: int, features: int) -> int:
    """Return how many features a block of the kernel adds up, a multiple of 16."""
    splits = max(1, min(-(-BLOCKS // (count * _pairs(width))), features // LEAST_COLUMNS))
    return -(-features // (16 * splits)) * 16


def _pairs(width: int) -> int:
    tiles = -(-width // TILE)
    return tiles * (tiles + 1) // 2


def _is_native(basis: Tensor, backend: str) -> bool:
    if backend not in BACKENDS:
        raise EvaValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "auto":
        return runs_natively(basis)
    if backend == "torch":
        return False
    if basis.dtype != torch.float32:
        raise EvaTypeError(f"backend='native' takes float32 bases, not {basis.dtype}")
    if len(basis) > MAX_WIDTH:
        raise EvaValueError(f"backend='native' takes Q up to {MAX_WIDTH}, not {len(basis)}")
    if not isinstance(basis, FakeTensor):
        _native.load(basis.device.type)  # raises, and says why
    return True


def _run_measure(
    bases: list[Tensor],
    products: list[Tensor],
    delta: Tensor,
    numbers: Tensor,
    partial: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    along, core, metric = _empty_results(bases)
    table = _table(bases, products, [])
    _native.call(
        _native.load(delta.device.type),
        "fold_measure",
        *_fold_arguments(table, bases, delta, numbers, along),
        columns,
        partial.data_ptr(),
        core.data_ptr(),
        metric.data_ptr(),
        device=delta.device,
    )
    return along, core, metric


_measure = define_operator(
    "fold_measure",
    "(Tensor[] bases, Tensor[] products, Tensor delta, Tensor numbers, Tensor(a!) partial, "
    "int columns) -> (Tensor, Tensor, Tensor)",
    _run_measure,
    lambda bases, *given: _empty_results(bases),
)


def _run_rows(
    bases: list[Tensor],
    products: list[Tensor],
    delta: Tensor,
    numbers: Tensor,
    along: Tensor,
    mixing: Tensor,
    sound: Tensor,
    before: list[Tensor],
) -> None:
    table = _table(bases, products, before)
    _native.call(
        _native.load(delta.device.type),
        "fold_rows",
        *_fold_arguments(table, bases, delta, numbers, along),
        mixing.data_ptr(),
        sound.data_ptr(),
        device=delta.device,
    )


_rows = define_operator(
    "fold_rows",
    "(Tensor(a!)[] bases, Tensor[] products, Tensor delta, Tensor numbers, Tensor along, "
    "Tensor mixing, Tensor sound, Tensor(b!)[] before) -> ()",
    _run_rows,
)


def _empty_results(bases: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    count, q = len(bases), len(bases[0])
    shapes = ((count, q), (count, q, q), (count, q, q))
    along, core, metric = (bases[0].new_empty(shape, dtype=torch.float64) for shape in shapes)
    return along, core, metric


def _table(bases: Sequence[Tensor], products: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """Describe the layers as csrc/fold.h wants it, on their device."""
    kept = [(part.data_ptr(), len(part)) for part in before] or [(0, 0)] * len(bases)
    entries = [
        (basis.data_ptr(), product.data_ptr(), *saved)
        for basis, product, saved in zip(bases, products, kept, strict=True)
    ]
    return _native.upload(entries, bases[0].device)


def _fold_arguments(
    table: Tensor, bases: Sequence[Tensor], delta: Tensor, numbers: Tensor, along: Tensor
) -> tuple[int, ...]:
    shape = (len(bases), *bases[0].shape)
    addresses = (delta.data_ptr(), numbers.data_ptr(), numbers.stride(0), along.data_ptr())
    return (table.data_ptr(), *shape, *addresses)


def _check(
    bases: Sequence[Tensor], products: Sequence[Tensor], delta: Tensor, numbers: Tensor
) -> None:
    if not bases or len(bases) != len(products):
        raise EvaValueError(
            "bases and products must be equally many, at least one, "
            f"not {len(bases)} and {len(products)}"
        )
    like = bases[0]
    if like.dim() != 2 or like.dtype not in (torch.float32, torch.float64):
        raise EvaTypeError(
            f"bases must be (Q, D) of float32 or float64, not {tuple(like.shape)} of {like.dtype}"
        )
    for name, tensors in (("bases", bases), ("products", products)):
        for i, t in enumerate(tensors):
            # Hundreds a step: what is wrong is looked for only where something is.
            fits = t.shape == like.shape and t.dtype == like.dtype and t.is_contiguous()
            if not (fits and t.device == like.device):
                _check_tensor(f"{name}[{i}]", t, tuple(like.shape), like.dtype, like.device)
    count, (q, d) = len(bases), like.shape
    _check_tensor("delta", delta, (count, d), torch.float64, like.device)
    whole = numbers.dim() != 2 or numbers.stride(1) != 1  # rows may lie apart
    shape = (count, 1 + q)
    _check_tensor("numbers", numbers, shape, torch.float64, like.device, contiguous=whole)


def _check_rows(
    bases: Sequence[Tensor],
    along: Tensor,
    mixing: Tensor,
    sound: Tensor,
    before: Sequence[Tensor],
) -> None:
    like, count, (q, d) = bases[0], len(bases), bases[0].shape
    _check_tensor("along", along, (count, q), torch.float64, like.device)
    _check_tensor("mixing", mixing, (count, q, q), torch.float64, like.device, contiguous=False)
    _check_tensor("sound", sound, (), torch.bool, like.device)
    if len(before) != count:
        raise EvaValueError(f"before must have {count} matrices, not {len(before)}")
    for i, part in enumerate(before):
        kept = min(len(part), q) if part.dim() else 0
        _check_tensor(f"before[{i}]", part, (kept, d), like.dtype, like.device)


def _check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    if tensor.dtype != dtype:
        raise EvaTypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tuple(tensor.shape) != shape or (contiguous and not tensor.is_contiguous()):
        raise EvaValueError(
            f"{name} must be contiguous {shape}, not {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
    if tensor.device != device:
        raise EvaValueError(f"{name} is on {tensor.device}, bases[0] on {device}")
