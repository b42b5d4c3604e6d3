"""Reductions over a block run on the CPU, and planted bugs that must be detected."""

from pathlib import Path

import pytest

from emulation import CHECKS, assert_detected, assert_sound


@pytest.mark.parametrize("check", CHECKS)
def test_reductions_are_sound(check: str, tmp_path: Path) -> None:
    assert_sound("run_block.cpp", tmp_path, check)


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
    assert_detected(
        "run_block.cpp", tmp_path, ("block.cuh", *MUTATIONS[name]), race=name in ONLY_FOUND_AS_RACES
    )
