"""The time of one step at one point and of its competitors, each checked before it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor
from torch.nn.functional import linear

from eva_kernels.streaming import InputStream, Options, compare_streams, fold_streams

from ..common import spread, synchronized_now
from ..kernels._timing import repetitions, timer_for
from .data import Tokens, make_tokens
from .work import OUTPUTS, Ceilings, Point, floors, forward_flops, gram_flops

TAU = 0.99
CHECK_STEPS = 3
LIMITS = {"sketch": 0.02, "gram": 1e-4, "peft": 0.02}
Phases = dict[str, float]


class Ours:
    """Our step, by the engine's public functions, on all layer inputs."""

    def __init__(self, point: Point, device: torch.device, data: list[Tokens], method: str) -> None:
        plan = point.plan(method)
        self.data, self.device = data, device
        self.ranks = [max(1, point.K // 2)] * point.L
        self.streams = [
            InputStream(plan.features, plan.components, plan.width, device, options=Options(method))
            for _ in data
        ]

    def step(self) -> Phases:
        """Take one step; return the seconds of its phases and of the whole step.

        On a GPU two steps are taken: the synchronisation between phases keeps the host from running
        ahead of the device, as it would in real use, so the whole is timed without it.
        """
        phases = self._timed_step(lambda: synchronized_now(self.device))
        if self.device.type == "cuda":
            phases["step"] = self._timed_step(time.perf_counter)["step"]
        return phases

    def _timed_step(self, clock: Callable[[], float]) -> Phases:
        marks = [synchronized_now(self.device)]
        for stream, tokens in zip(self.streams, self.data, strict=True):
            stream.add(tokens.x)
        marks.append(clock())
        folded = fold_streams(self.streams)
        marks.append(clock())
        compare_streams(folded, self.ranks, tau=TAU)
        marks.append(synchronized_now(self.device))
        if len(folded) != len(self.streams):
            raise ArithmeticError(
                f"only {len(folded)} of {len(self.streams)} layer inputs were folded"
            )
        spans = [after - before for before, after in pairwise(marks)]
        phases = dict(zip(("accumulate", "fold", "compare"), spans, strict=True))
        return {**phases, "step": marks[-1] - marks[0]}

    def components(self) -> list[Tensor]:
        """Return the rows found for each layer input.

        Exact streams, too, are judged by the rows that their folds produce: these are what is
        timed, and the final decomposition takes minutes at large D.
        """
        return [s.sketch.basis[: s.components] for s in self.streams if s.sketch]


class Peft:
    """PEFT's step, with the settings and the dtype cast of its EVA hook, on all layer inputs."""

    def __init__(self, point: Point, device: torch.device, data: list[Tokens]) -> None:
        self.data, self.device = data, device
        self.pcas = [
            IncrementalPCA(point.K, copy=True, lowrank=True, lowrank_seed=42) for _ in data
        ]

    def step(self) -> Phases:
        """Take one step; return its duration in seconds."""
        begin = synchronized_now(self.device)
        for pca, tokens in zip(self.pcas, self.data, strict=True):
            before = getattr(pca, "components_", None)
            pca.partial_fit(tokens.x.to(torch.float32))
            if before is not None:
                torch.nn.functional.cosine_similarity(pca.components_, before)
        return {"step": synchronized_now(self.device) - begin}

    def components(self) -> list[Tensor]:
        """Return the rows found for each layer input."""
        return [pca.components_ for pca in self.pcas]


class Forward:
    """The linear layers that read one layer input; times are scaled to all layer inputs."""

    def __init__(self, point: Point, device: torch.device, data: list[Tokens]) -> None:
        self.x, self.count, self.timer = data[0].x, point.L, timer_for(device)
        shape = (OUTPUTS, point.D, point.D)
        self.weights = torch.randn(shape, device=device).mul_(point.D**-0.5).to(self.x.dtype)

    def step(self) -> Phases:
        """Run them; return the seconds scaled to all layer inputs."""
        return {"step": self.count * self.timer.sample(self._run)[0]}

    def _run(self) -> None:
        for weight in self.weights:
            linear(self.x, weight)


def measure(
    point: Point, device: torch.device, dtype: torch.dtype, ceilings: Ceilings, limit: float
) -> dict[str, Any]:
    """Return one row: lost variance and times of every competitor, and the roofline's least time.

    Args:
        point: the size of the step.
        device: where to measure.
        dtype: of the tokens.
        ceilings: of the machine.
        limit: seconds; a competitor whose step would take longer is left out, and all timed rounds
            together take about this long.

    Raises:
        ArithmeticError: a competitor's result is wrong.
    """
    data = [make_tokens(point, device, dtype, seed) for seed in range(point.L)]
    competitors: dict[str, Callable[[], Any]] = {
        "sketch": lambda: Ours(point, device, data, "sketch"),
        "gram": lambda: Ours(point, device, data, "gram"),
        "peft": lambda: Peft(point, device, data),
    }
    row: dict[str, Any] = {
        "width": point.plan().width,
        "floor": floors(point, device, dtype, ceilings),
        "state_bytes": {method: point.state_bytes(method) for method in ("sketch", "gram")},
        "left_out": {},
        "lost": {},
    }
    estimated_seconds = {
        "gram": gram_flops(point) / ceilings.flops_per_second,
        "forward": forward_flops(point) / point.L / ceilings.flops_per_second,
        "peft": _estimate_peft_seconds(point, device, data[:1]),
    }
    for name, seconds in estimated_seconds.items():
        if seconds > limit:
            row["left_out"][name] = f"would take about {seconds:.1f} s"
    running = {}
    for name, make in competitors.items():
        if name not in row["left_out"]:
            running[name] = make()
            row["lost"][name] = check(name, running[name])
    if "forward" not in row["left_out"]:
        running["forward"] = Forward(point, device, data)
    return {**row, "ms": time_alternately(running, limit)}


def check(name: str, competitor: Any) -> float:
    """Take some steps, and return the variance lost relative to the exact answer in float64.

    Raises:
        ArithmeticError: it exceeds the competitor's entry in ``LIMITS``.
    """
    with torch.no_grad():
        for _ in range(CHECK_STEPS):
            competitor.step()
        pairs = zip(competitor.data, competitor.components(), strict=True)
        lost_variances = [tokens.lost(rows) for tokens, rows in pairs]
    for lost in lost_variances:
        if not lost <= LIMITS[name]:  # NaN fails, too
            raise ArithmeticError(f"{name} is wrong: it lost {lost:.1e} of the variance")
    return max(lost_variances)


def time_alternately(running: dict[str, Any], limit: float) -> dict[str, dict[str, Any]]:
    """Run the competitors alternately; return the spread of milliseconds of each one's phases."""
    samples: dict[str, list[Phases]] = {name: [] for name in running}
    with torch.no_grad():
        begin = time.perf_counter()
        for competitor in running.values():
            competitor.step()
        rounds = repetitions(time.perf_counter() - begin, limit, 3, 25)
        for _ in range(rounds):
            for name, competitor in running.items():
                samples[name].append(competitor.step())
    return {
        name: {phase: spread([1e3 * s[phase] for s in phases]) for phase in phases[0]}
        for name, phases in samples.items()
    }


def _estimate_peft_seconds(point: Point, device: torch.device, data: list[Tokens]) -> float:
    """Estimate the seconds of PEFT's step on all layer inputs from its second step on the first.

    Its first step is not typical: it computes in float32, and includes the loading of libraries.
    """
    peft = Peft(point, device, data)
    with torch.no_grad():
        peft.step()
        return point.L * peft.step()["step"]
