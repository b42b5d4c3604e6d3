"""The keyword options of ``initialize`` and ``calibrate``, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal

from eva_kernels.ops import BACKENDS, PRECISIONS
from eva_kernels.streaming.plan import METHODS

from .errors import EvaTypeError, EvaValueError

__all__ = ["AUTO", "CalibrateOptions", "check_option_names"]

AUTO: Literal["auto"] = "auto"

_CHOICES = {
    "on_not_converged": ("warn", "raise", "ignore"),
    "on_nonfinite": ("raise", "skip"),
    "method": METHODS,
    "criterion": ("cosine", "subspace"),
    "backend": BACKENDS,
    "precision": PRECISIONS,
    "budget": ("rank", "params"),
    "early_exit": ("auto", True, False),
    "freeze_converged": (True, False),
    "trim_padding": (True, False),
    "progress": (True, False),
}
# The type and the least value of each number.
_NUMBERS: dict[str, tuple[Any, float]] = {
    "max_steps": (Integral, 1),
    "max_tokens": (Integral, 1),
    "tokens_per_step": (Integral, 1),
    "max_seconds": (Real, 0),
    "oversample": (Real, 1),
    "min_rank": (Integral, 0),
    "memory_budget": (Real, 1),
    "seed": (Integral, -math.inf),
    "checkpoint_every": (Integral, 1),
}


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of a calibration pass.

    Attributes:
        forward_fn: ``f(model, batch)`` that runs the model; by default the batch is unpacked.
        prepare_model_inputs_fn: ``f(batch, peft_config)``, as in PEFT; ``"auto"`` selects tokens by
            the attention and label masks, ``None`` uses every token.
        prepare_layer_inputs_fn: ``f(layer_input, model_input, layer_name)`` returning (tokens, D),
            or a mapping from layer names to such functions; layers not in it use the default.
        adapter_name: the adapter of a PeftModel to initialise.
        max_steps: maximum number of forward passes. (``EvaResult.steps`` counts folds, each of one
            or several passes.)
        max_tokens: maximum number of tokens (the batch that reaches it is still used).
        tokens_per_step: accumulate at most this many of a batch's tokens in each layer: a uniform
            random sample, drawn for every batch and the same in all layers. The model still runs on
            the whole batch.
        max_seconds: maximum number of seconds (checked between forward passes).
        on_not_converged: ``"warn"``, ``"raise"`` or ``"ignore"`` when a limit is reached first.
        method: ``"sketch"``, ``"gram"`` (exact) or ``"auto"``.
        oversample: sketch width divided by components, at least 1.
        criterion: ``"cosine"`` (the paper's) or ``"subspace"``.
        freeze_converged: stop accumulating layers that have converged.
        memory_budget: bytes that the streaming state may take, or ``"auto"``.
        budget: ``"rank"`` (the sum of ranks stays) or ``"params"`` (the number of parameters).
        min_rank: every layer keeps at least this rank, as far as its inputs have that many
            directions; a layer whose inputs never vary still gets no adapter.
        backend: for accumulating tokens: ``"triton"``, ``"torch"``, or ``"auto"``, Triton on a GPU
            if supported. Folds and comparisons use native code wherever it is built.
        precision: ``"high"`` multiplies 16 bits of each factor on a GPU, ``"fast"`` 8.
        early_exit: stop the forward pass after the last target layer.
        trim_padding: cut columns that are padding in every sample, and run short samples separately
            from long ones if that saves time. Only right padding is cut, which is exact if no token
            attends to masked ones; transformers models known to do that, and models with layers
            that are not from transformers, are not trimmed.
        seed: of the initial basis.
        checkpoint: safetensors file with the state of the pass. It is written every
            ``checkpoint_every`` forward passes, at the end, and when an exception or Ctrl-C stops
            the pass between two of them; its folder is created. If it exists, the pass resumes from
            it, with the same result as an uninterrupted run: the loader starts again, and the
            batches that were seen are skipped without running the model. So the loader must yield
            the same batches in the same order; a warning says if the last one that is skipped is
            another, unless forward passes draw random numbers. One that draws from the global
            random states of torch, NumPy or Python, such as a shuffling ``DataLoader``, does, since
            the file saves them (also for what a ``forward_fn`` draws, and on the model's device);
            one with its own random generator needs the same seed, and a one-shot iterator must
            yield the same stream from its beginning. ``max_steps``, ``max_tokens`` and
            ``max_seconds`` count all runs together. With several processes the first writes and
            reads the file for all; the number of processes must stay the same. The file of another
            model, config or data type is refused.
        checkpoint_every: forward passes between two writes.
        group: ``torch.distributed`` process group whose processes share one pass, each with its own
            batches: all get the same result, from the tokens of all. ``"auto"`` is the default
            group if ``torch.distributed`` is initialised: then all must make the call. With
            ``None`` each process runs by itself.
            If the model is sharded over them (FSDP, ZeRO-3), the pass ends when the first of them
            has no batch left.
        on_nonfinite: ``"raise"``, or ``"skip"`` to leave such tokens out and count them.
        progress: show a tqdm bar (rank 0 only).
        callback: called after every step with a dict (rank 0 only): ``step``, ``forwards``,
            ``tokens`` and ``seconds`` so far; ``converged`` of ``layers``; ``similarity``, the
            smallest |cos| of each layer, ``None`` before its second step; ``names`` of the layers
            in that order (the same list at every step); ``slowest``, the name of the layer with
            the least similarity, ``None`` before there is one.
    """

    forward_fn: Callable[..., Any] | None = None
    prepare_model_inputs_fn: Callable[..., Any] | Literal["auto"] | None = AUTO
    prepare_layer_inputs_fn: (
        Callable[..., Any] | Mapping[str, Callable[..., Any]] | Literal["auto"] | None
    ) = AUTO
    adapter_name: str = "default"
    max_steps: int = 1000
    max_tokens: int | None = None
    tokens_per_step: int | None = None
    max_seconds: float | None = None
    on_not_converged: str = "warn"
    method: str = "auto"
    oversample: float = 2.0
    criterion: str = "cosine"
    freeze_converged: bool = False
    memory_budget: int | Literal["auto"] = AUTO
    budget: str = "rank"
    min_rank: int = 0
    backend: str = "auto"
    precision: str = "high"
    early_exit: bool | Literal["auto"] = AUTO
    trim_padding: bool = True
    seed: int = 0
    checkpoint: str | PathLike[str] | None = None
    checkpoint_every: int = 10
    group: Any = AUTO
    on_nonfinite: str = "raise"
    progress: bool = True
    callback: Callable[[dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise EvaValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {allowed}"
                )
        self._check_numbers()
        if self.checkpoint is not None and not isinstance(self.checkpoint, (str, PathLike)):
            raise EvaTypeError(f"checkpoint={self.checkpoint!r} must be a path or None")
        self._check_functions()

    def _check_numbers(self) -> None:
        for name, (number_type, minimum) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "max_seconds", "tokens_per_step"):
                continue
            if value == AUTO and name == "memory_budget":
                continue
            if not isinstance(value, number_type) or isinstance(value, bool):
                wanted = "a whole number" if number_type is Integral else "a number"
                raise EvaTypeError(f"{name}={value!r} must be {wanted}")
            if not value >= minimum:
                raise EvaValueError(f"{name}={value} must be at least {minimum}")
            if name in ("oversample", "memory_budget") and value == math.inf:
                raise EvaValueError(f"{name}={value} must be finite")
            if number_type is Integral:  # such as NumPy's, which JSON and generators reject
                object.__setattr__(self, name, int(value))
        if not -(2**63) <= self.seed < 2**63:
            raise EvaValueError(f"seed={self.seed} must fit a signed 64-bit integer")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise EvaValueError(f"max_seconds={self.max_seconds} must be positive")

    def _check_functions(self) -> None:
        for name in ("forward_fn", "callback", "prepare_model_inputs_fn"):
            value = getattr(self, name)
            is_default = value is None or (name.startswith("prepare") and value == AUTO)
            if not (is_default or callable(value)):
                raise EvaTypeError(f"{name}={value!r} must be callable")
        given = self.prepare_layer_inputs_fn
        functions = given.values() if isinstance(given, Mapping) else [given]
        if not all(value is None or callable(value) or value == AUTO for value in functions):
            raise EvaTypeError(
                f"prepare_layer_inputs_fn={given!r} must be callable, or a mapping from layer "
                "names to functions"
            )

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> CalibrateOptions:
        """Build the options; the error for an unknown one lists those that exist."""
        check_option_names(kwargs, [f.name for f in fields(cls)])
        return cls(**kwargs)


def check_option_names(names: Iterable[str], known_names: Sequence[str]) -> None:
    """Refuse unknown names; the message lists those that exist.

    Raises:
        EvaTypeError: there is one.
    """
    for name in names:
        if name not in known_names:
            raise EvaTypeError(f"unknown option {name!r}; the options are {', '.join(known_names)}")
