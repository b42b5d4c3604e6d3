"""Peak rates reached by library calls: a large copy and a large bfloat16 matrix product."""

from __future__ import annotations

from ..context import Context


def run(context: Context) -> None:
    """Measure both."""
    from bench.kernels._timing import measure_ceilings

    context.save(measure_ceilings(context.device(), small=context.dry_run))
