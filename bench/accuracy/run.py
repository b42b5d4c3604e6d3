"""Run every method on every stream, and compare with exact PCA at checkpoints."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from .. import minilm
from ..common import RESULTS, spread
from ..rows import Rows
from . import inputs
from .exact import ExactPCA, Truth, rank_errors
from .inputs import Inputs, Sizes
from .methods import METHODS, Answer, Method, Running, check_all

RANK, COMPONENTS = 16, 32  # r, and K = r rho


@dataclass(frozen=True)
class Preset:
    """The extent of a run; checkpoints are numbers of steps."""

    sizes: Sizes
    checkpoints: Sequence[int]
    synthetic_checkpoints: Sequence[int]


_LABELS = list(inputs.LAYERS)
PRESETS = {
    "quick": Preset(Sizes(_LABELS[:7], 16, 2048, 512, 12), (1, 2, 4, 8, 16), (1, 3, 6, 12)),
    "full": Preset(Sizes(_LABELS, 46, 4096, 1024, 16), (1, 2, 4, 8, 16, 32, 46), (1, 4, 8, 16)),
}


def run(preset: str = "quick", out: Path = RESULTS, quiet: bool = False) -> Path:
    """Measure and save ``accuracy.json``.

    Args:
        preset: ``"quick"`` (three minutes) or ``"full"`` (eight) on two cores.
        out: folder of the results.
        quiet: show no progress bar.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    settings = {
        "preset": preset,
        "components": COMPONENTS,
        "rank": RANK,
        **asdict(chosen),
        "labels": {name: method.label for name, method in METHODS.items()},
    }
    rows = Rows("accuracy", settings, out, quiet)
    faults, streams = check_all(METHODS), Inputs(chosen.sizes)
    verified_methods = {name: method for name, method in METHODS.items() if name not in faults}

    def measure_input(key: Mapping[str, Any]) -> dict[str, Any]:
        synthetic = key["input"] == inputs.SYNTHETIC
        checkpoints = chosen.synthetic_checkpoints if synthetic else chosen.checkpoints
        _, tokens_by_step = streams.steps(key["input"])
        return {
            "synthetic": synthetic,
            **measure(tokens_by_step, verified_methods, COMPONENTS, checkpoints),
        }

    measured = rows.make([{"input": label} for label in chosen.sizes.labels], measure_input)
    measured_real = [row for row in measured if "error" not in row and not row["synthetic"]]
    ranks = rank_errors(measured_real, RANK)
    without_ratios = [_without_ratios(row) for row in measured]
    return rows.finish({"inputs": without_ratios, "ranks": ranks, "refused": faults})


def _without_ratios(value: Any) -> Any:
    """Drop the ratios: nine tenths of the file, and no longer needed once ranks are computed."""
    if isinstance(value, Mapping):
        return {k: _without_ratios(entry) for k, entry in value.items() if k != "ratios"}
    return [_without_ratios(entry) for entry in value] if isinstance(value, list) else value


def measure(
    tokens_by_step: Iterable[Tensor],
    methods: Mapping[str, Method],
    components: int,
    checkpoints: Sequence[int],
) -> dict[str, Any]:
    """Run all methods on one stream, alternating step by step.

    Args:
        tokens_by_step: tokens of each step, (N, D) float32.
        methods: name -> method.
        components: K.
        checkpoints: steps (1, 2, ...) after which they are compared with exact PCA.

    Returns:
        ``features``, ``tokens`` per step, ``steps``; ``exact``: by checkpoint, the tokens so far
        and the exact ratios; ``methods``: by name, the milliseconds per step, without the first (a
        start-up: a first basis, a full decomposition), and of the last answer, and by checkpoint
        the lost variance, the ratios, and the relative error of the ratio of component K.
    """
    tokens_by_step = iter(tokens_by_step)
    first = next(tokens_by_step)
    features, exact = first.shape[1], ExactPCA(first.shape[1])
    running = {name: method.start(features, components) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    record: dict[str, Any] = {"features": features, "tokens": len(first), "exact": []}
    results: dict[str, dict[str, Any]] = {name: {"points": []} for name in methods}
    # numpy's BLAS gets as many threads as torch, whatever the environment says
    with torch.no_grad(), threadpool_limits(torch.get_num_threads(), user_api="blas"):
        for step, x in enumerate(chain([first], tokens_by_step), 1):
            exact.add(x)
            for name in _shuffled(list(running), step):
                seconds[name].append(_step_seconds(running[name], x))
            record["steps"] = step
            if step in checkpoints:
                truth = exact.solve(components)
                checkpoint = {"step": step, "tokens": exact.count}
                record["exact"].append({**checkpoint, "ratios": truth.ratios.tolist()})
                for name, instance in running.items():
                    begin = time.perf_counter()
                    answer = instance.answer()
                    results[name]["answer_ms"] = 1e3 * (time.perf_counter() - begin)
                    results[name]["points"].append({**checkpoint, **compare(answer, truth)})
    for name, step_seconds in seconds.items():
        results[name]["ms"] = spread([1e3 * value for value in step_seconds[1:] or step_seconds])
    return {**record, "methods": results}


def compare(answer: Answer, truth: Truth) -> dict[str, Any]:
    """Return lost variance, ratios, and the relative error of the ratio of component K.

    The error is negative if a method underestimates the ratio.
    """
    lost = minilm.lost_variance(answer.components, truth.covariance, truth.spectrum)
    last_ratio = float(truth.ratios[-1])
    error = float(answer.ratios[-1]) / last_ratio - 1 if last_ratio > 0 else None
    return {"lost": lost, "ratio_error": error, "ratios": answer.ratios.tolist()}


def _shuffled(names: Sequence[str], step: int) -> list[str]:
    """Return the names in a random order seeded by ``step``, so that all share the disadvantages.

    The first method finds the tokens in cold caches, and the one after scikit-learn shares the
    cores with BLAS threads of numpy that still spin.
    """
    return random.Random(step).sample(names, len(names))


def _step_seconds(running: Running, x: Tensor) -> float:
    begin = time.perf_counter()
    running.step(x)
    return time.perf_counter() - begin
