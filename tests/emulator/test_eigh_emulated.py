"""The CUDA kernel of the eigen-decomposition run on the CPU, and planted bugs it must detect."""

from pathlib import Path

import pytest

from emulation import CHECKS, assert_detected, assert_sound


@pytest.mark.parametrize("check", CHECKS)
def test_kernel_is_sound(check: str, tmp_path: Path) -> None:
    assert_sound("run_eigh.cpp", tmp_path, check)


# Plausible bugs: file, original text, text with the bug.
MUTATIONS = {
    "no barrier after a round": (
        "eigh.cuh",
        "rotate_vectors(block, round);\n    __syncthreads();",
        "rotate_vectors(block, round);",
    ),
    "no barrier after loading": (
        "eigh.cuh",
        "  __syncthreads();\n  return exponent;",
        "  return exponent;",
    ),
    "no barrier before ranking": (
        "eigh.cuh",
        "fix_signs(block);\n  __syncthreads();",
        "fix_signs(block);",
    ),
    "no barrier before storing": (
        "eigh.cuh",
        "  __syncthreads();\n  const int half",
        "  const int half",
    ),
    "no barrier after staging": (
        "eigh.cuh",
        "first + i % columns];\n    }\n    __syncthreads();",
        "first + i % columns];\n    }",
    ),
    "a thread skips the round alone": (
        "eigh.cuh",
        "if (!__syncthreads_or(rotated)) continue;",
        "if (__syncthreads(), !rotated) continue;",
    ),
    "a sweep is one round short": (
        "eigh.cuh",
        "round < block.players - 1",
        "round < block.players - 2",
    ),
    "circle closes late": ("eigh.cuh", "q < 0 ? q + circle", "q < 0 ? q + players"),
    "block skipped for one identity": (
        "eigh.cuh",
        "rotation_a.sine == 0.0 && rotation_b",
        "rotation_a.sine == 0.0 || rotation_b",
    ),
    "rotation of the wrong side": (
        "eigh.cuh",
        "rotation_b.apply(v_qp, v_qq)",
        "rotation_a.apply(v_qp, v_qq)",
    ),
    "upper triangle read": ("eigh.cuh", "if (column > row) continue;", ""),
    "row of the odd player not zeroed": ("eigh.cuh", "block.triangle[i] = 0.0;", ""),
    "NaN goes on": ("eigh.cuh", "finite = !__syncthreads_or(bad)", "finite = true"),
    "equal values share a place": ("eigh.cuh", " && i < j", ""),
    "negative peak": ("eigh.cuh", "value < 0.0, 0)", "value > 0.0, 0)"),
    "peak of half a warp": (
        "eigh.cuh",
        "int offset = kLanes / 2; offset > 0; offset /= 2) {\n      const",
        "int offset = kLanes / 4; offset > 0; offset /= 2) {\n      const",
    ),
    "last columns stored past the end": (
        "eigh.cuh",
        "first + half < width ? half : width - first",
        "half",
    ),
    "shared memory too small": ("eigh.cuh", "even + even / 2", "even"),
    "root of the other sign": ("eigh.h", "gap < 0.0 ? -size : size", "size"),
    "negligible to the norm": (
        "eigh.h",
        "kEighTolerance * kEighTolerance * fabs(a_pp * a_qq)",
        "kEighTolerance * kEighTolerance",
    ),
    "stops early": ("eigh.h", "kEighMaxSweeps = 40", "kEighMaxSweeps = 3"),
}


# Results show no difference on the CPU, where a few bytes past the end are accessible.
ONLY_FOUND_BY_SANITIZERS = {"shared memory too small"}


# Results show no difference under any schedule of the emulator, where a warp runs at once.
ONLY_FOUND_AS_RACES = {"no barrier before ranking"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bug_is_detected(name: str, tmp_path: Path) -> None:
    assert_detected(
        "run_eigh.cpp",
        tmp_path,
        MUTATIONS[name],
        memory=name in ONLY_FOUND_BY_SANITIZERS,
        race=name in ONLY_FOUND_AS_RACES,
    )
