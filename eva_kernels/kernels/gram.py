"""The exact second moment of one batch: upper triangle of tiles, split over tokens.

Tokens are centred in registers and multiplied as two bfloat16 planes, which keeps 16 bits of each
number; the lower triangle is mirrored from the upper one. There are no atomics.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import (
    GRAM_TILES,
    Arch,
    Tile,
    ceil_div,
    compile_options,
    lay_out_workspace,
    pipeline_stages,
    rows_per_thread,
)
from .primitives import (
    add_column_sums,
    add_product,
    add_splits,
    allow_next_kernel,
    begin_kernel,
    centre_tokens,
    load_tokens,
    split_bf16,
    sum_all,
)
from .sequence import Call, LaunchSequence

__all__ = ["GramPlan", "gram_sequence", "plan_gram"]


@triton.jit
def _store_mirrored(out_ptr, acc, o_i, o_j, d, ADD: tl.constexpr, MIRROR: tl.constexpr):
    # Each entry is written by one program only: that of the tile on or above the diagonal.
    m_out = (o_i < d)[:, None] & (o_j < d)[None, :]
    p_out = out_ptr + o_i.to(tl.int64)[:, None] * d + o_j[None, :]
    if ADD:
        acc += tl.load(p_out, mask=m_out, other=0.0)
    tl.store(p_out, acc, mask=m_out)
    if MIRROR:
        p_mirror = out_ptr + o_j.to(tl.int64)[:, None] * d + o_i[None, :]
        tl.store(p_mirror, tl.trans(acc), mask=(o_j < d)[:, None] & (o_i < d)[None, :])


@triton.jit(do_not_specialize=["n", "blocks_per_split"])
def gram_kernel(
    x_ptr, rows_ptr, pivot_ptr, out_ptr, shift_ptr, square_ptr,
    n, d, stride_xn, blocks_per_split,
    HAS_ROWS: tl.constexpr, HIGH: tl.constexpr, DIRECT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ROWS_PER_SUM: tl.constexpr,
    UNMASKED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Add to the scatter matrix (DIRECT), or write this split's partial sums to (splits, D, D).

    Programs on the diagonal also write the sums of x - p, (splits, D), and of their squares,
    (splits, blocks of D).
    """
    begin_kernel(DEPENDENT)
    pid_i = tl.program_id(0)
    pid_j = tl.program_id(1)
    pid_s = tl.program_id(2)
    if pid_j < pid_i:
        return
    o_i = pid_i * BLOCK_D + tl.arange(0, BLOCK_D)
    o_j = pid_j * BLOCK_D + tl.arange(0, BLOCK_D)
    pivot_i = tl.load(pivot_ptr + o_i, mask=o_i < d, other=0.0)
    pivot_j = tl.load(pivot_ptr + o_j, mask=o_j < d, other=0.0)
    begin = pid_s * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(n, BLOCK_N))
    acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for i in range(begin, end):
        o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        x = load_tokens(x_ptr, rows_ptr, o_n, o_i, n, d, stride_xn, HAS_ROWS, UNMASKED)
        left = centre_tokens(x, pivot_i, o_n, o_i, n, d, UNMASKED)
        x = load_tokens(x_ptr, rows_ptr, o_n, o_j, n, d, stride_xn, HAS_ROWS, UNMASKED)
        right = centre_tokens(x, pivot_j, o_n, o_j, n, d, UNMASKED)
        left_high, left_low = split_bf16(tl.trans(left))
        right_high, right_low = split_bf16(right)
        acc = add_product(acc, left_high, left_low, right_high, right_low, HIGH)
    allow_next_kernel(DEPENDENT)
    if DIRECT:
        if pid_i == pid_j:
            _store_mirrored(out_ptr, acc, o_i, o_j, d, True, False)
        else:
            _store_mirrored(out_ptr, acc, o_i, o_j, d, True, True)
    else:
        p_split = out_ptr + pid_s * tl.cast(d, tl.int64) * d
        _store_mirrored(p_split, acc, o_i, o_j, d, False, False)
    if pid_i == pid_j:
        shift = tl.zeros((BLOCK_N // ROWS_PER_SUM, BLOCK_D), tl.float32)
        square = tl.zeros((BLOCK_N // ROWS_PER_SUM, BLOCK_D), tl.float32)
        for i in range(begin, end):  # second pass, from the cache, by one in D / BLOCK_D programs
            o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            x = load_tokens(x_ptr, rows_ptr, o_n, o_i, n, d, stride_xn, HAS_ROWS, UNMASKED)
            centred = centre_tokens(x, pivot_i, o_n, o_i, n, d, UNMASKED)
            shift, square = add_column_sums(shift, square, centred, BLOCK_N // ROWS_PER_SUM)
        tl.store(shift_ptr + pid_s * tl.cast(d, tl.int64) + o_i, tl.sum(shift, 0), mask=o_i < d)
        total = tl.sum(tl.sum(square, axis=0), axis=0)
        tl.store(square_ptr + pid_s * tl.num_programs(0) + pid_i, total)


@triton.jit(do_not_specialize=["splits", "square_blocks"])
def collect_kernel(
    partial_ptr, shift_partial_ptr, square_partial_ptr, scatter_ptr, shift_ptr, square_ptr,
    d, splits, square_blocks,
    DIRECT: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Add the splits to the scatter matrix (unless DIRECT), shift (D,) and square ()."""
    begin_kernel(DEPENDENT)
    pid_i = tl.program_id(0)
    pid_j = tl.program_id(1)
    if pid_j < pid_i:
        return
    o_i = pid_i * BLOCK_D + tl.arange(0, BLOCK_D)
    o_j = pid_j * BLOCK_D + tl.arange(0, BLOCK_D)
    if not DIRECT:
        m_out = (o_i < d)[:, None] & (o_j < d)[None, :]
        p_out = o_i.to(tl.int64)[:, None] * d + o_j[None, :]
        acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
        for s in range(splits):
            p_split = partial_ptr + s * tl.cast(d, tl.int64) * d
            acc += tl.load(p_split + p_out, mask=m_out, other=0.0)
        if pid_i == pid_j:
            _store_mirrored(scatter_ptr, acc, o_i, o_j, d, True, False)
        else:
            _store_mirrored(scatter_ptr, acc, o_i, o_j, d, True, True)
    if pid_i == pid_j:
        shift = tl.load(shift_ptr + o_i, mask=o_i < d, other=0.0)
        step = tl.cast(d, tl.int64)
        shift = add_splits(shift, shift_partial_ptr, o_i, o_i < d, splits, step)
        tl.store(shift_ptr + o_i, shift, mask=o_i < d)
    if (pid_i == 0) & (pid_j == 0):
        tl.store(square_ptr, tl.load(square_ptr) + sum_all(square_partial_ptr, square_blocks))


@dataclass(frozen=True)
class GramPlan:
    """Tile and splits of one launch, and the layout of its workspace.

    Attributes:
        tile: of the tokens.
        splits: over tokens; ``blocks_per_split`` token blocks each.
        offsets: byte offset of every part of the workspace.
        nbytes: of the workspace.
    """

    tile: Tile
    splits: int
    blocks_per_split: int
    offsets: dict[str, int]
    nbytes: int


@functools.lru_cache(maxsize=1024)
def plan_gram(n: int, d: int, itemsize: int, arch: Arch) -> GramPlan:
    """Return how to add (n, d) tokens to a scatter matrix (d, d)."""
    tile = GRAM_TILES[arch.name].for_itemsize(itemsize)
    d_blocks, n_blocks = ceil_div(d, tile.block_d), ceil_div(n, tile.block_n)
    # Split if the triangle alone leaves processors idle, but to at most half the bytes of X.
    triangle = d_blocks * (d_blocks + 1) // 2
    splits = min(arch.processors // triangle, n // (4 * d), n_blocks)
    blocks_per_split = ceil_div(n_blocks, max(1, splits))
    splits = ceil_div(n_blocks, blocks_per_split)
    parts = {
        "scatter_parts": 4 * splits * d * d if splits > 1 else 0,
        "shift_parts": 4 * splits * d,
        "square_parts": 4 * splits * d_blocks,
    }
    return GramPlan(tile, splits, blocks_per_split, *lay_out_workspace(parts))


TENSORS = ("x", "rows", "pivot", "scatter", "shift", "square")
PARTIAL_SUMS = ("scatter_parts", "shift_parts", "square_parts")


@functools.lru_cache(maxsize=1024)
def gram_sequence(
    n: int, d: int, stride: int, dtype: torch.dtype, has_rows: bool, high: bool, arch: Arch
) -> LaunchSequence:
    """Return the launches that add tokens of one kind to a scatter matrix; cached.

    :meth:`~.sequence.LaunchSequence.run` takes the tensors of ``TENSORS``, see
    :func:`eva_kernels.reference.gram`; arguments as for ``sketch_sequence``.
    """
    plan = plan_gram(n, d, dtype.itemsize, arch)
    tile, direct = plan.tile, plan.splits == 1
    d_blocks = ceil_div(d, tile.block_d)
    common = {"DIRECT": direct, "BLOCK_D": tile.block_d, "DEPENDENT": arch.dependent_launch}
    add = Call(
        gram_kernel,
        (d_blocks, d_blocks, plan.splits),
        ("x", "rows", "pivot", "scatter" if direct else PARTIAL_SUMS[0], *PARTIAL_SUMS[1:]),
        (n, d, stride, plan.blocks_per_split),
        {
            **common, "HAS_ROWS": has_rows, "HIGH": high, "BLOCK_N": tile.block_n,
            "ROWS_PER_SUM": rows_per_thread(tile, dtype.itemsize), "UNMASKED": tile.divides(n, d),
        },
        compile_options(arch, tile.num_warps, pipeline_stages(tile, has_rows, arch)),
    )  # fmt: skip
    collect = Call(
        collect_kernel,
        (d_blocks, d_blocks),
        (*PARTIAL_SUMS, "scatter", "shift", "square"),
        (d, plan.splits, plan.splits * d_blocks),
        common,
        compile_options(arch, tile.num_warps),
    )
    parts = {name: (plan.offsets[name], torch.float32) for name in PARTIAL_SUMS}
    return LaunchSequence([add, collect], TENSORS, parts, plan.nbytes)
