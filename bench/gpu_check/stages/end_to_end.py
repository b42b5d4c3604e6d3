"""The whole pass at the shape of a model: plain forward, ours, and for Llama-2-7B PEFT's."""

from __future__ import annotations

from typing import Any

from ..context import Context, StageFailed

CONFIGS = {
    "end_to_end": "llama-2-7b",
    "end_to_end_8b": "llama-3.1-8b",
    "end_to_end_70b": "llama-3.1-70b",
}


def run(context: Context) -> None:
    """Measure all methods; each must have run, and ours must be bitwise reproducible."""
    from bench import end_to_end

    results = end_to_end.run(
        "tiny" if context.dry_run else CONFIGS[context.stage],
        context.device(),
        seconds=context.remaining,
        save=context.save,
    )
    context.save(results)
    reason = failure_reason(results["rows"])
    if reason:
        raise StageFailed(reason)


def failure_reason(rows: list[dict[str, Any]]) -> str:
    """Return what is missing or wrong, or an empty string."""
    if not rows:
        return "nothing was measured"
    bad = [f"{r['method']} at {r['batch']}: {r['status']}" for r in rows]
    bad = [text for text in bad if not text.endswith(": measured")]
    bad += [
        f"{r['method']} at {r['batch']}: two runs differ in their bits"
        for r in rows
        if r.get("same_bits_twice") is False
    ]
    return "; ".join(bad)[:300]
