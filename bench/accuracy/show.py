"""The output of ``accuracy``: tables, sentences generated from the numbers, and plots."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..sections import Section
from . import figures

DEFAULT, PEER, WIDER_PEER = "sketch-2", "peft", "peft-2k"
EXACT = 1e-9  # less lost variance than this is rounding


@dataclass(frozen=True)
class Group:
    """Layer inputs of one width and kind, with the results of each method (medians).

    Attributes:
        title: for a heading.
        rows: of the result file.
        ms, answer_ms: time of a step, and of the final answer, by method.
        lost, ratio_error: at the last checkpoint, by method.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    ms: dict[str, float]
    answer_ms: dict[str, float]
    lost: dict[str, float]
    ratio_error: dict[str, float]


def sections(record: Mapping[str, Any]) -> list[Section]:
    """Return the sections of the report for a result file."""
    labels: dict[str, str] = record["settings"]["labels"]
    measured = [row for row in record["rows"]["inputs"] if "error" not in row]
    failed = [row for row in record["rows"]["inputs"] if "error" in row]
    grouped = groups(measured)
    notes = [f"{row['input']}: {row['error']}." for row in failed]
    notes += [f"Not timed: {why}." for why in record["rows"]["refused"].values()]
    if not grouped:
        return [Section("Accuracy against time", "Nothing was measured.", notes=" ".join(notes))]
    ranks = record["rows"]["ranks"]
    return [
        _time_section(record, grouped, labels, " ".join(notes)),
        *(
            [_tokens_section(grouped, ranks, labels)]
            if len(grouped[0].rows[0]["exact"]) > 1
            else []
        ),
    ]


