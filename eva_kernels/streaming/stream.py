"""The stream of one layer input, and the step over many of them at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import EvaValueError, NonFiniteError
from ..ops import gram, sketch
from .fold import FoldReport, fold, fold_gram, scatter_about_mean
from .merge import merge_gram, merge_sketch
from .plan import StreamPlan, stream_bytes
from .state import GramState, SketchState, StepSums, clear_sums, empty_sketch, zero_sums

__all__ = [
    "InputStream",
    "Options",
    "Spectrum",
    "fold_streams",
    "variance_ratio",
]

# The first basis comes from at most this many tokens per row of the sketch: it need not be exact.
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Options:
    """How a stream works.

    Attributes:
        method: ``"sketch"`` or ``"gram"``.
        seed: of the first basis.
        backend, precision: see ``ops``.
        skip_nonfinite: leave tokens with NaN or infinity out instead of raising.
    """

    method: str = "sketch"
    seed: int = 0
    backend: str = "auto"
    precision: str = "high"
    skip_nonfinite: bool = False


@dataclass(frozen=True)
class Spectrum:
    """The answer for one layer input.

    Attributes:
        components: (K, D), orthonormal rows, dtype of the stream, the entry of largest magnitude
            of each row positive.
        singular_values: (K,), float64, descending; 0 beyond the numerical rank.
        ratio: explained-variance ratio ``s^2 / total``, (K,), float64; 0 without variance.
        mean: (D,).
        count: tokens.
        total: centred sum of squares.
        rank: numerical rank among the directions tracked.
        lost: share of the captured variance that the last fold still gained; an estimate of the
            variance lost against the best K components.
    """

    components: Tensor
    singular_values: Tensor
    ratio: Tensor
    mean: Tensor
    count: int
    total: float
    rank: int
    lost: float


@dataclass
class InputStream:
    """Incremental PCA of one layer input.

    Args:
        features: D.
        components: K, at most D.
        width: sketch width Q, ``K <= Q <= D``.
        device, dtype: of the state; float32, or float64 for float64 input.
        options: see :class:`Options`.
    """

    features: int
    components: int
    width: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        if not 1 <= self.components <= self.width <= self.features:
            raise EvaValueError(
                f"components={self.components}, width={self.width} and features={self.features} "
                "must satisfy 1 <= components <= width <= features"
            )
        self.pending = 0  # tokens accumulated since the last fold
        self.skipped = 0  # tokens left out because they are not finite
        self.folds = 0
        self.previous: Tensor | None = None  # (K, D) before the last fold, until compared
        self.cosines: Tensor | None = None  # (K,) on the CPU, of the last fold, once compared
        self.similarity: float | None = None  # smallest needed one; None before the second fold
        self.converged = False
        self.settled = 0  # leading components that were all similar enough at some fold
        self.lost = float("nan")
        self.state: SketchState | GramState | None = None
        self.sums: StepSums | None = None

    @property
    def sketch(self) -> SketchState | None:
        """The current sketch, whatever the method."""
        return self.state.sketch if isinstance(self.state, GramState) else self.state

    @property
    def tokens(self) -> int:
        """Tokens seen, those of the current step included."""
        folded = 0 if self.state is None else int(_counted(self.state))
        return folded if isinstance(self.state, GramState) else folded + self.pending

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the sums."""
        if self.state is None:
            return 0
        plan = StreamPlan(self.features, self.components, self.width, self.options.method)
        return stream_bytes(plan, self.dtype.itemsize)

    def add(self, x: Tensor, rows: Tensor | None = None) -> int:
        """Accumulate tokens; returns how many were used.

        Args:
            x: (N, D), any floating dtype, any strides.
            rows: indices of the tokens to use, int64 on the device of ``x``; all if ``None``.

        Raises:
            NonFiniteError: a token to be used holds NaN or infinity, unless ``skip_nonfinite``.
            EvaValueError: another number of features.
        """
        if x.dim() != 2 or x.shape[1] != self.features:
            raise EvaValueError(
                f"expected tokens of shape (N, {self.features}), got {tuple(x.shape)}"
            )
        rows = self._finite_rows(x, rows)
        used = x.shape[0] if rows is None else rows.numel()
        if used == 0:
            return 0
        if self.state is None:
            self._start(x, rows)
        self._accumulate(x, rows)
        self.pending += used
        return used

    def _finite_rows(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        # One pass over X that the CPU does at the speed of memory; masked rows may hold anything,
        # so only the slow path below looks at them one by one.
        dtype = torch.promote_types(x.dtype, self.dtype)
        if torch.isfinite(torch.linalg.vector_norm(x, dtype=dtype)):
            return rows
        chosen = x if rows is None else x.index_select(0, rows)
        finite = chosen.isfinite().all(1)
        bad = int((~finite).sum())
        if bad and not self.options.skip_nonfinite:
            raise NonFiniteError(f"{bad} of {len(chosen)} tokens hold NaN or infinity")
        self.skipped += bad
        if not torch.isfinite(torch.linalg.vector_norm(chosen[finite], dtype=dtype)):
            raise NonFiniteError(
                f"tokens are finite, but their squares overflow {self.dtype}; scale the data, or "
                "give it as float64"
            )
        index = torch.arange(len(x), device=x.device) if rows is None else rows
        return index[finite]

    def _start(self, x: Tensor, rows: Tensor | None) -> None:
        limit = WARM_UP_TOKENS * self.width
        index = torch.arange(len(x), device=x.device) if rows is None else rows
        sample = x.index_select(0, index[:: -(-len(index) // limit)]).to(self.dtype)
        blank = empty_sketch(self.width, self.features, self.dtype, self.device, self.options.seed)
        blank = replace(blank, mean=sample.double().mean(0).to(self.dtype))
        sums = zero_sums(self.width, self.features, self.dtype, self.device)
        self._sketch_into(sample, None, blank, sums)
        sums.count.fill_(len(sample))
        warm, _ = fold([blank], [sums])[0]
        start = replace(blank, mean=warm.mean, basis=warm.basis)
        if self.options.method == "gram":
            total = zero_sums(self.features, self.features, self.dtype, self.device)
            self.state, self.sums = GramState(total, start.mean, start), total
        else:
            clear_sums(sums)
            self.state, self.sums = start, sums

    def _sketch_into(
        self, x: Tensor, rows: Tensor | None, state: SketchState, sums: StepSums
    ) -> None:
        sketch(
            x,
            state.basis,
            state.mean,
            sums.products,
            sums.shift,
            sums.square,
            rows,
            backend=self.options.backend,
            precision=self.options.precision,
        )

    def _accumulate(self, x: Tensor, rows: Tensor | None) -> None:
        assert self.sums is not None
        if isinstance(self.state, GramState):
            sums = self.sums
            gram(
                x,
                self.state.pivot,
                sums.products,
                sums.shift,
                sums.square,
                rows,
                backend=self.options.backend,
                precision=self.options.precision,
            )
        else:
            assert self.state is not None
            self._sketch_into(x, rows, self.state, self.sums)
        self.sums.count.add_(len(x) if rows is None else rows.numel())

    def close_step(self, state: SketchState | GramState, report: FoldReport) -> None:
        """Take over a folded state and start the next step."""
        self.state, self.pending = state, 0
        self.folds += 1
        if isinstance(state, SketchState):
            assert self.sums is not None
            clear_sums(self.sums)
        k, now = self.components, self.sketch
        assert now is not None
        best = float(now.singular_values[:k].square().sum())
        self.lost = max(0.0, 1 - float(report.captured[:k].sum()) / best) if best > 0 else 0.0

    def clone(self) -> InputStream:
        """Return an independent copy."""
        return deepcopy(self)

    def merge(self, other: InputStream) -> None:
        """Take the tokens of another stream of the same shape and method into this one."""
        fold_streams([self, other], final=True)
        if other.state is None:
            return
        if self.state is None:
            self.__dict__.update(other.clone().__dict__)
        elif isinstance(self.state, GramState) and isinstance(other.state, GramState):
            state, report = fold_gram(merge_gram(self.state, other.state))
            self.sums = state.sums
            self.close_step(state, report)
        elif isinstance(self.state, SketchState) and isinstance(other.state, SketchState):
            self.state = merge_sketch(self.state, other.state)
        else:
            raise EvaValueError("a sketch and an exact Gram stream cannot be merged")

    def ratios(self) -> Tensor:
        """Return the explained-variance ratios after the last fold, (K,) float64."""
        now = self.sketch
        if now is None:
            return torch.zeros(self.components, dtype=torch.float64)
        return variance_ratio(now.singular_values[: self.components].square(), now)

    def spectrum(self) -> Spectrum:
        """Return the answer so far; the pending step is folded first.

        Raises:
            EvaValueError: no token was seen.
        """
        fold_streams([self], final=True)
        if self.state is None:
            raise EvaValueError("no tokens were seen")
        if isinstance(self.state, GramState):
            squares, basis, rank = _eigen(self.state, self.components)
        else:
            k = self.components
            squares, basis = self.state.singular_values[:k].square(), self.state.basis[:k]
            rank = min(int(self.state.rank), k)
        now = self.sketch
        assert now is not None
        ratio = variance_ratio(squares, now)
        peak = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        return Spectrum(
            components=basis * torch.where(peak < 0, -1.0, 1.0).to(basis.dtype),
            singular_values=squares.sqrt(),
            ratio=ratio,
            mean=now.mean.clone(),
            count=int(now.count),
            total=float(now.total),
            rank=rank if bool(ratio.any()) else 0,
            lost=0.0 if isinstance(self.state, GramState) else self.lost,
        )


def variance_ratio(squares: Tensor, state: SketchState) -> Tensor:
    """Return the explained-variance ratios ``s^2 / total``; all 0 for a constant input.

    What rounding leaves of a constant (its mean is not exact) is not variance: totals below
    ``n (4 eps |mean|)^2`` count as none.
    """
    noise = 4 * torch.finfo(state.mean.dtype).eps * state.mean.double().norm()
    alive = state.total > state.count * noise.square()
    return torch.where(alive, squares / state.total, 0.0).clamp_max(1.0)


def _counted(state: SketchState | GramState) -> Tensor:
    return state.sums.count if isinstance(state, GramState) else state.count


def _eigen(state: GramState, components: int) -> tuple[Tensor, Tensor, int]:
    scatter = scatter_about_mean(state)
    squares, vectors = torch.linalg.eigh(scatter)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    # Rounding of the sums is relative to the two features of an entry, not to the largest of all:
    # an outlier feature must not declare every direction without it to be noise.
    spread = vectors.abs().mT @ scatter.diagonal().clamp_min(0).sqrt()
    noise = 4 * torch.finfo(state.pivot.dtype).eps * spread.square()
    noise += len(squares) * torch.finfo(squares.dtype).eps * squares[0]  # of the eigen-solver
    rank = int((squares > noise).long().cumprod(0).sum())
    rank = min(rank, max(int(state.sums.count) - 1, 0), components)
    alive = torch.arange(components, device=squares.device) < rank
    squares = torch.where(alive, squares[:components], 0.0)
    return squares, vectors[:, :components].mT.contiguous().to(state.pivot.dtype), rank


def fold_streams(streams: Iterable[InputStream], *, final: bool = False) -> list[InputStream]:
    """Fold every stream that has a full step.

    Args:
        streams: of any shapes and devices; those of equal shape are folded as one batch.
        final: fold whatever is pending, however few tokens.

    Returns:
        The streams that were folded. A step is at least Q tokens; fewer stay pending.
    """
    groups: dict[tuple[object, ...], list[InputStream]] = defaultdict(list)
    for stream in streams:
        least = 1 if final else stream.width
        if stream.pending >= least and stream.state is not None:
            kind = type(stream.state)
            key = (kind, stream.features, stream.width, stream.device, stream.dtype)
            groups[key].append(stream)
    for group in groups.values():
        for stream, (state, report) in zip(group, _fold_group(group), strict=True):
            # The first fold starts from the warm-up, which is no step to compare with.
            before = stream.sketch
            stream.previous = before.basis[: stream.components] if stream.folds and before else None
            stream.close_step(state, report)
    return [stream for group in groups.values() for stream in group]


def _fold_group(
    group: Sequence[InputStream],
) -> Sequence[tuple[SketchState | GramState, FoldReport]]:
    if isinstance(group[0].state, GramState):
        return [fold_gram(s.state) for s in group if isinstance(s.state, GramState)]
    states = [s.state for s in group if isinstance(s.state, SketchState)]
    return fold(states, [s.sums for s in group if s.sums is not None])
