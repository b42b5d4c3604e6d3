"""The (Q, Q) algebra of a fold: from the image of a basis to the leading eigenpairs.

See "Fold" in this folder's README. Shapes have a leading batch axis L; everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.eigh import eigh, lapack_eigh
from ..ops.nystrom import runs_natively
from . import _host
from ._basis import cholesky_correction

__all__ = [
    "CUT",
    "NOISE",
    "OVERLAP_TOLERANCE",
    "Nystrom",
    "nystrom",
    "nystrom_plain",
    "orthogonalisation",
    "whitening",
]

# Squares below this fraction of the largest are rounding noise (singular values below 1e-6 of it).
NOISE = 1e-12
# If the eigenvalues sum to more than the trace of C, by this fraction of it, diagonal entries above
# NOISE were noise as well: sums of low precision leave some in rows that the data do not reach, and
# its inverse makes it an eigenvalue of any size. Then higher fractions are tried. One that does not
# end the excess is not kept, since it would only cost small components: with sums of 8 bits the
# largest eigenvalue may exceed the trace by itself.
EXCESS = 5e-4
RETRIED_NOISE = (1e-10, 1e-8)
# Directions of the scaled (Q, Q) matrix below this eigenvalue carry no information about C.
CUT = 1e-6
# Rows of eigenvalues below this fraction of the largest need a second orthogonalisation: they miss
# orthogonality by up to 10 to 100 eps over that fraction, which must stay below the next constant.
UNEVEN = {torch.float32: 1e-6, torch.float64: 1e-3}
# If the Gram matrix of the new rows is known, they are uneven if an entry is off by more than this:
# below the rounding of a float32 basis, and a tenth of the tolerance of a float64 basis.
OVERLAP_TOLERANCE = {torch.float32: 1e-8, torch.float64: 1e-11}


@dataclass(frozen=True)
class Nystrom:
    """Leading eigenpairs of ``C ~ Y^T B^-1 Y`` for L layer inputs.

    Attributes:
        mixing: (L, Q, Q); ``mixing^T Y`` are the new rows, zero beyond the rank.
        summary: the numbers that the host reads, (L, 2 + 2 Q): the columns that follow. Of a
            whitening or an orthogonalisation only the rank, the first column, is meaningful.
    """

    mixing: Tensor
    summary: Tensor

    @property
    def rank(self) -> Tensor:
        """(L,)."""
        return self.summary[:, 0]

    @property
    def uneven(self) -> Tensor:
        """1 where the rows need :func:`._basis.repair_basis`, otherwise 0, (L,)."""
        return self.summary[:, 1]

    @property
    def squares(self) -> Tensor:
        """Eigenvalues (L, Q), descending, 0 beyond the rank."""
        return self.summary[:, 2 : 2 + self.mixing.shape[1]]

    @property
    def captured(self) -> Tensor:
        """Variance along each row of the old basis, the diagonal of B, (L, Q)."""
        return self.summary[:, 2 + self.mixing.shape[1] :]


def nystrom(
    core: Tensor, metric: Tensor, ceiling: Tensor, trace: Tensor, dtype: torch.dtype
) -> Nystrom:
    """Decompose C from ``Y = V C``, the image of a basis V of orthonormal rows.

    ``C ~ Y^T B^-1 Y``, with B^-1 truncated where the scaled matrix is singular (Tropp, Yurtsever,
    Udell and Cevher 2017, arXiv 1706.05736).

    Args:
        core: ``B = Y V^T``, (L, Q, Q).
        metric: ``Y Y^T``, (L, Q, Q).
        ceiling: upper bound of the rank, (L,).
        trace: of C, (L,): the eigenvalues do not sum to more.
        dtype: that the rows will be rounded to.

    Numerics: where reads are free, a triangular whitener if it is safe, eigenvectors otherwise;
        elsewhere without a host decision: native code decides on the device, PyTorch always takes
        eigenvectors and corrects the rows by their Gram matrix. Native code does not need that
        correction, thanks to the graded accuracy of Jacobi's method. NaN in gives rank 0. PyTorch
        on an accelerator does not use the trace, since that takes a decision.
    """
    if runs_natively(core):
        tolerance = OVERLAP_TOLERANCE[dtype]
        return Nystrom(*ops.nystrom(core, metric, ceiling, tolerance, trace=trace))
    return nystrom_plain(core, metric, ceiling, trace, dtype)


def nystrom_plain(
    core: Tensor, metric: Tensor, ceiling: Tensor, trace: Tensor, dtype: torch.dtype
) -> Nystrom:
    """As :func:`nystrom`, by PyTorch."""
    captured = core.diagonal(dim1=1, dim2=2).clamp(min=0)
    reads_are_free = _host.reads_are_free(core.device)
    found = _white_eigenpairs(core, metric, NOISE)
    if reads_are_free:
        _solve_exceeding_again(found, core, metric, trace)
    scale, metric, whitener, squares, rotation = found

    rank = (squares > NOISE * squares[:, :1]).sum(1)
    rank = torch.minimum(rank, ceiling.to(rank.dtype))
    in_rank = torch.arange(squares.shape[1], device=squares.device) < rank[:, None]
    squares = torch.where(in_rank, squares, 0.0)
    inverse = torch.where(in_rank, squares.rsqrt(), 0.0)
    mixing = (whitener @ rotation) * inverse[:, None, :]
    uneven = rank < squares.shape[1]
    if reads_are_free:
        # A row is orthogonal to the others only to eps times (largest / its own eigenvalue).
        uneven |= squares.amin(1) < UNEVEN[dtype] * squares[:, 0]
    else:
        mixing, overlap_error = _orthonormality_corrected(mixing, metric, in_rank)
        uneven |= overlap_error > OVERLAP_TOLERANCE[dtype]
    flags = torch.stack([rank.to(squares.dtype), uneven.to(squares.dtype)], 1)
    summary = torch.cat([flags, squares, captured], 1)
    return Nystrom(scale[:, :, None] * mixing, summary)


def whitening(core: Tensor, ceiling: Tensor) -> Nystrom:
    """Return a mixing whose rows ``mixing^T Y``, of C^1/2, span what Y does, better conditioned.

    Args:
        core: ``B = Y V^T``, (L, Q, Q), of float32 sums.
        ceiling: upper bound of the rank, (L,): anything beyond is rounding noise, however large.
    """
    if runs_natively(core):
        return Nystrom(*ops.nystrom(core, core, ceiling, 0.0, goal="whiten"))
    scale = _unit_scale(core)
    values, vectors = eigh(core * scale[:, :, None] * scale[:, None, :])
    in_rank = values > CUT  # false for NaN
    mixing = torch.where(in_rank[:, None, :], vectors * values.rsqrt()[:, None, :], 0.0).flip(2)
    rank = torch.minimum(in_rank.sum(1), ceiling)
    return Nystrom(scale[:, :, None] * mixing, rank[:, None])


def orthogonalisation(overlaps: Tensor) -> Nystrom:
    """Return a mixing that makes rows orthonormal and, for every j, keeps the span of the first j.

    Args:
        overlaps: Gram matrix of linearly independent rows of any lengths, (L, Q, Q). If they are
            dependent, PyTorch leaves all rows as they are, and native code the dependent ones.
    """
    if runs_natively(overlaps):
        return Nystrom(
            *ops.nystrom(overlaps, overlaps, overlaps[:, 0, 0], 0.0, goal="orthogonalise")
        )
    scale = _unit_scale(overlaps)
    lower, info = torch.linalg.cholesky_ex(overlaps * scale[:, :, None] * scale[:, None, :])
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    rank = torch.where(info == 0, lower.shape[-1], 0)
    return Nystrom(scale[:, :, None] * inverse.mT, rank[:, None])


def _unit_scale(matrix: Tensor) -> Tensor:
    """Return factors that scale to a unit diagonal, 0 where that is not possible, (L, Q)."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    return torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)


