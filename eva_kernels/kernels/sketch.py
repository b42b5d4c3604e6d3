"""The sketch of one batch: five kernels that read X twice and write only small matrices.

    prepare   V -> bfloat16 planes, V p, and which feature blocks sit on a large offset
    project   P = V (x - p), split over features so that few tokens still fill the chip
    finish    sum the splits, subtract V p, split P into bfloat16 planes
    back      P (x - p)^T and the sums about p, split over tokens
    collect   sum the splits in a fixed order into products, shift and square

bfloat16 tokens go to the tensor cores as they are (an exact operand), V and P as a high and a low
plane; the pivot enters as a rank-one correction in float32. Where the pivot is much larger than
the spread of a feature that correction would cancel, so such blocks of features are centred in
registers first; float16 and float32 tokens always are, since they do not fit one plane.

Nothing is added atomically: every partial sum has a place of its own, and the order is fixed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SKETCH_TILES, Arch, Tile, rows_of_a_thread, stages
from .primitives import (
    add_half_product,
    add_product,
    add_sums,
    load_tokens,
    split_bf16,
    sum_all,
    sum_rows,
)
from .sequence import Call, LaunchSequence

__all__ = ["SketchPlan", "launch_sketch", "plan_sketch"]

# Features that are centred or not together; a launch's feature blocks are multiples of it.
FLAG_BLOCK = tl.constexpr(64)
# A pivot this many times the spread leaves 1e-6 of the spread to float32's cancellation.
LARGE_OFFSET = tl.constexpr(16.0)
# Tokens that tell the spread; a wrong guess costs time or digits, never the answer.
SAMPLE = tl.constexpr(32)
# What the rows of P are padded to, and what parts of the workspace start at.
PITCH, ALIGNMENT = 64, 256
# Entries of a tile of Q by tokens in finish.
FINISH_TILE = 4096


@triton.jit
def _load_basis(basis_ptr, o_q, o_d, q, d):
    """Return the tile V (BLOCK_Q, BLOCK_D) in float32, 0 outside."""
    m_v = (o_q < q)[:, None] & (o_d < d)[None, :]
    return tl.load(basis_ptr + o_q.to(tl.int64)[:, None] * d + o_d[None, :], mask=m_v, other=0.0)


@triton.jit(do_not_specialize=["n", "q"])
def prepare_kernel(
    x_ptr, rows_ptr, basis_ptr, pivot_ptr, high_ptr, low_ptr, along_ptr, flags_ptr,
    n, q, d, stride_xn,
    HAS_ROWS: tl.constexpr, HIGH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write V as planes (BLOCK_Q, D), V p of this block (blocks, BLOCK_Q), and its flag.

    A flagged block has zero planes and no V p: it is left to the centred path.
    """
    pid = tl.program_id(0)
    o_d = pid * BLOCK_D + tl.arange(0, BLOCK_D)
    o_q = tl.arange(0, BLOCK_Q)
    pivot = tl.load(pivot_ptr + o_d, mask=o_d < d, other=0.0)

    o_sample = (tl.arange(0, SAMPLE).to(tl.int64) * n // SAMPLE).to(tl.int32)
    x, m_x = load_tokens(x_ptr, rows_ptr, o_sample, o_d, n, d, stride_xn, HAS_ROWS)
    centred = tl.where(m_x, x.to(tl.float32) - pivot[None, :], 0.0)
    spread = tl.sum(tl.sum(centred * centred, axis=0), axis=0) / (SAMPLE * BLOCK_D)
    flag = tl.max(pivot * pivot, axis=0) > LARGE_OFFSET * LARGE_OFFSET * spread
    tl.store(flags_ptr + pid, flag.to(tl.int32))

    v = _load_basis(basis_ptr, o_q, o_d, q, d)
    v = tl.where(flag, 0.0, v)
    high, low = split_bf16(v)
    used = high.to(tl.float32)
    p_plane = o_q.to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(high_ptr + p_plane, high, mask=(o_d < d)[None, :])
    if HIGH:
        used += low.to(tl.float32)
        tl.store(low_ptr + p_plane, low, mask=(o_d < d)[None, :])
    tl.store(along_ptr + pid * BLOCK_Q + o_q, tl.sum(used * pivot[None, :], axis=1))


@triton.jit(do_not_specialize=["n", "q", "blocks_per_split"])
def project_kernel(
    x_ptr, rows_ptr, basis_ptr, pivot_ptr, high_ptr, low_ptr, flags_ptr, partial_ptr,
    n, q, d, pitch, stride_xn, blocks_per_split,
    HAS_ROWS: tl.constexpr, CENTRED: tl.constexpr, HIGH: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write this split's share of V x (V (x - p) where centred) to partial (splits, Q, N)."""
    pid_n = tl.program_id(0)
    pid_s = tl.program_id(1)
    o_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_q = tl.arange(0, BLOCK_Q)
    begin = pid_s * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(d, BLOCK_D))
    acc = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    flagged = CENTRED
    if not CENTRED:
        for i in range(begin, end):
            o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
            x, m_x = load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS)
            p_plane = o_q.to(tl.int64)[:, None] * d + o_d[None, :]
            m_d = (o_d < d)[None, :]
            v_high = tl.load(high_ptr + p_plane, mask=m_d, other=0.0)
            v_low = v_high
            if HIGH:
                v_low = tl.load(low_ptr + p_plane, mask=m_d, other=0.0)
            acc = add_half_product(acc, v_high, v_low, tl.trans(x), HIGH)
        o_flag = tl.arange(0, FLAGS)
        flags = tl.load(flags_ptr + begin + o_flag, mask=o_flag < end - begin, other=0)
        flagged = tl.max(flags, axis=0) > 0
    if flagged:
        for i in range(begin, end):
            needed = CENTRED
            if not CENTRED:
                needed = tl.load(flags_ptr + i) > 0
            if needed:
                o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
                x, m_x = load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS)
                pivot = tl.load(pivot_ptr + o_d, mask=o_d < d, other=0.0)
                centred = tl.where(m_x, x.to(tl.float32) - pivot[None, :], 0.0)
                x_high, x_low = split_bf16(tl.trans(centred))
                v_high, v_low = split_bf16(_load_basis(basis_ptr, o_q, o_d, q, d))
                acc = add_product(acc, v_high, v_low, x_high, x_low, HIGH)
    p_partial = (pid_s * BLOCK_Q + o_q).to(tl.int64)[:, None] * pitch + o_n[None, :]
    tl.store(partial_ptr + p_partial, acc, mask=(o_n < pitch)[None, :])


