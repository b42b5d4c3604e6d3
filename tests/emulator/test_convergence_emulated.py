"""The CUDA kernel of the convergence check run on the CPU, and planted bugs it must detect."""

from pathlib import Path

import pytest

from emulation import CHECKS, RACES, WARNINGS, assert_detected, assert_sound, compile_and_run


@pytest.mark.parametrize("check", CHECKS)
def test_kernel_is_sound(check: str, tmp_path: Path) -> None:
    assert_sound("run_convergence.cpp", tmp_path, check)


# Plausible bugs: file, original text, text with the bug.
MUTATIONS = {
    "no barrier": ("convergence.cuh", "  __syncthreads();\n", ""),
    "half a warp": ("convergence.cuh", "offset = kLanes / 2", "offset = kLanes / 4"),
    "reduction skips a step": ("convergence.cuh", "offset /= 2", "offset /= 4"),
    "one sum not reduced": (
        "convergence.cuh",
        "sums.current += __shfl_down_sync(0xffffffffu, sums.current, offset);",
        "",
    ),
    "last warp left out": ("convergence.cuh", "w < kWarps; ++w", "w < kWarps - 1; ++w"),
    "first warp twice": ("convergence.cuh", "int w = 1; w < kWarps", "int w = 0; w < kWarps"),
    "wrong lane stores": ("convergence.cuh", "% kLanes == 0)", "% kLanes == 1)"),
    "strides swapped": (
        "convergence.cuh",
        "matrix.previous + i_row * matrix.previous_row_stride",
        "matrix.previous + i_row * matrix.columns",
    ),
    "alignment of one side only": (
        "convergence.cuh",
        "is_vector_aligned(previous) && is_vector_aligned(current)",
        "is_vector_aligned(previous)",
    ),
    "tail left out": ("convergence.cuh", "done + threadIdx.x; i < columns", "done; i < 0"),
    "tail read too far": (
        "convergence.cuh",
        "threadIdx.x; i < columns;",
        "threadIdx.x; i <= columns;",
    ),
    "tail counted twice": ("convergence.cuh", "done = columns / 4 * 4;", "done = columns / 8 * 4;"),
    "one component missed": ("convergence.cuh", "sums.add(x.w, y.w);", ""),
    "search off by one": ("convergence.cuh", ".first_row <= row", ".first_row < row"),
    "search stops early": ("convergence.cuh", "high - low > 1", "high - low > 2"),
    "count overwritten": (
        "convergence.cuh",
        "atomicAdd(&args.unconverged[m], 1)",
        "args.unconverged[m] = 1",
    ),
    "rank ignored": ("convergence.cuh", "i_row < matrix.rank && ", ""),
    "rank inclusive": ("convergence.cuh", "i_row < matrix.rank", "i_row <= matrix.rank"),
    "NaN converges": ("convergence.h", "!(similarity >= tau)", "similarity < tau"),
    "tau exclusive": ("convergence.h", "!(similarity >= tau)", "!(similarity > tau)"),
    "sign kept": ("convergence.h", "fabs(sums.dot / scale)", "sums.dot / scale"),
    "zero row is NaN": ("convergence.h", "scale == 0.0 ? 0.0f : ", ""),
}


# Results show no difference on the CPU, which loads from any address; gaps hold few NaN.
ONLY_FOUND_BY_SANITIZERS = {"alignment of one side only", "tail read too far"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bug_is_detected(name: str, tmp_path: Path) -> None:
    assert_detected(
        "run_convergence.cpp", tmp_path, MUTATIONS[name], memory=name in ONLY_FOUND_BY_SANITIZERS
    )


def test_emulator_reports_races(tmp_path: Path) -> None:
    done = compile_and_run("self_test.cpp", tmp_path, *RACES, small=True)
    assert done.returncode != 0
    assert "data race" in done.stderr


def test_emulator_detects_deadlocks_and_missing_barriers(tmp_path: Path) -> None:
    done = compile_and_run("self_test.cpp", tmp_path, "-O1", *WARNINGS)
    assert done.stdout.splitlines() == [
        "deadlock: 16 threads wait at __shfl_down_sync; 16 threads wait at __syncthreads;",
        "wrong without a barrier: yes, with it: 0",
        "after an early exit of 24 threads: 40",
        "wrong entries of a product: 0",
    ]
