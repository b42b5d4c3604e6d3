"""All kernel timings, most important first, as JSON-serialisable rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from . import convergence, eigh, fold, fold_passes, gram, nystrom, sketch
from ._case import Case, measure_all
from ._timing import Ceilings

Rows = list[dict[str, Any]]


def all_cases(small: bool = False) -> list[Case]:
    """Return the cases of every op, the most informative first."""
    sketches = sketch.cases(small)
    return [
        *sketches[:1],
        *convergence.cases(small)[:1],
        *nystrom.cases(small)[:1],
        *fold_passes.cases(small)[:2],
        *gram.cases(small)[:1],
        *sketches[1:],
        *nystrom.cases(small)[1:],
        *eigh.cases(small),
        *fold_passes.cases(small)[2:],
        *gram.cases(small)[1:],
        *convergence.cases(small)[1:],
    ]


def run(
    device: torch.device,
    *,
    small: bool = False,
    ceilings: Ceilings | None = None,
    seconds: float = 60.0,
    save: Callable[[Rows], None] = lambda rows: None,
) -> Rows:
    """Measure the fold, then case by case while time is left; list the cases not reached.

    Args:
        device: where to measure.
        small: shapes of a rehearsal.
        ceilings: of this machine, for the ceiling shares.
        seconds: no case starts later than this.
        save: called after each row with all rows so far.
    """
    deadline = time.monotonic() + seconds
    try:
        fold_rows = [fold.measure(device, small)]
    except Exception as error:  # the other cases are still worth measuring
        fold_rows = [
            {"op": "fold", "label": "fold", "status": "failed", "reason": repr(error)[:500]}
        ]
    save(fold_rows)
    cases, budget = all_cases(small), 0.1 if small else 0.5
    case_rows = measure_all(
        cases, device, ceilings, deadline, lambda found: save(fold_rows + found), budget
    )
    return fold_rows + case_rows