@triton.jit(do_not_specialize=["n", "splits", "along_blocks"])
def finish_kernel(
    partial_ptr, along_ptr, high_ptr, low_ptr, sums_ptr,
    n, pitch, splits, along_blocks,
    CENTRED: tl.constexpr, HIGH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write P as planes (BLOCK_Q, pitch), 0 beyond the tokens, and its sums over this block."""
    pid = tl.program_id(0)
    o_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    o_q = tl.arange(0, BLOCK_Q)
    m_n = (o_n < pitch)[None, :]
    p_out = o_q.to(tl.int64)[:, None] * pitch + o_n[None, :]
    p = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    step = tl.cast(BLOCK_Q, tl.int64) * pitch
    for s in range(splits):
        p += tl.load(partial_ptr + s * step + p_out, mask=m_n, other=0.0)
    if not CENTRED:
        p -= sum_rows(along_ptr, o_q, along_blocks, BLOCK_Q)[:, None]
    p = tl.where((o_n < n)[None, :], p, 0.0)
    high, low = split_bf16(p)
    used = high.to(tl.float32)
    tl.store(high_ptr + p_out, high, mask=m_n)
    if HIGH:
        used += low.to(tl.float32)
        tl.store(low_ptr + p_out, low, mask=m_n)
    tl.store(sums_ptr + pid * BLOCK_Q + o_q, tl.sum(used, axis=1))


@triton.jit(do_not_specialize=["n", "blocks_per_split"])
def back_kernel(
    x_ptr, rows_ptr, pivot_ptr, high_ptr, low_ptr, flags_ptr,
    products_ptr, shift_ptr, square_ptr,
    n, d, pitch, stride_xn, blocks_per_split,
    HAS_ROWS: tl.constexpr, CENTRED: tl.constexpr, HIGH: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Write this split's P x^T (P (x - p)^T where centred), sum of x - p and of its squares.

    To (splits, BLOCK_Q, D), (splits, D) and (splits, blocks of D). FOLD: rows of a tile that are
    added before they join the running sums, so that these take few registers.
    """
    pid_d = tl.program_id(0)
    pid_s = tl.program_id(1)
    o_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_q = tl.arange(0, BLOCK_Q)
    m_d = o_d < d
    pivot = tl.load(pivot_ptr + o_d, mask=m_d, other=0.0)
    flagged = CENTRED
    if not CENTRED:
        flagged = _any_flag(flags_ptr, pid_d, d, FLAGS)
    begin = pid_s * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(n, BLOCK_N))
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    shift = tl.zeros((BLOCK_N // FOLD, BLOCK_D), tl.float32)
    square = tl.zeros((BLOCK_N // FOLD, BLOCK_D), tl.float32)
    if flagged:
        for i in range(begin, end):
            o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            x, m_x = load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS)
            centred = tl.where(m_x, x.to(tl.float32) - pivot[None, :], 0.0)
            shift, square = add_sums(shift, square, centred, BLOCK_N, BLOCK_D, FOLD)
            x_high, x_low = split_bf16(centred)
            p_high, p_low = _load_planes(high_ptr, low_ptr, o_q, o_n, pitch, HIGH)
            acc = add_product(acc, p_high, p_low, x_high, x_low, HIGH)
    elif not CENTRED:
        for i in range(begin, end):
            o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            x, m_x = load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS)
            p_high, p_low = _load_planes(high_ptr, low_ptr, o_q, o_n, pitch, HIGH)
            acc = add_half_product(acc, p_high, p_low, x, HIGH)
            centred = tl.where(m_x, x.to(tl.float32) - pivot[None, :], 0.0)
            shift, square = add_sums(shift, square, centred, BLOCK_N, BLOCK_D, FOLD)
    p_out = (pid_s * BLOCK_Q + o_q).to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(products_ptr + p_out, acc, mask=m_d[None, :])
    tl.store(shift_ptr + pid_s.to(tl.int64) * d + o_d, tl.sum(shift, axis=0), mask=m_d)
    total = tl.sum(tl.sum(square, axis=0), axis=0)
    tl.store(square_ptr + pid_s * tl.num_programs(0) + pid_d, total)


@triton.jit
def _any_flag(flags_ptr, pid_d, d, FLAGS: tl.constexpr):
    o_flag = pid_d * FLAGS + tl.arange(0, FLAGS)
    flags = tl.load(flags_ptr + o_flag, mask=o_flag < tl.cdiv(d, FLAG_BLOCK), other=0)
    return tl.max(flags, axis=0) > 0


@triton.jit
def _load_planes(high_ptr, low_ptr, o_q, o_n, pitch, HIGH: tl.constexpr):
    p_plane = o_q.to(tl.int64)[:, None] * pitch + o_n[None, :]
    m_n = (o_n < pitch)[None, :]
    high = tl.load(high_ptr + p_plane, mask=m_n, other=0.0)
    if HIGH:
        low = tl.load(low_ptr + p_plane, mask=m_n, other=0.0)
    else:
        low = high
    return high, low


@triton.jit(do_not_specialize=["q", "splits", "sums_blocks", "square_blocks"])
def collect_kernel(
    partial_ptr, shift_partial_ptr, square_partial_ptr, sums_ptr, flags_ptr, pivot_ptr,
    products_ptr, shift_ptr, square_ptr,
    q, d, splits, sums_blocks, square_blocks,
    CENTRED: tl.constexpr, FLAGS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the splits of a block of features to products (Q, D), shift (D,) and square ().

    FLAGS blocks make one of back's, which is corrected for the pivot as a whole or not at all.
    """
    pid = tl.program_id(0)
    o_d = pid * BLOCK_D + tl.arange(0, BLOCK_D)
    o_q = tl.arange(0, BLOCK_Q)
    m_d = o_d < d
    p_products = o_q.to(tl.int64)[:, None] * d + o_d[None, :]
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    shift = tl.zeros((BLOCK_D,), tl.float64)
    step = tl.cast(BLOCK_Q, tl.int64) * d
    for s in range(splits):
        acc += tl.load(partial_ptr + s * step + p_products, mask=m_d[None, :], other=0.0)
        part = tl.load(shift_partial_ptr + s * d.to(tl.int64) + o_d, mask=m_d, other=0.0)
        shift += part.to(tl.float64)
    corrected = not CENTRED
    if not CENTRED:
        corrected = not _any_flag(flags_ptr, pid // FLAGS, d, FLAGS)
    if corrected:
        sums = sum_rows(sums_ptr, o_q, sums_blocks, BLOCK_Q)
        pivot = tl.load(pivot_ptr + o_d, mask=m_d, other=0.0)
        acc -= sums[:, None] * pivot[None, :]
    m_out = (o_q < q)[:, None] & m_d[None, :]
    acc += tl.load(products_ptr + p_products, mask=m_out, other=0.0)
    tl.store(products_ptr + p_products, acc, mask=m_out)
    tl.store(shift_ptr + o_d, tl.load(shift_ptr + o_d, mask=m_d, other=0.0) + shift, mask=m_d)
    if pid == 0:
        tl.store(square_ptr, tl.load(square_ptr) + sum_all(square_partial_ptr, square_blocks))


@dataclass(frozen=True)
class SketchPlan:
    """Tiles and splits of one launch, and where its partial results lie.

    Attributes:
        block_q: rows of V and P, padded.
        project, back: tiles of the kernels that stream tokens.
        pitch: tokens, padded: row length of P.
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


def finish_tokens(block_q: int) -> int:
    """Return how many tokens a program of finish takes."""
    return FINISH_TILE // block_q


def small_warps(block_q: int) -> int:
    """Return the warps of the kernels whose tiles are (block_q, FLAG_BLOCK)."""
    return max(4, block_q // 32)


@functools.lru_cache(maxsize=1024)
def plan_sketch(n: int, q: int, d: int, centred: bool, arch: Arch) -> SketchPlan:
    """Return how to sketch (n, d) tokens with a basis (q, d)."""
    block_q = max(arch.least_q, triton.next_power_of_2(q), 16)
    by_width = SKETCH_TILES[arch.name]
    width = min(width for width in by_width if width >= block_q)
    project, back = by_width[width].of(centred)
    pitch = triton.cdiv(n, PITCH) * PITCH
    # Two programs on a multiprocessor, unless the partial sums would outweigh half of X.
    slots = 2 * arch.processors
    k_blocks, n_blocks = triton.cdiv(d, project.block_d), triton.cdiv(n, back.block_n)
    splits_d = min(slots // triton.cdiv(n, project.block_n), d // (4 * block_q), k_blocks)
    splits_n = min(slots // triton.cdiv(d, back.block_d), n // (4 * block_q), n_blocks)
    blocks_d = triton.cdiv(k_blocks, max(1, splits_d))
    blocks_n = triton.cdiv(n_blocks, max(1, splits_n))
    splits_d, splits_n = triton.cdiv(k_blocks, blocks_d), triton.cdiv(n_blocks, blocks_n)
    flag_blocks, d_blocks = triton.cdiv(d, FLAG_BLOCK.value), triton.cdiv(d, back.block_d)
    parts = {
        "v_high": 2 * block_q * d,
        "v_low": 2 * block_q * d,
        "along": 4 * flag_blocks * block_q,
        "flags": 4 * flag_blocks,
        "projected": 4 * splits_d * block_q * pitch,
        "p_high": 2 * block_q * pitch,
        "p_low": 2 * block_q * pitch,
        "sums": 4 * triton.cdiv(pitch, finish_tokens(block_q)) * block_q,
        "products_parts": 4 * splits_n * block_q * d,
        "shift_parts": 4 * splits_n * d,
        "square_parts": 4 * splits_n * d_blocks,
    }
    offsets, end = {}, 0
    for name, nbytes in parts.items():
        offsets[name], end = end, end + triton.cdiv(nbytes, ALIGNMENT) * ALIGNMENT
    return SketchPlan(
        block_q, project, back, pitch, splits_d, blocks_d, splits_n, blocks_n, offsets, end
    )  # fmt: skip


# The tensors of a launch, in order, and the dtype of every part of the workspace.
GIVEN = ("x", "rows", "basis", "pivot", "products", "shift", "square")
PART_DTYPES = {
    "v_high": torch.bfloat16,
    "v_low": torch.bfloat16,
    "along": torch.float32,
    "flags": torch.int32,
    "projected": torch.float32,
    "p_high": torch.bfloat16,
    "p_low": torch.bfloat16,
    "sums": torch.float32,
    "products_parts": torch.float32,
    "shift_parts": torch.float32,
    "square_parts": torch.float32,
}
V_PLANES, P_PLANES = ("v_high", "v_low"), ("p_high", "p_low")
SPLIT = ("products_parts", "shift_parts", "square_parts")


@functools.lru_cache(maxsize=1024)
def _sequence(
    n: int, q: int, d: int, stride: int, dtype: torch.dtype, has_rows: bool, high: bool, arch: Arch
) -> LaunchSequence:
    centred = dtype != torch.bfloat16
    plan = plan_sketch(n, q, d, centred, arch)
    project, back = plan.project, plan.back
    flag_blocks = triton.cdiv(d, FLAG_BLOCK.value)
    finish_block = finish_tokens(plan.block_q)
    finish_blocks = triton.cdiv(plan.pitch, finish_block)
    d_blocks = triton.cdiv(d, back.block_d)
    flags_of_block = back.block_d // FLAG_BLOCK.value
    width, rows, high_ = {"BLOCK_Q": plan.block_q}, {"HAS_ROWS": has_rows}, {"HIGH": high}
    path, feature_block = {"CENTRED": centred}, {"BLOCK_D": FLAG_BLOCK.value}
    small = {"num_warps": small_warps(plan.block_q), "enable_fp_fusion": True}
    prepare = Call(
        prepare_kernel,
        (flag_blocks,),
        ("x", "rows", "basis", "pivot", *V_PLANES, "along", "flags"),
        (n, q, d, stride),
        {**rows, **high_, **width, **feature_block},
        small,
    )
    calls = [
        Call(
            project_kernel,
            (triton.cdiv(n, project.block_n), plan.splits_d),
            ("x", "rows", "basis", "pivot", *V_PLANES, "flags", "projected"),
            (n, q, d, plan.pitch, stride, plan.blocks_d),
            {
                **rows, **path, **high_, **width, "FLAGS": triton.next_power_of_2(flag_blocks),
                "BLOCK_N": project.block_n, "BLOCK_D": project.block_d,
            },
            _options(project, project.num_stages),
        ),
        Call(
            finish_kernel,
            (finish_blocks,),
            ("projected", "along", *P_PLANES, "sums"),
            (n, plan.pitch, plan.splits_d, flag_blocks),
            {**path, **high_, **width, "BLOCK_N": finish_block},
            {"num_warps": 4, "enable_fp_fusion": True},
        ),
        Call(
            back_kernel,
            (d_blocks, plan.splits_n),
            ("x", "rows", "pivot", *P_PLANES, "flags", *SPLIT),
            (n, d, plan.pitch, stride, plan.blocks_n),
            {
                **rows, **path, **high_, **width, "FLAGS": flags_of_block,
                "BLOCK_N": back.block_n, "BLOCK_D": back.block_d,
                "FOLD": rows_of_a_thread(back, dtype.itemsize),
            },
            _options(back, stages(back, has_rows, arch)),
        ),
        Call(
            collect_kernel,
            (flag_blocks,),
            (*SPLIT, "sums", "flags", "pivot", "products", "shift", "square"),
            (q, d, plan.splits_n, finish_blocks, plan.splits_n * d_blocks),
            {**path, "FLAGS": flags_of_block, **width, **feature_block},
            small,
        ),
    ]  # fmt: skip
    parts = {name: (plan.offsets[name], dtype) for name, dtype in PART_DTYPES.items()}
    return LaunchSequence(calls if centred else [prepare, *calls], GIVEN, parts)


def _options(tile: Tile, num_stages: int) -> dict[str, int | bool]:
    return {"num_warps": tile.num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def launch_sketch(
    x: Tensor,
    basis: Tensor,
    pivot: Tensor,
    products: Tensor,
    shift: Tensor,
    square: Tensor,
    rows: Tensor | None,
    workspace: Tensor,
    high: bool,
    arch: Arch,
) -> None:
    """Run the five kernels; see :func:`eva_kernels.reference.sketch` for the arguments.

    Args:
        x: (N, D) bfloat16, float16 or float32; columns contiguous, any row stride.
        workspace: at least ``plan_sketch(...).nbytes`` bytes, uint8; overwritten.
        high: split precision, see ``ops.sketch``.
        arch: of the device.
    """
    (q, d), n = basis.shape, len(x) if rows is None else len(rows)
    sequence = _sequence(n, q, d, x.stride(0), x.dtype, rows is not None, high, arch)
    sequence.run((x, rows, basis, pivot, products, shift, square), workspace)
