"""The tables, sentences and plots of ``quality``, generated from its result file alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..sections import Section
from . import figures
from .statistics import (
    LOSES,
    TIES,
    WINS,
    best_rates,
    false_alarm_rate,
    mean_error,
    steps_to,
    verdict,
    verdict_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "eva"
CONTROLLED, CONTROL = "lora", "orthonormal"


@dataclass
class MethodResults:
    """The results of a method in a domain.

    Attributes:
        label: of the method.
        rate: the best of the sweep; ``None`` if the method could not be run.
        at_edge: the rate is the lowest or the highest of the sweep.
        rows: seed -> row on the test split.
        reason: why rows are missing.
    """

    label: str
    rate: float | None = None
    at_edge: bool = False
    rows: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    reason: str = ""

    def values(self, name: str) -> dict[int, float]:
        """Return seed -> value of field ``name``."""
        return {seed: row[name] for seed, row in self.rows.items()}


def sections(record: Mapping[str, Any]) -> list[Section]:
    """Return a section for the summary, and one for each domain."""
    names = record["settings"]["domains"]
    return [_summary(record), *(_section(record, name) for name in names)]


def results_by_method(record: Mapping[str, Any], domain: str) -> dict[str, MethodResults]:
    """Return the results in a domain by method, in the order of the registry."""
    settings, rows = record["settings"], record["rows"]
    rates = best_rates(rows["sweep"])
    swept = settings["domains"][domain]["rates"]
    by_method = {}
    for method, label in settings["methods"].items():
        method_rows = [
            row
            for kind in ("final", "sweep")
            for row in rows[kind]
            if row["domain"] == domain and row["method"] == method
        ]
        rate = rates.get((domain, method))
        tested = {
            row["seed"]: row for row in method_rows if row["on"] == "test" and "error" not in row
        }
        reasons = [
            row["error"] for row in method_rows if "error" in row and row["rate"] in (rate, None)
        ]
        if not tested:
            reasons = [row["error"] for row in method_rows if "error" in row]
        at_edge = len(swept) > 1 and rate in (swept[0], swept[-1])
        by_method[method] = MethodResults(
            label, rate, at_edge, tested, reasons[0] if reasons else ""
        )
    return by_method


def target_loss(by_method: Mapping[str, MethodResults]) -> float | None:
    """Return the loss up to which steps are counted: plain LoRA's final loss, mean over seeds."""
    plain = by_method.get(CONTROLLED)
    return mean_error(list(plain.values("loss").values()))[0] if plain and plain.rows else None


def verdicts(
    by_method: Mapping[str, MethodResults], name: str, lower_is_better: bool
) -> dict[str, str]:
    """Return method -> the verdict of EVA against it, by field ``name`` of the rows."""
    if OURS not in by_method or not by_method[OURS].rows:
        return {}
    ours = by_method[OURS].values(name)
    return {
        method: verdict(ours, other.values(name), lower_is_better)
        for method, other in by_method.items()
        if method != OURS and other.rows
    }


def _section(record: Mapping[str, Any], domain: str) -> Section:
    settings = record["settings"]
    recipe = settings["domains"][domain]
    by_method = results_by_method(record, domain)
    base = next(row for row in record["rows"]["bases"] if row["domain"] == domain)
    if "error" in base:
        return Section(recipe["title"], f"{recipe['what']}\n\nThis did not run: {base['error']}")
    headers = [
        "initialisation",
        "rate",
        "trained",
        recipe["loss"],
        "EVA by it",
        recipe["score"],
        "EVA by it",
        "steps to LoRA's loss",
        "old loss",
        "old score",
    ]
    by_loss, by_score = verdicts(by_method, "loss", True), verdicts(by_method, "score", False)
    loss_target = target_loss(by_method)
    rows = [
        _row(results, by_loss.get(method, ""), by_score.get(method, ""), base, loss_target)
        for method, results in by_method.items()
    ]
    text = [
        recipe["what"],
        _before_text(base, recipe),
        _comparison_text(by_method, recipe),
        _control_text(by_method),
    ]
    return Section(
        title=recipe["title"],
        text="\n\n".join(part for part in text if part),
        headers=headers,
        rows=rows,
        figures=_figures(domain, recipe, by_method, loss_target),
        notes=_notes(recipe, settings, by_method),
    )


