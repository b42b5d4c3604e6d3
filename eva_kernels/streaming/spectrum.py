"""The answers of many streams; the number of launches does not grow with the number of layers."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import EvaValueError
from ..ops.eigh import lapack_eigh
from . import _host
from ._autocast import without_autocast
from ._host import Array
from .batch import chunk_bytes, stacked
from .plan import EIGEN_ARRAYS
from .state import GramState, SketchState
from .step import fold_streams

if TYPE_CHECKING:
    from .stream import InputStream

__all__ = ["Spectrum", "centred_scatter", "leading_ratios", "spectra"]


@dataclass(frozen=True)
class Spectrum:
    """The answer for one layer input.

    Attributes:
        components: (K, D), orthonormal rows, dtype of the stream, the entry of largest magnitude
            of each row positive.
        values: singular values, (K,), float64, on the host, descending; 0 beyond the numerical
            rank.
        ratios: explained-variance ratios ``s^2 / total``, as ``values``; 0 without variance.
        mean: (D,), where the components are.
        count: tokens.
        total: centred sum of squares.
        rank: numerical rank among the directions tracked.
        lost: share of the captured variance that the last whole step still gained. Early in a
            stream it is at least about what is lost relative to the best K components; after many
            steps on a flat spectrum it is far less than that loss.
    """

    components: Tensor
    values: Array
    ratios: Array
    mean: Tensor
    count: int
    total: float
    rank: int
    lost: float

    @property
    def singular_values(self) -> Tensor:
        """The values as a tensor on the CPU; it shares their memory."""
        return torch.from_numpy(self.values)

    @property
    def ratio(self) -> Tensor:
        """The ratios as a tensor on the CPU; it shares their memory."""
        return torch.from_numpy(self.ratios)


@without_autocast
def spectra(streams: Sequence[InputStream], device: torch.device | None = None) -> list[Spectrum]:
    """Return the answers of streams so far; the pending steps are folded first.

    Args:
        streams: of any shapes, methods and devices.
        device: for components and means; that of each stream if ``None``. If it is the CPU, an
            accelerator never holds the components of all streams at once.

    Raises:
        EvaValueError: a stream has seen no token.
    Cost: on an accelerator some ten launches and two copies to ``device`` for every 32 MB of
        float64 bases, and one read for all exact streams, each of which also takes a full
        eigen-decomposition.
    """
    if any(s.state is None for s in streams):
        raise EvaValueError("no tokens were seen; add some first")
    fold_streams(streams, final=True)
    parts = [_device_answers(chunk, device) for chunk in _chunks(streams)]
    host_arrays = iter(_host.read([tensor for answers in parts for tensor in answers.numbers]))
    by_stream: dict[int, Spectrum] = {}
    for answers in parts:
        numbers = _values_and_ranks(answers.streams, [next(host_arrays) for _ in answers.numbers])
        tensors = zip(answers.streams, answers.components, answers.means, strict=True)
        for (stream, components, mean), own_numbers in zip(tensors, numbers, strict=True):
            by_stream[id(stream)] = _spectrum(stream, components, mean, *own_numbers)
    return [by_stream[id(s)] for s in streams]


def _totals_above_noise(states: Sequence[SketchState]) -> Array:
    """Return the total of each state, (L,); 0 where that is rounding.

    The rounding error of a constant (whose mean is not exact) is not variance: totals below
    ``n (4 eps |mean|)^2`` count as zero.
    """
    totals = np.array([s.total for s in states], np.float64)
    counts = np.array([s.count for s in states], np.float64)
    noise = np.array([4 * _eps(s.mean.dtype) * s.mean_norm for s in states], np.float64)
    return np.where(totals > counts * noise**2, totals, 0.0)


@functools.cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def leading_ratios(streams: Sequence[InputStream]) -> Array:
    """Return the explained-variance ratios of streams after their last fold.

    Returns:
        Float64 (L, K) with the largest K; 0 beyond that of a stream, and before its first fold.
    """
    ratios = np.zeros((len(streams), max((s.components for s in streams), default=0)))
    groups: dict[tuple[int, int], list[tuple[int, SketchState]]] = defaultdict(list)
    for i, stream in enumerate(streams):
        sketch = stream.sketch
        if sketch is not None:
            groups[stream.components, stream.width].append((i, sketch))
    for (count, width), members in groups.items():
        rows, states = zip(*members, strict=True)
        # into one flat array, not row by row: a third of the time for a hundred layers
        values = np.concatenate([state.values for state in states]).reshape(-1, width)
        ratios[list(rows), :count] = variance_ratios(np.square(values[:, :count]), states)
    return ratios


def variance_ratios(squares: Array, states: Sequence[SketchState]) -> Array:
    """Return ``s^2 / total`` of states, (L, K), each; all 0 without variance."""
    totals = _totals_above_noise(states)
    return np.minimum(squares / np.where(totals > 0, totals, np.inf)[:, None], 1.0)


def centred_scatter(states: Sequence[GramState]) -> Tensor:
    """Return the exact centred scatter matrices C of states of equal D, float64 (L, D, D)."""
    shift = stacked([s.sums.shift for s in states])
    share = np.array([-1 / max(s.sums.count, 1) for s in states])
    device_share = _host.upload(torch.from_numpy(share), shift.device)[:, None]
    products = stacked([s.sums.products for s in states])
    return torch.addcmul(products, shift[:, :, None], (shift * device_share)[:, None, :])


class _DeviceAnswers(NamedTuple):
    """The device part of the answers of streams, and numbers for the host to read.

    Attributes:
        numbers: of exact streams, see :func:`_leading_eigenvectors`; nothing of sketches.
    """

    streams: Sequence[InputStream]
    components: Sequence[Tensor]
    means: Sequence[Tensor]
    numbers: Sequence[Tensor]


def _chunks(streams: Sequence[InputStream]) -> Iterator[list[InputStream]]:
    """Group streams by shape, and split the groups into chunks that are processed together."""
    groups: dict[tuple[object, ...], list[InputStream]] = defaultdict(list)
    for s in streams:
        groups[type(s.state), s.features, s.width, s.components, s.device, s.dtype].append(s)
    for group in groups.values():
        first = group[0]
        exact = isinstance(first.state, GramState)
        rows = EIGEN_ARRAYS * first.features if exact else first.width
        max_bytes = chunk_bytes(_host.reads_are_free(first.device))
        size = max(1, max_bytes // (8 * rows * first.features))
        yield from (group[begin : begin + size] for begin in range(0, len(group), size))


# A separate function, so that only the results of a chunk stay alive.
def _device_answers(chunk: Sequence[InputStream], device: torch.device | None) -> _DeviceAnswers:
    sketches = [s.sketch for s in chunk if s.sketch is not None]
    exact = [s.state for s in chunk if isinstance(s.state, GramState)]
    count = chunk[0].components
    numbers: list[Tensor] = []
    if exact:
        rows, *numbers = _leading_eigenvectors(exact, count)
    else:
        rows = stacked([s.basis for s in sketches])[:, :count]
    peak = rows.gather(2, rows.abs().argmax(2, keepdim=True))
    rows = rows * peak.sign()
    means = torch.stack([s.mean for s in sketches])  # a copy, of one, too
    return _DeviceAnswers(chunk, _split_copies(rows, device), _split_copies(means, device), numbers)


def _split_copies(stacked_tensor: Tensor, device: torch.device | None) -> Sequence[Tensor]:
    """Return each layer's part on a device, in memory of its own.

    A view would keep the memory of all layers alive, and its pickle would contain all of it.
    """
    if device is not None:
        stacked_tensor = stacked_tensor.to(device)  # one copy for all
    if len(stacked_tensor) == 1:
        return stacked_tensor.unbind()
    parts: Sequence[Tensor] = torch.ops.aten.unbind_copy(stacked_tensor)
    return parts


def _leading_eigenvectors(states: Sequence[GramState], components: int) -> tuple[Tensor, ...]:
    """Return the leading eigenvectors of exact streams as rows, and numbers to detect noise.

    Returns:
        (L, K, D) in the dtype of the streams; their eigenvalues, the roots of these, and
        ``sum_i |v_i| sqrt(C_ii)`` of each, float64 (L, K).
    """
    scatter = centred_scatter(states)
    # finite, or the fold would have rejected it; no second copy is made
    if _host.reads_are_free(scatter.device):
        pairs = [_leading_pairs(matrix, components) for matrix in scatter]
        squares, rows = map(torch.stack, zip(*pairs, strict=True))
    else:
        squares, vectors = lapack_eigh(scatter)
        squares = squares.flip(1)[:, :components].clamp_min(0)
        rows = vectors[:, :, -components:].flip(2).mT.contiguous()
    deviation = scatter.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    spread = (rows.abs() @ deviation[:, :, None]).squeeze(2)
    return rows.to(states[0].pivot.dtype), squares, squares.sqrt(), spread


def _leading_pairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (K,), descending, and rows (K, D) of a (D, D) scatter matrix.

    A feature that never varies, such as a dead unit after a ReLU, is itself an eigenvector: only
    the other features are decomposed.
    """
    varies = matrix.diagonal() != 0
    varying, constant = (part.nonzero().flatten() for part in (varies, ~varies))
    submatrix = matrix if len(varying) == len(matrix) else matrix[varying][:, varying]
    values, vectors = lapack_eigh(submatrix)
    num_pairs = min(count, len(varying))
    squares, rows = matrix.new_zeros(count), matrix.new_zeros(count, len(matrix))
    squares[:num_pairs] = values.flip(0)[:num_pairs].clamp_min(0)
    rows[:num_pairs, varying] = vectors[:, len(varying) - num_pairs :].flip(1).mT
    ordinals = torch.arange(num_pairs, count, device=matrix.device)
    rows[ordinals, constant[: count - num_pairs]] = 1.0
    return squares, rows


