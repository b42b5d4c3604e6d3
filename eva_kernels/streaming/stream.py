"""The stream of one layer input; a step over many of them at once is in ``step.py``."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EvaValueError, NonFiniteError
from ..ops import (
    SketchInto,
    check_precision,
    check_tokens,
    gram,
    sketch_unchecked,
    token_norms,
)
from . import _host
from ._autocast import without_autocast, without_subclass
from ._host import Array
from .fold import first_basis, fold_gram, lost_shares
from .merge import merge_gram, merge_sketch
from .plan import StreamPlan, stream_bytes
from .spectrum import Spectrum, spectra
from .state import (
    GramState,
    SketchState,
    StepSums,
    clear_sums,
    empty_sketch,
    sketch_of,
    start_basis,
    zero_sums,
)
from .step import fold_streams

__all__ = ["InputStream", "Options"]

# The first basis is computed from at most this many tokens per row of the sketch: a rough one does.
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Options:
    """How a stream works.

    Attributes:
        method: ``"sketch"`` or ``"gram"``.
        seed: of the first basis.
        backend, precision: see ``ops``.
        skip_nonfinite: leave tokens with NaN or infinity out instead of raising; looks for them in
            every ``add``.
        check_every_add: look for NaN and infinity in every ``add`` although that is a read on an
            accelerator, where otherwise the fold finds them.
    """

    method: str = "sketch"
    seed: int = 0
    backend: str = "auto"
    precision: str = "high"
    skip_nonfinite: bool = False
    check_every_add: bool = False

    def __post_init__(self) -> None:
        check_precision(self.precision)


@dataclass
class InputStream:
    """Incremental PCA of one layer input.

    Args:
        features: D.
        components: K, at most D.
        width: sketch width Q, ``K <= Q <= D``.
        device: of the tokens, and of the state where it computes in float64; otherwise the state is
            on the CPU, and so is the attribute.
        dtype: of the state; float32, or float64 for float64 input.
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
        self.device = _host.state_device(self.device)
        self.pending = 0  # tokens accumulated since the last fold
        self.skipped = 0  # tokens left out because they are not finite
        self.folds = 0
        self._shared_start_basis: Tensor | None = None  # cached as long as it is held
        self.previous: Tensor | None = None  # (K, D) before the last fold, until compared
        # (K,) cosines that the fold has read, until compared
        self.pending_cosines: Array | None = None
        self.cosines: Tensor | None = None  # (K,) on the CPU, of the last fold, once compared
        self.similarity: float | None = None  # smallest needed one; None before the second fold
        self.converged = False
        self.settled = 0  # leading components that were all similar enough at some fold
        self.lost = float("nan")
        self.state: SketchState | GramState | None = None
        self.sums: StepSums | None = None
        self._sketcher: SketchInto | None = None  # adds to the sums as they are

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy: without the object that adds to this stream's own sums."""
        return self.__dict__ | {"_sketcher": None}

    @property
    def sketch(self) -> SketchState | None:
        """The current sketch, whatever the method."""
        return None if self.state is None else sketch_of(self.state)

    @property
    def tokens(self) -> int:
        """Tokens seen, those of the current step included."""
        if isinstance(self.state, GramState):
            return self.state.sums.count
        return self.pending + (0 if self.state is None else self.state.count)

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the sums."""
        if self.state is None:
            return 0
        plan = StreamPlan(self.features, self.components, self.width, self.options.method)
        return stream_bytes(plan, self.dtype.itemsize)

    @without_autocast
    def add(self, x: Tensor, rows: Tensor | None = None) -> int:
        """Accumulate tokens; returns how many were used.

        Args:
            x: (N, D), any floating dtype, any strides.
            rows: indices of the tokens to use, int64 on the device of ``x``; all if ``None``.

        Raises:
            NonFiniteError: a token to be used holds NaN or infinity, unless ``skip_nonfinite``. On
                an accelerator the fold raises it, unless ``check_every_add``.
            EvaValueError: another number of features, another device, or no floating-point tokens;
                rows of another kind.
        """
        x = without_subclass(x)
        x = x.detach() if x.requires_grad else x
        if self._sketcher is not None:
            if not self._sketcher.adds_to(self._sketch_arguments()):
                self._sketcher = None
            elif self._sketcher.add(x, rows):
                return self._count_tokens(x.shape[0] if rows is None else rows.shape[0])
        if x.dim() != 2 or x.shape[1] != self.features:
            raise EvaValueError(
                f"expected tokens of shape (N, {self.features}), got {tuple(x.shape)}"
            )
        check_tokens("add", x, rows)
        x, rows = self._to_state_device(x, rows)
        expected_device = self.device if self.sums is None else self.sums.shift.device
        same_index = expected_device.index in (None, x.device.index)
        if x.device.type != expected_device.type or not same_index:
            raise EvaValueError(f"expected tokens on {expected_device}, got {x.device}")
        options, num_bad = self.options, None
        exact = options.method == "gram"
        checks_now = options.check_every_add or options.skip_nonfinite
        checks_now = checks_now or _host.reads_are_free(self.device)
        if checks_now:
            rows = self._finite_rows(x, rows)
        elif exact:
            x, num_bad = self._replace_nonfinite(x, rows)
        num_used = x.shape[0] if rows is None else rows.numel()
        if num_used == 0:
            return 0
        if self.state is None:
            self._start_state(x, rows)
        self._accumulate(x, rows)
        if num_bad is not None and self.sums is not None:
            self.sums.bad = num_bad if self.sums.bad is None else self.sums.bad + num_bad
        if self._sketcher is None and not (exact or checks_now):
            self._sketcher = SketchInto(
                self._sketch_arguments(), options.backend, options.precision == "high"
            )
        return self._count_tokens(num_used)

    def _to_state_device(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Move the tokens to be used to the state's device, if they are on another."""
        target = _host.state_device(x.device)
        if target == x.device or target != self.device:
            return x, rows
        return (x if rows is None else x.index_select(0, rows)).detach().to(target), None

    def _count_tokens(self, tokens: int) -> int:
        assert self.sums is not None
        self.sums.count += tokens
        self.pending += tokens
        return tokens

    def _sketch_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the arguments of a sketch besides the tokens."""
        state, sums = self.state, self.sums
        assert isinstance(state, SketchState)
        assert sums is not None
        return state.basis, state.mean, sums.products, sums.shift, sums.square

    def _replace_nonfinite(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        # The sums of an exact stream hold everything it has seen, so bad tokens must be kept out of
        # them, without a read: replacing a token by the pivot makes it add nothing (except the
        # pivot's rounding to the dtype of x).
        dtype = torch.promote_types(x.dtype, self.dtype)
        finite = token_norms(x, dtype).isfinite()
        finite_used = finite if rows is None else finite.index_select(0, rows)
        num_bad = len(finite_used) - finite_used.sum(dtype=torch.float64)
        pivot = self.state.pivot if isinstance(self.state, GramState) else x.new_zeros(())
        return torch.where(finite[:, None], x, pivot.to(x.dtype)), num_bad

    def _finite_rows(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        # The norm of X - p is at most this sum; p may be as large as the tokens, of opposite sign.
        dtype, pivot = torch.promote_types(x.dtype, self.dtype), self._pivot()
        norm = _used_norm(x, rows, dtype)
        if pivot is not None:
            count = len(x if rows is None else rows)
            norm = norm + math.sqrt(count) * torch.linalg.vector_norm(pivot)
        if self._norm_fits(norm):
            return rows
        used_tokens = x if rows is None else x.index_select(0, rows)
        finite = used_tokens.isfinite().all(1)
        num_bad = int((~finite).sum())
        if num_bad and not self.options.skip_nonfinite:
            raise NonFiniteError(_nonfinite_message(num_bad, len(used_tokens)))
        self.skipped += num_bad
        centred = used_tokens[finite] if pivot is None else used_tokens[finite] - pivot
        if not self._norm_fits(torch.linalg.vector_norm(centred, dtype=dtype)):
            raise NonFiniteError(_overflow_message(self.dtype))
        index = torch.arange(len(x), device=x.device) if rows is None else rows
        return index[finite]

    def _pivot(self) -> Tensor | None:
        """Return the pivot that tokens are summed about, or None before the first token."""
        if isinstance(self.state, GramState):
            return self.state.pivot
        return None if self.state is None else self.state.mean

    def _norm_fits(self, norm: Tensor) -> bool:
        """Tell whether the numbers of a fold with tokens of this norm are finite; a read."""
        total = norm.square()
        if self.sums is not None:  # of the step; of an exact stream, of all
            total = total + self.sums.square
        if self.dtype == torch.float64 and isinstance(self.state, SketchState):
            total = total + self.state.total  # which the fold adds up in float64, too
        return _square_fits(total, self.dtype)

    def _start_state(self, x: Tensor, rows: Tensor | None) -> None:
        limit = WARM_UP_TOKENS * self.width
        stride = -(-(len(x) if rows is None else len(rows)) // limit)
        sample = x[::stride] if rows is None else x.index_select(0, rows[::stride])
        sample = sample.to(self.dtype).contiguous()
        basis_key = self.width, self.features, self.dtype, self.device, self.options.seed
        self._shared_start_basis = basis = start_basis(*basis_key)
        mean = sample.mean(0, dtype=torch.float64).to(self.dtype)
        empty = empty_sketch(basis.clone(), mean)
        sums = zero_sums(self.width, self.features, self.dtype, self.device)
        arguments = empty.basis, empty.mean, sums.products, sums.shift, sums.square
        self._sketch_into(sample, None, arguments)
        sums.count = len(sample)
        start = first_basis(empty, sums)
        if self.options.method == "gram":
            gram_sums = zero_sums(self.features, self.features, self.dtype, self.device)
            # A copy: a fold may overwrite this mean with the next one.
            self.state, self.sums = GramState(gram_sums, start.mean.clone(), start), gram_sums
        else:
            self.state, self.sums = start, sums

    def _sketch_into(
        self,
        x: Tensor,
        rows: Tensor | None,
        arguments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    ) -> None:
        high = self.options.precision == "high"
        sketch_unchecked(x, arguments, rows, self.options.backend, high)

    def _accumulate(self, x: Tensor, rows: Tensor | None) -> None:
        if not isinstance(self.state, GramState):
            self._sketch_into(x, rows, self._sketch_arguments())
            return
        sums = self.state.sums
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

    def close_step(
        self, state: SketchState | GramState, lost: float, previous: Tensor | None
    ) -> None:
        """Take over a folded state and start the next step.

        Args:
            state: the new one.
            lost: see :func:`.fold.lost_shares`; kept of whole steps, and of the first.
            previous: the K leading rows before, (K, D), to be compared.
        """
        if self.pending >= self.width or math.isnan(self.lost):  # few tokens would gain too little
            self.lost = lost
        self.state, self.pending, self._shared_start_basis = state, 0, None
        self.folds += 1
        self.previous, self.pending_cosines = previous, None

    def drop_pending(self) -> str:
        """Forget the bad tokens of the current step, and return what was wrong with them; reads.

        A sketch forgets all tokens of the step, an exact stream those that are not finite, or all
        it has seen where its sums overflow, and a stream that was never folded everything.
        """
        assert self.sums is not None
        bad, pending = self.sums.bad, self.pending
        count = 0 if bad is None else int(bad)
        if bad is not None and count:
            message = _nonfinite_message(count, pending)
            message += f", or numbers whose squares overflow {self.dtype}"
            self.sums.count -= count
            self.pending -= count
            bad.zero_()
        else:
            message = f"some of {pending} tokens hold NaN or infinity"
            if bool(self.sums.shift.isfinite().all()):
                message = _overflow_message(self.dtype)
            clear_sums([self.sums])
            self.pending = 0
        if not self.folds:  # the first basis was computed from these tokens, too
            self.state, self.sums, self.pending, self._sketcher = None, None, 0, None
        return message

    def clone(self) -> InputStream:
        """Return an independent copy."""
        return deepcopy(self)

    @without_autocast
    def merge(self, other: InputStream) -> None:
        """Take the tokens of another stream of the same shape and method into this one.

        Raises:
            EvaValueError: another method, or numbers beyond this one's dtype.
        """
        fold_streams([self, other], final=True)
        skipped = self.skipped + other.skipped
        if other.state is None:
            self.skipped = skipped
            return
        total = sum(s.sketch.total for s in (self, other) if s.sketch is not None)
        if not _square_fits(torch.tensor(total, dtype=torch.float64, device="cpu"), self.dtype):
            raise EvaValueError(_overflow_message(self.dtype))
        if self.state is None:
            self.__dict__.update(other.clone().__dict__)
        elif isinstance(self.state, GramState) and isinstance(other.state, GramState):
            state, captured = fold_gram(merge_gram(self.state, other.state))
            self.sums = state.sums
            values = state.sketch.values
            lost = lost_shares(np.square(values)[None], captured[None], [self.components])
            self.close_step(state, lost[0], self.previous)
        elif isinstance(self.state, SketchState) and isinstance(other.state, SketchState):
            self.state = merge_sketch(self.state, other.state)
            self.pending_cosines = None  # those of the basis before
        else:
            raise EvaValueError(
                "a sketch and an exact (gram) stream cannot be merged; give both the same method"
            )
        self.skipped = skipped

    def spectrum(self) -> Spectrum:
        """Return the answer so far; the pending step is folded first.

        Raises:
            EvaValueError: no token was seen.
        """
        return spectra([self])[0]


def _used_norm(x: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the norm of the tokens to be used, or of all if that is much faster."""
    if x.stride(1) != 1:  # sums of single rows would jump through memory
        return torch.linalg.vector_norm(x, dtype=dtype)
    norms = token_norms(x, dtype)
    return (norms if rows is None else norms.index_select(0, rows)).double().square().sum().sqrt()


def _square_fits(total: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a sum of squares can be folded in ``dtype``; a read."""
    # a fold multiplies sums of squares with each other, in float64
    largest_product = total.square() if dtype == torch.float64 else total.to(dtype)
    return bool(torch.isfinite(largest_product))


def _nonfinite_message(count: int, tokens: int) -> str:
    return f"{count} of {tokens} tokens {'holds' if count == 1 else 'hold'} NaN or infinity"


def _overflow_message(dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return f"tokens are finite, but products of their squares overflow {dtype}; scale the data"
    return (
        f"tokens are finite, but their squares overflow {dtype}; scale the data, or give it as "
        "float64"
    )
