"""Means, standard errors and verdicts over seeds; number of steps to a loss."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student

MIN_SEEDS = 3  # least number of seeds for a verdict
WINS, TIES, LOSES, UNKNOWN = "wins", "ties", "loses", "too few seeds"
BySeed = Mapping[int, float]


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, ``None`` for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def verdict(ours: BySeed, theirs: BySeed, lower_is_better: bool) -> str:
    """Say whether we win, tie or lose: a tie is a difference within two of its standard errors.

    Runs with the same seed share new head, calibration data and batches, so differences are paired
    by seed.

    Args:
        ours, theirs: seed -> value; seeds that only one of them has are ignored.
        lower_is_better: lower values are better.
    """
    gains = [
        (theirs[s] - ours[s]) * (1 if lower_is_better else -1) for s in sorted(ours) if s in theirs
    ]
    if len(gains) < MIN_SEEDS:
        return UNKNOWN
    mean, error = mean_error(gains)
    assert error is not None
    if abs(mean) <= 2 * error or mean == 0:
        return TIES
    return WINS if mean > 0 else LOSES


def best_rates(sweep: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Return (domain, method) -> the rate with the lowest mean validation loss.

    Rates at which any seed failed are excluded; methods with no rate left are not in the result.
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
    """Return the step at which a loss first is at or below a target, linearly interpolated.

    Args:
        curve: (step, loss) pairs, by step.
        target: loss to reach.
    """
    previous_point: Sequence[float] | None = None
    for step, loss in curve:
        if loss <= target:
            if previous_point is None:
                return float(step)
            share = (previous_point[1] - target) / (previous_point[1] - loss)
            return previous_point[0] + share * (step - previous_point[0])
        previous_point = (step, loss)
    return None


def false_alarm_rate(seeds: int) -> float:
    """Return the probability that equal methods differ by more than two standard errors.

    This is the two-sided tail beyond 2 of Student's t-distribution with ``seeds - 1`` degrees of
    freedom.
    """
    return float(2 * student.sf(2, seeds - 1))


def verdict_text(subject: str, measure: str, verdicts: Mapping[str, str]) -> str:
    """Return a paragraph that says against which methods the subject wins, ties and loses.

    Args:
        subject: name of the method.
        measure: the quantity compared.
        verdicts: name of the other method -> verdict; names may contain commas.
    """
    parts = []
    for kind, verb in (
        (WINS, "wins against"),
        (TIES, "ties with"),
        (LOSES, "loses to"),
        (UNKNOWN, "has too few seeds for a verdict against"),
    ):
        names = [name for name, outcome in verdicts.items() if outcome == kind]
        if names or kind != UNKNOWN:
            parts.append(f"{verb} {'; '.join(names) if names else 'none'}.")
    return f"By {measure}, {subject} {' It '.join(parts)}"
