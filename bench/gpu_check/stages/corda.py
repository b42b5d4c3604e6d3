"""The cost of CorDA on Llama-2-7B, extrapolated from one and two of its layers."""

from __future__ import annotations

import importlib
from typing import Any

from ...files import read_json
from ..context import Context, StageFailed, StageSkipped
from .tests import NEEDED_PACKAGES

METHOD = "corda-ipm"
REPEATS = 1  # on a GPU 12 seconds with one layer, 22 with two, and as much for setup and teardown


def run(context: Context) -> None:
    """Measure at two depths, saving each at once, and extrapolate linearly."""
    from bench.cost import depth

    context.device()  # raises without a GPU
    package = missing_package()
    if package:
        raise StageSkipped(f"PEFT's CorDA needs the package {package}, which is not installed")
    name = "tiny" if context.dry_run else "llama-2-7b"
    path = depth.run(
        name,
        (1, 2),
        (METHOD,),
        out=context.folder,
        quiet=True,
        repeats=REPEATS,
        on_rows=lambda rows: context.save({"measured": rows}),
    )
    rows = read_json(path)["rows"]
    context.save(rows)
    reason = failure_reason(rows["whole"])
    if reason:
        raise StageFailed(reason)


def missing_package() -> str:
    """Return the missing package that PEFT's CorDA imports, or an empty string."""
    try:
        importlib.import_module("peft.tuners.lora.corda")
    except ModuleNotFoundError as error:
        return NEEDED_PACKAGES.get(str(error.name), str(error.name))
    return ""


def failure_reason(rows: list[dict[str, Any]]) -> str:
    """Return what is missing, or an empty string."""
    bad = [f"{row['method']}: {row['error']}" for row in rows if "error" in row]
    return "; ".join(bad)[:300] if rows else "nothing was measured"