def groups(rows: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Group rows by width, real inputs first."""
    keys = list(dict.fromkeys((row["synthetic"], row["features"]) for row in rows))
    return [
        _group(key, [row for row in rows if (row["synthetic"], row["features"]) == key])
        for key in sorted(keys)
    ]


def _group(key: tuple[bool, int], rows: list[Mapping[str, Any]]) -> Group:
    synthetic, features = key
    count = "" if len(rows) == 1 else f", {len(rows)} inputs"
    names = list(rows[0]["methods"])

    def medians(pick: Any) -> dict[str, float]:
        return {name: median(pick(row["methods"][name]) for row in rows) for name in names}

    return Group(
        title=f"{'synthetic, ' if synthetic else ''}D = {features}{count}",
        rows=rows,
        ms=medians(lambda m: m["ms"]["median"]),
        answer_ms=medians(lambda m: m["answer_ms"]),
        lost=medians(lambda m: m["points"][-1]["lost"]),
        ratio_error=medians(lambda m: m["points"][-1]["ratio_error"] or 0.0),
    )


def undominated(ms: Mapping[str, float], lost: Mapping[str, float]) -> list[str]:
    """Return the Pareto front, fastest first: no other method is both faster and more accurate."""
    front: list[str] = []
    for name in sorted(ms, key=lambda n: ms[n]):
        if not front or max(lost[name], EXACT) < max(lost[front[-1]], EXACT):
            front.append(name)
    return front


def _time_section(
    record: Mapping[str, Any], grouped: Sequence[Group], labels: Mapping[str, str], notes: str
) -> Section:
    settings = record["settings"]
    ranks = {e["method"]: e["rank_error"] for e in record["rows"]["ranks"]}  # last checkpoint
    headers = ["method"]
    for group in grouped:
        headers += [f"{group.title}: ms a step", "lost variance", "ratio of component K"]
    headers.append("ranks off")
    rows = []
    for name in grouped[0].ms:
        cells = [labels[name]]
        for group in grouped:
            cells += [
                f"{group.ms[name]:.2f}",
                _format_lost(group.lost[name]),
                f"{100 * group.ratio_error[name]:+.1f} %".replace("-0.0", "+0.0"),
            ]
        rows.append([*cells, str(ranks.get(name, "—"))])
    text = (
        f"Lost variance is the share that the span of the K = {settings['components']} components "
        "misses of the variance that the exact ones capture, over all tokens seen; *ratio* is how "
        "far the explained-variance ratio of component K, which the ranks are given by, is from "
        f"the exact one. {_ranks_sentences(grouped, settings['rank'])}"
    )
    sentences = [_group_sentences(group, labels) for group in grouped]
    return Section(
        "Accuracy against time",
        "\n\n".join([text, *sentences]),
        headers,
        rows,
        {"accuracy_time": functools.partial(figures.plot_lost_vs_time, grouped, labels)},
        notes,
    )


def _ranks_sentences(grouped: Sequence[Group], rank: int) -> str:
    layers = sum(len(group.rows) for group in grouped if not group.rows[0]["synthetic"])
    return (
        f"*Ranks off* is the sum over the {layers} real layer inputs of how far a rank is from the "
        f"exact one, with a budget of {rank * layers} for all. All methods were given the same "
        "tokens in turn, in one process; medians without the first step."
    )


def _group_sentences(group: Group, labels: Mapping[str, str]) -> str:
    """Say in words which methods are faster and which more accurate."""
    row, ms, lost = group.rows[0], group.ms, group.lost
    sentences = [f"**{group.title}**, {row['steps']} steps of {row['tokens']} tokens."]
    ours = f"The {labels[DEFAULT]} (the default)" if DEFAULT in ms else ""
    if ours and PEER in ms:
        sentences.append(
            f"{ours} is {_compare(ms[DEFAULT], ms[PEER], 'faster', 'slower')} than PEFT's EVA and "
            f"{_compare(lost[DEFAULT], lost[PEER], 'closer', 'further off')}."
        )
    worse = [n for n in ms if n.startswith("sketch") and PEER in ms and lost[n] > lost[PEER]]
    if worse:
        listed = "; ".join(f"{labels[n]} ({lost[n] / lost[PEER]:.1f} times)" for n in worse)
        sentences.append(f"Further off than PEFT's EVA: {listed}.")
    if ours and WIDER_PEER in ms:
        sentences.append(
            f"{labels[WIDER_PEER]}, as many directions as that sketch has, is "
            f"{_compare(lost[WIDER_PEER], lost[DEFAULT], 'closer', 'further off')} than it and "
            f"{_compare(ms[WIDER_PEER], ms[DEFAULT], 'faster', 'slower')}."
        )
    if ours and "gram" in ms:
        sentences.append(
            f"Exact Gram is {_compare(ms['gram'], ms[DEFAULT], 'faster', 'slower')} than the "
            f"sketch, and takes {group.answer_ms['gram']:.0f} ms more once, at the end."
        )
    front = "; ".join(labels[name] for name in undominated(ms, lost))
    sentences.append(f"No method is both faster and closer than these: {front}.")
    return " ".join(sentences)


def _compare(value: float, other: float, less: str, more: str) -> str:
    """Compare in words: ``12 times faster``, ``1.4 times slower``."""
    ratio = max(value, EXACT) / max(other, EXACT)
    return f"{ratio:.3g} times {more}" if ratio > 1 else f"{1 / ratio:.3g} times {less}"


def _format_lost(value: float) -> str:
    return "exact" if value < EXACT else f"{value:.1e}"


def _tokens_section(
    grouped: Sequence[Group], ranks: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> Section:
    group = grouped[0]
    points = group.rows[0]["exact"]
    headers = ["method", *(f"{point['tokens']} tokens" for point in points)]
    rows = []
    for name in group.ms:
        cells = [_format_lost(_median_lost(group, name, i)) for i in range(len(points))]
        rank_error_at = {e["step"]: e["rank_error"] for e in ranks if e["method"] == name}
        if rank_error_at:
            pairs = zip(cells, points, strict=True)
            cells = [f"{cell} / {rank_error_at.get(point['step'], '—')}" for cell, point in pairs]
        rows.append([labels[name], *cells])
    lost = {name: [_median_lost(group, name, i) for i in range(len(points))] for name in group.ms}
    text = f"{group.title}: lost variance / ranks off, after so many tokens."
    if DEFAULT in lost:
        text += " " + _error_trend(
            lost[DEFAULT], lost.get(PEER), [point["tokens"] for point in points]
        )
        text += _ranks_trend(ranks)
    plots = {"accuracy_tokens": functools.partial(figures.plot_lost_vs_tokens, grouped, labels)}
    if ranks:
        plots["accuracy_ranks"] = functools.partial(figures.plot_rank_errors, ranks, labels)
    return Section("Accuracy over tokens", text, headers, rows, plots)


def _median_lost(group: Group, name: str, i: int) -> float:
    return median(row["methods"][name]["points"][i]["lost"] for row in group.rows)


def _error_trend(ours: Sequence[float], peer: Sequence[float] | None, tokens: Sequence[int]) -> str:
    """Say how the default sketch's error develops, and where PEFT's EVA is more accurate."""
    verb = "falls" if ours[-1] < ours[0] else "grows"
    text = (
        f"What the sketch at its default width loses {verb} from {ours[0]:.1e} after the first "
        f"step to {ours[-1]:.1e}."
    )
    if peer is None:
        return text
    peer_closer_at = [count for count, a, b in zip(tokens, ours, peer, strict=True) if b < a]
    if not peer_closer_at:
        return f"{text} It is closer than PEFT's EVA at every checkpoint."
    if peer_closer_at == list(tokens[: len(peer_closer_at)]) and len(peer_closer_at) < len(tokens):
        return (
            f"{text} PEFT's EVA, which decomposes each step by itself, is closer up to "
            f"{peer_closer_at[-1]} tokens, and further off from {tokens[len(peer_closer_at)]} on."
        )
    return f"{text} PEFT's EVA is closer after {', '.join(map(str, peer_closer_at))} tokens."


def _ranks_trend(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Say at how many checkpoints the default sketch's ranks are closer to exact than PEFT's."""
    ours, theirs = ([e["rank_error"] for e in ranks if e["method"] == n] for n in (DEFAULT, PEER))
    if not ours or len(ours) != len(theirs):
        return ""
    nearer = sum(a < b for a, b in zip(ours, theirs, strict=True))
    further = sum(a > b for a, b in zip(ours, theirs, strict=True))
    return (
        f" Its ranks are nearer to the exact ones than those of PEFT's EVA at {nearer} of "
        f"{len(ours)} checkpoints, and further at {further}; at the last {ours[-1]} against "
        f"{theirs[-1]} are off."
    )
