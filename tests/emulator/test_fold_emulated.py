"""The CUDA kernels of the fold run on the CPU, and planted bugs that must be detected."""

from pathlib import Path

import pytest

from emulation import CHECKS, assert_detected, assert_sound


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_are_sound(check: str, tmp_path: Path) -> None:
    assert_sound("run_fold.cpp", tmp_path, check)


# Plausible bugs: original text, text with the bug.
MUTATIONS = {
    "no barrier after staging": (
        "    __syncthreads();\n    // Prefetch the next columns",
        "    // Prefetch the next columns",
    ),
    "no barrier before staging again": (
        "part, sums);\n    __syncthreads();",
        "part, sums);",
    ),
    "mixing staged without a barrier": (
        "      __syncthreads();  // in the first round also: the image is complete\n",
        "",
    ),
    "mixing overwritten while it is read": (
        "      __syncthreads();  // the preceding stage has been read\n",
        "",
    ),
    "the next mixing is the same": ("last ? 0 : old + kFoldDepth", "old"),
    "the next tile of mixing is the same": ("last ? tile + kFoldTile : tile", "tile"),
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
    "mean not taken off": (" - row.along * delta[column + i]", ""),
    "another column's mean": ("row.along * delta[column + i]", "row.along * delta[column]"),
    "square left out": ("four.basis[i] * row.square", "four.basis[i]"),
    "pair before": ("while (pair > rows) pair -= ++rows;", "while (pair >= rows) pair -= ++rows;"),
    "row of products cut short": (
        "2 * below + 2 - kWarpProducts<true>",
        "2 * below + 1 - kWarpProducts<true>",
    ),
    "two warps with the same products": ("warp % 2 == 0) return", "warp % 2 == 2) return"),
    "row above taken for the row below": ("in_row = n < part.row_products", "in_row = true"),
    "products of another row": (
        "Place{next_row, i - row_products}",
        "Place{next_row, first + i - row_products}",
    ),
    "half of a product left out": (
        "part.row * kProductRows + row]",
        "part.row * kProductRows + lane.group]",
    ),
    "columns of a product swapped": (
        "+ column + 1] = sums[n][2 * i + 1]",
        "+ column + 1] = sums[n][2 * i]",
    ),
    "Y of the other tile": ("fetch(column, begin + first", "fetch(row, begin + first"),
    "basis of the other tile": (
        "diagonal ? of_row.basis[i] : of_column.basis[i]",
        "of_row.basis[i]",
    ),
    "core and metric swapped": ("+ !of_core)", "+ of_core)"),
    "the tile below the diagonal stored on it": ("TilePair{1, 0}", "TilePair{1, 1}"),
    "one tile on the diagonal": (
        "return diagonal ? fold_tiles(width) : fold_tiles(width) - 1",
        "return diagonal",
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
    "saved row too many": ("if (i < of.num_saved)", "if (i <= of.num_saved)"),
    "written though not finite": ("if (!*args.all_finite) return;", ""),
    "mixing transposed": ("mixing[k * width + row]", "mixing[row * width + k]"),
    "mixing beyond the width": ("k < width && row < width ?", "true ?"),
    "rows below the last not staged": ("depth = fold_rows_depth(fold.width)", "depth = fold.width"),
    "rows beyond the rank": ("rank = args.rank(layer)", "rank = width"),
    "row at the rank left out": ("tile + of_warp >= rank", "tile + of_warp >= rank - 1"),
    "last products beyond the width": (
        "part.next_row * kProductRows <",
        "part.row * kProductRows <",
    ),
    "columns beyond the last": (
        "(fold.features + kRowsColumns - 1) / kRowsColumns",
        "fold.features / kRowsColumns + 1",
    ),
    "rows beyond the width": ("if (at >= rank) continue;", ""),
    "columns of new rows swapped": (
        "static_cast<float>(sums[n][2 * i]), static_cast<float>(sums[n][2 * i + 1])",
        "static_cast<float>(sums[n][2 * i + 1]), static_cast<float>(sums[n][2 * i])",
    ),
    "only the first tile of rows": (
        "tile < width; tile += kFoldTile",
        "tile < kFoldTile; tile += kFoldTile",
    ),
}
# The same for loads and stores of several numbers.
VECTOR_MUTATIONS = {
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
    "stored beyond the row": ("if (column + i < columns) to[i]", "to[i]"),
    "four stored beyond the row": (
        "if (column + 4 <= columns && reinterpret_cast<uintptr_t>(to)",
        "if (reinterpret_cast<uintptr_t>(to)",
    ),
    "four stored anywhere": ("&& reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0", ""),
    "two stored beyond the row": (
        "if (column + 2 <= columns && reinterpret_cast<uintptr_t>(to)",
        "if (reinterpret_cast<uintptr_t>(to)",
    ),
    "two stored anywhere": ("&& reinterpret_cast<uintptr_t>(to) % sizeof(float2) == 0", ""),
    "first of two stored beyond the row": ("if (column < columns) to[0]", "to[0]"),
    "second of two stored beyond the row": ("if (column + 1 < columns) to[1]", "to[1]"),
}
MUTATIONS_BY_FILE = {
    "fold.cuh": MUTATIONS,
    "vectors.cuh": VECTOR_MUTATIONS,
}
# Results show no difference on the CPU: any address can be loaded, and a few bytes past the end.
ONLY_FOUND_BY_SANITIZERS = {
    "row beyond the width",
    "alignment not asked for",
    "vector past the end",
    "stored beyond the row",
    "four stored beyond the row",
    "four stored anywhere",
    "two stored beyond the row",
    "two stored anywhere",
    "first of two stored beyond the row",
    "second of two stored beyond the row",
    "end of a row read as the next row",
    "along past the last row",
    "mixing beyond the width",
}


@pytest.mark.parametrize(
    ("file", "name"),
    [(file, name) for file, mutations in MUTATIONS_BY_FILE.items() for name in mutations],
)
def test_planted_bug_is_detected(file: str, name: str, tmp_path: Path) -> None:
    bug = (file, *MUTATIONS_BY_FILE[file][name])
    assert_detected("run_fold.cpp", tmp_path, bug, memory=name in ONLY_FOUND_BY_SANITIZERS)