def _row(
    results: MethodResults,
    by_loss: str,
    by_score: str,
    base: Mapping[str, Any],
    loss_target: float | None,
) -> list[str]:
    if not results.rows:
        return [results.label, "-", "-", results.reason or "not run", *["-"] * 6]
    any_row = next(iter(results.rows.values()))
    changes = [
        {seed: value - base[name] for seed, value in results.values(name).items()}
        for name in ("old_loss", "old_score")
    ]
    return [
        results.label,
        f"{results.rate:g}{' *' if results.at_edge else ''}",
        f"{any_row['parameters']:,}",
        _plus_minus(results.values("loss")),
        by_loss,
        _plus_minus(results.values("score")),
        by_score,
        steps(results, loss_target),
        *(_plus_minus(change, "+") for change in changes),
    ]


def _plus_minus(values: Mapping[int, float], sign: str = "") -> str:
    mean, error = mean_error(list(values.values()))
    return f"{mean:{sign}.3f}" + (f" ± {error:.3f}" if error is not None else "")


def steps(results: MethodResults, loss_target: float | None) -> str:
    """Return the mean number of steps to a loss over the seeds that reach it, and their count."""
    if loss_target is None:
        return "-"
    reached = [
        s for row in results.rows.values() if (s := steps_to(row["curve"], loss_target)) is not None
    ]
    if not reached:
        return "never"
    count = f" ({len(reached)} of {len(results.rows)})" if len(reached) < len(results.rows) else ""
    return f"{sum(reached) / len(reached):.1f}{count}"


