"""Check that a state dict of EVA fits the layers of an adapter, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eva_kernels.streaming import _host

from .._peft_compat import LoraLayer, ParamWrapper, adapter_configs, tied_modules
from ..errors import EvaTypeError, EvaValueError, counted, listed, warn
from ..model.attention import OUT_PROJ
from ..model.layers import CONVOLUTIONS, widths
from ..model.routing import expert_names
from ..model.targets import base_name, own_layers, peft_key, resolve_name

__all__ = ["Fitted", "fit", "parts_of"]


@dataclass(frozen=True)
class Fitted:
    """The rows of a state dict, checked against the layers of an adapter.

    Attributes:
        layers: name in the base model, of a layer or a parameter -> (path, layer).
        parts: name in a state dict -> name of the layer; for experts several names per layer.
        rows: name in a state dict -> (rank, in_features).
        left: names in a state dict that may be missing.
    """

    layers: dict[str, tuple[str, LoraLayer]]
    parts: dict[str, str]
    rows: dict[str, Tensor]
    left: set[str]

    def resizes(self, adapter_name: str) -> bool:
        """Tell whether any adapter would get another rank."""
        return any(
            len(self.rows[part]) != self.layers[name][1].r[adapter_name]
            for part, name in self.parts.items()
            if part in self.rows
        )

    def follows(self, name: str) -> bool:
        """Tell whether PEFT takes a layer's rank from another, as an attention's projection."""
        return _owner(name, self.layers) not in (None, name)


def fit(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    strict: bool,
    default_layers: Iterable[str],
) -> Fitted:
    """Match the rows of a state dict to the layers of an adapter.

    Args:
        model, state_dict, adapter_name, strict, default_layers: see
            :func:`eva_peft.lora.adapters.write_state_dict`; the model without wrappers.

    Raises:
        EvaValueError: unknown, missing or duplicate layers; a width that does not fit; rows that
            are not finite. EvaTypeError: not a mapping of tensors.
    """
    layers = _layers_of(model, adapter_name)
    parts = {part: name for name, (_, layer) in layers.items() for part in parts_of(name, layer)}
    rows = _check_keys(state_dict, parts)
    for name in _without_adapter(model, parts, rows):
        del rows[name]
    left = {part for part, name in parts.items() if _features(layers[name][1]) is None}
    left.update(default_layers)
    _check_names(parts, rows, strict, left)
    _check_shapes(layers, parts, rows, adapter_name)
    _check_finite({name: value for name, value in rows.items() if name in parts})
    _check_variance(parts, rows)
    return Fitted(layers, parts, rows, left)


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, LoraLayer]]:
    """Return (path, layer) by the name in the base model, of a layer or of a parameter.

    Layers whose adapter is tied to that of the embeddings are left out.
    """
    tied = tied_modules(model, adapter_configs(model)[adapter_name])
    layers = own_layers(model, adapter_name)
    return {name: found for name, found in layers.items() if peft_key(*found) not in tied}


def parts_of(name: str, layer: LoraLayer) -> list[str]:
    """Return the names that a state dict has for a layer: one, or one for each expert."""
    if not isinstance(layer, ParamWrapper):
        return [name]
    return expert_names(name, layer.get_param().dim() == 3, layer.num_experts)


def _features(layer: LoraLayer) -> int | None:
    if isinstance(layer, ParamWrapper):
        return int(layer.in_features)
    size = widths(layer.get_base_layer())
    return None if size is None else size[0]


def _without_adapter(
    model: nn.Module, parts: Mapping[str, str], rows: Mapping[str, Any]
) -> list[str]:
    """Return the layers that get rank 0 and already have no adapter."""
    asked = [
        name
        for name, value in rows.items()
        if name not in parts and isinstance(value, Tensor) and value.dim() == 2 and not len(value)
    ]
    known = {base_name(path) for path, _ in model.named_modules()} if asked else set()
    return [name for name in asked if resolve_name(name, known) in known]


def _check_keys(state_dict: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the rows of a state dict by the layer names of this model."""
    if not isinstance(state_dict, Mapping):
        raise EvaTypeError(
            "the EVA state dict must map layer names to tensors, as get_eva_state_dict and "
            f"EvaResult.state_dict return it; got {type(state_dict)}"
        )
    keys: dict[str, str] = {}
    for key in state_dict:
        if not isinstance(key, str):
            raise EvaTypeError(f"the keys of an EVA state dict are names of layers, got {key!r}")
        name = resolve_name(key, parts)
        if name in keys:
            raise EvaValueError(
                f"layer {name}: the EVA state dict has it twice, as {keys[name]!r} and {key!r}; "
                "take one of them out"
            )
        keys[name] = key
    return {name: state_dict[key] for name, key in keys.items()}


