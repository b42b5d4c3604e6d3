"""The convergence check: how far every component of every layer turned since the last step."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native, reference
from ..errors import EvaTypeError, EvaValueError
from ._dispatch import define_operator, with_contiguous_columns

__all__ = ["BACKENDS", "convergence", "cosines"]

BACKENDS = ("auto", "native", "torch")


@torch.no_grad()
def convergence(
    previous: Sequence[Tensor],
    current: Sequence[Tensor],
    ranks: Sequence[int],
    tau: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compare the components of every layer with those of the step before, in one launch.

    ``similarity_j = |<u_j, v_j>| / (|u_j| |v_j|)`` for previous row u_j and current row v_j.

    Args:
        previous: one float32 matrix (K_i, D_i) per layer, rows are components, all on one device.
            Rows may have any stride; a matrix whose last dimension is not contiguous is copied.
        current: the same shapes, one step later.
        ranks: how many leading components of each layer must agree, ``0 <= R_i <= K_i``.
        tau: least similarity that counts as agreement, between 0 and 1.
        backend: "native" (compiled C++ or CUDA), "torch", or "auto": native where it was built,
            otherwise torch, with the reason logged once.

    Returns:
        ``similarity``, float32 (sum of K_i,): 0 where either row is zero, NaN where either holds
        a NaN or an infinity. ``unconverged``, int32 (layers,): for how many of the first R_i
        components of each layer ``similarity >= tau`` is false, as it is for NaN. Both are on the
        device of the matrices, without a synchronisation.

    Raises:
        EvaValueError: lengths, shapes, devices, a rank, ``tau`` or ``backend`` do not fit.
        EvaTypeError: a matrix is not a float32 tensor.
        EvaRuntimeError: ``backend="native"`` and the module for this device was not built.

    Numerics: products are exact and accumulate in float64, so backends differ only by the order of
        the additions; bitwise reproducible.
    Cost: ``8 sum K_i D_i`` bytes read, ``6 sum K_i D_i`` flops.
    Reference: EVA (arXiv 2410.07170) section 3; PEFT's ``SVDHook`` in ``peft.tuners.lora.eva``.
    """
    _check(previous, current, ranks, tau)
    if backend not in BACKENDS:
        raise EvaValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if not current or backend == "torch":
        return reference.convergence(previous, current, ranks, tau)
    device = current[0].device
    if backend == "native" and device.type not in _native.MODULES:
        _native.load(device)  # raises, and says why
    if device.type not in _native.MODULES:
        return reference.convergence(previous, current, ranks, tau)
    arguments = list(previous), list(current), [int(rank) for rank in ranks], float(tau)
    return _compare(*arguments, backend == "auto")


# The module is chosen inside the operator, so that a simulation with fake tensors sees one call, as
# on a machine with the module.
def _run(
    previous: list[Tensor],
    current: list[Tensor],
    ranks: list[int],
    tau: float,
    may_fall_back: bool,
) -> tuple[Tensor, Tensor]:
    """Run native code; ``may_fall_back`` allows PyTorch where it was not built."""
    device = current[0].device
    module = _native.load_or_none(device) if may_fall_back else _native.load(device)
    if module is None:
        return reference.convergence(previous, current, ranks, tau)
    return _launch(module, previous, current, ranks, tau)


def _fake(previous: list[Tensor], current: list[Tensor], *given: object) -> tuple[Tensor, Tensor]:
    like, rows = current[0], sum(matrix.shape[0] for matrix in current)
    return like.new_empty((rows,)), like.new_empty((len(current),), dtype=torch.int32)


