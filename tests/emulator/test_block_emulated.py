"""Reductions over a block run on the CPU, and planted bugs that must be detected."""

from pathlib import Path

import pytest

from emulation import (
    RACES,
    SANITIZERS,
    WARNINGS,
    compile_and_run,
    skip_without_thread_sanitizer,
    with_bug,
)


def test_reductions_agree_under_every_schedule(tmp_path: Path) -> None:
    done = compile_and_run("run_block.cpp", tmp_path, "-O1", *WARNINGS)
    assert (done.returncode, done.stdout) == (0, "all agree\n")


def test_reductions_stay_within_their_memory(tmp_path: Path) -> None:
    done = compile_and_run("run_block.cpp", tmp_path, *SANITIZERS)
    assert (done.returncode, done.stdout) == (0, "all agree\n"), done.stderr


def test_threads_do_not_race(tmp_path: Path) -> None:
    skip_without_thread_sanitizer()
    done = compile_and_run("run_block.cpp", tmp_path, *RACES)
    assert (done.returncode, done.stdout) == (0, "all agree\n"), done.stderr


# Plausible bugs: original text, text with the bug.
MUTATIONS = {
    "sums of warps not published": (
        "threadIdx.x / kLanes] = x;\n  __syncthreads();",
        "threadIdx.x / kLanes] = x;",
    ),
    "sums of warps overwritten while they are read": (
        "  __syncthreads();  // every thread has read of_warp of a preceding reduction\n",
        "",
    ),
    "one warp's sum": ("i < static_cast<int>(blockDim.x) / kLanes", "i < 1"),
    "half a warp's sum": ("int offset = kLanes / 2", "int offset = kLanes / 4"),
    "the smallest": ("return fmax(x, y)", "return x"),
}
# Results show no difference under the emulator's schedules, in which no warp is slow enough.
ONLY_FOUND_AS_RACES = {"sums of warps overwritten while they are read"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bug_is_detected(name: str, tmp_path: Path) -> None:
    flags = ["-w"]
    if name in ONLY_FOUND_AS_RACES:
        skip_without_thread_sanitizer()
        flags = RACES
    csrc = with_bug(tmp_path, "block.cuh", *MUTATIONS[name])
    done = compile_and_run("run_block.cpp", tmp_path, *flags, csrc=csrc)
    assert done.returncode != 0
    assert flags != RACES or "data race" in done.stderr
