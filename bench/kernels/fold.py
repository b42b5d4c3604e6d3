"""The end of a step: fold all layer inputs of a model, and compare with the previous step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eva_kernels.streaming import InputStream, Options, compare_streams, fold_streams

from ..common import spread, synchronized_now
from ._timing import count_device_calls

COMPONENTS, WIDTH, TAU = 32, 64, 0.99
WIDTHS = [(4096, 96), (11008, 32)]  # Llama-2-7B: D and layer inputs
SMALL_WIDTHS = [(64, 3), (96, 1)]
LOST_LIMIT = 0.02


def measure(device: torch.device, small: bool = False) -> dict[str, Any]:
    """Time ``fold_streams`` and ``compare_streams`` of one step with the host's clock.

    The host waits for the result of a step, so wall time around both, with the device idle before
    and after, is the time that a user waits.
    """
    widths = SMALL_WIDTHS if small else WIDTHS
    components, width = (4, 8) if small else (COMPONENTS, WIDTH)
    streams = [
        InputStream(d, components, width, device, options=Options("sketch", seed=i))
        for d, count in widths
        for i in range(count)
    ]
    batches = {d: _decaying_tokens(8 * width, d, device) for d, _ in widths}
    step = _Step(streams, batches, components, device)
    row: dict[str, Any] = {
        "op": "fold",
        "model": "tiny" if small else "Llama-2-7B",
        "label": "fold and convergence of a step",
        "shape": {"L": len(streams), "Q": width, "K": components},
    }
    for _ in range(3):
        step.accumulate()
        step.close()
    # one stream of each width is compared with the exact answer before anything is timed
    checked_streams = {d: next(s for s in streams if s.features == d) for d, _ in widths}
    lost = {d: lost_variance(checked_streams[d], batches[d]) for d, _ in widths}
    row["lost_variance"] = {str(d): value for d, value in lost.items()}
    wrong = [value for value in lost.values() if not value <= LOST_LIMIT]  # or NaN
    if wrong:
        return {**row, "status": "incorrect", "reason": f"lost variance {wrong[0]:.1e}"}
    times = _time_steps(step, 3 if small else 12)
    step.accumulate()
    calls = count_device_calls(_close_and_refill(step), device)
    accumulate_calls = count_device_calls(step.accumulate, device)
    # counted together, as a fold needs accumulated sums; the calls that fill them are subtracted
    step_calls = {key: _subtract(calls[key], accumulate_calls[key]) for key in calls}
    return {
        **row,
        "status": "timed",
        "wall_ms": times,
        "calls": step_calls,
        "calls_of_adding": accumulate_calls,
    }


class _Step:
    """One step over prepared streams, split in two halves."""

    def __init__(
        self,
        streams: list[InputStream],
        batches: dict[int, torch.Tensor],
        components: int,
        device: torch.device,
    ) -> None:
        self.streams, self.batches, self.device = streams, batches, device
        self.ranks = [components // 2] * len(streams)

    def accumulate(self) -> None:
        for stream in self.streams:
            stream.add(self.batches[stream.features])

    def close(self) -> None:
        folded = fold_streams(self.streams)
        compare_streams(folded, self.ranks, tau=TAU)


def _close_and_refill(step: _Step) -> Callable[[], None]:
    def run() -> None:
        step.close()
        step.accumulate()

    return run


def _time_steps(step: _Step, repetitions: int) -> dict[str, float]:
    milliseconds = []
    for _ in range(repetitions):
        step.accumulate()
        begin = synchronized_now(step.device)
        step.close()
        milliseconds.append(1e3 * (synchronized_now(step.device) - begin))
    return {**spread(milliseconds), "fastest": min(milliseconds)}


def _subtract(total: int | None, part: int | None) -> int | None:
    return None if total is None or part is None else total - part


def _decaying_tokens(count: int, d: int, device: torch.device) -> torch.Tensor:
    """Return bfloat16 tokens with a quickly decaying spectrum, like that of activations."""
    rank = min(d, 4 * COMPONENTS)
    values = torch.logspace(2, -1, rank, device=device)
    mixing = torch.randn(rank, d, device=device)
    return ((torch.randn(count, rank, device=device) * values) @ mixing).bfloat16()


def lost_variance(stream: InputStream, x: torch.Tensor) -> float:
    """Return the variance of one batch that is lost relative to as many exact components."""
    centred = x.double() - x.double().mean(0)
    best = torch.linalg.eigvalsh((centred @ centred.mT).cpu()).flip(0)
    components = stream.spectrum().components
    basis = torch.linalg.qr(components.double().mT).Q
    return float(1 - float((centred @ basis).square().sum()) / float(best[: len(components)].sum()))
