"""Tiles and splits of a sketch, and the layout of its workspace."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from .launch import SKETCH_TILES, Arch, Tile, ceil_div, lay_out_workspace, splits_to_fill

__all__ = ["COLLECT_BLOCK", "FINISH_BLOCK", "FLAG_BLOCK", "SketchPlan"]
__all__ += ["plan_sketch", "small_block"]

# Granularity of centring, in features; the feature blocks of a launch are multiples of it.
FLAG_BLOCK = tl.constexpr(64)
PITCH = 64  # rows of P are padded to a multiple of this
# Most tokens of a program of finish, and most features of one of collect: few enough that four
# tiles of a split fit in registers.
FINISH_BLOCK, COLLECT_BLOCK, SMALL_TILE = 32, 32, 2048


@dataclass(frozen=True)
class SketchPlan:
    """Tiles and splits of one launch, and the layout of its workspace.

    Attributes:
        block_q: rows of V and P, padded.
        project, back: tiles of the kernels that stream tokens.
        pitch: row length of P: tokens, padded.
        splits_d: over features, of project; ``blocks_d`` feature blocks each.
        splits_n: over tokens, of back; ``blocks_n`` token blocks each.
        offsets: byte offset of every part of the workspace.
        nbytes: of the workspace.
    """

    block_q: int
    project: Tile
    back: Tile
    pitch: int
    splits_d: int
    blocks_d: int
    splits_n: int
    blocks_n: int
    offsets: dict[str, int]
    nbytes: int


def small_block(block_q: int, max_columns: int) -> int:
    """Return the columns of a tile with block_q rows in finish and collect."""
    return max(16, min(max_columns, SMALL_TILE // block_q))


@functools.lru_cache(maxsize=1024)
def plan_sketch(n: int, q: int, d: int, centred: bool, arch: Arch) -> SketchPlan:
    """Return how to sketch (n, d) tokens with a basis (q, d)."""
    block_q = max(arch.min_q, triton.next_power_of_2(q))
    tiles_by_width = SKETCH_TILES[arch.name]
    width = min(width for width in tiles_by_width if width >= block_q)
    project, back = tiles_by_width[width].project_and_back(centred)
    pitch = ceil_div(n, PITCH) * PITCH
    k_blocks, n_blocks = ceil_div(d, project.block_d), ceil_div(n, back.block_n)
    # Partial sums may take at most half the bytes of X.
    max_splits_d, max_splits_n = d // (4 * block_q), n // (4 * block_q)
    programs_d, programs_n = ceil_div(n, project.block_n), ceil_div(d, back.block_d)
    splits_d = splits_to_fill(programs_d, k_blocks, max_splits_d, project, arch)
    splits_n = splits_to_fill(programs_n, n_blocks, max_splits_n, back, arch)
    blocks_d = ceil_div(k_blocks, splits_d)
    blocks_n = ceil_div(n_blocks, splits_n)
    flag_blocks, d_blocks = ceil_div(d, FLAG_BLOCK.value), ceil_div(d, back.block_d)
    parts = {
        "v_high": 2 * block_q * d,
        "v_low": 2 * block_q * d,
        "vp_parts": 4 * flag_blocks * block_q,
        "vp": 4 * block_q,
        "flags": 4 * flag_blocks,
        "projected": 4 * splits_d * block_q * pitch,
        "p_high": 2 * block_q * pitch,
        "p_low": 2 * block_q * pitch,
        "p_sum_parts": 4 * ceil_div(pitch, small_block(block_q, FINISH_BLOCK)) * block_q,
        "p_sum": 4 * block_q,
        "products_parts": 4 * splits_n * block_q * d,
        "shift_parts": 4 * splits_n * d,
        "square_parts": 4 * splits_n * d_blocks,
    }
    return SketchPlan(
        block_q,
        project,
        back,
        pitch,
        splits_d,
        blocks_d,
        splits_n,
        blocks_n,
        *lay_out_workspace(parts),
    )
