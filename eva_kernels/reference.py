"""Plain PyTorch twins of every operation: the reference that fast paths are tested against.

Notation throughout the package: N tokens, D features, Q sketch width, x one token (a row of X), p
the pivot, v_j the rows of the basis V (Q, D).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "convergence",
    "fold_measure",
    "fold_prepare",
    "fold_rows",
    "gram",
    "sketch",
    "token_norms",
]

# Rows are streamed in tiles that fit the cache: the centred copy of a tile is written and read
# twice there, so X itself is read from memory once and never copied as a whole.
TILE_ROWS = 512


def _centred_tiles(x: Tensor, pivot: Tensor, rows: Tensor | None) -> Iterator[Tensor]:
    """Yield x - p tile by tile, in one buffer that every tile overwrites."""
    count = len(x) if rows is None else len(rows)
    buffer = pivot.new_empty(min(count, TILE_ROWS), x.shape[1])
    same_dtype = x.dtype == buffer.dtype
    # memory that is new for every tile costs a page fault for each of its pages
    gathered = buffer if same_dtype or rows is None else torch.empty_like(buffer, dtype=x.dtype)
    for begin in range(0, count, TILE_ROWS):
        end = min(begin + TILE_ROWS, count)
        if rows is None:
            tile = x[begin:end]
        else:
            tile = torch.index_select(x, 0, rows[begin:end], out=gathered[: end - begin])
        centred = buffer[: end - begin]
        if same_dtype:
            torch.sub(tile, pivot, out=centred)
        else:  # widened first: the difference of two 16-bit numbers would be rounded
            centred.copy_(tile).sub_(pivot)
        yield centred


def _sum_of_squares(centred: Tensor) -> Tensor:
    # Row by row: one running float32 sum over a whole tile has a relative error of 1e-5 and more.
    return torch.linalg.vector_norm(centred, dim=1).double().square().sum()


def sketch(
    x: Tensor,
    basis: Tensor,
    pivot: Tensor,
    products: Tensor,
    shift: Tensor,
    square: Tensor,
    rows: Tensor | None = None,
) -> None:
    """Add the sums of one batch for a sketched layer input, in place.

    ``products += sum_x (V (x - p)) (x - p)^T``, ``shift += sum_x (x - p)``,
    ``square += sum_x |x - p|^2``.

    Args:
        x: tokens, (N, D), any floating dtype and any strides.
        basis: V, (Q, D), orthonormal rows, float32 or float64 (the dtype of the computation).
        pivot: p, (D,), dtype of ``basis``.
        products: (Q, D), dtype of ``basis``; updated.
        shift: (D,), float64; updated.
        square: (), float64; updated.
        rows: indices of the tokens to use, (M,) int64; all if ``None``.

    Numerics: products accumulate in the dtype of ``basis``, sums in that dtype within a tile and in
        float64 across tiles; bitwise reproducible. NaN and infinity propagate.
    Cost: ``4 N D Q`` flops; X is read once.
    """
    for centred in _centred_tiles(x, pivot, rows):
        projected = centred.new_empty(len(centred), len(basis))  # autocast does not affect out=
        products.addmm_(torch.mm(centred, basis.mT, out=projected).mT, centred)
        shift += centred.sum(0)
        square += _sum_of_squares(centred)


def gram(
    x: Tensor,
    pivot: Tensor,
    scatter: Tensor,
    shift: Tensor,
    square: Tensor,
    rows: Tensor | None = None,
) -> None:
    """Add the sums of one batch for an exactly tracked layer input, in place.

    ``scatter += sum_x (x - p) (x - p)^T``, ``shift += sum_x (x - p)``,
    ``square += sum_x |x - p|^2``.

    Args:
        x: tokens, (N, D), any floating dtype and any strides.
        pivot: p, (D,), float32 or float64 (the dtype of the computation).
        scatter: (D, D), dtype of ``pivot``; updated.
        shift: (D,), float64; updated.
        square: (), float64; updated.
        rows: indices of the tokens to use, (M,) int64; all if ``None``.

    Numerics: as :func:`sketch`.
    Cost: ``2 N D^2`` flops; X is read once.
    """
    for centred in _centred_tiles(x, pivot, rows):
        scatter.addmm_(centred.mT, centred)
        shift += centred.sum(0)
        square += _sum_of_squares(centred)


def token_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norm of each token; NaN or infinity where it is not finite.

    Args:
        x: tokens, (N, D), any floating dtype.
        dtype: of the computation and the result, (N,).
    """
    if x.dtype == dtype or x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    # on a CPU that would widen all of X before it sums
    norms = x.new_empty(len(x), dtype=dtype)
    buffer = x.new_empty(min(len(x), TILE_ROWS), x.shape[1], dtype=dtype)
    for begin in range(0, len(x), TILE_ROWS):
        tile = x[begin : begin + TILE_ROWS]
        part = norms[begin : begin + TILE_ROWS]
        torch.linalg.vector_norm(buffer[: len(tile)].copy_(tile), dim=1, out=part)
    return norms