_compare = define_operator(
    "convergence",
    "(Tensor[] previous, Tensor[] current, int[] ranks, float tau, bool may_fall_back) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)


def _launch(
    module: ModuleType,
    previous: Sequence[Tensor],
    current: Sequence[Tensor],
    ranks: Sequence[int],
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Build the table of the ragged batch for csrc/convergence.h, and run it."""
    device = current[0].device
    # Kept alive until the launch: the table holds only their addresses.
    previous_rows = [with_contiguous_columns(matrix) for matrix in previous]
    current_rows = [with_contiguous_columns(matrix) for matrix in current]
    entries, n_rows = np.empty((len(current_rows), 8), np.int64), 0
    for i, (u, v, rank) in enumerate(zip(previous_rows, current_rows, ranks, strict=True)):
        rows, columns = v.shape
        strides = (u.stride(0), v.stride(0))
        entries[i] = u.data_ptr(), v.data_ptr(), *strides, rows, columns, n_rows, int(rank)
        n_rows += rows
    return _run_table(module, entries, n_rows, tau, device)


def _run_table(
    module: ModuleType,
    entries: np.ndarray[Any, np.dtype[np.int64]],
    n_rows: int,
    tau: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    table = _native.upload(entries, device)
    similarity = torch.empty(n_rows, dtype=torch.float32, device=device)
    unconverged = torch.empty(len(entries), dtype=torch.int32, device=device)
    addresses = (similarity.data_ptr(), unconverged.data_ptr())
    arguments = (table.data_ptr(), len(entries), n_rows, float(tau), *addresses)
    _native.call(module, "convergence", *arguments, device=device)
    return similarity, unconverged


@torch.no_grad()
def cosines(
    saved: Sequence[Tensor], bases: Sequence[Sequence[Tensor]], num_saved: Sequence[Sequence[int]]
) -> Tensor:
    """Compare saved rows with the rows now in their place, in one launch.

    Does what :func:`convergence` does with "auto", for groups of layers of one shape whose saved
    rows are contiguous: a step has hundreds of layers, so few checks are made for each.

    Args:
        saved: one matrix per group, (sum of K_i, D), float32 and contiguous, as all matrices here.
        bases: per group one or more of (Q, D); dtype and shape are checked for the first only.
        num_saved: per group, K_i of each layer: how many leading rows of its basis are compared.

    Returns:
        |cos| of all rows, float32 (sum of all K_i,).

    Raises:
        EvaTypeError, EvaValueError: dtypes or sizes do not fit.
    """
    for rows, group, counts in zip(saved, bases, num_saved, strict=True):
        for matrix in (rows, *group[:1]):
            _check_matrix("a matrix of cosines", matrix)
        sizes_fit = 0 < len(group) == len(counts) and len(rows) == sum(counts)
        sizes_fit = sizes_fit and rows.shape[1] == group[0].shape[1]
        sizes_fit = sizes_fit and min(counts) >= 0 and max(counts) <= len(group[0])
        if not (sizes_fit and all(matrix.is_contiguous() for matrix in (rows, *group))):
            raise EvaValueError(
                f"num_saved={list(counts)} does not fit {len(group)} bases and {len(rows)} saved "
                "rows: it must hold one number per basis, at most its number of rows, and sum to "
                "the saved rows; all must be contiguous and have the same number of features"
            )
    flat = [basis for group in bases for basis in group]
    counts = [count for group in num_saved for count in group]
    if flat[0].device.type not in _native.MODULES:
        return _cosines_by_torch(list(saved), flat, counts, list(map(len, bases)))
    return _cosines(list(saved), flat, counts, list(map(len, bases)))


def _run_cosines(
    saved: list[Tensor], bases: list[Tensor], num_saved: list[int], layers_per_group: list[int]
) -> Tensor:
    module = _native.load_or_none(bases[0].device)
    if module is None:
        return _cosines_by_torch(saved, bases, num_saved, layers_per_group)
    entries = np.zeros((len(bases), 8), np.int64)
    row_counts = np.array(num_saved, np.int64)
    entries[:, 1] = [basis.data_ptr() for basis in bases]
    entries[:, 4], entries[:, 6] = row_counts, row_counts.cumsum() - row_counts
    begin = 0
    for saved_rows, count in zip(saved, layers_per_group, strict=True):
        group = slice(begin, begin + count)
        offsets = row_counts[group].cumsum() - row_counts[group]
        row_bytes = saved_rows.shape[1] * saved_rows.element_size()
        entries[group, 0] = saved_rows.data_ptr() + offsets * row_bytes
        entries[group, 2] = entries[group, 3] = entries[group, 5] = saved_rows.shape[1]
        begin += count
    return _run_table(module, entries, sum(num_saved), 0.0, bases[0].device)[0]


def _cosines_by_torch(
    saved: list[Tensor], bases: list[Tensor], num_saved: list[int], layers_per_group: list[int]
) -> Tensor:
    saved_by_layer: list[Tensor] = []
    for saved_rows, count in zip(saved, layers_per_group, strict=True):
        begin = len(saved_by_layer)
        saved_by_layer += saved_rows.split(num_saved[begin : begin + count])
    current_rows = [basis[:count] for basis, count in zip(bases, num_saved, strict=True)]
    return reference.convergence(saved_by_layer, current_rows, [0] * len(current_rows), 0.0)[0]


_cosines = define_operator(
    "cosines",
    "(Tensor[] saved, Tensor[] bases, int[] num_saved, int[] layers_per_group) -> Tensor",
    _run_cosines,
    lambda saved, bases, num_saved, layers: bases[0].new_empty((sum(num_saved),)),
)


def _check(
    previous: Sequence[Tensor], current: Sequence[Tensor], ranks: Sequence[int], tau: float
) -> None:
    if not len(previous) == len(current) == len(ranks):
        raise EvaValueError(
            "previous, current and ranks must be equally long, "
            f"not {len(previous)}, {len(current)} and {len(ranks)}"
        )
    if not 0.0 <= tau <= 1.0:  # NaN, too
        raise EvaValueError(f"tau must be between 0 and 1, not {tau}")
    for i, (previous_matrix, current_matrix, rank) in enumerate(
        zip(previous, current, ranks, strict=True)
    ):
        _check_matrix(f"current[{i}]", current_matrix)
        _check_matrix(f"previous[{i}]", previous_matrix)
        for name, matrix in (("previous", previous_matrix), ("current", current_matrix)):
            if matrix.device != current[0].device:
                raise EvaValueError(
                    f"{name}[{i}] is on {matrix.device}, current[0] on {current[0].device}"
                )
        if previous_matrix.shape != current_matrix.shape:
            raise EvaValueError(
                f"previous[{i}] and current[{i}] must have the same shape, "
                f"not {tuple(previous_matrix.shape)} and {tuple(current_matrix.shape)}"
            )
        if not 0 <= rank <= current_matrix.shape[0]:
            raise EvaValueError(
                f"ranks[{i}] must be between 0 and {current_matrix.shape[0]}, not {rank}"
            )


def _check_matrix(name: str, matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor) or matrix.dtype != torch.float32:
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise EvaTypeError(f"{name} must be a float32 tensor, not {kind}")
    if matrix.dim() != 2:
        raise EvaValueError(f"{name} must have 2 dimensions, not {matrix.dim()}")
