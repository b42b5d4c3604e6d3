"""Compile programs of tests/emulator, which run csrc's device code on the CPU, also with bugs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).resolve().parent / "emulator"
CSRC = PROGRAMS.parents[1] / "csrc"
CXX = shutil.which("g++") or shutil.which("c++") or "c++"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RACES = ["-g", "-O1", "-fsanitize=thread"]


def compile_and_run(
    source: str, folder: Path, *flags: str, csrc: Path = CSRC, small: bool = False
) -> subprocess.CompletedProcess[str]:
    """Build a program in a folder and run it; ``small`` skips slow parts."""
    program = folder / "program"
    command = [CXX, "-std=c++17", *flags, f"-I{csrc}", str(PROGRAMS / source), "-o", str(program)]
    subprocess.run(command, check=True)
    arguments = [str(program), *(["small"] if small else [])]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)


@functools.cache
def _can_find_races() -> bool:
    """Tell whether the compiler has ThreadSanitizer, and the system lets its programs run."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "program")
        commands = ([CXX, *RACES, "-x", "c++", "-", "-o", program], [program])
        for command in commands:
            if subprocess.run(command, input=b"int main() {}", capture_output=True).returncode:
                return False
    return True


def skip_without_thread_sanitizer() -> None:
    """Skip a test that looks for races where none can be found."""
    if not _can_find_races():
        pytest.skip("programs compiled with -fsanitize=thread do not run here")


def with_bug(folder: Path, file: str, text: str, bug: str) -> Path:
    """Return a copy of csrc in which ``text``, which must occur exactly once, is replaced."""
    mutant = folder / "csrc"
    shutil.copytree(CSRC, mutant)
    source = (mutant / file).read_text("utf-8")
    assert source.count(text) == 1
    (mutant / file).write_text(source.replace(text, bug), "utf-8")
    return mutant