def convergence(
    previous: Sequence[Tensor], current: Sequence[Tensor], ranks: Sequence[int], tau: float
) -> tuple[Tensor, Tensor]:
    """Compare the components of every layer with those of the step before.

    Args:
        previous: one matrix per layer, (K_i, D_i), rows are components.
        current: the same shapes, one step later.
        ranks: how many leading components of each layer must agree, ``0 <= R_i <= K_i``.
        tau: least absolute cosine that counts as agreement.

    Returns:
        ``similarity``, float32 (sum of K_i,): absolute cosine of every component with its
        predecessor (0 where either is zero, NaN where either is NaN), and ``unconverged``, int32
        (layers,): how many of the first R_i components of each layer are not at least ``tau``.
    """
    similarity, unconverged = [], []
    for previous_rows, current_rows, rank in zip(previous, current, ranks, strict=True):
        previous_rows, current_rows = previous_rows.double(), current_rows.double()
        norms = previous_rows.norm(dim=1) * current_rows.norm(dim=1)
        norms = norms.clamp_min(torch.finfo(torch.float64).tiny)
        cosine = ((previous_rows * current_rows).sum(1).abs() / norms).float()
        similarity.append(cosine)
        unconverged.append((~(cosine[:rank] >= tau)).sum())
    if not similarity:
        return torch.empty(0), torch.empty(0, dtype=torch.int32)
    return torch.cat(similarity), torch.stack(unconverged).to(torch.int32)


# References for the passes of a native fold. Without native code ``streaming.batch`` does the fold.


def fold_prepare(
    shifts: Sequence[Tensor], squares: Sequence[Tensor], means: Sequence[Tensor], numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how the tokens of a step change the means of layer inputs.

    Args:
        shifts, squares: sums of the step about the old mean, float64 (D,) and (); see
            :func:`sketch`.
        means: the old ones, (D,) each.
        numbers: float64 (L, 4 + Q): ``added``, the tokens of the step; ``added / count``; an upper
            bound of the rank; ``weight = added^2 / count``; and the squares s^2.

    Returns:
        ``delta`` float64 (L, D), the mean of the step's tokens minus the old mean; the new means
        (L, D), in the dtype of the old; ``scalars`` float64 (L, 3): sum of squares, how much it
        increases the total variance, norm of the new mean.
    """
    added, share, _, weight = numbers[:, :4].split(1, dim=1)
    delta, square = torch.stack(list(shifts)) / added, torch.stack(list(squares))
    old_mean = torch.stack(list(means))
    mean = torch.addcmul(old_mean, share, delta).to(old_mean.dtype)
    gain = square - (weight * delta.square().sum(1, keepdim=True)).squeeze(1)
    norm = torch.linalg.vector_norm(mean, dim=1, dtype=torch.float64)
    return delta, mean, torch.stack([square, gain.clamp_min(0), norm], 1)


def fold_measure(
    bases: Sequence[Tensor], products: Sequence[Tensor], numbers: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of the image Y = V C of each basis V with the basis and with itself.

    C is the scatter matrix that a layer input's state and the sums of a step represent:
    ``Y = products + diag(s^2) V - along delta^T`` with ``along = weight V delta``.

    Args:
        bases: V, one (Q, D) per layer, orthonormal rows.
        products: of the step about the old mean, (Q, D) each; see :func:`sketch`.
        numbers, delta: as :func:`fold_prepare` takes and returns them.

    Returns:
        ``along`` (L, Q), ``core = Y V^T`` and ``metric = Y Y^T`` (L, Q, Q), float64. They are
        symmetric up to rounding; only their lower triangles are used.
    """
    along, core, metric = [], [], []
    for i, (basis, step_products) in enumerate(zip(bases, products, strict=True)):
        basis64 = basis.double()
        along.append(numbers[i, 3] * (basis64 @ delta[i]))
        image = _image(basis64, step_products, delta[i], numbers[i, 4:], along[-1])
        core.append(image @ basis64.mT)
        metric.append(image @ image.mT)
    return torch.stack(along), torch.stack(core), torch.stack(metric)


def fold_rows(
    bases: Sequence[Tensor],
    products: Sequence[Tensor],
    means: Sequence[Tensor],
    num_saved: Sequence[int],
    numbers: Tensor,
    delta: Tensor,
    along: Tensor,
    mean: Tensor,
    mixing: Tensor,
    summary: Tensor,
    all_finite: Tensor,
) -> Tensor:
    """Overwrite each basis with ``mixing^T Y`` and the old means with the new ones.

    Args:
        bases, products, means, numbers, delta: as above; ``bases`` and ``means`` are updated.
        num_saved: how many leading rows of each basis are returned as they were.
        along: from :func:`fold_measure`.
        mean: from :func:`fold_prepare`.
        mixing: (L, Q, Q), float64.
        summary: (L, 2 + 2 Q), float64, the rank of each layer first: rows from the rank on are not
            written.
        all_finite: (), bool: if false, ``bases`` and ``means`` are not written.

    Returns:
        The saved old rows of all layers, (sum of num_saved, D).
    """
    saved = torch.cat([basis[:count] for basis, count in zip(bases, num_saved, strict=True)])
    for i, (basis, step_products) in enumerate(zip(bases, products, strict=True)):
        image = _image(basis.double(), step_products, delta[i], numbers[i, 4:], along[i])
        rows = (mixing[i].mT @ image).to(basis.dtype)
        in_rank = torch.arange(len(basis), device=basis.device) < summary[i, 0]
        basis.copy_(torch.where(all_finite & in_rank[:, None], rows, basis))
        means[i].copy_(torch.where(all_finite, mean[i], means[i]))
    return saved


def _image(
    basis64: Tensor, step_products: Tensor, delta: Tensor, squares: Tensor, along: Tensor
) -> Tensor:
    return step_products + basis64 * squares[:, None] - torch.outer(along, delta)
