"""How the GPU check runs the test suite: completeness, order, and number of processes."""

import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from bench import files
from bench.gpu_check import table
from bench.gpu_check.stages import tests

MARKED = re.compile(r"^\s*(@|pytestmark = .*)pytest\.mark\.gpu\b", re.MULTILINE)


def suite_files() -> list[Path]:
    """Return the files of this suite, relative to the checkout."""
    return sorted(path.relative_to(files.ROOT) for path in files.ROOT.glob("tests/**/test_*.py"))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkout with the same test files, each with one test, that is quick to collect."""
    root = tmp_path_factory.mktemp("mirror")
    for path in suite_files():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("def test_it(): pass\n")
    (root / "tests" / "helpers.py").touch()
    (root / "tests" / "__pycache__").mkdir()
    options = "addopts = --import-mode=importlib\ntestpaths = tests\n"
    (root / "pytest.ini").write_text(f"[pytest]\n{options}")
    return root


def collect(root: Path, arguments: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += [*arguments, "-p", "no:xdist", "-p", "no:benchmark"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if "::" in line]


@pytest.mark.parametrize("parallel", [False, True])
def test_whole_suite_runs_once_with_gpu_tests_first(mirror: Path, parallel: bool) -> None:
    whole = collect(mirror, [f"--ignore={path}" for path in tests.NOT_ON_DEVICE])
    names = [path.as_posix() for path in suite_files()]
    names = [name for name in names if not name.startswith(tests.NOT_ON_DEVICE)]
    assert sorted(whole) == [f"{name}::test_it" for name in names]
    found = collect(mirror, tests.ordered_paths(parallel, mirror))
    assert sorted(found) == sorted(whole)
    firsts = [test.startswith(tests.FIRST_PATHS) for test in found]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[0]
    slow = [i for i, test in enumerate(found) if test.startswith(tests.SLOW_PATH)]
    assert slow[0 if parallel else -1] == (sum(firsts) if parallel else len(found) - 1)


def test_all_gpu_tests_are_in_the_first_paths() -> None:
    marked = [
        path.as_posix() for path in suite_files() if MARKED.search((files.ROOT / path).read_text())
    ]
    assert "tests/ops/test_launches.py" in marked
    own = Path(tests.SELF_TEST.partition("::")[0]).as_posix()  # contains the mark only in a string
    assert [path for path in marked if not path.startswith((*tests.FIRST_PATHS, own))] == []


@pytest.mark.parametrize(
    ("cores", "installed", "dry_run", "expected"),
    [
        (16, True, False, (12, "")),
        (8, True, False, (6, "")),
        (4, True, False, (1, "the machine has 4 cores")),
        (16, False, False, (1, "pytest-xdist is not installed")),
        (16, False, True, (1, "")),
    ],
)
def test_number_of_processes_and_reason(
    cores: int,
    installed: bool,
    dry_run: bool,
    expected: tuple[int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = ModuleSpec("xdist", None) if installed else None
    monkeypatch.setattr(tests.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(tests.os, "cpu_count", lambda: cores)
    assert tests.num_processes(dry_run) == expected


def test_text_of_a_killed_suite_names_missing_packages() -> None:
    found: dict[str, Any] = {"missing_packages": ["attrs"], "one_process": "why"}
    assert table._tests(found) == [
        "tests: no report",
        "  in one process: why",
        "  not installed: attrs",
    ]
    assert table._tests({"missing_packages": [], "one_process": ""}) == []


def test_xdist_keeps_the_given_order(pytestconfig: pytest.Config) -> None:
    class Config:
        option: Any = type("Options", (), {"loadscopereorder": True})()

    tests.marks.pytest_configure(Config())  # type: ignore[arg-type]
    assert Config.option.loadscopereorder is False
    if pytestconfig.pluginmanager.hasplugin(
        "xdist"
    ):  # xdist must still have an option of this name
        assert hasattr(pytestconfig.option, "loadscopereorder")