def _values_and_ranks(
    streams: Sequence[InputStream], host_arrays: Sequence[Array]
) -> list[tuple[Array, Array, int]]:
    """Return singular values, their squares, (K,), and the rank of streams of one shape."""
    first = streams[0]
    if not host_arrays:
        count = first.components
        states = [s.state for s in streams if isinstance(s.state, SketchState)]
        values = [s.values[:count].copy() for s in states]
        return [(v, np.square(v), min(s.rank, count)) for v, s in zip(values, states, strict=True)]
    squares, roots, spread = host_arrays
    # The rounding error of an entry is relative to its two features, not to the largest feature: an
    # outlier feature must not turn every direction without it into noise.
    noise = 4 * torch.finfo(first.dtype).eps * np.square(spread)
    noise += first.features * np.finfo(np.float64).eps * squares[:, :1]  # of the eigen-solver
    ranks = np.logical_and.accumulate(squares > noise, 1).sum(1)
    ranks = np.minimum(ranks, [s.tokens - 1 for s in streams])
    in_rank = np.arange(first.components) < ranks[:, None]
    parts = (np.where(in_rank, each, 0.0) for each in (roots, squares))
    return list(zip(*parts, ranks.tolist(), strict=True))


def _spectrum(
    stream: InputStream,
    components: Tensor,
    mean: Tensor,
    values: Array,
    squares: Array,
    rank: int,
) -> Spectrum:
    sketch = stream.sketch
    assert sketch is not None
    return Spectrum(
        components=components,
        values=values,
        ratios=variance_ratios(squares[None], [sketch])[0],
        mean=mean,
        count=sketch.count,
        total=sketch.total,
        rank=rank if _totals_above_noise([sketch])[0] > 0 else 0,
        lost=0.0 if isinstance(stream.state, GramState) else stream.lost,
    )
