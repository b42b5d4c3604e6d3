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
# How a program is compiled to check its results under several schedules, or the threads' accesses.
CHECKS = {"results": ["-O1", *WARNINGS], "memory": SANITIZERS, "races": RACES}


def compile_and_run(
    source: str, folder: Path, *flags: str, csrc: Path = CSRC, small: bool = False
) -> subprocess.CompletedProcess[str]:
    """Build a program in a folder and run it; ``small`` skips slow parts.

    A test that looks for races is skipped where none can be found.
    """
    if RACES[-1] in flags and not _can_find_races():
        pytest.skip("programs compiled with -fsanitize=thread do not run here")
    program = folder / "program"
    language = ["-std=c++17", "-U_FORTIFY_SOURCE"]  # see cuda_emulator.h
    command = [CXX, *language, *flags, f"-I{csrc}", str(PROGRAMS / source), "-o", str(program)]
    subprocess.run(command, check=True)
    arguments = [str(program), *(["small"] if small else [])]
    # clang's fake stacks, which find uses after a return, do not follow jumps between stacks
    options = {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    environment = {**os.environ, **options}
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


def assert_sound(source: str, folder: Path, check: str) -> None:
    """Require that a program finds no fault, and neither does a sanitizer; see :data:`CHECKS`."""
    done = compile_and_run(source, folder, *CHECKS[check], small=check != "results")
    assert (done.returncode, done.stdout) == (0, "all agree\n"), done.stderr


def assert_detected(
    source: str,
    folder: Path,
    bug: tuple[str, str, str],
    *,
    memory: bool = False,
    race: bool = False,
) -> None:
    """Require that a program fails with a bug in csrc.

    Args:
        source: of the program.
        folder: for what is built.
        bug: file, text, and the text with the bug.
        memory, race: it is found only by the sanitizer of memory, or of races.
    """
    flags = SANITIZERS if memory else RACES if race else ["-w"]
    done = compile_and_run(source, folder, *flags, csrc=with_bug(folder, *bug), small=True)
    assert done.returncode != 0
    assert not race or "data race" in done.stderr


def with_bug(folder: Path, file: str, text: str, bug: str) -> Path:
    """Return a copy of csrc in which ``text``, which must occur exactly once, is replaced."""
    mutant = folder / "csrc"
    shutil.copytree(CSRC, mutant)
    source = (mutant / file).read_text("utf-8")
    assert source.count(text) == 1
    (mutant / file).write_text(source.replace(text, bug), "utf-8")
    return mutant
