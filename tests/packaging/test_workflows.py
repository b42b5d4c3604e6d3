"""The CI workflows (actionlint, pinned actions, permissions) and the Makefile."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import extras

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")
USES = re.compile(r"^\s*(?:-\s+)?uses:\s*(\S+)(.*)$", re.MULTILINE)


def read(path: Path) -> dict[str, Any]:
    # BaseLoader: YAML 1.1 reads the key `on` as a boolean
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def unpinned(text: str) -> list[str]:
    """Return the actions that are not pinned by a full hash with a version comment."""
    return [
        action
        for action, rest in USES.findall(text)
        if not PINNED.fullmatch(action) or not re.match(r"\s+# v\d", rest)
    ]


def find_actionlint() -> str | None:
    beside = Path(sys.executable).with_name("actionlint")
    return str(beside) if beside.exists() else shutil.which("actionlint")


def test_workflows_are_found() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "gpu.yml", "release.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actionlint_finds_nothing(path: Path) -> None:
    program = find_actionlint()
    if program is None:
        pytest.skip("actionlint is not installed; CI runs it in a job of its own")
    done = subprocess.run([program, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_hash(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert USES.findall(text)
    assert unpinned(text) == []


@pytest.mark.parametrize(
    "line",
    [
        "- uses: actions/checkout@v4 # v4.2.2",
        "- uses: actions/checkout@11bd719 # v4.2.2",
        "uses: actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683",
        "uses: ./local",
    ],
)
def test_unpinned_actions_are_detected(line: str) -> None:
    assert len(unpinned(f"      {line}\n")) == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_least_permissions(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        may = {"id-token": "write"} if name == "publish" else {}
        assert job.get("permissions", {}) == may
        assert int(job["timeout-minutes"]) <= 60
        checkouts = [s for s in job["steps"] if "actions/checkout" in s.get("uses", "")]
        assert all(step["with"]["persist-credentials"] == "false" for step in checkouts)


def test_gpu_workflow_runs_the_check_and_keeps_its_results() -> None:
    workflow = read(FOLDER / "gpu.yml")
    assert set(workflow["on"]) == {"schedule", "workflow_dispatch"}
    steps = workflow["jobs"]["gpu-check"]["steps"]
    check = next(step for step in steps if "make gpu-check" in step.get("run", ""))
    # a failed check fails the job
    assert "continue-on-error" not in check
    assert "||" not in check["run"]
    upload = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()"
    assert {"gpu-check/gpu-check.json", "gpu-check/gpu-check.txt"} <= set(
        upload["with"]["path"].split()
    )


def test_ci_matrix_has_jobs_with_and_without_nvcc() -> None:
    matrix = read(FOLDER / "ci.yml")["jobs"]["check"]["strategy"]["matrix"]
    assert matrix["cuda"] == [""]
    assert [entry["cuda"] for entry in matrix["include"]] == ["13.0"]


@pytest.mark.parametrize(
    ("has_torch", "expected"),
    [(True, "-m bench gpu-check --out results --dry-run\n"), (False, None)],
)
def test_make_uses_a_python_that_has_torch(
    has_torch: bool, expected: str | None, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1 $2" in\n'
        f'"-c "*torch*) exit {0 if has_torch else 1} ;;\n"-c "*) exit 9 ;;\nesac\necho "$@"\n'
    )
    python.chmod(0o755)
    command = ["make", "-s", "gpu-check", f"PYTHON={python}", "OUT=results"]
    command += ["CHECK_ARGS=--dry-run", f"VENV={tmp_path / 'venv'}"]
    # In the other branch `make setup` is replaced by `false`, so that nothing is installed.
    command += ["MAKE=false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not (tmp_path / "venv").exists()
    assert (done.returncode == 0) == has_torch
    if expected is not None:
        assert done.stdout == expected


@pytest.mark.parametrize(
    ("variables", "fetched"),
    [
        (["HAS_GPU=yes", "HAS_NVCC="], True),
        (["HAS_GPU=yes", "HAS_NVCC=/usr/bin/nvcc"], False),
        (["HAS_GPU=yes", "HAS_NVCC=", "EVA_KERNELS_CUDA=0"], False),
        (["HAS_GPU=", "HAS_NVCC="], False),
        (["HAS_GPU=", "HAS_NVCC=", "EVA_KERNELS_CUDA=1"], True),
    ],
)
def test_make_installs_nvcc_if_cuda_is_built_and_nvcc_is_missing(
    variables: list[str], fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EVA_KERNELS_CUDA", "MAKEFLAGS"):  # set by the make that runs the tests
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        ["make", "-n", "-B", "setup", *variables], cwd=ROOT, capture_output=True, text=True
    )
    fetch, install = (done.stdout.find(f"-m pip install {how}") for how in ("--upgrade", "-c"))
    assert ("-r csrc/nvcc.txt" in done.stdout) == fetched
    assert install > 0
    assert (0 < fetch < install) == fetched


@pytest.mark.parametrize(("cuda", "succeeds"), [("auto", True), ("1", False)])
def test_make_continues_without_nvcc_unless_cuda_is_required(
    cuda: str, succeeds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"  # a fake that fails only when installing the compiler
    python.write_text('#!/bin/sh\ncase "$*" in *nvcc.txt*) exit 1;; esac\n')
    python.chmod(0o755)
    variables = [f"VENV={tmp_path}", f"EVA_KERNELS_CUDA={cuda}", "HAS_GPU=yes", "HAS_NVCC="]
    done = subprocess.run(["make", "setup", *variables], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert (tmp_path / ".ready").exists() == succeeds


def test_make_completes_a_venv_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C, or on Debian without python3-venv."""
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    (tmp_path / "bin").mkdir()
    for name, does in (("bin/python", '[ -e "$0.pip" ]'), ("python", 'touch "$3/bin/python.pip"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    variables = [f"VENV={tmp_path}", f"PYTHON={tmp_path / 'python'}", "HAS_GPU=", "HAS_NVCC="]
    done = subprocess.run(["make", "setup", *variables], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_test_requires_all_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "test"], cwd=ROOT, capture_output=True, text=True
    )
    assert re.search(
        rf"^OMP_NUM_THREADS=1 {extras.ALL_INSTALLED}=1 \S+python -m pytest .*--dist loadfile$",
        done.stdout,
        re.MULTILINE,
    )
    monkeypatch.setenv(extras.ALL_INSTALLED, "1")
    assert extras.needs("json").dumps([]) == "[]"
    with pytest.raises(ModuleNotFoundError):
        extras.needs("no_such_package")
    monkeypatch.delenv(extras.ALL_INSTALLED)
    assert extras.needs("json").dumps([]) == "[]"
    with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed"):
        extras.needs("no_such_package")
