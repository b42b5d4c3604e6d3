"""``IncrementalPCA``: the engine by itself, with scikit-learn's conventions."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import EvaTypeError, EvaValueError, NonFiniteError, NotFittedError, warnings_caught
from .streaming._autocast import without_autocast, without_subclass
from .streaming._host import state_device
from .streaming.plan import METHODS, plan_streams
from .streaming.spectrum import Spectrum
from .streaming.step import fold_streams
from .streaming.stream import InputStream, Options

__all__ = ["IncrementalPCA"]

P = ParamSpec("P")
T = TypeVar("T")
SEED_RANGE = -(2**63), 2**63 - 1


def _in_engine_mode(method: Callable[P, T]) -> Callable[P, T]:
    """Run a method in the modes that the engine needs, whatever context the user has opened."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        # tensors made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


class IncrementalPCA:
    """Principal components of a stream of batches, in constant memory.

    The conventions are those of ``sklearn.decomposition.IncrementalPCA``, and so of PEFT's class of
    the same name: it can be cloned, used in a parameter search and put into pipelines like any
    estimator. Data are dense tensors (or arrays), and results are tensors on the data's device, or
    on the CPU if that device does not support float64 (such as Apple's GPUs). Not supported:
    whitening, ``get_precision`` and ``set_output``. Squares must neither overflow (an error) nor
    underflow: scale up data below 1e-18 (float64: 1e-75).

    Args:
        n_components: K; ``None`` means the smaller dimension of the first batch. It is fixed from
            the first batch on; ``fit`` starts over.
        method: ``"sketch"`` (a basis of ``oversample * K`` rows), ``"gram"`` (exact, D x D) or
            ``"auto"`` (exact where that costs no more arithmetic, for at most ``2 * oversample *
            K`` features).
        oversample: sketch width over components.
        seed: of the random first basis.
        batch_size: rows per batch in :meth:`fit`, at least 1; 5 times the features if ``None``.
        backend: accumulates rows: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on a GPU if
            possible. Folds use native code wherever it is built.
        precision: on a GPU, ``"high"`` multiplies 16 bits of each factor, ``"fast"`` 8.

    Attributes (after the first ``partial_fit``; all tensors on the device of the results):
        components_: (K, D), orthonormal rows; the entry of largest magnitude of each is positive.
            Reading this or any of the following closes the current step of the stream.
        singular_values_: (K,), explained_variance_: (K,), explained_variance_ratio_: (K,).
        mean_: (D,), var_: (D,) per-feature variance (denominator n, as scikit-learn).
        n_samples_seen_: int. noise_variance_: float, mean variance of the D - K directions that are
            left out (scikit-learn counts fewer of them if there are fewer rows than features).
        n_components_: K. n_features_in_: D. batch_size_: rows per batch of the last :meth:`fit`.

    Raises:
        NotFittedError: (a ValueError and an AttributeError) used before it has seen data;
        EvaValueError: (a ValueError) too many components, another number of features, an argument
            out of range; EvaTypeError: (a TypeError) sparse or complex data, an argument of another
            type; NonFiniteError: a row holds NaN or infinity.

    Reference: arXiv 1706.05736 (sketch); ``sklearn.decomposition.IncrementalPCA``.
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        method: str = "auto",
        oversample: float = 2.0,
        seed: int = 0,
        batch_size: int | None = None,
        backend: str = "auto",
        precision: str = "high",
    ) -> None:
        self.n_components = n_components
        self.method = method
        self.oversample = oversample
        self.seed = seed
        self.batch_size = batch_size
        self.backend = backend
        self.precision = precision
        self._check_arguments()
        self._reset()

    def _check_arguments(self) -> None:
        if self.method not in METHODS:
            raise EvaValueError(f"method={self.method!r} is unknown; choose one of {METHODS}")
        _check_integer("n_components", self.n_components, 1)
        _check_integer("batch_size", self.batch_size, 1)
        _check_integer("seed", self.seed, *SEED_RANGE)
        oversample: Any = self.oversample
        if not isinstance(oversample, Real):
            raise EvaTypeError(f"oversample={oversample!r} must be a number")
        if not 1 <= self.oversample < math.inf:
            raise EvaValueError(f"oversample={self.oversample} must be at least 1, and finite")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor; ``deep`` changes nothing."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> IncrementalPCA:
        """Set arguments of the constructor, to take effect at the next :meth:`fit`."""
        unknown = sorted(set(params) - {*_PARAMETERS})
        if unknown:
            raise EvaValueError(
                f"invalid parameter {unknown[0]!r} for IncrementalPCA; valid parameters are "
                f"{list(_PARAMETERS)}"
            )
        old_params = self.get_params()
        self.__dict__.update(params)
        try:
            self._check_arguments()
        except Exception:
            self.__dict__.update(old_params)
            raise
        return self

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self.get_params().items())
        return f"IncrementalPCA({', '.join(given)})"

    def __copy__(self) -> IncrementalPCA:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        if self._stream is not None:  # it is updated in place
            copied._stream = self._stream.clone()
        return copied

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return names of the coordinates, as scikit-learn gives them."""
        names = [f"incrementalpca{i}" for i in range(self.n_components_)]
        return np.asarray(names, dtype=object)

    def __sklearn_tags__(self) -> Any:
        # called by scikit-learn only, which is an optional dependency
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags(None, TargetTags(required=False), transformer_tags=TransformerTags())

    def __sklearn_is_fitted__(self) -> bool:
        return self._stream is not None

    def _reset(self) -> None:
        self._stream: InputStream | None = None
        self._cached_spectrum: Spectrum | None = None
        self._sum = self._square = torch.empty(0, device="cpu")
        self._pivot = torch.empty(0, device="cpu")

    def fit(
        self, x: Tensor | np.ndarray, y: None = None, *, batch_size: int | None = None
    ) -> IncrementalPCA:
        """Forget everything and learn from x, (N, D), batch by batch."""
        data = _as_tensor(x)
        _check_two_dimensional(data)
        self._check_arguments()
        _check_integer("batch_size", batch_size, 1)
        self._reset()
        rows_per_batch = self.batch_size_ = batch_size or self.batch_size or 5 * data.shape[1]
        min_rows = self.n_components or 1
        begin = 0
        while begin < len(data):
            end = begin + rows_per_batch
            if len(data) - end < min_rows:  # as scikit-learn, append a short rest to the last batch
                end = len(data)
            self.partial_fit(data[begin:end])
            begin = end
        return self

    @_in_engine_mode
    def partial_fit(
        self, x: Tensor | np.ndarray, y: None = None, *, mask: Tensor | None = None
    ) -> IncrementalPCA:
        """Learn from one more batch.

        Args:
            x: (N, D); or (..., D), flattened. Any floating dtype, any strides.
            y: ignored; part of scikit-learn's signature.
            mask: rows to use, bool (N,) or the leading shape of ``x``.
        """
        data = _as_tensor(x)
        data = data.reshape(-1, data.shape[-1])
        rows = None
        if mask is not None:
            flat_mask = torch.as_tensor(mask, device=data.device).reshape(-1)
            if len(flat_mask) != len(data):
                raise EvaValueError(f"mask has {len(flat_mask)} entries for {len(data)} rows")
            rows = flat_mask.nonzero().flatten()
        num_rows = len(data) if rows is None else len(rows)
        stream = self._stream
        if stream is None:
            if num_rows == 0:
                return self
            stream = self._make_stream(data, num_rows)
        else:
            _check_features(data, stream.features)
            if self.n_components not in (None, stream.components):
                raise EvaValueError(
                    f"n_components was {stream.components} for the earlier batches and is "
                    f"{self.n_components} now; call fit to start over"
                )
        _add_to_stream(stream, data, rows)
        used_rows = data if rows is None else data.index_select(0, rows)
        if self._stream is None:  # only now: a rejected first batch leaves no state behind
            self._stream = stream
            # a copy, since the caller may reuse the buffer
            self._pivot = used_rows[0].to(torch.float64, copy=True)
            self._sum = self._square = torch.zeros_like(self._pivot)
        self._add_moments(used_rows)
        fold_streams([self._stream])
        self._cached_spectrum = None
        return self

    def _make_stream(self, data: Tensor, num_rows: int) -> InputStream:
        self._check_arguments()
        features = data.shape[1]
        k = min(num_rows, features) if self.n_components is None else int(self.n_components)
        if k > features:
            raise EvaValueError(
                f"n_components={k} invalid for n_features={features}, need more rows than columns "
                "for IncrementalPCA processing"
            )
        if k > num_rows:
            raise EvaValueError(
                f"n_components={k} must be less or equal to the batch number of samples {num_rows} "
                "for the first partial_fit call."
            )
        dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
        plan = plan_streams([features], [k], method=self.method, oversample=self.oversample)[0]
        # A call with bad rows is rejected immediately, which costs a read on a GPU.
        options = Options(
            plan.method, int(self.seed), self.backend, self.precision, check_every_add=True
        )
        return InputStream(features, k, plan.width, data.device, dtype, options)

    def _add_moments(self, data: Tensor) -> None:
        # Per-feature variance is exact, independent of the sketch; float64 like the pivot, which is
        # the first row, so that a large constant offset causes no cancellation.
        offset = data - self._pivot
        self._sum = self._sum + offset.sum(0)
        self._square = self._square + offset.square().sum(0)

    @without_autocast
    def transform(self, x: Tensor | np.ndarray) -> Tensor:
        """Return the coordinates of x, (N, K), dtype of the components."""
        components, data = self.components_, _as_tensor(x)
        _check_features(data, components.shape[1])
        return (data.to(components) - self.mean_) @ components.mT

    @without_autocast
    def inverse_transform(self, x: Tensor | np.ndarray) -> Tensor:
        """Return the data, (N, D), whose coordinates are x, (N, K)."""
        components, data = self.components_, _as_tensor(x)
        if data.shape[-1] != len(components):
            raise EvaValueError(f"X has {data.shape[-1]} coordinates, not {len(components)}")
        return data.to(components) @ components + self.mean_

    @without_autocast
    def get_covariance(self) -> Tensor:
        """Return the model's covariance, (D, D): components, plus noise in all other directions."""
        components, noise = self.components_, self.noise_variance_
        excess_variance = (self.explained_variance_ - noise).clamp_min(0)
        covariance = (components * excess_variance[:, None]).mT @ components
        covariance.diagonal().add_(noise)
        return covariance

    def fit_transform(self, x: Tensor | np.ndarray, y: None = None) -> Tensor:
        """Fit, then transform."""
        return self.fit(x).transform(x)

    @_in_engine_mode
    def merge(self, other: IncrementalPCA) -> IncrementalPCA:
        """Merge everything that ``other`` has seen into this one (``other`` is unchanged)."""
        if not isinstance(other, IncrementalPCA):
            raise EvaTypeError(
                f"cannot merge {type(other).__name__} into an IncrementalPCA; pass another "
                "IncrementalPCA, or give data to partial_fit"
            )
        if other._stream is None:
            return self
        if self._stream is None:
            if self.n_components not in (None, other._stream.components):
                raise EvaValueError(
                    f"cannot merge {other._stream.components} components into an IncrementalPCA "
                    f"of n_components={self.n_components}"
                )
            self._stream = other._stream.clone()
            self._pivot, self._sum, self._square = other._pivot, other._sum, other._square
        else:
            mine, theirs = self._stream, other._stream
            if (mine.features, mine.width) != (theirs.features, theirs.width):
                raise EvaValueError(
                    f"cannot merge {theirs.features} features and sketch width {theirs.width} into "
                    f"{mine.features} and {mine.width}; give both the same n_components and "
                    "oversample"
                )
            delta, n = other._pivot - self._pivot, other.n_samples_seen_
            mine.merge(theirs.clone())  # first, since it rejects another method
            self._square = (
                self._square + other._square + 2 * delta * other._sum + n * delta.square()
            )
            self._sum = self._sum + other._sum + n * delta
        self._cached_spectrum = None
        return self

    @property
    def _spectrum(self) -> Spectrum:
        if self._stream is None:
            raise NotFittedError(
                "this IncrementalPCA has not seen any data; call fit or partial_fit first"
            )
        return self._cached_spectrum or self._compute_spectrum(self._stream)

    @_in_engine_mode
    def _compute_spectrum(self, stream: InputStream) -> Spectrum:
        self._cached_spectrum = stream.spectrum()
        return self._cached_spectrum

    @property
    def n_samples_seen_(self) -> int:
        """Rows seen."""
        return 0 if self._stream is None else self._stream.tokens

    @property
    def components_(self) -> Tensor:
        """Principal directions, (K, D)."""
        return self._spectrum.components

    @property
    def singular_values_(self) -> Tensor:
        """Singular values of the centred data, (K,)."""
        return self._spectrum.singular_values.to(self.components_, copy=True)

    @property
    def explained_variance_(self) -> Tensor:
        """Variance along each component, (K,), denominator n - 1."""
        variance = self._spectrum.singular_values.square() / max(self.n_samples_seen_ - 1, 1)
        return variance.to(self.components_)

    @property
    def explained_variance_ratio_(self) -> Tensor:
        """Share of the total variance along each component, (K,)."""
        return self._spectrum.ratio.to(self.components_, copy=True)

    @property
    def mean_(self) -> Tensor:
        """Mean of the rows, (D,)."""
        return self._spectrum.mean

    @property
    def var_(self) -> Tensor:
        """Variance of each feature, (D,), denominator n."""
        n = self.n_samples_seen_
        return (self._square / n - (self._sum / n).square()).clamp_min(0).to(self.mean_.dtype)

    @property
    def noise_variance_(self) -> float:
        """Mean variance of the directions left out."""
        spectrum = self._spectrum
        num_left_out = self.components_.shape[1] - self.components_.shape[0]
        if num_left_out == 0:
            return 0.0
        left_out = spectrum.total - float(spectrum.singular_values.square().sum())
        return max(left_out, 0.0) / max(self.n_samples_seen_ - 1, 1) / num_left_out

    @property
    def n_components_(self) -> int:
        """Components, K."""
        return len(self.components_)

    @property
    def n_features_in_(self) -> int:
        """Features, D."""
        return int(self._spectrum.mean.shape[0])


