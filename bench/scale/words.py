"""Sentences about the cost of a step, generated from the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .fit import crossing
from .work import AXES, Point, rows_along

Row = Mapping[str, Any]
SMALL = 0.1


def milliseconds(row: Row, name: str, phase: str = "step") -> float | None:
    """Return the median time of a competitor's phase; ``None`` if it was left out."""
    found = row["ms"].get(name)
    return None if found is None else float(found[phase]["median"])


def end_of_step(row: Row) -> float:
    """Return the milliseconds of fold and comparison together."""
    phases = row["ms"]["sketch"]
    return float(phases["fold"]["median"] + phases["compare"]["median"])


def crossovers(base: Point, rows: Sequence[Row]) -> list[str]:
    """Return the sentences that say where the order of two costs changes, if it does."""
    lines = {axis: rows_along(axis, base, rows) for axis in AXES}
    return [
        *_compare_text(lines, "gram", "exact Gram", ("D", "N", "K")),
        *_compare_text(lines, "peft", "PEFT's step", ("D", "N", "L", "K")),
        *_fold_text(lines["N"]),
        *_forward_text(lines),
        *_state_text(base),
        *_layers_text(lines["L"]),
        *_roofline_text(base, rows),
    ]


def _compare_text(
    lines: Mapping[str, Sequence[Row]], name: str, label: str, axes: Sequence[str]
) -> list[str]:
    """Say where our step is faster than a competitor, along some axes."""
    parts, ratios = [], []
    for axis in axes:
        xs, ours, theirs = _measured_pairs(lines[axis], axis, name)
        if xs:
            parts.append(crossing(xs, ours, theirs).text(axis))
            ratios += [b / a for a, b in zip(ours, theirs, strict=True)]
    if not parts:
        return [f"{_capitalized(label)} was not measured anywhere."]
    return [
        f"The sketch's step is faster than {label} {'; '.join(parts)}. {_capitalized(label)} takes "
        f"{min(ratios):.2g} to {max(ratios):.2g} times as long."
    ]


def _measured_pairs(
    rows: Sequence[Row], axis: str, name: str, scale: float = 1.0
) -> tuple[list[float], list[float], list[float]]:
    """Return the sizes at which a competitor was measured, our times there, and its times."""
    known = [row for row in rows if milliseconds(row, name) is not None]
    ours = [milliseconds(row, "sketch") or 0.0 for row in known]
    theirs = [scale * (milliseconds(row, name) or 0.0) for row in known]
    return [row[axis] for row in known], ours, theirs


def _fold_text(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    steps = [milliseconds(row, "sketch") or 0.0 for row in rows]
    ends = [end_of_step(row) for row in rows]
    range_below = crossing([row["N"] for row in rows], ends, [SMALL * step for step in steps])
    shares = [
        f"{100 * e / s:.0f} % at N = {r['N']}" for e, s, r in _first_and_last(ends, steps, rows)
    ]
    return [
        f"Fold and comparison are below {100 * SMALL:.0f} % of the step "
        f"{range_below.text('N')}: {', '.join(shares)}."
    ]


def _first_and_last(*columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    lines = list(zip(*columns, strict=True))
    return lines if len(lines) < 2 else [lines[0], lines[-1]]


def _forward_text(lines: Mapping[str, Sequence[Row]]) -> list[str]:
    parts, shares = [], []
    for axis in ("D", "N"):
        xs, ours, limit = _measured_pairs(lines[axis], axis, "forward", SMALL)
        if xs:
            parts.append(crossing(xs, ours, limit).text(axis))
            pairs = zip(xs, ours, limit, strict=True)
            shares += [(100 * SMALL * a / b, f"{axis} = {x}") for x, a, b in pairs]
    if not parts:
        return ["The forward pass of the linear layers was not measured anywhere."]
    (least_share, point_of_least), (most_share, point_of_most) = min(shares), max(shares)
    return [
        f"The step takes less than {100 * SMALL:.0f} % of the forward pass of the three linear "
        f"layers (D to D) that read the input {'; '.join(parts)}. Its share is {least_share:.1f} % "
        f"({point_of_least}) to {most_share:.1f} % ({point_of_most})."
    ]


def _state_text(base: Point) -> list[str]:
    """Say from which width on exact Gram's state is larger; computed from plans, not measured."""
    first_larger = first_width(
        base, lambda point: point.state_bytes("gram") > point.state_bytes("sketch")
    )
    first_tenfold = first_width(
        base, lambda point: point.state_bytes("gram") > 10 * point.state_bytes("sketch")
    )
    more = "at every width" if first_larger <= base.K else f"from D = {first_larger} on"
    return [
        f"For K = {base.K}, the state of exact Gram takes more memory than that of the sketch "
        f"{more}, and more than ten times as much from D = {first_tenfold} on."
    ]


def first_width(base: Point, holds: Callable[[Point], bool]) -> int:
    """Return the least width D >= K for which a condition holds that also holds for larger D."""
    low, high = base.K - 1, base.K
    while not holds(Point(high, base.N, base.L, base.K)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if holds(Point(middle, base.N, base.L, base.K)):
            high = middle
        else:
            low = middle
    return high


def _layers_text(rows: Sequence[Row]) -> list[str]:
    if len(rows) < 2:
        return []
    ms = [(milliseconds(row, "sketch") or 0.0) / row["L"] for row in rows]
    first, last = rows[0]["L"], rows[-1]["L"]
    return [
        f"A layer input costs {ms[0]:.3g} ms a step at L = {first}, and {ms[-1]:.3g} ms at "
        f"L = {last}: {_change_text(ms[-1] / ms[0])}."
    ]


def _change_text(ratio: float) -> str:
    if abs(ratio - 1) < SMALL:
        return "no more than 10 % apart"
    return f"{abs(ratio - 1):.0%} {'less' if ratio < 1 else 'more'}".replace("%", " %")


def _roofline_text(base: Point, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    shares = [row["floor"]["step_ms"] / (milliseconds(row, "sketch") or 1.0) for row in rows]
    ordered = sorted(zip(shares, range(len(rows)), strict=True))
    (worst, at_worst), (best, at_best) = ordered[0], ordered[-1]
    binding = [row["floor"]["limited_by"] for row in rows]
    counts = {name: binding.count(name) for name in dict.fromkeys(binding)}
    bound_by = ", ".join(
        f"{name} at {count} of {len(rows)} points" for name, count in counts.items()
    )
    above = (
        " More than 100 % means that the ceilings were measured while others took more of the "
        "machine than during the step."
    )
    return [
        f"The step runs at {100 * worst:.0f} % ({_point(rows[at_worst])}) to {100 * best:.0f} % "
        f"({_point(rows[at_best])}) of what the machine's ceilings allow. What binds: {bound_by}."
        f"{above if best > 1 else ''}"
    ]


def _point(row: Row) -> str:
    return ", ".join(f"{axis} = {row[axis]}" for axis in AXES)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
