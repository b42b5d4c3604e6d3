"""Kernel timings with pytest-benchmark: ``python -m pytest bench/kernels``.

Shapes of language models on a GPU, small ones on the CPU. A case with a wrong result fails and is
not timed. pytest-benchmark's rounds use the host's clock and wait for the device; times by the
device's clock are in the extra information.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.common import default_device, synchronized_now
from bench.kernels._case import Case, check
from bench.kernels._timing import rates_and_share, time_together, timer_for
from bench.kernels.run import all_cases

DEVICE = default_device()
CASES = all_cases(small=DEVICE.type == "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_fast_path(case: Case, benchmark: Any) -> None:
    prepared = case.make(DEVICE)
    check(prepared)
    timer = timer_for(DEVICE)
    fast = next(iter(prepared.competitors))
    times = time_together(prepared.competitors, timer, budget=0.3, min_rounds=2, max_rounds=30)
    rates = rates_and_share(
        times[fast]["ms"]["median"] / 1e3, prepared.flops, prepared.nbytes, None
    )
    benchmark.group = case.label
    benchmark.extra_info.update({"timer": timer.name, "times": times, "errors": prepared.errors})
    benchmark.extra_info.update(rates)

    def once() -> None:
        prepared.competitors[fast]()
        synchronized_now(DEVICE)

    benchmark.pedantic(once, rounds=3 if DEVICE.type == "cpu" else 20, warmup_rounds=1)