class _WhiteEigenpairs(NamedTuple):
    """Eigenpairs of ``T^T S (Y Y^T) S T``, where ``S B S`` has a unit diagonal and T whitens it.

    Attributes:
        scale: the diagonal of S, (L, Q).
        metric: ``S (Y Y^T) S``, (L, Q, Q).
        whitener: T, (L, Q, Q).
        squares, rotation: eigenvalues, descending, (L, Q); eigenvectors as columns, (L, Q, Q).
    """

    scale: Tensor
    metric: Tensor
    whitener: Tensor
    squares: Tensor
    rotation: Tensor


def _white_eigenpairs(core: Tensor, metric: Tensor, noise: float) -> _WhiteEigenpairs:
    scale = _graded_scale(core, noise)
    outer = scale[:, :, None] * scale[:, None, :]
    # Symmetric up to rounding: the factorisations below read the lower triangle only.
    core, metric = core * outer, metric * outer
    reads_are_free = _host.reads_are_free(core.device)
    whitener = _whitener(core) if reads_are_free else _eigen_whitener(*eigh(core))
    image = whitener.mT @ metric @ whitener
    squares, rotation = lapack_eigh(image) if reads_are_free else eigh(image)
    return _WhiteEigenpairs(scale, metric, whitener, squares.flip(1), rotation.flip(2))