def _check_names(
    layers: Mapping[str, Any], rows: Mapping[str, Any], strict: bool, default: set[str]
) -> None:
    unknown = [name for name in rows if name not in layers]
    missing = [name for name in layers if name not in rows and name not in default]
    if not unknown and not missing:
        return
    absent = counted(len(missing), "layer of the adapter is", "layers of the adapter are")
    told = {counted(len(unknown), "unknown layer"): unknown, f"{absent} missing": missing}
    parts = [f"{what} ({listed(names)})" for what, names in told.items() if names]
    message = f"the EVA state dict does not fit the model: {', and '.join(parts)}"
    if strict:
        raise EvaValueError(message + "; pass strict=False to use what fits")
    warn(f"{message}; missing layers keep the default initialisation")


def _check_shapes(
    layers: Mapping[str, tuple[str, LoraLayer]],
    parts: Mapping[str, str],
    rows: Mapping[str, Tensor],
    adapter_name: str,
) -> None:
    # an attention that is not in the state dict keeps its rank
    ranks = {
        name: layer.r[adapter_name]
        for name, (_, layer) in layers.items()
        if _is_attention(layer) and name not in rows
    }
    for name, value in rows.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or value.is_meta:
            raise EvaTypeError(f"layer {name}: expected a (rank, in_features) tensor, not on meta")
        if name not in parts:
            continue
        layer = layers[parts[name]][1]
        features = _features(layer)
        if features is not None and value.shape[1] != features:
            raise EvaValueError(
                f"layer {name}: the state dict has {value.shape[1]} features, the layer {features}"
            )
        base = layer.get_base_layer()
        groups = base.groups if isinstance(base, CONVOLUTIONS) else 1
        if len(value) % groups:
            raise EvaValueError(
                f"layer {name}: rank {len(value)} is no multiple of the {groups} groups of the "
                "convolution"
            )
        owner = _owner(parts[name], layers)
        if owner is None:
            continue
        common = ranks.setdefault(owner, len(value))
        if len(value) != common or not common:
            what = "experts" if isinstance(layer, ParamWrapper) else "projections"
            raise EvaValueError(
                f"layer {name}: rank {len(value)}, but the {what} of {owner} have one rank in "
                f"common, at least 1 (another one has {common})"
            )


def _owner(name: str, layers: Mapping[str, tuple[str, LoraLayer]]) -> str | None:
    """Return the layer (itself, or its attention) whose parts share one rank, if there is one."""
    layer = layers[name][1]
    if isinstance(layer, ParamWrapper) or _is_attention(layer):
        return name
    above = name.removesuffix(f".{OUT_PROJ}")
    return above if above in layers and _is_attention(layers[above][1]) else None


def _is_attention(layer: LoraLayer) -> bool:
    return isinstance(layer.get_base_layer(), nn.MultiheadAttention)


def _check_finite(rows: Mapping[str, Tensor]) -> None:
    flags = _host.read([value.isfinite().all() for value in rows.values()])
    bad = [name for name, finite in zip(rows, flags, strict=True) if not finite]
    if bad:
        raise EvaValueError(
            f"the EVA state dict holds NaN or infinity in layers {listed(bad)}; compute it anew"
        )


def _check_variance(parts: Mapping[str, str], rows: Mapping[str, Tensor]) -> None:
    ranks = [len(rows[part]) if part in rows else None for part in parts]
    if ranks and not any(rank is None or rank for rank in ranks):
        raise EvaValueError(
            f"none of the {counted(len(ranks), 'layer')} is given a rank: each layer read the same "
            "input all the time, so there is no variance to explain. Give more, and different, "
            "samples"
        )