def _before_text(base: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    return (
        f"Before the adaptation: {recipe['loss']} {base['loss']:.3f}, {recipe['score']} "
        f"{base['score']:.3f}; on the old task {base['old_loss']:.3f} and {base['old_score']:.3f} "
        f"({recipe['old']})."
    )


def _comparison_text(by_method: Mapping[str, MethodResults], recipe: Mapping[str, Any]) -> str:
    """Return sentences that say where EVA wins, ties and loses."""
    if OURS not in by_method or not by_method[OURS].rows:
        return "EVA of this package was not run, so nothing is compared with it."
    measures = [
        (recipe["loss"], verdicts(by_method, "loss", True)),
        (recipe["score"], verdicts(by_method, "score", False)),
        ("what is forgotten of the old task (its loss)", verdicts(by_method, "old_loss", True)),
    ]
    subject = by_method[OURS].label
    return "\n\n".join(
        verdict_text(
            subject,
            measure,
            {by_method[method].label: outcome for method, outcome in verdict_of.items()},
        )
        for measure, verdict_of in measures
        if verdict_of
    )


def _control_text(by_method: Mapping[str, MethodResults]) -> str:
    """Say how much of the difference between plain LoRA and EVA the control accounts for."""
    if not all(name in by_method and by_method[name].rows for name in (OURS, CONTROL, CONTROLLED)):
        return ""
    plain, control, ours = (
        mean_error(list(by_method[name].values("loss").values()))[0]
        for name in (CONTROLLED, CONTROL, OURS)
    )
    return (
        "Control of the scale: random orthonormal rows have the length of EVA's. From plain LoRA's "
        f"loss to theirs it is {control - plain:+.3f}, from theirs to EVA's {ours - control:+.3f}."
    )


def _notes(
    recipe: Mapping[str, Any], settings: Mapping[str, Any], by_method: Mapping[str, MethodResults]
) -> str:
    rates = ", ".join(f"{rate:g}" for rate in recipe["rates"])
    seeds, swept = settings["seeds"], settings["sweep_seeds"]
    edges = [results.label for results in by_method.values() if results.at_edge]
    at_edge = f" * the best rate is at the edge of the sweep: {', '.join(edges)}." if edges else ""
    failed = "; ".join(
        f"{results.label}: {len(results.rows)} of {len(seeds)} seeds ({results.reason})"
        for results in by_method.values()
        if results.rows and len(results.rows) < len(seeds)
    )
    return (
        f"{recipe['steps']} steps of {recipe['batch']} samples, rank {recipe['r']} in every layer "
        "(moved between layers by EVA and AdaLoRA, which begins with half as much again); all "
        "have the same batches, schedule and calibration data, which are "
        f"{recipe['calibration']} batches of the training split, drawn by the seed as are "
        f"initialisation and order. Rates {rates}, chosen by the loss on the validation split, "
        f"seeds {', '.join(map(str, swept))}; then {len(seeds)} seeds on the test split: mean ± "
        "standard error. EVA by it: what EVA of this package does against the row, a tie being "
        "a difference within two of its standard errors, taken seed by seed; so few seeds exceed "
        f"that by chance in {false_alarm_rate(len(seeds)):.0%} of the cases. Steps to LoRA's loss: "
        "to the mean loss at the end of plain LoRA, interpolated, mean over the seeds that reach "
        "it. Old loss, old score: change on the old task; it grows with the rate, too. PEFT's EVA "
        "is given functions of its own where the inputs are no text, and no labels of sentences, "
        f"or else it does not run; both EVAs end after {settings['most_forwards']} forward passes "
        f"at most.{at_edge}" + (f" Failed: {failed}." if failed else "")
    )


def _summary(record: Mapping[str, Any]) -> Section:
    settings = record["settings"]
    names = list(settings["domains"])
    results_by_domain = {name: results_by_method(record, name) for name in names}
    counts = dict.fromkeys((WINS, TIES, LOSES), 0)
    verdicts_by_domain = {
        name: (verdicts(by_method, "loss", True), verdicts(by_method, "score", False))
        for name, by_method in results_by_domain.items()
    }
    for by_loss, by_score in verdicts_by_domain.values():
        for outcome in [*by_loss.values(), *by_score.values()]:
            if outcome in counts:
                counts[outcome] += 1
    rows = [
        [
            label,
            *(
                _cell(results_by_domain[name][method], by_loss.get(method), by_score.get(method))
                for name, (by_loss, by_score) in verdicts_by_domain.items()
            ),
        ]
        for method, label in settings["methods"].items()
    ]
    titles = [settings["domains"][name]["title"] for name in names]
    text = (
        "Fine-tuning that differs in nothing but the initialisation and its best learning rate. "
        f"Over {len(names)} domains, both measures and all other methods, EVA of this package "
        f"wins {counts[WINS]} times, ties {counts[TIES]} times and loses {counts[LOSES]} times."
    )
    notes = (
        "Mean loss and score on the test split; in brackets what EVA does against the row by "
        f"either. Preset {settings['preset']}, data {settings['data']}, seeds "
        f"{', '.join(map(str, settings['seeds']))}. The models are small and the runs short: this "
        "says which initialisation learns fast here, not what large models do."
    )
    return Section("Quality after fine-tuning", text, ["", *titles], rows, notes=notes)


def _cell(results: MethodResults, by_loss: str | None, by_score: str | None) -> str:
    if not results.rows:
        return "not run"
    loss, score = (mean_error(list(results.values(name).values()))[0] for name in ("loss", "score"))
    in_brackets = f" ({by_loss}, {by_score})" if by_loss and by_score else ""
    return f"{loss:.3f}, {score:.3f}{in_brackets}"


def _figures(
    domain: str,
    recipe: Mapping[str, Any],
    by_method: Mapping[str, MethodResults],
    loss_target: float | None,
) -> dict[str, Callable[[], Figure]]:
    ends = {results.label: results.values("loss") for results in by_method.values() if results.rows}
    curves = {
        method: (results.label, [row["curve"] for row in results.rows.values()])
        for method, results in by_method.items()
        if results.rows
    }
    if not ends:
        return {}
    ours = by_method[OURS].label if OURS in by_method else None
    return {
        f"quality-{domain}-ends": functools.partial(
            figures.plot_final_losses, ends, ours, recipe["loss"]
        ),
        f"quality-{domain}-curves": functools.partial(
            figures.plot_loss_curves,
            curves,
            (OURS, CONTROLLED, CONTROL),
            loss_target,
            recipe["loss"],
        ),
    }
