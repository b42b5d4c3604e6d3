"""What a checkpoint must share with the pass that resumes it, and the processes of a pass."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._peft_compat import base_model_of
from ..errors import EvaValueError, listed
from ..model.names import name_in_base_model
from ..options import AUTO

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = [
    "check_requests",
    "check_weights",
    "differences",
    "fingerprint_of",
    "join_differences",
    "request_of",
    "sample_weights",
]

# Options that change the numbers. The others may change from run to run: limits, tau, messages and
# callbacks, and ways to compute the same.
_RESULT_OPTIONS = (
    "method",
    "oversample",
    "criterion",
    "freeze_converged",
    "budget",
    "min_rank",
    "precision",
    "seed",
    "tokens_per_step",
)
_FUNCTION_OPTIONS = ("forward_fn", "prepare_model_inputs_fn", "prepare_layer_inputs_fn")
# Where a model was loaded from and with which version; and what the pass itself switches off.
_IGNORED_CONFIG_FIELDS = frozenset(["_name_or_path", "transformers_version", "use_cache"])
# Names of weights that an adapter adds, and what it inserts into the names of the others.
_ADAPTER_WEIGHT = re.compile(r"(?:^|\.)(?:lora_\w+|modules_to_save)\.")
_INSERTED_BY_PEFT = re.compile(r"\.(?:base_layer|original_module)(?=\.)")
# Parts that are digests: a message says that they differ, not how.
_WEIGHT_SHAPES, _WEIGHT_VALUES = "names, shapes and dtypes of the weights", "values of the weights"
_DIGEST_KEYS = (_WEIGHT_SHAPES, _WEIGHT_VALUES)

MAX_NAMED_DIFFERENCES = 6  # differences in a message
WEIGHT_TOLERANCE = 0.05  # of the largest element; devices and dtypes may round differently
SAMPLED_ELEMENTS = 16  # elements of each target's weight that are compared


def request_of(run: CalibrationPass) -> dict[str, Any]:
    """Return the request for a pass: layers, and options that affect its numbers; JSON-able."""
    eva = run.eva
    parts = {
        "r": run.config.r,
        "rho": eva.rho,
        "use_label_mask": eva.use_label_mask,
        "label_mask_value": eva.label_mask_value,
        **{name: getattr(run.options, name) for name in _RESULT_OPTIONS},
        **{name: _option_kind(getattr(run.options, name)) for name in _FUNCTION_OPTIONS},
        "layers": {t.name: {"features": t.in_features, "rank": t.rank} for t in run.targets},
    }
    return _json_round_trip(parts)


def fingerprint_of(run: CalibrationPass) -> dict[str, Any]:
    """Return what determines the numbers of a pass, JSON-able; without wrappers and adapters.

    Weights count by name, shape and dtype, and those of the target layers by a few elements each.
    """
    model = base_model_of(run.model)
    weights = list(_base_weights(run.model))
    parts = {
        "model": type(model).__name__,
        "processes": 1 if run.processes is None else run.processes.size,
        "data type": ", ".join(sorted({str(w.dtype).removeprefix("torch.") for _, w in weights})),
        **request_of(run),
        "model config": _plain_config(run.architecture.config),
        "streams": {
            f"{d} features": {"components": p.components, "width": p.width, "method": p.method}
            for d, p in sorted(run.plan.items())
        },
        _WEIGHT_SHAPES: _digest([[name, list(w.shape), str(w.dtype)] for name, w in weights]),
        # a shard of a weight says little, and gathering it would involve all processes
        _WEIGHT_VALUES: {
            t.name: "hidden" if run.sharded else _weight_digest(t.module) for t in run.targets
        },
    }
    return _json_round_trip(parts)


def differences(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    places: tuple[str, str] = ("in the file", "now"),
) -> list[str]:
    """Describe where two fingerprints differ, the most informative parts first.

    Args:
        saved, current: from :func:`fingerprint_of`, or from :func:`request_of`.
        places: the words for where each of them is.
    """
    old_values, new_values = dict(_flatten(saved)), dict(_flatten(current))
    changes = []
    for key in [*new_values, *(k for k in old_values if k not in new_values)]:
        if key in old_values and key in new_values and old_values[key] == new_values[key]:
            continue
        name = " ".join(key)
        if key[0] in _DIGEST_KEYS:
            changes.append(f"{name} differ")
        else:
            old_text, new_text = (_value_text(values, key) for values in (old_values, new_values))
            changes.append(f"{name}: {old_text} {places[0]}, {new_text} {places[1]}")
    return changes


def join_differences(changes: Sequence[str]) -> str:
    """Join differences for a message: all, or the first ones and the number of others."""
    more = (
        f"; and {len(changes) - MAX_NAMED_DIFFERENCES} more"
        if len(changes) > MAX_NAMED_DIFFERENCES
        else ""
    )
    return "; ".join(changes[:MAX_NAMED_DIFFERENCES]) + more


def _value_text(values: Mapping[tuple[str, ...], Any], key: tuple[str, ...]) -> str:
    if key not in values:
        return "absent"
    return values[key] if isinstance(values[key], str) else json.dumps(values[key])


def _flatten(
    values: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if not _ADAPTER_WEIGHT.search(name):
            yield _INSERTED_BY_PEFT.sub("", name_in_base_model(name)), weight


def _plain_config(config: Any) -> Any:
    if callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    return _drop_keys(config, _IGNORED_CONFIG_FIELDS) if isinstance(config, Mapping) else None


def _drop_keys(value: Any, names: frozenset[str]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: _drop_keys(v, names) for k, v in value.items() if k not in names}


def _option_kind(option: Any) -> str:
    """Return which kind of function is used; its code has no identity that lasts between runs."""
    if option is None:
        return "default"
    if option == AUTO:
        return AUTO
    if isinstance(option, Mapping):
        return f"functions for {', '.join(sorted(option))}"
    return "own function"


def _weight_digest(module: nn.Module) -> str:
    """Return a digest of evenly spaced elements of a weight, ``"hidden"`` if they are unreadable.

    Weights on the meta device, or of size 0, are filled in by a hook only while the layer runs,
    and some quantised ones cannot be indexed.
    """
    elements = _sample_elements(module)
    return "hidden" if elements is None else _digest(elements)


def _sample_elements(module: nn.Module) -> list[float] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.numel():
        return None
    index = torch.linspace(
        0, weight.numel() - 1, SAMPLED_ELEMENTS, dtype=torch.float64, device="cpu"
    ).long()
    try:
        # By coordinates, since flattening would copy a weight that is stored transposed.
        chosen = weight.detach()[torch.unravel_index(index.to(weight.device), weight.shape)]
        elements: list[float] = chosen.double().tolist()
    except (NotImplementedError, RuntimeError, TypeError):
        return None
    return elements


def sample_weights(run: CalibrationPass) -> dict[str, list[float]]:
    """Return a few elements of every readable layer weight; none if the model is sharded.

    Each process then holds different parts.
    """
    if run.sharded:
        return {}
    elements_of = {t.name: _sample_elements(t.module) for t in run.targets if t.weight is None}
    return {name: elements for name, elements in elements_of.items() if elements is not None}


def _layers_with_other_weights(
    weights: Mapping[str, list[float]], other_weights: Mapping[str, list[float]]
) -> list[str]:
    """Return the layers whose weights differ between two processes by more than rounding."""
    names = []
    for name in weights.keys() & other_weights.keys():
        pairs = list(zip(weights[name], other_weights[name], strict=False))
        largest = max(abs(value) for pair in pairs for value in pair)
        if any(abs(a - b) > WEIGHT_TOLERANCE * largest for a, b in pairs):
            names.append(name)
    return sorted(names)


def check_requests(requests: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to share a pass between processes that were asked for different ones.

    Args:
        requests: what :func:`request_of` returns in each process, by rank.

    Raises:
        EvaValueError: they differ.
    """
    counts = [len(request["layers"]) for request in requests]
    if len(set(counts)) > 1:
        raise EvaValueError(
            f"the processes have different models, with {counts} target layers: load the same "
            "model in all"
        )
    for rank, request in enumerate(requests):
        changes = differences(requests[0], request, ("in process 0", f"in process {rank}"))
        if changes:
            raise EvaValueError(
                f"the processes were asked for different passes: {join_differences(changes)}. "
                "Give all of them the same config and options"
            )


def check_weights(weights: Sequence[Mapping[str, list[float]]]) -> None:
    """Refuse to share a pass between processes whose models have different weights.

    Args:
        weights: what :func:`sample_weights` returns in each process, by rank.

    Raises:
        EvaValueError: most layers differ.
    """
    for rank, other_weights in enumerate(weights):
        names = _layers_with_other_weights(weights[0], other_weights)
        if len(names) > len(weights[0]) / 2:  # one new layer, say a pooler, is harmless
            raise EvaValueError(
                f"processes 0 and {rank} have different weights in {listed(names)}: load the same "
                "weights in all (some loaders fill those of the first process only)"
            )


def _digest(value: Sequence[Any]) -> str:
    return hashlib.sha256(_as_json(value).encode()).hexdigest()[:16]


def _json_round_trip(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Normalise as writing to and reading from a file does: tuples to lists, keys to text."""
    normal: dict[str, Any] = json.loads(_as_json(parts))
    return normal


def _as_json(value: Any) -> str:
    def to_jsonable(other: Any) -> Any:
        if isinstance(other, (set, frozenset)):
            return sorted(other, key=str)
        return str(other) if isinstance(other, torch.dtype) else type(other).__name__

    return json.dumps(value, default=to_jsonable)
