"""User functions that select which rows of a layer's input count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import EvaTypeError, EvaValueError
from ..model.names import resolve_name
from ..model.targets import Target
from ..options import AUTO, CalibrateOptions

__all__ = ["Selector", "selectors_of"]

# A layer's own selection of its input: f(positional arguments, model input, layer name) -> rows
Selector = Callable[[Any, Any, str], Tensor]


def selectors_of(targets: list[Target], options: CalibrateOptions) -> list[Selector | None]:
    """Return each layer's own selection function; ``None`` where the token mask selects."""
    given = options.prepare_layer_inputs_fn
    default: Callable[..., Any] | None = None
    if given is None:
        default = _all_rows
    elif options.prepare_model_inputs_fn is None:
        default = None  # there is no mask, so every row counts and inputs can be shared
    elif options.prepare_model_inputs_fn != AUTO:
        default = _rows_by_index  # PEFT's contract: the model input is an index of (sample, token)
    if callable(given):
        default = given
    if not isinstance(given, Mapping):
        return [_with_check(default)] * len(targets)
    known = {t.name for t in targets}
    by_name = {resolve_name(name, known): None if fn == AUTO else fn for name, fn in given.items()}
    unknown = set(by_name) - known
    if unknown:
        raise EvaValueError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found "
            f"in the model: {sorted(unknown)}"
        )
    return [_with_check(by_name.get(t.name, default)) for t in targets]


def _with_check(fn: Callable[..., Any] | None) -> Selector | None:
    if fn is None:
        return None

    def select(layer_input: Any, model_input: Any, name: str) -> Tensor:
        rows = fn(layer_input, model_input, name)
        if not isinstance(rows, Tensor):
            raise EvaValueError(
                f"prepare_layer_inputs_fn must return a tensor, got {type(rows)} for layer {name}"
            )
        return rows

    return select


def _all_rows(layer_input: Any, model_input: Any, name: str) -> Tensor:
    return layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input


def _rows_by_index(layer_input: Any, model_input: Any, name: str) -> Tensor:
    x = _all_rows(layer_input, model_input, name)
    if not isinstance(model_input, Tensor) or model_input.dim() != 2:
        given = getattr(model_input, "shape", type(model_input))
        raise EvaTypeError(
            "prepare_model_inputs_fn must return the indices of tokens, a tensor of shape "
            f"(tokens, 2), got {given}; or pass a prepare_layer_inputs_fn that takes it"
        )
    return x[model_input.T.unbind()]
