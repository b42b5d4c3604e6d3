"""The CUDA kernel of the (Q, Q) part of a fold run on the CPU, and planted bugs it must detect."""

from pathlib import Path

import pytest

from emulation import CHECKS, assert_detected, assert_sound


@pytest.mark.parametrize("check", CHECKS)
def test_kernel_is_sound(check: str, tmp_path: Path) -> None:
    assert_sound("run_nystrom.cpp", tmp_path, check)


# Plausible bugs: original text, text with the bug.
MUTATIONS = {
    "a product's last rows left out": ("+ kStripRows - 1) / kStripRows", ") / kStripRows"),
    "row beyond the width": ("first + i < width ? first + i : width - 1", "first + i"),
    "product not published": (
        "= sum[i];\n    }\n  }\n  __syncthreads();",
        "= sum[i];\n    }\n  }",
    ),
    "transpose not transposed": (
        "transposed[column * width + first + i] = sum[i]",
        "transposed[(first + i) * width + column] = sum[i]",
    ),
    "a step of the factor not published": (
        "k < width; ++k) {\n    __syncthreads();",
        "k < width; ++k) {",
    ),
    "pivot not divided": ("block.at(row, k) * inverse", "block.at(row, k)"),
    "pivots below the cut taken": ("if (!(pivot > cut)) continue;", ""),
    "rows below the cut counted": ("of.values[k] = pivot > cut", "of.values[k] = 1.0"),
    "whitened in ascending order": (
        "regular ? i / width : width - 1 - i / width",
        "i / width",
    ),
    "rows of a singular core not counted": ("rank += block.values[i] > kNystromCut", "++rank"),
    "whitened beyond the ceiling": ("ceiling < left ?", "false ?"),
    "a floor under any length": (
        "grade(block, core, 0.0, summary.captured);  // rows",
        "grade(block, core, 0.5, summary.captured);  // rows",
    ),
    "trace ignored": ("sum > (1.0 + kNystromExcess) * args.trace[layer]", "false"),
    "sum of a part": ("  sum = over_block(sum, Sum());\n  return sum", "  return sum"),
    "trace of another layer": ("args.trace[layer]", "args.trace[0]"),
    "scratch of another layer": ("layer * kNystromScratch * size", "kNystromScratch * size"),
    "noise stays": ("nystrom_noise(retry)", "nystrom_noise(0)"),
    "more noise than needed": ("int retry = 0;; ++retry", "int retry = 1;; ++retry"),
    "a floor kept that does not help": ("retry == kNystromTries", "retry == kNystromTries - 1"),
    "root left out": ("block.vectors[i] / sqrt(block.at(row, row))", "block.vectors[i]"),
    "norm of a part": ("return over_block(squares, Sum());", "return squares;"),
    "upper triangle read": ("if (column <= row) block", "block"),
    "singular core taken as regular": ("rank == width && norm < kNystromRegular", "true"),
    "scale left out": (
        "whitener[row * width + i % width] * block.scale[i % width]",
        "whitener[row * width + i % width]",
    ),
    "cut left out": ("value > kNystromCut ?", "value != 0.0 ?"),
    "rows left out stay in place": ("place += block.values[j] != 0.0", "++place"),
    "noise counted": ("> kNystromNoise * largest", "> 0.0"),
    "ceiling forgotten": ("if (rank > ceiling)", "if (false)"),
    "ascending": ("from = width - 1 - row;", "from = row;"),
    "squares beyond the rank": ("i < rank ? block.values[width - 1 - i] : 0.0", "block.values[0]"),
    "overlaps of other rows": ("multiply(b, metric, width, a);", "multiply(a, metric, width, b);"),
    "always even": ("!(deviation <= args.tolerance)", "false"),
    "captured below 0": ("positive = entry < 0.0 ? 0.0 : entry", "positive = 1.0"),
}  # fmt: skip
# Results show no difference on the CPU, where a few numbers past the end are accessible.
ONLY_FOUND_BY_SANITIZERS = {"row beyond the width"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bug_is_detected(name: str, tmp_path: Path) -> None:
    assert_detected(
        "run_nystrom.cpp",
        tmp_path,
        ("nystrom.cuh", *MUTATIONS[name]),
        memory=name in ONLY_FOUND_BY_SANITIZERS,
    )
