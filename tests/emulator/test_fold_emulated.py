"""The CUDA kernels of the fold, run on the CPU, and planted bugs that must show."""

from pathlib import Path

import pytest

from emulation import SANITIZERS, WARNINGS, compile_and_run, with_bug


def test_kernels_agree_under_every_schedule(tmp_path: Path) -> None:
    done = compile_and_run("run_fold.cpp", tmp_path, "-O1", *WARNINGS)
    assert (done.returncode, done.stdout) == (0, "all agree\n")


def test_kernels_stay_within_their_memory(tmp_path: Path) -> None:
    done = compile_and_run("run_fold.cpp", tmp_path, *SANITIZERS, small=True)
    assert (done.returncode, done.stdout) == (0, "all agree\n"), done.stderr


# What a slip of the pen would do: text as it stands, text with the bug.
MUTATIONS = {
    "no barrier after staging": (
        "    __syncthreads();\n    // The next columns",
        "    // The next columns",
    ),
    "no barrier before staging again": (
        "core, metric);\n    __syncthreads();",
        "core, metric);",
    ),
    "mixing staged without a barrier": (
        "      __syncthreads();\n      const int depth",
        "      const int depth",
    ),
    "mixing overwritten while it is read": (
        "      __syncthreads();  // the stage before has been read, and once: the image is there\n",
        "",
    ),
    "delta of the sum": ("layer.shift[d] / numbers.added", "layer.shift[d]"),
    "whole step taken by the mean": ("numbers.share * delta", "delta"),
    "mean of another layer": (
        "args.mean[layer * fold.features + column]",
        "args.mean[column]",
    ),
    "mean beyond the features": (
        "threadIdx.x < kRowsColumns && begin + threadIdx.x < fold.features",
        "threadIdx.x < kRowsColumns",
    ),
    "wrong lane stores": ("% kLanes == 0) args", "% kLanes == 1) args"),
    "weight left out": ("args.head(layer).weight * sum", "sum"),
    "rows of another layer": ("row % args.width * args.features", "row * args.features"),
    "along past the last row": (
        "if (row >= args.n_layers * args.width) return;  // a whole warp",
        "",
    ),
    "row beyond the width": (
        "if (row >= args.width) return {nullptr",
        "if (false) return {nullptr",
    ),
    "end of a row read as the next row": (
        "column + i < columns ? from[i] : 0.0f",
        "from[i]",
    ),
    "vector past the end": (
        "if (column + 4 <= columns && reinterpret_cast<uintptr_t>(from)",
        "if (reinterpret_cast<uintptr_t>(from)",
    ),
    "alignment not asked for": (
        "&& reinterpret_cast<uintptr_t>(from) % sizeof(float4) == 0",
        "",
    ),
    "mean not taken off": (" - row.along * delta[column + i]", ""),
    "another column's mean": ("row.along * delta[column + i]", "row.along * delta[column]"),
    "square left out": ("four.basis[i] * row.square", "four.basis[i]"),
    "pair before": ("while (pair > rows) pair -= ++rows;", "while (pair >= rows) pair -= ++rows;"),
    "diagonal not a triangle": (
        "rest > row && row < kFoldParts",
        "rest >= row && row < kFoldParts",
    ),
    "Y of the other tile": (
        "diagonal ? stage.image_rows[k] : stage.image_columns[k]",
        "stage.image_rows[k]",
    ),
    "basis of the other tile": (
        "diagonal ? of_row.basis[i] : of_column.basis[i]",
        "of_row.basis[i]",
    ),
    "core and metric swapped": (
        "core[i][j] += left[i] * basis[j]",
        "core[i][j] += left[i] * image[j]",
    ),
    "the next columns are the same": (
        "fetch(row, d + kFoldDepth + first, end, of_row)",
        "fetch(row, d + first, end, of_row)",
    ),
    "split reads into the next": (
        "begin + args.columns < fold.features ? begin + args.columns : fold.features",
        "fold.features",
    ),
    "last split left out": ("split < splits; ++split", "split < splits - 1; ++split"),
    "upper triangle stored": (
        "if (row >= width || column > row) return;",
        "if (row >= width) return;",
    ),
    "first entries of a tile alone": ("% kReduceBlocks) * kReduceThreads", "% kReduceBlocks) * 0"),
    "not mirrored": ("args.core[lower] = args.core[upper] = core", "args.core[lower] = core"),
    "saved row too many": ("if (i < of.kept)", "if (i <= of.kept)"),
    "stored beyond the row": ("if (column + i < columns) to[i]", "to[i]"),
    "four stored beyond the row": (
        "if (column + 4 <= columns && reinterpret_cast<uintptr_t>(to)",
        "if (reinterpret_cast<uintptr_t>(to)",
    ),
    "four stored anywhere": ("&& reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0", ""),
    "written though not sound": ("if (!*args.sound) return;", ""),
    "mixing transposed": (
        "of_layer[(old + k) * width + tile + row]",
        "of_layer[(tile + row) * width + old + k]",
    ),
    "mixing beyond the width": ("old + k < width && tile + row < width", "true"),
    "rows beyond the rank": ("if (row >= rank) break;", "if (row >= width) break;"),
    "rows beyond the width": ("if (row >= rank) break;", ""),
    "only the first tile of rows": (
        "tile < width; tile += kFoldTile",
        "tile < kFoldTile; tile += kFoldTile",
    ),
    "pairs of a part swapped": (
        "out[2] = high.x;\n  out[3] = high.y;",
        "out[2] = high.y;\n  out[3] = high.x;",
    ),
}
# The same, of what a block adds up.
BLOCK_MUTATIONS = {
    "sums of warps not published": (
        "threadIdx.x / kLanes] = x;\n  __syncthreads();",
        "threadIdx.x / kLanes] = x;",
    ),
    "one warp's sum": ("i < static_cast<int>(blockDim.x) / kLanes", "i < 1"),
    "half a warp's sum": ("int offset = kLanes / 2", "int offset = kLanes / 4"),
}
# The CPU forgives these: it loads from any address, and a few bytes beyond the memory are there.
ONLY_SANITIZERS_SEE = {
    "row beyond the width",
    "alignment not asked for",
    "vector past the end",
    "stored beyond the row",
    "four stored beyond the row",
    "four stored anywhere",
    "end of a row read as the next row",
    "along past the last row",
    "mixing beyond the width",
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bug_is_seen(name: str, tmp_path: Path) -> None:
    flags = SANITIZERS if name in ONLY_SANITIZERS_SEE else ["-w"]
    csrc = with_bug(tmp_path, "fold.cuh", *MUTATIONS[name])
    done = compile_and_run("run_fold.cpp", tmp_path, *flags, csrc=csrc, small=True)
    assert done.returncode != 0


@pytest.mark.parametrize("name", BLOCK_MUTATIONS)
def test_planted_bug_of_a_block_is_seen(name: str, tmp_path: Path) -> None:
    csrc = with_bug(tmp_path, "block.cuh", *BLOCK_MUTATIONS[name])
    done = compile_and_run("run_fold.cpp", tmp_path, "-w", csrc=csrc, small=True)
    assert done.returncode != 0
