"""The tables, sentences and plots of ``quality``, generated from its result file alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..sections import Section
from . import figures
from .statistics import (
    LOSES,
    TIES,
    WINS,
    best_rates,
    chance,
    mean_error,
    steps_to,
    verdict,
    words,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "eva"
CONTROLLED, CONTROL = "lora", "orthonormal"


@dataclass
class Found:
    """The results of a method in a domain.

    Attributes:
        label: of the method.
        rate: the best of the sweep; ``None`` if the method could not be run.
        edge: the rate is the lowest or the highest of the sweep.
        rows: seed -> row on the test split.
        reason: why rows are missing.
    """

    label: str
    rate: float | None = None
    edge: bool = False
    rows: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    reason: str = ""

    def values(self, name: str) -> dict[int, float]:
        """Return seed -> value of field ``name``."""
        return {seed: row[name] for seed, row in self.rows.items()}


def sections(record: Mapping[str, Any]) -> list[Section]:
    """Return a section for the summary, and one for each domain."""
    names = record["settings"]["domains"]
    return [_summary(record), *(_section(record, name) for name in names)]


def find(record: Mapping[str, Any], domain: str) -> dict[str, Found]:
    """Return the results in a domain by method, in the order of the registry."""
    settings, rows = record["settings"], record["rows"]
    rates = best_rates(rows["sweep"])
    swept = settings["domains"][domain]["rates"]
    found = {}
    for method, label in settings["methods"].items():
        mine = [
            row
            for kind in ("final", "sweep")
            for row in rows[kind]
            if row["domain"] == domain and row["method"] == method
        ]
        rate = rates.get((domain, method))
        done = {row["seed"]: row for row in mine if row["on"] == "test" and "error" not in row}
        reasons = [row["error"] for row in mine if "error" in row and row["rate"] in (rate, None)]
        if not done:
            reasons = [row["error"] for row in mine if "error" in row]
        edge = len(swept) > 1 and rate in (swept[0], swept[-1])
        found[method] = Found(label, rate, edge, done, reasons[0] if reasons else "")
    return found


def target(found: Mapping[str, Found]) -> float | None:
    """Return the loss up to which steps are counted: plain LoRA's final loss, mean over seeds."""
    plain = found.get(CONTROLLED)
    return mean_error(list(plain.values("loss").values()))[0] if plain and plain.rows else None


def verdicts(found: Mapping[str, Found], name: str, lower: bool) -> dict[str, str]:
    """Return method -> the verdict of EVA against it, by field ``name`` of the rows."""
    if OURS not in found or not found[OURS].rows:
        return {}
    ours = found[OURS].values(name)
    return {
        method: verdict(ours, other.values(name), lower)
        for method, other in found.items()
        if method != OURS and other.rows
    }


def _section(record: Mapping[str, Any], domain: str) -> Section:
    settings = record["settings"]
    recipe = settings["domains"][domain]
    found = find(record, domain)
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
    by_loss, by_score = verdicts(found, "loss", True), verdicts(found, "score", False)
    goal = target(found)
    rows = [
        _row(one, by_loss.get(method, ""), by_score.get(method, ""), base, goal)
        for method, one in found.items()
    ]
    text = [recipe["what"], _before(base, recipe), _words(found, recipe), _control(found)]
    return Section(
        title=recipe["title"],
        text="\n\n".join(part for part in text if part),
        headers=headers,
        rows=rows,
        figures=_figures(domain, recipe, found, goal),
        notes=_notes(recipe, settings, found),
    )


def _row(
    one: Found, by_loss: str, by_score: str, base: Mapping[str, Any], goal: float | None
) -> list[str]:
    if not one.rows:
        return [one.label, "-", "-", one.reason or "not run", *["-"] * 6]
    some = next(iter(one.rows.values()))
    changes = [
        {seed: value - base[name] for seed, value in one.values(name).items()}
        for name in ("old_loss", "old_score")
    ]
    return [
        one.label,
        f"{one.rate:g}{' *' if one.edge else ''}",
        f"{some['parameters']:,}",
        _plus_minus(one.values("loss")),
        by_loss,
        _plus_minus(one.values("score")),
        by_score,
        steps(one, goal),
        *(_plus_minus(change, "+") for change in changes),
    ]


def _plus_minus(values: Mapping[int, float], sign: str = "") -> str:
    mean, error = mean_error(list(values.values()))
    return f"{mean:{sign}.3f}" + (f" ± {error:.3f}" if error is not None else "")


def steps(one: Found, goal: float | None) -> str:
    """Return the mean number of steps to a loss over the seeds that reach it, and their count."""
    if goal is None:
        return "-"
    reached = [s for row in one.rows.values() if (s := steps_to(row["curve"], goal)) is not None]
    if not reached:
        return "never"
    count = f" ({len(reached)} of {len(one.rows)})" if len(reached) < len(one.rows) else ""
    return f"{sum(reached) / len(reached):.1f}{count}"


