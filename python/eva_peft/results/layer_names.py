"""Derive from a dotted name the kind of a layer and the block it is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import takewhile

__all__ = ["layer_table", "module_kinds"]


def layer_table(names: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Split layer names into a short module kind and a block index.

    The block index is the first number in the dotted name that is not its last part. The kind is
    the shortest suffix that distinguishes it from other kinds: `q_proj`, or
    `attention.output.dense` next to `output.dense`. If two towers have kinds of the same name, the
    tower's name is put in front.

    Args:
        names: dotted layer names.

    Returns:
        (kind, block index or None) for each name, in the order given.
    """
    parsed = {name: _parse(name) for name in names}
    tower_names = _tower_names({tower for tower, _, _ in parsed.values()})
    kinds = _shortest_tails({tail for _, _, tail in parsed.values()})
    towers_of_tail: dict[str, set[str]] = {}
    for tower, _, tail in parsed.values():
        towers_of_tail.setdefault(tail, set()).add(tower)
    return {
        name: (
            f"{tower_names[tower]}: {kinds[tail]}"
            if len(towers_of_tail[tail]) > 1
            else kinds[tail],
            block,
        )
        for name, (tower, block, tail) in parsed.items()
    }


def module_kinds(names: Iterable[str]) -> dict[str, str]:
    """Return the module kind of each name, the same for experts of a block or blocks of a stage."""
    starred_name_of = {name: _star_numbers(name) for name in names}
    table = layer_table(starred_name_of.values())
    return {name: table[starred_name][0] for name, starred_name in starred_name_of.items()}


def _star_numbers(name: str) -> str:
    """Replace the numbers in a dotted name, but the block index and the last part, by stars."""
    _, block, tail = _parse(name)
    if block is None:
        return name
    *inner, last = tail.split(".")
    starred = ["*" if part.isdecimal() else part for part in inner]
    return name.removesuffix(tail) + ".".join([*starred, last])


def _is_number(part: str) -> bool:
    return part == "*" or part.isdecimal()


def _parse(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", None, name


def _shortest_tails(names: Iterable[str]) -> dict[str, str]:
    """Cut each dotted name to its shortest unique suffix that does not begin with a number."""
    split = {name: name.split(".") for name in names}
    suffix_counts = Counter(tuple(p[-n:]) for p in split.values() for n in range(1, len(p) + 1))
    tails = {}
    for name, parts in split.items():
        lengths = range(1, len(parts) + 1)
        unique_lengths = (
            n
            for n in lengths
            if suffix_counts[tuple(parts[-n:])] == 1 and not _is_number(parts[-n])
        )
        n = next(unique_lengths, len(parts))
        tails[name] = ".".join(parts[-n:])
    return tails


def _tower_names(prefixes: set[str]) -> dict[str, str]:
    """Name each prefix by its first part that is not common to all, if these are distinct."""
    split = {prefix: prefix.split(".") for prefix in prefixes}
    levels = zip(*split.values(), strict=False)
    num_shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    names = {prefix: (parts[num_shared:] or parts)[0] for prefix, parts in split.items()}
    if len(set(names.values())) < len(prefixes):
        names = {prefix: prefix for prefix in prefixes}
    return {prefix: name or "no block" for prefix, name in names.items()}
