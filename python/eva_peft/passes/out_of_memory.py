"""Out of memory: what was running, the expected memory, and what to reduce."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import torch

from ..surroundings.memory import OutOfMemoryError
from .planning import estimate_targets

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["out_of_memory_error"]

_ADVICE = {
    "forward": "a smaller batch or shorter texts, or a smaller memory_budget",
    "accumulate": "a smaller batch, tokens_per_step, or a smaller memory_budget",
    "fold": 'a smaller memory_budget, r, rho or oversample, or method="sketch"',
}


def out_of_memory_error(run: CalibrationPass, error: BaseException) -> OutOfMemoryError:
    """Return the error to raise instead, and release what the pass held.

    Args:
        run: the pass that failed.
        error: its exception; the local variables of its traceback's frames are cleared, since
            they would keep tensors alive while it is handled.
    """
    reason = str(error).split("\n")[0].strip()
    layer = run.collector.current_layer
    phase = "accumulate" if layer else run.phase
    where = f"layer {layer}" if layer else f"the {phase}"
    shape = run.batch_shape or (1, 1)
    number = run.forwards + (phase != "fold")  # at a fold the forward pass is counted already
    expected = estimate_targets(run.model, run.targets, run.eva.rho, run.options, shape)
    message = (
        f"out of memory on {run.device} in {where} of forward pass {number}, step "
        f"{run.steps + 1}, batch of {shape[0]} x {shape[1]} tokens"
        f"{f': {reason}' if reason else ''}. Expected memory in addition to the weights: "
        f"{_in_gib(expected.peak_bytes)} (streaming state {_in_gib(expected.state_bytes)}, "
        f"temporaries {_in_gib(expected.workspace_bytes)}, forward pass "
        f"{_in_gib(expected.activation_bytes)}){_free_memory(run.device)}. To need less, use "
        f"{_ADVICE[phase]}; eva_kernels.estimate() gives the expected memory without running"
    )
    run.collector.release()
    traceback.clear_frames(error.__traceback__)
    return OutOfMemoryError(message)


def _free_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"; {_in_gib(free)} of {_in_gib(total)} are free now"


def _in_gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
