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
_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_(?:embedding_)?[AB])(?:\.(weight|bias))?")
_ANY_LORA = re.compile(r"\.lora_(?!magnitude_vector)")
# Options that lay out or scale the rows of an adapter differently.
_REFUSED = ("target_parameters", "use_bdlora", "monteclora_config", "kasa_config")
# Others, such as "pissa", change the base weights by the rank whenever the adapter is loaded.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass
class _Layer:
    """The tensors of one layer: their keys in the file."""

    first: str = ""  # lora_A: (r, in_features, ...)
    second: str = ""  # lora_B: (out_features, r or r / groups, ...)
    bias: str | None = None
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
        raise EvaValueError(f"{out} is the adapter itself, which is kept; name another folder")
    config, tensors = _read(source)
    layers = _layers(source, config, tensors)
    rank = _rank(r, layers, tensors)
    common = _common([layer.scaling for layer in layers.values()])
    for layer in layers.values():
        _pad(layer, tensors, rank)
        _scale(layer, tensors, common)
    alpha = rank * common
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


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (ADAPTER_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise EvaValueError(
                f"there is no {name} in {folder}; pass the folder that save_pretrained wrote "
                "(adapters with a name are in a folder of that name)"
            )
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        tensors = load_file(folder / _WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise EvaValueError(f"the adapter in {folder} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise EvaValueError(f"{folder} holds {config.get('peft_type')!r}, only LORA can be padded")
    refused = [name for name in _REFUSED if config.get(name)]
    if refused:
        raise EvaValueError(
            f"the adapter in {folder} has {', '.join(refused)}, whose rows cannot be padded; "
            "merge it instead (merge_and_unload)"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise EvaValueError(
            f"the adapter in {folder} has init_lora_weights={start!r}, which changes the base "
            "weights by its rank when it is loaded; save it as plain LoRA first (save_pretrained "
            "with path_initial_model_for_weight_conversion), or merge it (merge_and_unload)"
        )
    return config, tensors


def _layers(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for key in tensors:
        found = _LORA.fullmatch(key)
        if found is None:
            if _ANY_LORA.search(key):
                raise EvaValueError(f"{folder}: {key} is of no kind of LoRA that can be padded")
            continue
        name, kind, part = found.groups()
        layer = layers.setdefault(name, _Layer())
        if part == "bias":
            layer.bias = key
        elif kind.endswith("A"):
            layer.first = key
        else:
            layer.second = key
    if not layers:
        raise EvaValueError(f"there is no layer with LoRA in {folder}")
    for name, layer in layers.items():
        if not (layer.first and layer.second):
            raise EvaValueError(f"{folder}: layer {name} lacks lora_A or lora_B")
        layer.scaling = _scaling(folder, name, config, len(tensors[layer.first]))
    return layers


def _scaling(folder: Path, name: str, config: dict[str, Any], rank: int) -> float:
    named = name.removesuffix(f".base_layer.{OUT_PROJ}")  # the patterns name its attention
    told = pattern_value(config.get("rank_pattern") or {}, named, config["r"])
    if told != rank:
        raise EvaValueError(
            f"{folder}: layer {name} has rank {rank}, but {told} in its config; save it again"
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, named, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _rank(r: int | None, layers: dict[str, _Layer], tensors: dict[str, Tensor]) -> int:
    """Return the requested rank, or the smallest one that fits all layers."""
    least = max(len(tensors[layer.first]) for layer in layers.values())
    groups = math.lcm(*(_groups(layer, tensors) for layer in layers.values()))
    rank = math.ceil(least / groups) * groups if r is None else r
    if rank < least:
        raise EvaValueError(
            f"r={r} is less than {least}, the largest rank of a layer; components would be lost. "
            "EvaConfig(rho=1.0) gives all layers the same rank from the start"
        )
    if rank % groups:
        raise EvaValueError(f"r={r} is no multiple of {groups}, the groups of convolutions")
    return rank


def _groups(layer: _Layer, tensors: dict[str, Tensor]) -> int:
    return tensors[layer.first].shape[0] // tensors[layer.second].shape[1]


def _common(scalings: list[float]) -> float:
    """Return the most common factor, if possible not zero; on a tie the largest."""
    counts = Counter(float(f"{scaling:.12g}") for scaling in scalings)
    return max(counts, key=lambda scaling: (scaling != 0, counts[scaling], scaling))


def _pad(layer: _Layer, tensors: dict[str, Tensor], rank: int) -> None:
    first, second = tensors[layer.first], tensors[layer.second]
    groups = _groups(layer, tensors)  # each reads a contiguous run of rows of lora_A
    runs = first.reshape(groups, -1, *first.shape[1:])
    missing = rank // groups - runs.shape[1]
    below = runs.new_zeros(groups, missing, *first.shape[1:])
    tensors[layer.first] = torch.cat([runs, below], 1).flatten(0, 1)
    beside = second.new_zeros(len(second), missing, *second.shape[2:])
    tensors[layer.second] = torch.cat([second, beside], 1)


def _scale(layer: _Layer, tensors: dict[str, Tensor], common: float) -> None:
    if math.isclose(layer.scaling, common, rel_tol=1e-12):
        return
    for key in filter(None, (layer.second, layer.bias)):
        before = tensors[key]
        tensors[key] = (before.double() * (layer.scaling / common)).to(before.dtype)
