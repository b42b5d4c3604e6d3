"""The sketch with other launch parameters: the source of the tables in ``kernels/launch.py``."""

from __future__ import annotations

from typing import Any

from ..context import Context, StageFailed


def run(context: Context) -> None:
    """Measure shape by shape while time is left; wrong sums with any parameters are a failure."""
    from bench.kernels import tune

    rows = tune.run(
        context.device(),
        small=context.dry_run,
        seconds=context.remaining,
        save=lambda rows: context.save({"rows": rows}),
    )
    reason = failure_reason(rows)
    if reason:
        raise StageFailed(reason)


def failure_reason(rows: list[dict[str, Any]]) -> str:
    """Return what is wrong, or an empty string; parameters that do not fit the chip are allowed."""
    wrong = [f"{row['change']}: {row['reason']}" for row in rows if row["status"] == "incorrect"]
    if not any(row["status"] == "timed" for row in rows):
        return "nothing was timed"
    return "; ".join(wrong)[:300]
