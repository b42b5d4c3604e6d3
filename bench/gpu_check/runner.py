"""Run the stages one after another, each in its own process with its own time limit."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..processes import GRACE_SECONDS, child_environment, run_limited
from .child import EXIT_STATUSES
from .context import result_path
from .plan import ON_REQUEST, TOTAL_SECONDS, Stage, select_stages, time_limit
from .record import FILE, new_record, resumable_parts, verdict
from .stages.environment import smi
from .table import render

TABLE = "gpu-check.txt"
LOG_LINES = 15

Say = Callable[[str], None]


class Check:
    """One run of the check.

    Args:
        out: folder of the results.
        dry_run: rehearse on the CPU, with small shapes and Triton's interpreter.
        skip: names of stages to skip; the check then does not pass.
        also: names of additional stages beyond the check.
        resume: keep stages that passed before in the same folder with the same sources and GPU, and
            skipped stages whatever their outcome.
        total: seconds for the whole check.
        say: prints a line.
        stages: plan to use instead of the default.
    """

    def __init__(
        self,
        out: Path,
        *,
        dry_run: bool = False,
        skip: Sequence[str] = (),
        also: Sequence[str] = (),
        resume: bool = False,
        total: float = TOTAL_SECONDS,
        say: Say = print,
        stages: Sequence[Stage] | None = None,
    ) -> None:
        stages = select_stages(also) if stages is None else stages
        _check_known("stage", skip, [stage.name for stage in stages])
        _check_known("additional stage", also, ON_REQUEST)
        self.out, self.dry_run, self.skip, self.say = out.resolve(), dry_run, set(skip), say
        self.stages, self.total = stages, total
        self.begin = time.monotonic()
        self.record = new_record(dry_run, None if dry_run else smi().get("name"))
        if resume:
            kept = resumable_parts(read_json(self.out / FILE), self.record, self.skip)
            self.record |= kept
            if not kept:
                say(f"nothing to resume: {self.out} holds no results of these sources on this GPU")

    @property
    def remaining(self) -> float:
        """Seconds left for the whole check."""
        return self.total - (time.monotonic() - self.begin)

    def run(self) -> bool:
        """Run all stages, write and print the table, and return whether the check passed."""
        self._write_record()
        group_begins = [i for i, stage in enumerate(self.stages) if i == 0 or not stage.parallel]
        for begin, end in itertools.pairwise([*group_begins, len(self.stages)]):
            self._run_together(self.stages[begin:end], self.stages[end:])
            self._write_record()
        required = {stage.name: stage.required for stage in self.stages}
        self.record["status"] = verdict(self.record["stages"], required)
        self._write_record()
        self.say(render(self.record))
        return self.record["status"] == "passed"

    def _run_together(self, stages: Sequence[Stage], later_stages: Sequence[Stage]) -> None:
        """Run a stage and those in parallel with it; ``later_stages`` are the stages after them."""
        outcomes = self.record["stages"]
        later_stages = [s for s in later_stages if s.name not in self.skip | set(outcomes)]
        due: list[tuple[Stage, float]] = []
        for stage in filter(self._is_due, stages):
            limit = (
                stage.rehearsal_seconds
                if self.dry_run
                else time_limit(stage, later_stages, self.remaining)
            )
            limit = min(limit, self.remaining)
            if limit < 1.0:
                outcomes[stage.name] = _outcome(stage, "not reached", "no time was left")
                continue
            time_left = f"{self.remaining:.0f} s left for the whole check"
            self.say(f"{stage.name}: time limit {limit:.0f} s, {time_left}")
            due.append((stage, limit))
        if not due:
            return
        stop = threading.Event()
        with ThreadPoolExecutor(len(due)) as pool:
            jobs = {
                pool.submit(self._run_stage_process, *stage_and_limit, stop): stage_and_limit[0]
                for stage_and_limit in due
            }
            try:
                for job in as_completed(jobs):
                    self._store_outcome(jobs[job], job.result())
                    self._write_record()
            except BaseException:
                stop.set()
                raise

    def _is_due(self, stage: Stage) -> bool:
        outcomes = self.record["stages"]
        if stage.name in outcomes:
            self.say(f"{stage.name}: kept from an earlier run")
            return False
        if stage.name in self.skip:
            outcomes[stage.name] = _outcome(stage, "skipped", "left out by --skip")
            self.say(f"{stage.name}: left out")
            return False
        return True

    def _store_outcome(self, stage: Stage, outcome: dict[str, Any]) -> None:
        self.record["stages"][stage.name] = outcome
        for key in ("machine", "versions"):
            self.record[key].update(outcome["results"].pop(key, {}))
        line = f"{stage.name}: {outcome['status']} in {outcome['seconds']:.1f} s"
        self.say(f"{line} ({outcome['reason']})" if outcome["reason"] else line)
        if outcome["status"] in ("failed", "timed out"):
            self.say(_log_tail(self.out / stage.name / "log.txt"))

    def _run_stage_process(
        self, stage: Stage, limit: float, stop: threading.Event
    ) -> dict[str, Any]:
        folder = self.out / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        result_path(self.out, stage.name).unlink(missing_ok=True)
        stage_seconds = max(0.5, limit - GRACE_SECONDS)
        command = [sys.executable, "-m", "bench.gpu_check.child", stage.name]
        command += ["--out", str(self.out), "--seconds", f"{stage_seconds:.1f}"]
        command += ["--dry-run"] if self.dry_run else []
        begin = time.monotonic()
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            environment = child_environment(os.environ, self.dry_run)
            status = run_limited(command, stage_seconds, log, environment, stop)
        saved = read_json(result_path(self.out, stage.name)) or {}
        outcome = _outcome(stage, saved.get("status", "failed"), saved.get("reason", ""))
        outcome["results"] = saved.get("results", {})
        outcome["seconds"] = round(time.monotonic() - begin, 2)
        outcome["limit"] = round(limit, 1)
        if status is None:
            outcome.update(status="timed out", reason=f"killed after {stage_seconds:.0f} s")
        elif not saved or status != EXIT_STATUSES.get(
            outcome["status"]
        ):  # died, perhaps at the end
            outcome.update(status="failed", reason=f"the process ended with status {status}")
        return outcome

    def _write_record(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.begin, 2)
        outcomes = self.record["stages"]  # in the order of the plan, not of completion
        planned = [stage.name for stage in self.stages if stage.name in outcomes]
        self.record["stages"] = {name: outcomes[name] for name in (*planned, *outcomes)}
        write_json(self.out / FILE, self.record)
        (self.out / TABLE).write_text(render(self.record) + "\n", encoding="utf-8")


def _outcome(stage: Stage, status: str, reason: str) -> dict[str, Any]:
    return {
        "status": status,
        "reason": reason,
        "required": stage.required,
        "seconds": 0.0,
        "results": {},
    }


def _check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; choose from {', '.join(known)}")


def _log_tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])
