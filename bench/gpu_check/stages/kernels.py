"""Timings of every kernel, each after its result was verified."""

from __future__ import annotations

from typing import Any

from ..context import Context, StageFailed


def run(context: Context) -> None:
    """Measure cases while time is left; the stage fails unless all were timed."""
    from bench.kernels._timing import Ceilings
    from bench.kernels.run import run as measure

    ceilings = context.results_of("ceilings")
    names = ("bytes_per_second", "flops_per_second")
    rows = measure(
        context.device(),
        small=context.dry_run,
        ceilings=Ceilings(*(ceilings[name] for name in names)) if ceilings else None,
        seconds=context.remaining,
        save=lambda found: context.save({"rows": found}),
    )
    reason = failure_reason(rows)
    if reason:
        raise StageFailed(reason)


def failure_reason(rows: list[dict[str, Any]]) -> str:
    """Return which cases were not timed, or an empty string."""
    if not rows:
        return "no case was measured"
    bad = [f"{row.get('label', row['op'])}: {row['status']}" for row in rows]
    bad = [text for text in bad if not text.endswith(": timed")]
    return "" if not bad else f"{len(bad)} of {len(rows)} cases: {'; '.join(bad)[:300]}"
