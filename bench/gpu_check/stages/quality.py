"""Fine-tuning at a size for a GPU: a base pre-trained here, from each initialisation."""

from __future__ import annotations

from typing import Any

from ...files import read_json
from ..context import Context, StageFailed

DOMAIN = "pretrained"
METHODS = ("lora", "eva", "lora-ga")


def run(context: Context) -> None:
    """Train, save every row in ``quality.json`` of the folder, and save the methods' results."""
    from bench.quality.run import run

    context.device()  # raises without a GPU
    run("quick", context.folder, [DOMAIN], METHODS[:2] if context.dry_run else METHODS, quiet=True)
    results = summary(read_json(context.folder / "quality.json"))
    context.save(results)
    reason = failure_reason(results["rows"])
    if reason:
        raise StageFailed(reason)


def summary(record: Any) -> dict[str, Any]:
    """Return each method's final results on the test split, mean over seeds, and the base's."""
    from bench.quality import show
    from bench.quality.statistics import mean_error

    (base,) = record["rows"]["bases"]
    rows = []
    for method, found in show.results_by_method(record, DOMAIN).items():
        row: dict[str, Any] = {"method": method, "seeds": len(found.rows), "rate": found.rate}
        if found.reason:
            row["reason"] = found.reason
        for name in ("loss", "score") if found.rows else ():
            row[name], row[f"{name}_error"] = mean_error(list(found.values(name).values()))
        rows.append(row)
    return {"base": base, "rows": rows}


def failure_reason(rows: list[dict[str, Any]]) -> str:
    """Return what is missing, or an empty string."""
    bad = [f"{row['method']}: {row['reason']}" for row in rows if "reason" in row]
    return "; ".join(bad)[:300] if rows else "nothing was measured"
