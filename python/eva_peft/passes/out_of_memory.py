"""Out of memory: what was running, the expected memory, and what to reduce."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import torch

from ..surroundings.memory import OutOfMemoryError
from .planning import estimate_targets

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["explained"]

_ADVICE = {
    "forward": "a smaller batch or shorter texts, or a smaller memory_budget",
    "accumulate": "a smaller batch, tokens_per_step, or a smaller memory_budget",
    "fold": 'a smaller memory_budget, r, rho or oversample, or method="sketch"',
}


def explained(run: CalibrationPass, error: BaseException) -> OutOfMemoryError:
    """Return the error to raise instead, and release what the pass held.

    Args:
        run: the pass that failed.
        error: its exception; the local variables of its traceback's frames are cleared, since
            they would keep tensors alive while it is handled.
    """
    told = str(error).split("\n")[0].strip()
    layer = run.collector.current
    phase = "accumulate" if layer else run.phase
    where = f"layer {layer}" if layer else f"the {phase}"
    shape = run.batch_shape or (1, 1)
    number = run.forwards + (phase != "fold")  # at a fold the forward pass is counted already
    guess = estimate_targets(run.model, run.targets, run.eva.rho, run.options, shape)
    message = (
        f"out of memory on {run.device} in {where} of forward pass {number}, step "
        f"{run.steps + 1}, batch of {shape[0]} x {shape[1]} tokens"
        f"{f': {told}' if told else ''}. Expected above the weights: {_gib(guess.peak_bytes)} "
        f"(state {_gib(guess.state_bytes)}, temporaries {_gib(guess.workspace_bytes)}, forward "
        f"pass {_gib(guess.activation_bytes)}){_free(run.device)}. What helps: {_ADVICE[phase]}; "
        "eva_kernels.estimate() tells beforehand"
    )
    run.collector.release()
    traceback.clear_frames(error.__traceback__)
    return OutOfMemoryError(message)


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"; {_gib(free)} of {_gib(total)} are free now"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
