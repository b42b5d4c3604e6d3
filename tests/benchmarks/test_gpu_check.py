"""The GPU check: time limits, records, parsing of reports, stage outcomes, and a whole dry run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bench import files, processes
from bench.gpu_check import child, context, record, table
from bench.gpu_check.plan import TOTAL_SECONDS, Stage, select_stages, time_limit
from bench.gpu_check.stages import build, end_to_end, environment, kernels, sanitizer, tests

A, B, C = Stage("a", 10.0, 5.0), Stage("b", 20.0, 5.0), Stage("c", 30.0, 5.0)


DEFAULT_STAGES = select_stages(())


def test_time_shares_fit_the_total() -> None:
    assert sum(stage.reserved_seconds for stage in DEFAULT_STAGES) <= TOTAL_SECONDS - 5
    assert TOTAL_SECONDS == 9 * 60


@pytest.mark.parametrize(
    ("stage", "later", "remaining", "limit"),
    [
        (A, [B, C], 60.0, 10.0),  # no spare time: only its share
        (A, [B, C], 70.0, 20.0),  # its share and the spare time
        (B, [C], 58.0, 28.0),  # including the time left by a quick stage before
        (C, [], 45.0, 45.0),  # the last stage gets all remaining time
        (B, [C], 15.0, 15.0),  # too little for its share
        (A, [], -1.0, 0.0),
    ],
)
def test_time_limit_of_a_stage(
    stage: Stage, later: list[Stage], remaining: float, limit: float
) -> None:
    assert time_limit(stage, later, remaining) == limit


def test_later_stages_keep_their_time_shares() -> None:
    remaining = TOTAL_SECONDS
    for i, stage in enumerate(DEFAULT_STAGES):
        limit = time_limit(stage, DEFAULT_STAGES[i + 1 :], remaining)
        assert limit >= stage.reserved_seconds
        remaining -= limit
    assert remaining >= 0


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"a": "passed", "b": "passed"}, "passed"),
        ({"a": "passed", "b": "skipped"}, "passed"),
        ({"a": "passed", "b": "failed"}, "failed"),
        ({"a": "passed", "b": "timed out"}, "failed"),
        ({"a": "skipped", "b": "passed"}, "failed"),
        ({"a": "not reached", "b": "passed"}, "failed"),
        ({"b": "passed"}, "failed"),
    ],
)
def test_overall_status(statuses: dict[str, str], expected: str) -> None:
    stages = {name: {"status": status} for name, status in statuses.items()}
    assert record.verdict(stages, {"a": True, "b": False}) == expected


def test_resume_keeps_stages_that_passed_with_the_same_sources() -> None:
    new = record.new_record(dry_run=False)
    stages = {"a": {"status": "passed"}, "b": {"status": "failed"}, "c": {"status": "timed out"}}
    earlier = {**new, "stages": stages, "machine": {"cpu": "x"}, "versions": {"torch": "2"}}
    assert record.resumable_parts(earlier, new) == {
        "stages": {"a": {"status": "passed", "kept": True}},
        "machine": {"cpu": "x"},  # the machine where the kept stages ran
        "versions": {"torch": "2"},
    }
    for key, other in (("sources", "x"), ("dry_run", True), ("schema_version", 0)):
        assert record.resumable_parts({**earlier, key: other}, new) == {}
    assert record.resumable_parts(None, new) == {}
    here = record.new_record(dry_run=False, gpu="this")
    assert record.resumable_parts(earlier, here) == {}
    assert record.resumable_parts({**earlier, "machine": here["machine"]}, here) != {}
    assert set(record.resumable_parts(earlier, new, skip=["b"])["stages"]) == {"a", "b"}


def test_source_hash_changes_with_the_sources(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("1")
    first = record.source_hash(tmp_path)
    assert record.source_hash(tmp_path) == first
    (tmp_path / "csrc" / "a.cu").write_text("2")
    assert record.source_hash(tmp_path) != first


def test_json_files_are_replaced_atomically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "x.json"
    files.write_json(path, {"a": 1})

    def fail(*arguments: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    path.write_text('{"a"')
    assert files.read_json(path) is None


JUNIT = """<testsuites><testsuite>
<testcase classname="t.a" name="one"/>
<testcase classname="t.a" name="two"><failure message="x">x</failure></testcase>
<testcase classname="t.b" name="three"><error message="collection failure">x</error></testcase>
<testcase classname="t.b" name="four"><skipped message="no nvcc">x</skipped></testcase>
<testcase classname="t.c" name="five">
  <properties><property name="gpu" value="yes"/></properties></testcase>
