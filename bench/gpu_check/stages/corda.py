"""What CorDA would cost on Llama-2-7B, from one and two of its layers."""

from __future__ import annotations

from typing import Any

from ...files import read_json
from ..context import Context, StageFailed

METHOD = "corda-ipm"


def run(context: Context) -> None:
    """Measure two depths, and draw the line through them."""
    import torch

    from bench.cost import depth

    if not (torch.cuda.is_available() or context.dry_run):
        raise StageFailed("torch sees no CUDA device")
    name = "tiny" if context.dry_run else "llama-2-7b"
    path = depth.run(name, (1, 2), (METHOD,), out=context.folder, quiet=True)
    rows = read_json(path)["rows"]
    context.save(rows)
    reason = judge(rows["whole"])
    if reason:
        raise StageFailed(reason)


def judge(rows: list[dict[str, Any]]) -> str:
    """Return what is missing, or an empty string."""
    bad = [f"{row['method']}: {row['error']}" for row in rows if "error" in row]
    return "; ".join(bad)[:300] if rows else "nothing was measured"
