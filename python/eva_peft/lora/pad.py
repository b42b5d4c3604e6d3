"""Give all layers of a saved adapter one rank, for runtimes without per-layer ranks."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._peft_compat import pattern_value
from ..errors import EvaValueError
from ..model.attention import OUT_PROJ
from ..surroundings.files import atomic_write
from ..surroundings.staging import ADAPTER_CONFIG

__all__ = ["pad_ranks"]

_WEIGHTS = "adapter_model.safetensors"
_LORA_KEY = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_(?:embedding_)?[AB])(?:\.(weight|bias))?"
)
_ANY_LORA = re.compile(r"\.lora_(?!magnitude_vector)")
# Options that lay out or scale the rows of an adapter differently.
_UNSUPPORTED_OPTIONS = ("target_parameters", "use_bdlora", "monteclora_config", "kasa_config")
# Others, such as "pissa", change the base weights by the rank whenever the adapter is loaded.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass
class _Layer:
    """The tensors of one layer: their keys in the file."""

    lora_a_key: str = ""  # lora_A: (r, in_features, ...)
    lora_b_key: str = ""  # lora_B: (out_features, r or r / groups, ...)
    bias_key: str | None = None
    scaling: float = 0.0


def pad_ranks(adapter: str | PathLike[str], out: str | PathLike[str], r: int | None = None) -> int:
    """Write an equivalent adapter with one rank and scaling factor for all layers.

    EVA gives each layer its own rank, which PEFT reads from ``rank_pattern`` and
    ``alpha_pattern``. Some inference runtimes read only ``r`` and ``lora_alpha``, and refuse the
    adapter or scale it wrongly. Here ``lora_A`` is padded with zero rows and ``lora_B`` with zero
    columns, which stay zero in further training; layers without an adapter stay without one.

    Args:
        adapter: folder that ``save_pretrained`` wrote; not changed. No model is loaded.
        out: folder for ``adapter_config.json`` and ``adapter_model.safetensors``.
        r: the rank; by default the largest of all layers.

    Returns:
        The rank. ``lora_alpha`` is the rank times the most common scaling factor; in layers with
        another factor ``lora_B`` is multiplied by the ratio, and rounded to its dtype.

    Raises:
        EvaValueError: not a LoRA adapter in safetensors; one of fused expert parameters, or one
            that changes the base weights (PiSSA); a rank that is too small; or ``out`` is
            ``adapter``.
    """
    source, target = Path(adapter), Path(out)
    if target.resolve() == source.resolve():
        raise EvaValueError(f"{out} is the folder of the adapter itself; name another folder")
    config, tensors = _read_adapter(source)
    layers = _group_by_layer(source, config, tensors)
    rank = _choose_rank(r, layers, tensors)
    common_scaling = _most_common_scaling([layer.scaling for layer in layers.values()])
    for layer in layers.values():
        _pad_layer(layer, tensors, rank)
        _rescale_layer(layer, tensors, common_scaling)
    alpha = rank * common_scaling
    whole = math.isclose(alpha, round(alpha), rel_tol=1e-12)
    config |= {
        "r": rank,
        "lora_alpha": round(alpha) if whole else alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,  # the factor is in lora_alpha
        "init_lora_weights": True,  # "orthogonal" would require an even rank
        "eva_config": None,
    }
    target.mkdir(parents=True, exist_ok=True)
    with atomic_write(target / _WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic_write(target / ADAPTER_CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True))
    return rank


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (ADAPTER_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise EvaValueError(
                f"there is no {name} in {folder}; pass the folder that save_pretrained wrote (a "
                "named adapter is in a subfolder of that name)"
            )
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        tensors = load_file(folder / _WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise EvaValueError(f"the adapter in {folder} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise EvaValueError(
            f"{folder} holds an adapter of type {config.get('peft_type')!r}; only LORA can be "
            "padded"
        )
    unsupported = [name for name in _UNSUPPORTED_OPTIONS if config.get(name)]
    if unsupported:
        raise EvaValueError(
            f"the adapter in {folder} has {', '.join(unsupported)}, whose rows cannot be padded; "
            "merge it instead (merge_and_unload)"
        )
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise EvaValueError(
            f"the adapter in {folder} has init_lora_weights={init!r}, which changes the base "
            "weights by its rank when it is loaded; save it as plain LoRA first (save_pretrained "
            "with path_initial_model_for_weight_conversion), or merge it (merge_and_unload)"
        )
    return config, tensors


def _group_by_layer(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for key in tensors:
        found = _LORA_KEY.fullmatch(key)
        if found is None:
            if _ANY_LORA.search(key):
                raise EvaValueError(
                    f"{folder}: {key} belongs to a kind of LoRA that cannot be padded; merge the "
                    "adapter instead (merge_and_unload)"
                )
            continue
        name, kind, part = found.groups()
        layer = layers.setdefault(name, _Layer())
        if part == "bias":
            layer.bias_key = key
        elif kind.endswith("A"):
            layer.lora_a_key = key
        else:
            layer.lora_b_key = key
    if not layers:
        raise EvaValueError(f"there is no LoRA layer in {folder}")
    for name, layer in layers.items():
        if not (layer.lora_a_key and layer.lora_b_key):
            raise EvaValueError(
                f"{folder}: layer {name} lacks lora_A or lora_B; save the adapter again"
            )
        layer.scaling = _layer_scaling(folder, name, config, len(tensors[layer.lora_a_key]))
    return layers


def _layer_scaling(folder: Path, name: str, config: dict[str, Any], rank: int) -> float:
    pattern_name = name.removesuffix(f".base_layer.{OUT_PROJ}")  # the patterns name its attention
    config_rank = pattern_value(config.get("rank_pattern") or {}, pattern_name, config["r"])
    if config_rank != rank:
        raise EvaValueError(
            f"{folder}: layer {name} has rank {rank}, but {config_rank} in its config; save the "
            "adapter again"
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, pattern_name, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _choose_rank(r: int | None, layers: dict[str, _Layer], tensors: dict[str, Tensor]) -> int:
    """Return the requested rank, or the smallest one that fits all layers."""
    largest_rank = max(len(tensors[layer.lora_a_key]) for layer in layers.values())
    multiple = math.lcm(*(_num_groups(layer, tensors) for layer in layers.values()))
    rank = math.ceil(largest_rank / multiple) * multiple if r is None else r
    if rank < largest_rank:
        raise EvaValueError(
            f"r={r} is less than {largest_rank}, the largest rank of a layer, and components "
            "would be lost; choose a larger r. EvaConfig(rho=1.0) gives all layers the same rank "
            "from the start"
        )
    if rank % multiple:
        raise EvaValueError(
            f"r={r} is not a multiple of {multiple}, which the groups of the convolutions require"
        )
    return rank


def _num_groups(layer: _Layer, tensors: dict[str, Tensor]) -> int:
    return tensors[layer.lora_a_key].shape[0] // tensors[layer.lora_b_key].shape[1]


def _most_common_scaling(scalings: list[float]) -> float:
    """Return the most common factor, if possible not zero; on a tie the largest."""
    counts = Counter(float(f"{scaling:.12g}") for scaling in scalings)
    return max(counts, key=lambda scaling: (scaling != 0, counts[scaling], scaling))


def _pad_layer(layer: _Layer, tensors: dict[str, Tensor], rank: int) -> None:
    lora_a, lora_b = tensors[layer.lora_a_key], tensors[layer.lora_b_key]
    groups = _num_groups(layer, tensors)  # each reads a contiguous run of rows of lora_A
    runs = lora_a.reshape(groups, -1, *lora_a.shape[1:])
    missing = rank // groups - runs.shape[1]
    zero_rows = runs.new_zeros(groups, missing, *lora_a.shape[1:])
    tensors[layer.lora_a_key] = torch.cat([runs, zero_rows], 1).flatten(0, 1)
    zero_columns = lora_b.new_zeros(len(lora_b), missing, *lora_b.shape[2:])
    tensors[layer.lora_b_key] = torch.cat([lora_b, zero_columns], 1)


def _rescale_layer(layer: _Layer, tensors: dict[str, Tensor], common_scaling: float) -> None:
    if math.isclose(layer.scaling, common_scaling, rel_tol=1e-12):
        return
    for key in filter(None, (layer.lora_b_key, layer.bias_key)):
        before = tensors[key]
        tensors[key] = (before.double() * (layer.scaling / common_scaling)).to(before.dtype)