def _before(base: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    return (
        f"Before the adaptation: {recipe['loss']} {base['loss']:.3f}, {recipe['score']} "
        f"{base['score']:.3f}; on the old task {base['old_loss']:.3f} and {base['old_score']:.3f} "
        f"({recipe['old']})."
    )


def _words(found: Mapping[str, Found], recipe: Mapping[str, Any]) -> str:
    """Return sentences that say where EVA wins, ties and loses."""
    if OURS not in found or not found[OURS].rows:
        return "EVA of this package was not run, so nothing is compared with it."
    measures = [
        (recipe["loss"], verdicts(found, "loss", True)),
        (recipe["score"], verdicts(found, "score", False)),
        ("what is forgotten of the old task (its loss)", verdicts(found, "old_loss", True)),
    ]
    subject = found[OURS].label
    return "\n\n".join(
        words(subject, measure, {found[method].label: told for method, told in told_of.items()})
        for measure, told_of in measures
        if told_of
    )


def _control(found: Mapping[str, Found]) -> str:
    """Say how much of the difference between plain LoRA and EVA the control accounts for."""
    if not all(name in found and found[name].rows for name in (OURS, CONTROL, CONTROLLED)):
        return ""
    plain, control, ours = (
        mean_error(list(found[name].values("loss").values()))[0]
        for name in (CONTROLLED, CONTROL, OURS)
    )
    return (
        "Control of the scale: random orthonormal rows have the length of EVA's. From plain LoRA's "
        f"loss to theirs it is {control - plain:+.3f}, from theirs to EVA's {ours - control:+.3f}."
    )


def _notes(
    recipe: Mapping[str, Any], settings: Mapping[str, Any], found: Mapping[str, Found]
) -> str:
    rates = ", ".join(f"{rate:g}" for rate in recipe["rates"])
    seeds, swept = settings["seeds"], settings["sweep_seeds"]
    edges = [one.label for one in found.values() if one.edge]
    edge = f" * the best rate is at the edge of the sweep: {', '.join(edges)}." if edges else ""
    failed = "; ".join(
        f"{one.label}: {len(one.rows)} of {len(seeds)} seeds ({one.reason})"
        for one in found.values()
        if one.rows and len(one.rows) < len(seeds)
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
        f"that by chance in {chance(len(seeds)):.0%} of the cases. Steps to LoRA's loss: "
        "to the mean loss at the end of plain LoRA, interpolated, mean over the seeds that reach "
        "it. Old loss, old score: change on the old task; it grows with the rate, too. PEFT's EVA "
        "is given functions of its own where the inputs are no text, and no labels of sentences, "
        f"or else it does not run; both EVAs end after {settings['most_forwards']} forward passes "
        f"at most.{edge}" + (f" Failed: {failed}." if failed else "")
    )


def _summary(record: Mapping[str, Any]) -> Section:
    settings = record["settings"]
    names = list(settings["domains"])
    all_found = {name: find(record, name) for name in names}
    cells: dict[str, list[str]] = {}
    counts = dict.fromkeys((WINS, TIES, LOSES), 0)
    by = {
        name: (verdicts(found, "loss", True), verdicts(found, "score", False))
        for name, found in all_found.items()
    }
    for told_of in by.values():
        for told in [*told_of[0].values(), *told_of[1].values()]:
            if told in counts:
                counts[told] += 1
    for method, label in settings["methods"].items():
        cells[label] = [
            _cell(all_found[name][method], by[name][0].get(method), by[name][1].get(method))
            for name in names
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
    return Section("Quality after fine-tuning", text, ["", *titles], _rows(cells), notes=notes)


def _rows(cells: Mapping[str, Sequence[str]]) -> list[list[str]]:
    return [[label, *values] for label, values in cells.items()]


def _cell(one: Found, by_loss: str | None, by_score: str | None) -> str:
    if not one.rows:
        return "not run"
    loss, score = (mean_error(list(one.values(name).values()))[0] for name in ("loss", "score"))
    told = f" ({by_loss}, {by_score})" if by_loss and by_score else ""
    return f"{loss:.3f}, {score:.3f}{told}"


def _figures(
    domain: str, recipe: Mapping[str, Any], found: Mapping[str, Found], goal: float | None
) -> dict[str, Callable[[], Figure]]:
    ends = {one.label: one.values("loss") for one in found.values() if one.rows}
    curves = {
        method: (one.label, [row["curve"] for row in one.rows.values()])
        for method, one in found.items()
        if one.rows
    }
    if not ends:
        return {}
    ours = found[OURS].label if OURS in found else None
    return {
        f"quality-{domain}-ends": functools.partial(figures.ends, ends, ours, recipe["loss"]),
        f"quality-{domain}-curves": functools.partial(
            figures.curves, curves, (OURS, CONTROLLED, CONTROL), goal, recipe["loss"]
        ),
    }
