"""The runner of the GPU check: order of stages, parallel stages, interrupts, and resuming."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import files
from bench.gpu_check import child, context, plan, runner
from bench.gpu_check.plan import Stage


class Stubbed(runner.Check):
    """A check whose stages have given outcomes instead of running."""

    outcomes: dict[str, str]
    meet: frozenset[str] = frozenset()
    barrier = threading.Barrier(2)

    def _run_stage_process(
        self, stage: Stage, limit: float, stop: threading.Event
    ) -> dict[str, Any]:
        if stage.name in self.meet:  # passes only if both stages run at once
            self.barrier.wait(timeout=10)
        status = self.outcomes[stage.name]
        if status == "interrupted":
            raise KeyboardInterrupt
        if status == "stopped":
            assert stop.wait(timeout=10)
            status = "failed"
        if status == "until a is written":
            end = time.monotonic() + 10
            while "a" not in files.read_json(self.out / "gpu-check.json")["stages"]:
                assert time.monotonic() < end
                time.sleep(0.01)
            status = "passed"
        results = {"versions": {"torch": "1"}}
        return {"status": status, "reason": "", "seconds": 0.0, "results": results}


def stubbed(out: Path, outcomes: dict[str, str], **options: Any) -> Stubbed:
    stages = [Stage(name, 1.0, 1.0, required=name != "c") for name in outcomes]
    check = Stubbed(out, stages=stages, total=30.0, say=lambda line: None, **options)
    check.outcomes = outcomes
    return check


def test_later_stages_run_after_a_failure_and_the_check_fails(tmp_path: Path) -> None:
    assert not stubbed(tmp_path, {"a": "passed", "b": "timed out", "c": "passed"}).run()
    found = files.read_json(tmp_path / "gpu-check.json")
    assert [s["status"] for s in found["stages"].values()] == ["passed", "timed out", "passed"]
    assert found["status"] == "failed"
    assert found["versions"] == {"torch": "1"}


def test_skipping_a_required_stage_fails_the_check(tmp_path: Path) -> None:
    outcomes = dict.fromkeys("abc", "passed")
    assert stubbed(tmp_path, outcomes).run()
    assert stubbed(tmp_path, outcomes, skip=["c"]).run()
    assert not stubbed(tmp_path, outcomes, skip=["b"]).run()
    with pytest.raises(ValueError, match="unknown stage: nope; choose from a, b, c"):
        stubbed(tmp_path, outcomes, skip=["nope"])


def test_optional_stage_runs_only_on_request(tmp_path: Path) -> None:
    names = [stage.name for stage in runner.Check(tmp_path).stages]
    assert not set(names) & {*plan.ON_REQUEST}
    asked = runner.Check(tmp_path, also=["quality", "tune"]).stages
    assert {stage.name for stage in asked} == {*names, "quality", "tune"}
    with pytest.raises(
        ValueError, match="unknown additional stage: kernels; choose from quality, "
    ):
        runner.Check(tmp_path, also=["kernels"])


def test_every_stage_has_a_module() -> None:
    for stage in plan.STAGES:
        module = importlib.import_module(f"bench.gpu_check.stages.{stage.module or stage.name}")
        assert callable(module.run)


def check_with_parallel_b(out: Path, outcomes: dict[str, str], **options: Any) -> Stubbed:
    check = stubbed(out, outcomes, **options)
    check.stages = [replace(s, parallel=s.name == "b") for s in check.stages]
    return check


def test_parallel_stage_runs_with_the_previous_one(tmp_path: Path) -> None:
    outcomes = {"a": "passed", "b": "passed", "c": "passed"}
    check = check_with_parallel_b(tmp_path, outcomes)
    check.meet = frozenset("ab")
    assert check.run()
    assert list(check.record["stages"]) == ["a", "b", "c"]
    assert not check_with_parallel_b(tmp_path, {**outcomes, "b": "failed"}).run()
    resumed = check_with_parallel_b(tmp_path, {**outcomes, "a": "failed"}, resume=True)
    assert resumed.record["stages"].keys() == {"a", "c"}
    assert check_with_parallel_b(
        tmp_path, {**outcomes, "a": "failed", "c": "failed"}, resume=True
    ).run()


def test_finished_stage_is_written_while_a_parallel_one_runs(tmp_path: Path) -> None:
    assert check_with_parallel_b(
        tmp_path, {"a": "passed", "b": "until a is written", "c": "passed"}
    ).run()


@pytest.mark.parametrize("ends", [("interrupted", "stopped"), ("stopped", "interrupted")])
def test_interrupt_ends_the_parallel_stage(tmp_path: Path, ends: tuple[str, str]) -> None:
    check = check_with_parallel_b(tmp_path, {"a": ends[0], "b": ends[1], "c": "passed"})
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        check.run()
    assert time.monotonic() - begin < 5


def test_resumed_check_runs_stages_that_had_not_passed(tmp_path: Path) -> None:
    assert not stubbed(tmp_path, {"a": "passed", "b": "failed"}).run()
    again = stubbed(tmp_path, {"a": "failed", "b": "passed"}, resume=True)
    assert again.run()
    assert again.record["stages"]["a"]["kept"]


def test_resumed_check_keeps_the_result_of_a_skipped_stage(tmp_path: Path) -> None:
    assert not stubbed(tmp_path, {"a": "failed", "b": "failed"}).run()
    again = stubbed(tmp_path, {"a": "passed", "b": "passed"}, resume=True, skip=["a"])
    assert not again.run()
    assert [s["status"] for s in again.record["stages"].values()] == ["failed", "passed"]


@pytest.mark.parametrize(
    ("reported", "status", "outcome"),
    [
        ("passed", 0, ("passed", "")),
        ("skipped", child.SKIPPED, ("skipped", "why")),
        ("failed", child.FAILED, ("failed", "why")),
        ("passed", -6, ("failed", "the process ended with status -6")),
        ("running", 1, ("failed", "the process ended with status 1")),
        (None, 0, ("failed", "the process ended with status 0")),
        ("passed", None, ("timed out", "killed after 1 s")),
    ],
)
def test_outcome_by_result_file_and_exit_status(
    reported: str | None,
    status: int | None,
    outcome: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_limited(*_: object) -> int | None:
        if reported is not None:
            found = {
                "status": reported,
                "reason": "" if reported == "passed" else "why",
                "results": {},
            }
            files.write_json(context.result_path(tmp_path, "a"), found)
        return status

    monkeypatch.setattr(runner, "run_limited", run_limited)
    stages = [Stage("a", 4.0, 4.0)]
    check = runner.Check(tmp_path, dry_run=True, stages=stages, total=4.0, say=lambda line: None)
    check.run()
    found = check.record["stages"]["a"]
    assert (found["status"], found["reason"]) == outcome


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM])
def test_terminated_stage_ends_its_child_processes(tmp_path: Path, number: int) -> None:
    code = f"""
        import os, sys
        from bench.gpu_check import child
        from bench.processes import run_limited

        class Module:
            def run(context):
                command = ["sh", "-c", "echo $$ > {tmp_path}/pid; exec sleep 60"]
                run_limited(command, 60.0, sys.stdout, os.environ)

        sys.modules["bench.gpu_check.stages.made_up"] = Module
        child.main(["made_up", "--out", {str(tmp_path)!r}, "--seconds", "60"])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=files.ROOT)
    end = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_stage_that_ignores_signals_is_ended(tmp_path: Path) -> None:
    """As in a native call that does not return."""
    code = f"""
        import signal, sys, time
        from bench.gpu_check import child

        class Module:
            def run(context):
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
                time.sleep(60)

        child.OVERTIME_SECONDS = 1
        sys.modules["bench.gpu_check.stages.made_up"] = Module
        child.main(["made_up", "--out", {str(tmp_path)!r}, "--seconds", "1"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, timeout=40)
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_check_without_time_reaches_no_stage(tmp_path: Path) -> None:
    check = stubbed(tmp_path, {"a": "passed"})
    check.total = 0.5
    assert not check.run()
    assert check.record["stages"]["a"]["status"] == "not reached"
