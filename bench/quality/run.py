"""The part ``quality``: learning-rate sweep on validation splits, then seeds on test splits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..methods import METHODS
from ..rows import Rows
from . import training
from .domain import Domain, Recipe
from .domains import ON_REQUEST, RECIPES, domain
from .statistics import best_rates
from .workers import Workers

VARIANTS = ("eva-sketch", "eva-gram", "eva-freeze")  # of one method; run only on request
DATA = ("embedded", "hub")


@dataclass(frozen=True)
class Preset:
    """The extent of a run.

    Attributes:
        rates: slice of a recipe's rates.
        sweep_seeds: for choosing the rate; disjoint from ``seeds``.
        seeds: for the comparison.
        step_divisor: divisor of a recipe's steps, but not of the steps between evaluations.
    """

    rates: slice
    sweep_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    step_divisor: int = 1


PRESETS = {
    "quick": Preset(slice(2, 4), (100,), (0, 1, 2), step_divisor=2),
    "full": Preset(slice(None), (100, 101), (0, 1, 2, 3, 4)),
}


def run(
    preset: str,
    out: Path,
    domains: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    quiet: bool = False,
    data: str = "embedded",
    workers: int | None = None,
) -> None:
    """Write ``quality.json``; resume an interrupted run with the same settings.

    Args:
        preset: name in ``PRESETS``.
        out: folder of the results.
        domains, methods: if ``None``, all except variants and those run on request.
        quiet: show no progress bar.
        data: ``"embedded"``, or ``"hub"`` for the data sets of ``hub``.
        workers: number of processes, one per core if ``None``; 0 runs in this process, as a domain
            run on request always does.
    """
    _check_known("preset", [preset], PRESETS)
    run_preset(preset, PRESETS[preset], out, domains, methods, quiet, data, workers)


def run_preset(
    name: str,
    preset: Preset,
    out: Path,
    domains: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    quiet: bool = False,
    data: str = "embedded",
    workers: int | None = None,
) -> None:
    """Like ``run``, for an arbitrary preset."""
    _check_known("data", [data], DATA)
    chosen_domains = _select_names(domains, RECIPES, ON_REQUEST)
    recipes = {name: shortened(RECIPES[name], preset) for name in chosen_domains}
    digests = {name: base_digest(name, data) for name in recipes if name in ON_REQUEST}
    if digests:
        workers = 0  # there is one GPU, and only this process has the base
    chosen_methods = _select_names(methods, METHODS, VARIANTS)
    with Workers(workers) as pool:
        rows = Rows("quality", _settings(name, preset, recipes, chosen_methods, data), out, quiet)

        def make(keys: list[dict[str, Any]]) -> list[Any]:
            keys = [{**key, **digests.get(key["domain"], {})} for key in keys]
            return rows.make(keys, pool.precompute(keys, functools.partial(make_row, preset, data)))

        bases = make([{"domain": name, "base": True} for name in recipes])
        sweep = make(
            [
                {"domain": name, "method": method, "rate": rate, "seed": seed, "on": "validation"}
                for name, recipe in recipes.items()
                for method in chosen_methods
                for rate in recipe.rates
                for seed in preset.sweep_seeds
            ]
        )
        final = make(
            [
                {"domain": name, "method": method, "rate": rate, "seed": seed, "on": "test"}
                for (name, method), rate in best_rates(sweep).items()
                for seed in preset.seeds
            ]
        )
        rows.finish({"bases": bases, "sweep": sweep, "final": final})


def make_row(preset: Preset, data: str, key: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make one row: for a base, or for a fine-tuning evaluated on the split ``key["on"]``."""
    built = domain(key["domain"], data)
    built = dataclasses.replace(built, recipe=shortened(built.recipe, preset))
    if "base" in key:
        return base_row(built)
    final = key["on"] == "test"
    task = built.test if final else built.validation
    return training.fine_tune(built, key["method"], key["rate"], key["seed"], task, curve=final)


def base_digest(name: str, data: str) -> dict[str, str]:
    """Return what identifies the base in row keys: every run trains it anew, never quite the same.

    Thus a resumed run does not reuse the rows of the interrupted run's base.
    """
    digest = hashlib.sha256()
    for tensor in domain(name, data).base.state_dict().values():
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"base_sha256": digest.hexdigest()}


def base_row(built: Domain) -> dict[str, Any]:
    """Evaluate a base before fine-tuning."""
    loss, score = built.test.loss_and_score(built.fresh(0))
    old_loss, old_score = built.old.loss_and_score(built.base)
    return {
        "loss": loss,
        "score": score,
        "old_loss": old_loss,
        "old_score": old_score,
        "parameters": sum(p.numel() for p in built.base.parameters()),
        "layers": len(built.targets),
        "train": len(next(iter(built.train.values()))),
    }


def shortened(recipe: Recipe, preset: Preset) -> Recipe:
    """Return a recipe with the rates and steps of a preset."""
    return dataclasses.replace(
        recipe,
        rates=recipe.rates[preset.rates],
        steps=max(1, recipe.steps // preset.step_divisor),
    )


def _settings(
    name: str, preset: Preset, recipes: Mapping[str, Recipe], methods: Sequence[str], data: str
) -> dict[str, Any]:
    return {
        "preset": name,
        "data": data,
        "sweep_seeds": preset.sweep_seeds,
        "seeds": preset.seeds,
        "rho": training.RHO,
        "most_forwards": training.MAX_FORWARDS,
        "methods": {method: METHODS[method].label for method in methods},
        "domains": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
    }


def _select_names(
    requested: Sequence[str] | None, known: Collection[str], on_request: Sequence[str]
) -> list[str]:
    """Return the requested names, or all but those on request, in the order of the registry."""
    if requested is None:
        return [name for name in known if name not in on_request]
    _check_known("name", requested, known)
    return [name for name in known if name in requested]


def _check_known(what: str, requested: Sequence[str], known: Collection[str]) -> None:
    unknown = [name for name in requested if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")
