"""An ``EvaResult`` as a file, and as text."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import fields
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..errors import EvaValueError, counted, listed
from ..resume.checkpoint_file import checksum, read_file, write_file
from .layer_names import module_kinds
from .report import explained_by_rank
from .result import EvaResult

__all__ = ["load_result", "save_result", "summary_text"]

RESULT_FORMAT = "eva_kernels.result/1"
_TENSORS = ("components", "singular_values", "explained_variance_ratio")


def save_result(result: EvaResult, path: str | PathLike[str]) -> None:
    """Write a result; layers that share an input share the tensors in the file, too.

    Raises:
        EvaValueError: the path is a folder.
    """
    if Path(path).is_dir():
        raise EvaValueError(f"{str(path)!r} is a folder; name a file, such as eva.safetensors")
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, str]] = {}
    for kind in _TENSORS:
        seen: dict[tuple[int, tuple[int, ...]], str] = {}
        index[kind] = {}
        for name, value in getattr(result, kind).items():
            identity = (value.data_ptr(), tuple(value.shape))
            key = seen.setdefault(identity, f"{kind}.{name}")
            tensors.setdefault(key, value.detach().cpu().contiguous().clone())
            index[kind][name] = key
    other_fields = {
        f.name: getattr(result, f.name) for f in fields(result) if f.name not in _TENSORS
    }
    text = {"index": json.dumps(index), "result": json.dumps(other_fields)}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, RESULT_FORMAT, text, tensors)


def load_result(path: str | PathLike[str]) -> EvaResult:
    """Read a result that :func:`save_result` wrote.

    Raises:
        EvaValueError: missing, damaged, or another kind of file.
    """
    if Path(path).is_dir():
        raise EvaValueError(f"{path} is a folder; pass the file in it that EvaResult.save wrote")
    if not Path(path).is_file():
        raise EvaValueError(f"{path} does not exist; pass the file that EvaResult.save wrote")
    try:
        metadata, tensors = read_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise EvaValueError(
            f"{path} is not a readable safetensors file ({error}); pass the file that "
            "EvaResult.save wrote"
        ) from error
    if metadata.get("format") != RESULT_FORMAT:
        raise EvaValueError(
            f"{path} is not a result of this version: its format is "
            f"{metadata.get('format') or 'not given'}, expected {RESULT_FORMAT}; pass a file that "
            "EvaResult.save wrote"
        )
    texts = "\n".join(metadata.get(key, "") for key in ("index", "result"))
    expected_checksum = metadata.get("checksum")  # files of earlier versions have none
    if expected_checksum is not None and expected_checksum != checksum(texts, tensors):
        raise EvaValueError(
            f"{path} is damaged: its contents do not match its checksum; copy the file again, or "
            "calibrate and save again"
        )
    try:
        index: dict[str, dict[str, str]] = json.loads(metadata["index"])
        other_fields: dict[str, Any] = json.loads(metadata["result"])
        tensors_by_layer: dict[str, Any] = {
            kind: {n: tensors[k] for n, k in index[kind].items()} for kind in _TENSORS
        }
        result = EvaResult(**tensors_by_layer, **other_fields)
    except (KeyError, TypeError, ValueError) as error:
        raise EvaValueError(
            f"{path} is damaged ({error!r}); copy the file again, or calibrate and save again"
        ) from error
    return result


def summary_text(result: EvaResult) -> str:
    """Return one line per kind of layer, then totals."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, kind in module_kinds(result.ranks).items():
        kinds[kind].append(name)
    column = max([24, *(len(kind) + 1 for kind in kinds)])
    column_heads = f"{'count':>6}{'width':>7}{'ranks':>12}{'variance explained':>20}"
    lines = [f"{'layers':<{column}}{column_heads}"]
    for kind, names in kinds.items():
        ranks = [result.ranks[n] for n in names]
        explained = [explained_by_rank(result, n) for n in names]
        width = max(result.in_features[n] for n in names)
        rank_range = f"{min(ranks)}-{max(ranks)}"
        lines.append(
            f"{kind:<{column}}{len(names):>6}{width:>7}{rank_range:>12}{median(explained):>20.1%}"
        )
    converged = sum(result.converged.values())
    layers = counted(len(result.ranks), "layer")
    lines += [
        "",
        f"total rank {sum(result.ranks.values())} over {layers}, "
        f"{sum(r == 0 for r in result.ranks.values())} of them without an adapter",
        f"{converged} of {layers} converged after {counted(result.steps, 'step')}, "
        f"{counted(result.forwards, 'forward pass', 'forward passes')}, "
        f"{counted(result.tokens, 'token')}",
        f"{result.seconds['total']:.2f} s, of which forward passes "
        f"{result.seconds['forward']:.2f} s",
    ]
    if result.uncalled:
        lines.append(f"default initialisation: {listed(result.uncalled)}")
    return "\n".join(lines)