_PARAMETERS = tuple(inspect.signature(IncrementalPCA).parameters)


def _check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    if value is None and name != "seed":
        return
    try:
        integer = operator.index(value)
    except TypeError:
        integer = None
    if integer is None or isinstance(value, bool):
        raise EvaTypeError(f"{name}={value!r} must be a whole number")
    if integer < minimum or (maximum is not None and integer > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise EvaValueError(f"{name}={value} must be {allowed}")


def _add_to_stream(stream: InputStream, data: Tensor, rows: Tensor | None) -> None:
    try:
        stream.add(data, rows)
    except NonFiniteError as error:
        used_rows = data if rows is None else data.index_select(0, rows)
        if used_rows.isfinite().all():  # their squares overflow, and the message says what to do
            raise
        raise NonFiniteError(
            f"{error}; impute or drop those rows, or leave them out by mask= of partial_fit"
        ) from None


def _check_two_dimensional(data: Tensor) -> None:
    if data.dim() != 2:
        raise EvaValueError(
            f"expected a 2D array of rows of features, got shape {tuple(data.shape)}; "
            "reshape(-1, D) makes rows of features, reshape(1, -1) one row"
        )


def _check_features(data: Tensor, features: int) -> None:
    if data.shape[-1] != features:
        raise EvaValueError(
            f"X has {data.shape[-1]} features, but IncrementalPCA is expecting {features} "
            "features as input"
        )


def _as_tensor(x: Tensor | np.ndarray) -> Tensor:
    if not isinstance(x, Tensor):
        if hasattr(x, "toarray"):
            raise EvaTypeError(f"dense data are needed, got {type(x).__name__}; see its toarray()")
        x = np.asarray(x)
        if x.dtype.kind == "O" and all(isinstance(value, Real) for value in x.flat):
            x = x.astype(float)  # from a DataFrame whose columns may have missing values
        if x.dtype.kind not in "biufc":
            raise EvaTypeError(f"numbers are needed, got an array of dtype {x.dtype}")
        x = np.asarray(x, x.dtype.newbyteorder("="), order="C")  # native byte order, no gaps
        if any(stride < 0 for stride in x.strides):  # of a single row, which NumPy leaves reversed
            x = x.copy()
    with warnings_caught():
        # torch warns about read-only arrays, but the data are never written to
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        # keep the data's device: without one torch would move them to its default device
        data = without_subclass(
            torch.as_tensor(x, device=x.device if isinstance(x, Tensor) else "cpu")
        )
    if data.layout != torch.strided:
        raise EvaTypeError(f"dense data are needed, got a tensor of layout {data.layout}")
    if data.dim() < 1 or data.numel() == 0:
        raise EvaValueError(f"expected rows of features, got an array of shape {tuple(data.shape)}")
    data = data.to(state_device(data.device))
    if data.is_floating_point() and data.element_size() == 1:
        data = data.float()  # torch has no float8 arithmetic
    if not data.is_floating_point():
        if data.is_complex():
            raise EvaTypeError("complex data are not supported")
        data = data.double()  # as scikit-learn
    return data
