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
from ..model.layers import CONVOLUTIONS, in_out_features
from ..model.names import adapter_layers, name_in_base_model, peft_key, resolve_name
from ..model.routing import expert_names

__all__ = ["FittedStateDict", "fit_state_dict", "state_dict_names"]


@dataclass(frozen=True)
class FittedStateDict:
    """The rows of a state dict, checked against the layers of an adapter.

    Attributes:
        layers: name in the base model, of a layer or a parameter -> (path, layer).
        layer_of_part: name in a state dict -> name of the layer; experts have several per layer.
        rows: name in a state dict -> (rank, in_features).
        may_be_missing: names in a state dict that may be missing.
    """

    layers: dict[str, tuple[str, LoraLayer]]
    layer_of_part: dict[str, str]
    rows: dict[str, Tensor]
    may_be_missing: set[str]

    def changes_ranks(self, adapter_name: str) -> bool:
        """Tell whether any adapter would get another rank."""
        return any(
            len(self.rows[part]) != self.layers[name][1].r[adapter_name]
            for part, name in self.layer_of_part.items()
            if part in self.rows
        )

    def takes_rank_from_owner(self, name: str) -> bool:
        """Tell whether PEFT takes a layer's rank from another, as an attention's projection."""
        return _rank_owner(name, self.layers) not in (None, name)


def fit_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    strict: bool,
    default_layers: Iterable[str],
) -> FittedStateDict:
    """Match the rows of a state dict to the layers of an adapter.

    Args:
        model, state_dict, adapter_name, strict, default_layers: see
            :func:`eva_peft.lora.adapters.write_state_dict`; the model without wrappers.

    Raises:
        EvaValueError: unknown, missing or duplicate layers; a width that does not fit; rows that
            are not finite. EvaTypeError: not a mapping of tensors.
    """
    layers = _writable_layers(model, adapter_name)
    layer_of_part = {
        part: name for name, (_, layer) in layers.items() for part in state_dict_names(name, layer)
    }
    rows = _check_keys(state_dict, layer_of_part)
    for name in _layers_without_adapter(model, layer_of_part, rows):
        del rows[name]
    may_be_missing = {
        part for part, name in layer_of_part.items() if _in_features(layers[name][1]) is None
    }
    may_be_missing.update(default_layers)
    _check_names(layer_of_part, rows, strict, may_be_missing)
    _check_shapes(layers, layer_of_part, rows, adapter_name)
    _check_finite({name: value for name, value in rows.items() if name in layer_of_part})
    _check_variance(layer_of_part, rows)
    return FittedStateDict(layers, layer_of_part, rows, may_be_missing)


def _writable_layers(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, LoraLayer]]:
    """Return (path, layer) by the name in the base model, of a layer or of a parameter.

    Layers whose adapter is tied to that of the embeddings are left out.
    """
    tied_paths = tied_modules(model, adapter_configs(model)[adapter_name])
    layers = adapter_layers(model, adapter_name)
    return {name: found for name, found in layers.items() if peft_key(*found) not in tied_paths}


def state_dict_names(name: str, layer: LoraLayer) -> list[str]:
    """Return the names that a state dict has for a layer: one, or one for each expert."""
    if not isinstance(layer, ParamWrapper):
        return [name]
    return expert_names(name, layer.get_param().dim() == 3, layer.num_experts)


def _in_features(layer: LoraLayer) -> int | None:
    if isinstance(layer, ParamWrapper):
        return int(layer.in_features)
    size = in_out_features(layer.get_base_layer())
    return None if size is None else size[0]


def _layers_without_adapter(
    model: nn.Module, layer_of_part: Mapping[str, str], rows: Mapping[str, Any]
) -> list[str]:
    """Return the layers that get rank 0 and already have no adapter."""
    removed = [
        name
        for name, value in rows.items()
        if name not in layer_of_part
        and isinstance(value, Tensor)
        and value.dim() == 2
        and not len(value)
    ]
    known_names = (
        {name_in_base_model(path) for path, _ in model.named_modules()} if removed else set()
    )
    return [name for name in removed if resolve_name(name, known_names) in known_names]