<testcase classname="t.c" name="six"><properties><property name="gpu" value="yes"/></properties>
  <skipped message="needs a CUDA device">x</skipped></testcase>
</testsuite></testsuites>"""


def test_junit_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(JUNIT)
    found = tests.parse(tmp_path / "report.xml")
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 2, 2)
    assert (found["gpu_passed"], found["gpu_failed"], found["gpu_skipped"]) == (1, 0, 1)
    assert found["failures"] == ["t.a::two", "t.b::three"]
    assert found["skip_reasons"] == {"no nvcc": 1, "needs a CUDA device": 1}


GREEN = {"passed": 3, "failed": 0, "gpu_passed": 1, "gpu_skipped": 0}


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({}, 0, ""),
        ({"failed": 2, "missing_packages": ["sklearn"]}, 1, "2 tests failed (not installed: skl"),
        ({}, 2, "pytest ended with status 2"),
        ({"passed": 0}, 0, "no test ran"),
        ({"gpu_passed": 0}, 0, "no test that needs the GPU ran"),
        ({"gpu_skipped": 4}, 0, "4 tests that need the GPU were skipped"),
    ],
)
def test_outcome_of_the_test_suite(change: dict[str, Any], status: int, reason: str) -> None:
    found = tests.failure_reason({**GREEN, **change}, status, dry_run=False)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("output", "status", "reason"),
    [
        ("5 passed in 3s\n========= ERROR SUMMARY: 0 errors\n", 0, ""),
        ("5 passed\n= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, ""),
        ("5 passed\n= RACECHECK SUMMARY: 2 hazards displayed (2 errors)\n", 99, "RACECHECK"),
        ("5 passed\n========= ERROR SUMMARY: 3 errors\n", 99, "ERROR SUMMARY: 3 errors"),
        ("5 passed\n========= ERROR SUMMARY: 3 errors\n", 0, "ERROR SUMMARY: 3 errors"),
        ("1 failed\n========= ERROR SUMMARY: 0 errors\n", 1, "ended with status 1"),
        ("5 passed\n", 0, "no summary"),
        ("no tests ran\n========= ERROR SUMMARY: 0 errors\n", 0, "no test ran"),
        ("Device not supported. Please refer\n", 255, "unsupported"),
    ],
)
def test_outcome_of_sanitizer_output(output: str, status: int, reason: str) -> None:
    found = sanitizer.failure_reason(output, status)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


FAKE_TOOL = """#!/bin/sh
echo "$@" > {folder}/$2.args
echo "9 passed in 1s"
echo "========= ERROR SUMMARY: {errors} errors"
"""


@pytest.mark.parametrize(("errors", "reason"), [(0, None), (2, "memcheck: ERROR SUMMARY: 2")])
def test_sanitizer_runs_three_tools(
    errors: int, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE_TOOL.format(folder=tmp_path, errors=errors))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    given = context.Context("sanitizer", tmp_path, dry_run=False, seconds=30.0)
    if reason is None:
        sanitizer.run(given)
    else:
        with pytest.raises(context.StageFailed, match=reason):
            sanitizer.run(given)
    assert set(given.saved()["tools"]) == {"memcheck", "racecheck", "synccheck"}
    for tool in sanitizer.TOOLS:
        arguments = (tmp_path / f"{tool}.args").read_text()
        assert "tests/ops/test_eigh.py" in arguments
        assert "kns=eva_kernels" in arguments


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_sanitizer_selects_every_native_kernel(tool: str) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *sanitizer.TESTS]
    command += ["-k", sanitizer.SELECTIONS[tool], "-p", "no:cacheprovider", "-p", "no:benchmark"]
    found = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True).stdout
    expected = ("convergence.py::test_ragged", "eigh.py::test_random", "fold_passes.py::test_rows")
    expected += "fold_passes.py::test_measure", "nystrom.py::test_native_answer"
    for name in (*expected, "start.py::test_native"):
        assert name in found, found


def test_missing_sanitizer_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    with pytest.raises(context.StageSkipped, match="not installed"):
        sanitizer.run(context.Context("sanitizer", tmp_path, dry_run=False, seconds=30.0))


def test_outcome_of_kernel_and_end_to_end_rows() -> None:
    timed = {"op": "sketch", "status": "timed"}
    assert kernels.failure_reason([timed]) == ""
    assert kernels.failure_reason([timed, {"op": "eigh", "status": "not reached"}]).startswith(
        "1 of 2"
    )
    assert kernels.failure_reason([]) != ""
    ours = {"method": "ours", "batch": 4, "status": "measured", "same_bits_twice": True}
    assert end_to_end.failure_reason([ours]) == ""
    assert "differ in their bits" in end_to_end.failure_reason([{**ours, "same_bits_twice": False}])
    assert "failed" in end_to_end.failure_reason([{**ours, "status": "failed"}])
    assert end_to_end.failure_reason([]) != ""


def test_module_older_than_its_sources_is_not_up_to_date(tmp_path: Path) -> None:
    names = ["setup.py", "csrc/a.cpp", "eva_kernels/_C.cpython-312.so"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (i, i))
    assert build.up_to_date(tmp_path) == "_C.cpython-312.so"
    os.utime(tmp_path / "csrc" / "a.cpp", (5, 5))
    assert build.up_to_date(tmp_path) == ""
    (tmp_path / names[2]).unlink()
    assert build.up_to_date(tmp_path) == ""


def test_nvidia_smi_fields() -> None:
    output = (
        "NVIDIA H200, 580.1, 345 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 700.00 W, 143771 MiB\nother\n"
    )
    found = environment.parse_smi(output)
    assert (found["name"], found["driver_version"]) == ("NVIDIA H200", "580.1")
    assert found["memory.total"] == "143771 MiB"
    assert environment.parse_smi("") == {}


def test_environment_of_a_stage() -> None:
    given = {"TRITON_INTERPRET": "1", "HOME": "/home"}
    real = processes.child_environment(given, dry_run=False)
    assert "TRITON_INTERPRET" not in real
    assert "CUDA_VISIBLE_DEVICES" not in real
    assert real["HOME"] == "/home"
    paths = processes.child_environment({"PYTHONPATH": "/more"})["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(files.ROOT), str(record.ROOT / "python"), "/more"]
    rehearsal = processes.child_environment({}, dry_run=True)
    assert (rehearsal["TRITON_INTERPRET"], rehearsal["CUDA_VISIBLE_DEVICES"]) == ("1", "")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("how", ["late", "stopped"])
def test_process_is_killed_with_its_children(how: str, tmp_path: Path) -> None:
    code = f"""
        import pathlib, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(sleeper.pid))
        time.sleep(60)
    """
    begin = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        stop = threading.Event() if how == "stopped" else None
        if stop is not None:
            threading.Timer(2.0, stop.set).start()
        seconds = 2.0 if stop is None else 60.0
        assert processes.run_limited(command, seconds, log, os.environ, stop) is None
    assert time.monotonic() - begin < 10
    deadline = time.monotonic() + 5
    pid = int((tmp_path / "pid").read_text())
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_report_has_gpu_marks_and_failures_are_written_at_once(tmp_path: Path) -> None:
    (tmp_path / "test_marks.py").write_text(
        "import os, pytest\n@pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): pass\n"
        "def test_c(): assert 'why' == 'not'\n"
        "def test_d():\n    if 'KILLED' in os.environ: os._exit(3)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    plugin = ["-p", tests.marks.__name__, "--junitxml=report.xml"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin]
    failures = tmp_path / "failures.txt"
    found = {**os.environ, "PYTHONPATH": str(files.ROOT), tests.marks.FAILURES: str(failures)}
    found.pop("PYTEST_XDIST_WORKER", None)  # the child run is no xdist worker
    found |= {"KILLED": "yes"}
    assert subprocess.run(command, cwd=tmp_path, env=found).returncode == 3
    assert not (tmp_path / "report.xml").exists()
    written = failures.read_text()
    assert written.startswith("test_marks.py::test_c (call)")
    assert "assert 'why' == 'not'" in written
    del found["KILLED"]
    assert subprocess.run(command, cwd=tmp_path, env=found).returncode == 1
    parsed = tests.parse(tmp_path / "report.xml")
    assert (parsed["passed"], parsed["failed"], parsed["gpu_passed"]) == (3, 1, 1)


def test_import_error_of_a_test_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    failures = tmp_path / "failures.txt"
    found = {**os.environ, "PYTHONPATH": str(files.ROOT), tests.marks.FAILURES: str(failures)}
    found.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", tests.marks.__name__]
    assert subprocess.run(command, cwd=tmp_path, env=found).returncode == 2
    written = failures.read_text()
    assert written.startswith("test_broken.py (collection)")
    assert "no_such_package" in written


@pytest.mark.parametrize(
    ("body", "status", "outcome", "reason"),
    [
        ("context.save({'x': 1})", child.PASSED, "passed", ""),
        ("raise StageSkipped('lacks it')", child.SKIPPED, "skipped", "lacks it"),
        ("raise StageFailed('is wrong')", child.FAILED, "failed", "is wrong"),
        ("context.save({'x': 1}); 1 / 0", child.FAILED, "failed", "ZeroDivisionError: division"),
    ],
)
def test_outcome_of_a_stage(
    body: str,
    status: int,
    outcome: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = {"StageSkipped": context.StageSkipped, "StageFailed": context.StageFailed}

    class Module:
        @staticmethod
        def run(context: context.Context) -> None:
            exec(body, {**names, "context": context})

    monkeypatch.setitem(sys.modules, "bench.gpu_check.stages.made_up", Module)
    given = context.Context("made_up", tmp_path, dry_run=True, seconds=5.0)
    assert child.run_stage(given) == status
    found = files.read_json(context.result_path(tmp_path, "made_up"))
    assert found["status"] == outcome
    assert found["reason"].startswith(reason)
    # results saved before an error are kept
    assert found["results"] == ({"x": 1} if "save" in body else {})


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, float]:
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "bench", "gpu-check", "--out", str(out), "--dry-run"]
    command += ["--also", "end_to_end_8b"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True)
    return out, done.returncode, done.stdout + done.stderr, time.monotonic() - begin


@pytest.mark.slow
def test_rehearsal_passes(rehearsal: tuple[Path, int, str, float]) -> None:
    out, status, output, _ = rehearsal
    found = json.loads((out / "gpu-check.json").read_text())
    outcomes = {name: stage["status"] for name, stage in found["stages"].items()}
    names = [stage.name for stage in select_stages(["end_to_end_8b"])]
    expected = {**dict.fromkeys(names, "passed"), "sanitizer": "skipped"}
    assert outcomes == expected, output
    assert status == 0
    assert found["status"] == "passed"
    assert found["schema_version"] == record.SCHEMA_VERSION
    assert {"torch", "triton", "peft"} <= found["versions"].keys()
    assert "left for the whole check" in output
    assert (out / "gpu-check.txt").read_text().strip() in output


@pytest.mark.slow
def test_rehearsal_is_not_presented_as_a_gpu_run(rehearsal: tuple[Path, int, str, float]) -> None:
    out = rehearsal[0]
    found = json.loads((out / "gpu-check.json").read_text())
    assert found["dry_run"] is True
    assert found["machine"]["gpu"] is None
    text = (out / "gpu-check.txt").read_text()
    assert table.WARNING in text
    rows = found["stages"]["kernels"]["results"]["rows"]
    ops = {"fold", "fold_measure", "fold_rows", "nystrom"}
    ops |= {"sketch", "gram", "convergence", "eigh"}
    assert {row["op"] for row in rows} == ops
    assert {row["timer"] for row in rows if "timer" in row} == {"cpu clock"}
    methods = [row["method"] for row in found["stages"]["end_to_end"]["results"]["rows"]]
    assert methods == ["plain", "ours", "peft"]
    assert found["stages"]["tests"]["results"]["passed"] > 10


@pytest.mark.slow
def test_terminated_check_keeps_its_record_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu-check", "--out", str(tmp_path), "--dry-run"]
    process = subprocess.Popen(
        [*command, "--skip", "build"], cwd=files.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "environment: time limit" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    process.stdout.close()
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["status"] == "running"
    assert found["stages"]["build"]["status"] == "skipped"
    # The stage would run for many seconds; a killed process may take a moment to disappear.
    until = time.monotonic() + 3
    while left := [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in _read(p)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
