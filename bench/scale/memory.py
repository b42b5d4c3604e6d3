"""The simulated memory of 7B to 70B models, read from its result file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eva_kernels.streaming import plan_streams, stream_bytes

from ..common import RESULTS

FILE = "simulated_memory.json"


def simulated(out: Path) -> dict[str, Any] | None:
    """Return the bytes that the part ``scale`` shows, with those of exact Gram's state.

    Args:
        out: folder whose result file is preferred to the committed one.

    Returns:
        ``date``, ``commit``, ``batch``, ``length`` and ``models``; ``None`` without a file.
    """
    path = next((folder / FILE for folder in (out, RESULTS) if (folder / FILE).exists()), None)
    if path is None:
        return None
    record = json.loads(path.read_text("utf-8"))
    settings = record["settings"]
    components = round(settings["r"] * settings["rho"])
    models = [
        {
            "model": row["model"],
            "parameters": row["base_bytes"] + row["adapter_bytes"],
            "plain": row["plain"]["bytes"],
            "ours": row["ours"]["bytes"],
            "state": row["state_bytes"],
            "gram_state": _gram_bytes(row["model"], components, row["planned_state_bytes"]),
        }
        for row in record["rows"]
    ]
    provenance = {key: record[key] for key in ("date", "commit")}
    return {
        **provenance,
        "batch": settings["batch"],
        "length": settings["length"],
        "models": models,
    }


def _gram_bytes(model: str, components: int, planned: int) -> int | None:
    """Return the bytes of the exact states, computed from the widths of a model's layer inputs.

    ``None`` if these widths do not reproduce the planned bytes of the sketches: they then differ
    from those that were simulated.
    """
    widths = _layer_input_widths(model)
    if widths is None or _planned_bytes(widths, components, "sketch") != planned:
        return None
    return _planned_bytes(widths, components, "gram")


def _planned_bytes(widths: Sequence[int], components: int, method: str) -> int:
    plans = plan_streams(widths, [components] * len(widths), method=method)
    return sum(stream_bytes(plan) for plan in plans)


def _layer_input_widths(model: str) -> list[int] | None:
    # imports transformers, and is only needed if a file was found
    from ..models import MODELS

    if model not in MODELS:
        return None
    config = MODELS[model]()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    block = [config.hidden_size, heads * size, config.hidden_size, config.intermediate_size]
    return config.num_hidden_layers * block
