"""Means, standard errors and verdicts over seeds; steps to a loss."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student

FEWEST = 3  # seeds, below which no verdict is given
WINS, TIES, LOSES, UNKNOWN = "wins", "ties", "loses", "too few seeds"
BySeed = Mapping[int, float]


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, which one value has not."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def verdict(ours: BySeed, theirs: BySeed, lower: bool) -> str:
    """Say what we do against them: a tie is a difference within two of its standard errors.

    Runs of one seed share new head, calibration data and batches, so the differences are taken seed
    by seed.

    Args:
        ours, theirs: seed -> value; seeds that only one has are left out.
        lower: the lower value is the better one.
    """
    gains = [(theirs[s] - ours[s]) * (1 if lower else -1) for s in sorted(ours) if s in theirs]
    if len(gains) < FEWEST:
        return UNKNOWN
    mean, error = mean_error(gains)
    assert error is not None
    if abs(mean) <= 2 * error or mean == 0:
        return TIES
    return WINS if mean > 0 else LOSES


def best_rates(sweep: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Return (domain, method) -> the rate with the lowest mean validation loss.

    A rate at which any seed failed is out; a method of which all rates are is not in the result.
    """
    losses: dict[tuple[str, str], dict[float, list[float | None]]] = defaultdict(dict)
    for row in sweep:
        rates = losses[row["domain"], row["method"]]
        rates.setdefault(row["rate"], []).append(None if "error" in row else row["loss"])
    best = {}
    for key, rates in losses.items():
        means = {
            rate: statistics.fmean(x for x in values if x is not None)
            for rate, values in rates.items()
            if None not in values
        }
        if means:
            best[key] = min(means, key=lambda rate: (means[rate], rate))
    return best


def steps_to(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """Return where a loss first is at or below a target, by linear interpolation.

    Args:
        curve: (step, loss), by step.
        target: loss.
    """
    before: Sequence[float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def chance(seeds: int) -> float:
    """Return how often methods that do not differ are told apart by two standard errors.

    The tail of Student's distribution beyond 2 on both sides, with ``seeds - 1`` degrees of
    freedom.
    """
    return float(2 * student.sf(2, seeds - 1))


def words(subject: str, measure: str, verdicts: Mapping[str, str]) -> str:
    """Return a paragraph that says against whom something wins, ties and loses.

    Args:
        subject: its name.
        measure: what was compared.
        verdicts: name of another -> verdict; names may hold commas.
    """
    parts = []
    for kind, verb in (
        (WINS, "wins against"),
        (TIES, "ties with"),
        (LOSES, "loses to"),
        (UNKNOWN, "has too few seeds for a verdict against"),
    ):
        names = [name for name, told in verdicts.items() if told == kind]
        if names or kind != UNKNOWN:
            parts.append(f"{verb} {'; '.join(names) if names else 'none'}.")
    return f"By {measure}, {subject} {' It '.join(parts)}"
