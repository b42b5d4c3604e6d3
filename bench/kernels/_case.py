"""One case of a kernel benchmark: prepared, checked against float64, then timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eva_kernels.errors import EvaRuntimeError

from ._timing import Ceilings, CpuTimer, CudaTimer, Run, rates_and_share, time_together, timer_for

# Tensor-core products per product of the formula, as operands are split into several parts.
SKETCH_PASSES = {
    ("high", torch.bfloat16): 2,
    ("high", torch.float16): 3,
    ("high", torch.float32): 3,
}
GRAM_PASSES = {"high": 3}
# Limits of the relative error of the products.
ERROR_LIMITS = {"high": 1e-5, "fast": 5e-3}


@dataclass(frozen=True)
class Prepared:
    """A case with its data on the device.

    Attributes:
        competitors: name -> call; first the fast path, named after its backend.
        errors: name -> relative error of one fresh run against float64.
        limit: largest error with which a competitor may be timed.
        flops, nbytes: minimum work of one call; 0 flops if a rate would be meaningless.
    """

    competitors: dict[str, Run]
    errors: dict[str, float]
    limit: float
    flops: float
    nbytes: float


@dataclass(frozen=True)
class Case:
    """A case to be timed.

    Attributes:
        op: name of the operation.
        model: the model from which the shape is taken.
        shape: by the usual letters N, D, Q, and L for layers.
        make: prepares the case on a device.
        dtype: of the tokens.
        precision: of the tensor-core products, if there is a choice.
    """

    op: str
    model: str
    shape: dict[str, int]
    make: Callable[[torch.device], Prepared]
    dtype: torch.dtype = torch.float32
    precision: str | None = None

    @property
    def label(self) -> str:
        """A readable name, unique among the cases."""
        shape = " ".join(f"{key}={value}" for key, value in self.shape.items())
        kind = str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, [self.op, self.model, shape, kind, self.precision]))


def matrix_cases(
    op: str,
    shapes: Sequence[tuple[str, int, int]],
    make: Callable[[int, int, torch.device], Prepared],
    small: bool,
) -> list[Case]:
    """Return cases of an op on (L, Q, Q) matrices, by model, L and Q; small for a rehearsal."""
    return [
        Case(
            op=op,
            model=model,
            shape={"L": count, "Q": q},
            make=functools.partial(make, count, q),
            dtype=torch.float64,
        )
        for model, count, q in ([("tiny", 3, 16)] if small else shapes)
    ]


def check(prepared: Prepared) -> None:
    """Raise ArithmeticError if the error of any checked competitor exceeds the limit."""
    for name, error in prepared.errors.items():
        if not error <= prepared.limit:  # NaN fails, too
            raise ArithmeticError(
                f"{name} has a relative error of {error:.1e}, above the limit {prepared.limit:.0e}"
            )


def fast_path(backend: str, attempt: Callable[[str], Any], device: torch.device) -> str:
    """Return the given backend if it runs; otherwise ``"auto"`` on the CPU, in a rehearsal.

    Raises:
        EvaRuntimeError: on a GPU, with the reason why the fast path cannot run.
    """
    try:
        attempt(backend)
    except EvaRuntimeError:
        if device.type == "cuda":
            raise
        return "auto"
    return backend


def measure(
    case: Case,
    device: torch.device,
    ceilings: Ceilings | None = None,
    timer: CpuTimer | CudaTimer | None = None,
    budget: float = 0.5,
) -> dict[str, Any]:
    """Return one row: errors, and if they are within limits times, rates and ceiling share."""
    row: dict[str, Any] = {
        "op": case.op,
        "model": case.model,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "precision": case.precision,
    }
    try:
        prepared = case.make(device)
        row["errors"] = prepared.errors
        check(prepared)
        timer = timer or timer_for(device)
        max_rounds = 5 if device.type == "cpu" else 50
        min_rounds = 2 if device.type == "cpu" else 5
        times = time_together(
            prepared.competitors, timer, budget=budget, min_rounds=min_rounds, max_rounds=max_rounds
        )
    except ArithmeticError as error:
        return {**row, "status": "incorrect", "reason": str(error)}
    except Exception as error:  # a failing case must not stop the others
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    fast = next(iter(times))
    median = times[fast]["ms"]["median"]
    ratios = {name: t["ms"]["median"] / median for name, t in times.items() if name != fast}
    rates = rates_and_share(median / 1e3, prepared.flops, prepared.nbytes, ceilings)
    return {
        **row,
        "status": "timed",
        "fast": fast,
        "timer": timer.name,
        "times": times,
        "over_fast": ratios,
        **rates,
    }


def measure_all(
    cases: Sequence[Case],
    device: torch.device,
    ceilings: Ceilings | None,
    deadline: float,
    save: Callable[[list[dict[str, Any]]], None],
    budget: float = 0.5,
) -> list[dict[str, Any]]:
    """Measure cases in order until a deadline (``time.monotonic``); list those not reached."""
    timer, rows = timer_for(device), []
    for case in cases:
        if time.monotonic() > deadline:
            rows.append({"op": case.op, "label": case.label, "status": "not reached"})
        else:
            row = measure(case, device, ceilings, timer, budget)
            rows.append({**row, "label": case.label})
            if device.type == "cuda":
                torch.cuda.empty_cache()
        save(rows)
    return rows