def _check_keys(
    state_dict: Mapping[str, Tensor], layer_of_part: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the rows of a state dict by the layer names of this model."""
    if not isinstance(state_dict, Mapping):
        raise EvaTypeError(
            "the EVA state dict must map layer names to tensors, as get_eva_state_dict and "
            f"EvaResult.state_dict return it; got {type(state_dict)}"
        )
    keys: dict[str, str] = {}
    for key in state_dict:
        if not isinstance(key, str):
            raise EvaTypeError(
                f"the keys of an EVA state dict must be names of layers, got {key!r}"
            )
        name = resolve_name(key, layer_of_part)
        if name in keys:
            raise EvaValueError(
                f"layer {name}: the EVA state dict has it twice, as {keys[name]!r} and {key!r}; "
                "remove one of them"
            )
        keys[name] = key
    return {name: state_dict[key] for name, key in keys.items()}


def _check_names(
    known_names: Mapping[str, Any], rows: Mapping[str, Any], strict: bool, may_be_missing: set[str]
) -> None:
    unknown = [name for name in rows if name not in known_names]
    missing = [name for name in known_names if name not in rows and name not in may_be_missing]
    if not unknown and not missing:
        return
    missing_text = counted(len(missing), "layer of the adapter is", "layers of the adapter are")
    problems = {counted(len(unknown), "unknown layer"): unknown, f"{missing_text} missing": missing}
    parts = [f"{what} ({listed(names)})" for what, names in problems.items() if names]
    message = f"the EVA state dict does not fit the model: {', and '.join(parts)}"
    if strict:
        raise EvaValueError(
            message + "; compute it for this model, or pass strict=False to use the layers that fit"
        )
    warn(f"{message}; missing layers keep the default initialisation")


def _check_shapes(
    layers: Mapping[str, tuple[str, LoraLayer]],
    layer_of_part: Mapping[str, str],
    rows: Mapping[str, Tensor],
    adapter_name: str,
) -> None:
    # an attention that is not in the state dict keeps its rank
    rank_of_owner = {
        name: layer.r[adapter_name]
        for name, (_, layer) in layers.items()
        if _is_attention(layer) and name not in rows
    }
    for name, value in rows.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or value.is_meta:
            raise EvaTypeError(
                f"layer {name}: expected a (rank, in_features) tensor with values, not on the "
                "meta device"
            )
        if name not in layer_of_part:
            continue
        layer = layers[layer_of_part[name]][1]
        features = _in_features(layer)
        if features is not None and value.shape[1] != features:
            raise EvaValueError(
                f"layer {name}: the rows in the state dict have {value.shape[1]} features, but "
                f"the layer reads {features}; they are of another model"
            )
        base = layer.get_base_layer()
        groups = base.groups if isinstance(base, CONVOLUTIONS) else 1
        if len(value) % groups:
            raise EvaValueError(
                f"layer {name}: rank {len(value)} is not a multiple of the {groups} groups of the "
                "convolution"
            )
        owner = _rank_owner(layer_of_part[name], layers)
        if owner is None:
            continue
        common_rank = rank_of_owner.setdefault(owner, len(value))
        if len(value) != common_rank or not common_rank:
            what = "experts" if isinstance(layer, ParamWrapper) else "projections"
            raise EvaValueError(
                f"layer {name}: rank {len(value)}, but the {what} of {owner} must have the same "
                f"rank, at least 1 (another one has {common_rank})"
            )


def _rank_owner(name: str, layers: Mapping[str, tuple[str, LoraLayer]]) -> str | None:
    """Return the layer (itself, or its attention) whose parts share one rank, if there is one."""
    layer = layers[name][1]
    if isinstance(layer, ParamWrapper) or _is_attention(layer):
        return name
    attention = name.removesuffix(f".{OUT_PROJ}")
    return attention if attention in layers and _is_attention(layers[attention][1]) else None


def _is_attention(layer: LoraLayer) -> bool:
    return isinstance(layer.get_base_layer(), nn.MultiheadAttention)


def _check_finite(rows: Mapping[str, Tensor]) -> None:
    flags = _host.read([value.isfinite().all() for value in rows.values()])
    nonfinite = [name for name, finite in zip(rows, flags, strict=True) if not finite]
    if nonfinite:
        raise EvaValueError(
            f"the EVA state dict holds NaN or infinity in layers {listed(nonfinite)}; compute it "
            "again"
        )


def _check_variance(layer_of_part: Mapping[str, str], rows: Mapping[str, Tensor]) -> None:
    ranks = [len(rows[part]) if part in rows else None for part in layer_of_part]
    if ranks and not any(rank is None or rank for rank in ranks):
        raise EvaValueError(
            f"none of the {counted(len(ranks), 'layer')} is given a rank: the input of each layer "
            "was the same for all tokens, so there is no variance to explain. Use more, and more "
            "varied, samples"
        )
