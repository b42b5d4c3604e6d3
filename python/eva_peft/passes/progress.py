"""The history of a pass, its progress bar, and its log."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["empty_history", "log_end", "make_progress_bar", "record_step"]

_LOGGER = logging.getLogger("eva_kernels")
_HISTORY = ("step", "forwards", "tokens", "seconds", "converged", "similarity")


def empty_history() -> dict[str, list[Any]]:
    """Return the lists that :func:`record_step` appends to."""
    return {key: [] for key in _HISTORY}


def make_progress_bar(run: CalibrationPass) -> Any:
    """Return the progress bar of a pass, which shows how many layers have converged."""
    processes = run.processes
    return tqdm(
        total=len(run.targets),
        desc="EVA" if processes is None else f"EVA, {processes.size} processes",
        unit="layer",
        leave=False,
        disable=not (run.options.progress and run.is_leader),
        file=sys.stderr,
    )


def record_step(run: CalibrationPass) -> dict[str, Any]:
    """Append the numbers of a step to the history, and show them.

    Returns:
        The argument for the user's callback.
    """
    streams = {i: slot.stream for i, slot in run.collector.slot_of.items()}
    similarity = [streams[i].similarity if i in streams else None for i in range(len(run.targets))]
    converged = sum(s.converged for s in streams.values())
    numbers = {
        "step": run.steps,
        "forwards": run.forwards,
        "tokens": run.tokens,
        "seconds": run.elapsed(),
        "converged": converged,
        "similarity": similarity,
    }
    for key, value in numbers.items():
        run.history[key].append(value)
    lowest = min(
        ((v, i) for i, v in enumerate(similarity) if v is not None),
        default=None,
    )
    slowest = None if lowest is None else run.layer_names[lowest[1]]
    progress = f"step {run.steps}"
    if lowest is not None:
        progress += f", slowest {slowest} at {lowest[0]:.3f}"
        run.bar.set_postfix_str(progress, refresh=False)
    run.bar.n = converged
    run.bar.refresh()
    _LOGGER.debug(
        "%s: %d forward passes, %d tokens, %.2f s, %d of %d layers converged",
        progress,
        run.forwards,
        run.tokens,
        numbers["seconds"],
        converged,
        len(run.targets),
    )
    return {**numbers, "layers": len(run.targets), "names": run.layer_names, "slowest": slowest}


def log_end(run: CalibrationPass) -> None:
    """Log the outcome of a pass."""
    _LOGGER.info(
        "calibration pass ends: %d steps, %d forward passes, %d tokens, %.2f s, %d of %d layers "
        "converged",
        run.steps,
        run.forwards,
        run.tokens,
        run.seconds["total"],
        sum(slot.stream.converged for slot in run.collector.slot_of.values()),
        len(run.targets),
    )
