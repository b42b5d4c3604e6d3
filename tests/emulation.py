"""Compile programs of tests/emulator, which run csrc's device code on the CPU, also with bugs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parent / "emulator"
CSRC = PROGRAMS.parents[1] / "csrc"
CXX = shutil.which("g++") or shutil.which("c++") or "c++"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_and_run(
    source: str, folder: Path, *flags: str, csrc: Path = CSRC, small: bool = False
) -> subprocess.CompletedProcess[str]:
    """Build a program in a folder and run it; ``small`` skips slow parts."""
    program = folder / "program"
    command = [CXX, "-std=c++17", *flags, f"-I{csrc}", str(PROGRAMS / source), "-o", str(program)]
    subprocess.run(command, check=True)
    arguments = [str(program), *(["small"] if small else [])]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


def with_bug(folder: Path, file: str, text: str, bug: str) -> Path:
    """Return a copy of csrc in which ``text``, which must occur exactly once, is replaced."""
    mutant = folder / "csrc"
    shutil.copytree(CSRC, mutant)
    source = (mutant / file).read_text("utf-8")
    assert source.count(text) == 1
    (mutant / file).write_text(source.replace(text, bug), "utf-8")
    return mutant
