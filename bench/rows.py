"""Rows of a benchmark, saved as they are measured, so that an interrupted run can resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .common import RESULTS, machine, save
from .files import commit

Key = Mapping[str, Any]


class Rows:
    """The rows of one part of the harness.

    Until the part is finished they are in ``.unfinished/PART.jsonl`` in the folder of the results,
    and another run with the same settings, commit and machine keeps them.

    Args:
        part: name of the result file.
        settings: of the part.
        out: folder of the results.
        quiet: show no progress bar.
    """

    def __init__(
        self,
        part: str,
        settings: Mapping[str, Any],
        out: Path = RESULTS,
        quiet: bool = False,
    ) -> None:
        self.part, self.settings, self.out, self.quiet = part, dict(settings), out, quiet
        self.path = out / ".unfinished" / f"{part}.jsonl"
        header = {"settings": self.settings, "commit": commit(), "machine": machine()}
        self._header = json.loads(json.dumps(header))
        self._finished_rows: dict[str, dict[str, Any]] = {}
        self._load_unfinished()

    def _load_unfinished(self) -> None:
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        if lines and json.loads(lines[0]) == self._header:
            for line in lines[1:]:
                try:
                    key, row = json.loads(line)
                except json.JSONDecodeError:  # cut off by the end of the run before
                    break
                self._finished_rows[key_text(key)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept_rows = [[json.loads(key), row] for key, row in self._finished_rows.items()]
        text = "".join(json.dumps(entry) + "\n" for entry in [self._header, *kept_rows])
        self.path.write_text(text, "utf-8")

    def make(self, keys: Sequence[Key], run: Callable[[Any], Mapping[str, Any]]) -> list[Any]:
        """Return a row for each key; make those that are not there.

        Args:
            keys: what tells one row from another, and what ``run`` is given.
            run: ``f(key)`` returns the numbers of a row. If it raises, the row holds ``error``, the
                first line of the message, and the others go on.

        Returns:
            Rows: the key and the numbers of each.
        """
        bar = tqdm(keys, desc=self.part, unit="run", disable=self.quiet)
        for key in bar:
            if key_text(key) in self._finished_rows:
                continue
            bar.set_postfix_str(" ".join(str(value) for value in key.values()))
            try:
                row = dict(run(key))
            except Exception as error:  # why a row has no numbers is what the row tells
                row = error_row(error)
            self._finished_rows[key_text(key)] = row
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([dict(key), row]) + "\n")
        return [{**key, **self._finished_rows[key_text(key)]} for key in keys]

    def finish(self, rows: Any) -> Path:
        """Write the result file, and forget the unfinished one."""
        path = save(self.part, rows, out=self.out, **self.settings)
        self.path.unlink()
        return path


def error_row(error: Exception) -> dict[str, Any]:
    """Return the row of a run that failed: the first line of the message."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return {"error": f"{type(error).__name__}: {first_line}"[:300]}


def key_text(key: Key) -> str:
    """Return the same text for equal keys, whatever their order."""
    return json.dumps(dict(key), sort_keys=True)
