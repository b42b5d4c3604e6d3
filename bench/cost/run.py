"""Run every method in a fresh process, and keep the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common import RESULTS, spread
from ..methods import METHODS
from ..processes import ask_child
from ..rows import Rows
from .configs import CONFIGS, Config

START_SECONDS = 120.0  # to load the libraries and the model


def row_keys(config: Config, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return the keys of the rows: data-driven methods have a row for every batch size."""
    keys = []
    for name in methods:
        method = METHODS[name]
        sizes: tuple[int, ...] = config.batches if method.reads_data else config.batches[:1]
        if method.one_sample:
            sizes = (1,)
        keys += [{"method": name, "batch": size} for size in sizes]
    return keys


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return a row: medians and spread over the repetitions of one process."""
    runs = result.pop("runs")
    phases = list(dict.fromkeys(name for run in runs for name in run["seconds"]))
    init = [sum(run["seconds"].get(p, 0.0) for p in ("collect", "solve", "apply")) for run in runs]
    return {
        **result,
        "repeats": len(runs),
        "seconds": {p: spread([run["seconds"].get(p, 0.0) for run in runs]) for p in phases},
        "init_s": spread(init),
        "train_step_s": runs[0]["train_step_s"],
        **{
            name: spread([float(run[name]) for run in runs])
            for name in ("init_peak", "init_reserved")
        },
        "first_step_peak": spread([float(run["peaks"]["first step"]) for run in runs]),
        "forwards": runs[0]["forwards"],
        "tokens": runs[0]["tokens"],
    }


def measure_row(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row that answers a question, see ``measure_method`` in ``__main__.py``."""
    limit = START_SECONDS + 20 * CONFIGS[question["config"]].seconds
    return summary(ask_child("bench.cost", question, limit))


def run(
    name: str = "tiny",
    out: Path = RESULTS,
    methods: Sequence[str] | None = None,
    quiet: bool = False,
) -> Path:
    """Measure a configuration.

    Args:
        name: of the configuration.
        out: folder of the results; the file is ``cost-NAME.json``.
        methods: names in ``METHODS``; all if ``None``.
        quiet: show no progress bar.

    Raises:
        RuntimeError: it needs a GPU, and there is none.
    """
    config = CONFIGS[name]
    config.device()
    real = config.has_weights()
    settings = {
        "config": name,
        "weights": "of the hub" if real else "random",
        "samples": config.samples,
        "length": config.length,
        "passes": config.passes,
        "epoch": config.epoch,
        "train_batch": config.train_batch,
        "r": config.r,
        "dtype": str(config.dtype).removeprefix("torch."),
        "model": _model_shape(config),
    }

    def measure(key: Any) -> dict[str, Any]:
        return measure_row({**key, "config": name, "real": real})

    rows = Rows(f"cost-{name}", settings, out, quiet)
    return rows.finish(rows.make(row_keys(config, methods or list(METHODS)), measure))


def _model_shape(config: Config) -> dict[str, int]:
    model_config = config.make_config()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {name: getattr(model_config, name) for name in names}
