"""Peak rates reached by library calls: a large copy and a large bfloat16 matrix product."""

from __future__ import annotations

from ..context import Context, StageFailed


def run(context: Context) -> None:
    """Measure both."""
    import torch

    from bench.kernels._timing import measure_ceilings

    cuda = torch.cuda.is_available()
    if not (cuda or context.dry_run):
        raise StageFailed("torch sees no CUDA device")
    context.save(measure_ceilings(torch.device("cuda" if cuda else "cpu"), small=context.dry_run))
