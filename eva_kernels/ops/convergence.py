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
    kind = current[0].device.type
    if backend == "native" and kind not in _native.MODULES:
        _native.load(kind)  # raises, and says why
    if kind not in _native.MODULES:
        return reference.convergence(previous, current, ranks, tau)
    given = list(previous), list(current), [int(rank) for rank in ranks], float(tau)
    return _compare(*given, backend == "auto")


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
    kind = current[0].device.type
    module = _native.load_or_none(kind) if may_fall_back else _native.load(kind)
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
    before = [with_contiguous_columns(matrix) for matrix in previous]
    now = [with_contiguous_columns(matrix) for matrix in current]
    entries, n_rows = np.empty((len(now), 8), np.int64), 0
    for i, (u, v, rank) in enumerate(zip(before, now, ranks, strict=True)):
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
    saved: Sequence[Tensor], bases: Sequence[Sequence[Tensor]], kept: Sequence[Sequence[int]]
) -> Tensor:
    """Compare saved rows with the rows now in their place, in one launch.

    Does what :func:`convergence` does with "auto", for groups of layers of one shape whose saved
    rows are contiguous: a step has hundreds of layers, so few checks are made for each.

    Args:
        saved: one matrix per group, (sum of K_i, D), float32 and contiguous, as all matrices here.
        bases: per group one or more of (Q, D); dtype and shape are checked for the first only.
        kept: per group, K_i of each layer: how many leading rows of its basis are compared.

    Returns:
        |cos| of all rows, float32 (sum of all K_i,).

    Raises:
        EvaTypeError, EvaValueError: dtypes or sizes do not fit.
    """
    for rows, group, counts in zip(saved, bases, kept, strict=True):
        for matrix in (rows, *group[:1]):
            _check_matrix("a matrix of cosines", matrix)
        fits = 0 < len(group) == len(counts) and len(rows) == sum(counts)
        fits = fits and rows.shape[1] == group[0].shape[1]
        fits = fits and min(counts) >= 0 and max(counts) <= len(group[0])
        if not (fits and all(matrix.is_contiguous() for matrix in (rows, *group))):
            raise EvaValueError(
                f"{len(group)} contiguous bases must have kept {len(rows)} contiguous rows of as "
                f"many features, not {list(counts)}"
            )
    flat = [basis for group in bases for basis in group]
    counts = [count for group in kept for count in group]
    if flat[0].device.type not in _native.MODULES:
        return _cosines_plain(list(saved), flat, counts, list(map(len, bases)))
    return _cosines(list(saved), flat, counts, list(map(len, bases)))


def _run_cosines(
    saved: list[Tensor], bases: list[Tensor], kept: list[int], layers: list[int]
) -> Tensor:
    module = _native.load_or_none(bases[0].device.type)
    if module is None:
        return _cosines_plain(saved, bases, kept, layers)
    entries = np.zeros((len(bases), 8), np.int64)
    rows = np.array(kept, np.int64)
    entries[:, 1] = [basis.data_ptr() for basis in bases]
    entries[:, 4], entries[:, 6] = rows, rows.cumsum() - rows
    begin = 0
    for part, count in zip(saved, layers, strict=True):
        group = slice(begin, begin + count)
        offsets = rows[group].cumsum() - rows[group]
        entries[group, 0] = part.data_ptr() + offsets * (part.shape[1] * part.element_size())
        entries[group, 2] = entries[group, 3] = entries[group, 5] = part.shape[1]
        begin += count
    return _run_table(module, entries, sum(kept), 0.0, bases[0].device)[0]


def _cosines_plain(
    saved: list[Tensor], bases: list[Tensor], kept: list[int], layers: list[int]
) -> Tensor:
    before: list[Tensor] = []
    for part, count in zip(saved, layers, strict=True):
        before += part.split(kept[len(before) : len(before) + count])
    now = [basis[:count] for basis, count in zip(bases, kept, strict=True)]
    return reference.convergence(before, now, [0] * len(now), 0.0)[0]


_cosines = define_operator(
    "cosines",
    "(Tensor[] saved, Tensor[] bases, int[] kept, int[] layers) -> Tensor",
    _run_cosines,
    lambda saved, bases, kept, layers: bases[0].new_empty((sum(kept),)),
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
    for i, (before, now, rank) in enumerate(zip(previous, current, ranks, strict=True)):
        _check_matrix(f"current[{i}]", now)
        _check_matrix(f"previous[{i}]", before)
        for name, matrix in (("previous", before), ("current", now)):
            if matrix.device != current[0].device:
                raise EvaValueError(
                    f"{name}[{i}] is on {matrix.device}, current[0] on {current[0].device}"
                )
        if before.shape != now.shape:
            raise EvaValueError(
                f"previous[{i}] and current[{i}] must have the same shape, "
                f"not {tuple(before.shape)} and {tuple(now.shape)}"
            )
        if not 0 <= rank <= now.shape[0]:
            raise EvaValueError(f"ranks[{i}] must be between 0 and {now.shape[0]}, not {rank}")


def _check_matrix(name: str, matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor) or matrix.dtype != torch.float32:
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise EvaTypeError(f"{name} must be a float32 tensor, not {kind}")
    if matrix.dim() != 2:
        raise EvaValueError(f"{name} must have 2 dimensions, not {matrix.dim()}")