def _solve_exceeding_again(
    found: _WhiteEigenpairs, core: Tensor, metric: Tensor, trace: Tensor
) -> None:
    """Overwrite layers whose eigenvalues exceed the trace, if a higher noise floor mends that."""
    layers = torch.nonzero(_exceeds(found.squares, trace)).flatten()
    for noise in RETRIED_NOISE:
        if not layers.numel():
            break
        again = _white_eigenpairs(core[layers], metric[layers], noise)
        exceeding = _exceeds(again.squares, trace[layers])
        for part, new_part in zip(found, again, strict=True):
            part[layers[~exceeding]] = new_part[~exceeding]
        layers = layers[exceeding]


def _exceeds(squares: Tensor, trace: Tensor) -> Tensor:
    return squares.clamp(min=0).sum(1) > (1 + EXCESS) * trace


def _graded_scale(core: Tensor, noise: float) -> Tensor:
    """Return factors that scale B to a unit diagonal, 0 up to ``noise`` of the largest, (L, Q).

    Entries are graded (activations of language models have outlier features), so this comes before
    any test for singularity.
    """
    captured = core.diagonal(dim1=1, dim2=2).clamp(min=0)
    floor = captured.amax(1, keepdim=True) * noise
    return torch.where(captured > floor, captured.rsqrt(), 0.0)


def _whitener(core: Tensor) -> Tensor:
    """Return T with ``T T^T = core^-1`` (pseudo-inverse below CUT), (L, Q, Q).

    A triangular factor is enough if the matrix is far from singular, which is the normal case (the
    basis is nearly that of the step before), and ten times cheaper than eigenvectors:
    ``|L^-1|_F^2`` is the trace of the inverse and bounds its largest eigenvalue.
    """
    lower, info = torch.linalg.cholesky_ex(core)
    identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device).expand_as(core)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    regular = (info == 0) & (inverse.square().sum((1, 2)) < 1 / CUT)
    whitener = inverse.mT
    singular = torch.nonzero(~regular).flatten()
    if singular.numel():
        whitener = whitener.clone()
        whitener[singular] = _eigen_whitener(*lapack_eigh(core[singular]))
    return whitener


def _eigen_whitener(values: Tensor, vectors: Tensor) -> Tensor:
    """Return T with ``T T^T`` the pseudo-inverse, below CUT, of (L, Q, Q) from its eigenpairs."""
    return vectors * torch.where(values > CUT, values.rsqrt(), 0.0)[:, None, :]


def _orthonormality_corrected(
    mixing: Tensor, metric: Tensor, in_rank: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mixing corrected towards orthonormal rows, and the error that is left, (L,).

    The Gram matrix of the new rows is ``M^T (Y Y^T) M``: a second orthogonalisation in (Q, Q),
    where its cost is negligible beside the work in (Q, D).
    """
    target = torch.diag_embed(in_rank.to(metric.dtype))
    for _ in range(2):  # each squares the error
        mixing = mixing - mixing @ cholesky_correction(mixing.mT @ metric @ mixing - target).mT
    return mixing, (mixing.mT @ metric @ mixing - target).abs().amax((1, 2))
