"""The sketch of one batch: five kernels that read X twice and write only small matrices.

    prepare   V -> bfloat16 planes, V p, and which feature blocks sit on a large offset
    project   P = V (x - p), split over features so that few tokens still fill the chip
    finish    sum the splits, subtract V p, split P into bfloat16 planes
    back      P (x - p)^T and the sums about p, split over tokens
    collect   sum the splits in a fixed order into products, shift and square

bfloat16 tokens go to the tensor cores as they are (an exact operand), V and P as a high and a low
plane; the pivot enters as a rank-one correction in float32. Where the pivot is much larger than
the spread of a feature, that correction would cause cancellation, so such blocks of features are
centred in registers first; float16 and float32 tokens always are, since one plane cannot hold them.

There are no atomics: every partial sum is stored separately and added in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .launch import Arch, ceil_div, compile_options, pipeline_stages, rows_per_thread
from .primitives import (
    add_column_sums,
    add_product,
    add_product_bf16,
    add_splits,
    allow_next_kernel,
    begin_kernel,
    centre_tokens,
    column_sums,
    load_or_zero,
    load_tokens,
    split_bf16,
    sum_all,
)
from .sequence import Call, LaunchSequence
from .sketch_plan import COLLECT_BLOCK, FINISH_BLOCK, FLAG_BLOCK, plan_sketch, small_block

__all__ = ["sketch_sequence"]

# A pivot this many times the spread costs, by float32 cancellation, 1e-6 of the spread.
LARGE_OFFSET = tl.constexpr(16.0)
# Tokens that the spread is estimated from; a wrong estimate costs time or digits only.
SAMPLE = tl.constexpr(32)
# Features of a program of collect that adds shift and square.
SUMS_BLOCK = tl.constexpr(512)


@triton.jit
def _load_basis(basis_ptr, o_q, o_d, q, d):
    """Return the tile V (BLOCK_Q, BLOCK_D) in float32, 0 outside."""
    m_v = (o_q < q)[:, None] & (o_d < d)[None, :]
    return tl.load(basis_ptr + o_q.to(tl.int64)[:, None] * d + o_d[None, :], mask=m_v, other=0.0)


@triton.jit
def _store_column_sums(rows_ptr, out_ptr, rows, BLOCK_Q: tl.constexpr):
    """Write the column sums of (rows, BLOCK_Q): by one program of a kernel that takes longer."""
    o_q = tl.arange(0, BLOCK_Q)
    tl.store(out_ptr + o_q, column_sums(rows_ptr, o_q, rows, BLOCK_Q))


@triton.jit(do_not_specialize=["n", "q"])
def prepare_kernel(
    x_ptr, rows_ptr, basis_ptr, pivot_ptr, high_ptr, low_ptr, vp_parts_ptr, flags_ptr,
    n, q, d, stride_xn,
    HAS_ROWS: tl.constexpr, HIGH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Write V as planes (BLOCK_Q, D), V p of this block (blocks, BLOCK_Q), and its flag.

    The planes and V p of a flagged block are zero: the centred path handles it.
    """
    begin_kernel(DEPENDENT)
    pid = tl.program_id(0)
    o_d = pid * BLOCK_D + tl.arange(0, BLOCK_D)
    o_q = tl.arange(0, BLOCK_Q)
    pivot = tl.load(pivot_ptr + o_d, mask=o_d < d, other=0.0)

    o_sample = (tl.arange(0, SAMPLE).to(tl.int64) * n // SAMPLE).to(tl.int32)
    x = load_tokens(x_ptr, rows_ptr, o_sample, o_d, n, d, stride_xn, HAS_ROWS)
    centred = centre_tokens(x, pivot, o_sample, o_d, n, d)
    spread = tl.sum(tl.sum(centred * centred, axis=0), axis=0) / (SAMPLE * BLOCK_D)
    flag = tl.max(pivot * pivot, axis=0) > spread * (LARGE_OFFSET * LARGE_OFFSET)
    tl.store(flags_ptr + pid, flag.to(tl.int32))

    v = _load_basis(basis_ptr, o_q, o_d, q, d)
    allow_next_kernel(DEPENDENT)
    v = tl.where(flag, 0.0, v)
    high, low = split_bf16(v)
    as_multiplied = high.to(tl.float32)
    p_plane = o_q.to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(high_ptr + p_plane, high, mask=(o_d < d)[None, :])
    if HIGH:
        as_multiplied += low.to(tl.float32)
        tl.store(low_ptr + p_plane, low, mask=(o_d < d)[None, :])
    tl.store(vp_parts_ptr + pid * BLOCK_Q + o_q, tl.sum(as_multiplied * pivot[None, :], axis=1))


@triton.jit(do_not_specialize=["n", "q", "blocks_per_split"])
def project_kernel(
    x_ptr, rows_ptr, basis_ptr, pivot_ptr, high_ptr, low_ptr, flags_ptr, vp_parts_ptr,
    partial_ptr, vp_ptr,
    n, q, d, pitch, stride_xn, blocks_per_split,
    HAS_ROWS: tl.constexpr, CENTRED: tl.constexpr, HIGH: tl.constexpr, NUM_FLAGS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNMASKED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Write this split's part of V x (V (x - p) where centred) to partial (splits, Q, N).

    Programs beyond the last token block: the first of them sums V p of all blocks to offset (Q,).
    """
    begin_kernel(DEPENDENT)
    pid_n = tl.program_id(0)
    pid_s = tl.program_id(1)
    if pid_n * BLOCK_N >= n:
        if pid_s == 0:
            _store_column_sums(vp_parts_ptr, vp_ptr, tl.cdiv(d, FLAG_BLOCK), BLOCK_Q)
        return
    o_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_q = tl.arange(0, BLOCK_Q)
    begin = pid_s * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(d, BLOCK_D))
    acc = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    if CENTRED:
        for i in range(begin, end):
            o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
            acc = _add_centred(
                acc, x_ptr, rows_ptr, basis_ptr, pivot_ptr, o_n, o_q, o_d, n, q, d, stride_xn,
                HAS_ROWS, HIGH, UNMASKED,
            )  # fmt: skip
    else:
        for i in range(begin, end):
            o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
            x = load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS, UNMASKED)
            v_high, v_low = _load_planes(high_ptr, low_ptr, o_q, o_d, d, HIGH, UNMASKED)
            acc = add_product_bf16(acc, v_high, v_low, tl.trans(x), HIGH)
    allow_next_kernel(DEPENDENT)
    p_partial = partial_ptr + (pid_s * BLOCK_Q + o_q).to(tl.int64)[:, None] * pitch
    tl.store(p_partial + o_n[None, :], acc, mask=(o_n < pitch)[None, :])
    if not CENTRED:
        o_flag = tl.arange(0, NUM_FLAGS)
        flags = tl.load(flags_ptr + begin + o_flag, mask=o_flag < end - begin, other=0)
        if tl.max(flags, axis=0) > 0:
            # A quarter of the tokens at a time: centred tiles use many registers.
            tl.debug_barrier()  # the sums above were written by other threads
            PART: tl.constexpr = BLOCK_N // 4 if BLOCK_N >= 64 else 16
            for part in range(BLOCK_N // PART):
                o_part = pid_n * BLOCK_N + part * PART + tl.arange(0, PART)
                m_part = (o_part < pitch)[None, :]
                acc_part = tl.load(p_partial + o_part[None, :], mask=m_part, other=0.0)
                for i in range(begin, end):
                    if tl.load(flags_ptr + i) > 0:
                        o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
                        acc_part = _add_centred(
                            acc_part, x_ptr, rows_ptr, basis_ptr, pivot_ptr, o_part, o_q, o_d,
                            n, q, d, stride_xn, HAS_ROWS, HIGH, UNMASKED,
                        )  # fmt: skip
                tl.store(p_partial + o_part[None, :], acc_part, mask=m_part)


@triton.jit
def _add_centred(
    acc, x_ptr, rows_ptr, basis_ptr, pivot_ptr, o_n, o_q, o_d, n, q, d, stride_xn,
    HAS_ROWS: tl.constexpr, HIGH: tl.constexpr, UNMASKED: tl.constexpr,
):  # fmt: skip
    """Return acc + V (x - p) of a block of features, both factors split in registers."""
    x = load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS, UNMASKED)
    pivot = tl.load(pivot_ptr + o_d, mask=o_d < d, other=0.0)
    centred = centre_tokens(x, pivot, o_n, o_d, n, d, UNMASKED)
    x_high, x_low = split_bf16(tl.trans(centred))
    v_high, v_low = split_bf16(_load_basis(basis_ptr, o_q, o_d, q, d))
    return add_product(acc, v_high, v_low, x_high, x_low, HIGH)


@triton.jit(do_not_specialize=["n", "splits"])
def finish_kernel(
    partial_ptr, vp_ptr, high_ptr, low_ptr, p_sum_parts_ptr,
    n, pitch, splits,
    CENTRED: tl.constexpr, HIGH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Write P as planes (BLOCK_Q, pitch), 0 beyond the tokens, and its sums over this block."""
    begin_kernel(DEPENDENT)
    pid = tl.program_id(0)
    o_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    o_q = tl.arange(0, BLOCK_Q)
    m_n = (o_n < pitch)[None, :]
    p_out = o_q.to(tl.int64)[:, None] * pitch + o_n[None, :]
    p = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    step = tl.cast(BLOCK_Q, tl.int64) * pitch
    p = add_splits(p, partial_ptr, p_out, m_n, splits, step)
    allow_next_kernel(DEPENDENT)
    if not CENTRED:
        p -= tl.load(vp_ptr + o_q)[:, None]
    p = tl.where((o_n < n)[None, :], p, 0.0)
    high, low = split_bf16(p)
    as_multiplied = high.to(tl.float32)
    tl.store(high_ptr + p_out, high, mask=m_n)
    if HIGH:
        as_multiplied += low.to(tl.float32)
        tl.store(low_ptr + p_out, low, mask=m_n)
    tl.store(p_sum_parts_ptr + pid * BLOCK_Q + o_q, tl.sum(as_multiplied, axis=1))


@triton.jit(do_not_specialize=["n", "blocks_per_split", "sums_blocks"])
def back_kernel(
    x_ptr, rows_ptr, pivot_ptr, high_ptr, low_ptr, flags_ptr, p_sum_parts_ptr,
    products_ptr, shift_ptr, square_ptr, p_sum_ptr,
    n, d, pitch, stride_xn, blocks_per_split, sums_blocks,
    HAS_ROWS: tl.constexpr, CENTRED: tl.constexpr, HIGH: tl.constexpr, NUM_FLAGS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS_PER_SUM: tl.constexpr, UNMASKED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Write this split's P x^T (P (x - p)^T where centred), sum of x - p and sum of its squares.

    To (splits, BLOCK_Q, D), (splits, D) and (splits, blocks of D). ROWS_PER_SUM: rows of a tile
    that are summed before they are added to the running sums, so that these use few registers.
    Programs beyond the last feature block: the first of them sums P over tokens to total (Q,).
    """
    begin_kernel(DEPENDENT)
    pid_d = tl.program_id(0)
    pid_s = tl.program_id(1)
    if pid_d * BLOCK_D >= d:
        if pid_s == 0:
            _store_column_sums(p_sum_parts_ptr, p_sum_ptr, sums_blocks, BLOCK_Q)
        return
    o_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_q = tl.arange(0, BLOCK_Q)
    m_d = o_d < d
    pivot = tl.load(pivot_ptr + o_d, mask=m_d, other=0.0)
    flagged = CENTRED
    if not CENTRED:
        flagged = _any_flag(flags_ptr, pid_d, d, NUM_FLAGS)
    begin = pid_s * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(n, BLOCK_N))
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    shift = tl.zeros((BLOCK_N // ROWS_PER_SUM, BLOCK_D), tl.float32)
    square = tl.zeros((BLOCK_N // ROWS_PER_SUM, BLOCK_D), tl.float32)
    if flagged:
        UNCUT: tl.constexpr = (CENTRED or ROWS_PER_SUM == 1) or BLOCK_N < 32
        PART: tl.constexpr = BLOCK_N if UNCUT else BLOCK_N // 2
        for i in range(begin * (BLOCK_N // PART), end * (BLOCK_N // PART)):
            o_n = i * PART + tl.arange(0, PART)
            x = load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS, UNMASKED)
            centred = centre_tokens(x, pivot, o_n, o_d, n, d, UNMASKED)
            shift, square = add_column_sums(shift, square, centred, BLOCK_N // ROWS_PER_SUM)
            x_high, x_low = split_bf16(centred)
            p_high, p_low = _load_planes(high_ptr, low_ptr, o_q, o_n, pitch, HIGH, UNMASKED)
            acc = add_product(acc, p_high, p_low, x_high, x_low, HIGH)
    elif not CENTRED:
        for i in range(begin, end):
            o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            x = load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS, UNMASKED)
            p_high, p_low = _load_planes(high_ptr, low_ptr, o_q, o_n, pitch, HIGH, UNMASKED)
            acc = add_product_bf16(acc, p_high, p_low, x, HIGH)
            centred = centre_tokens(x, pivot, o_n, o_d, n, d, UNMASKED)
            shift, square = add_column_sums(shift, square, centred, BLOCK_N // ROWS_PER_SUM)
    allow_next_kernel(DEPENDENT)
    p_out = (pid_s * BLOCK_Q + o_q).to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(products_ptr + p_out, acc, mask=m_d[None, :])
    tl.store(shift_ptr + pid_s.to(tl.int64) * d + o_d, tl.sum(shift, axis=0), mask=m_d)
    total = tl.sum(tl.sum(square, axis=0), axis=0)
    tl.store(square_ptr + pid_s * tl.cdiv(d, BLOCK_D) + pid_d, total)


@triton.jit
def _any_flag(flags_ptr, pid_d, d, NUM_FLAGS: tl.constexpr):
    o_flag = pid_d * NUM_FLAGS + tl.arange(0, NUM_FLAGS)
    flags = tl.load(flags_ptr + o_flag, mask=o_flag < tl.cdiv(d, FLAG_BLOCK), other=0)
    return tl.max(flags, axis=0) > 0


@triton.jit
def _load_planes(
    high_ptr, low_ptr, o_q, o_column, columns, HIGH: tl.constexpr, UNMASKED: tl.constexpr
):
    """Load some columns of both planes; 0 outside. UNMASKED: all of them are inside."""
    p_plane = o_q.to(tl.int64)[:, None] * columns + o_column[None, :]
    mask = (o_column < columns)[None, :]
    high = load_or_zero(high_ptr + p_plane, mask, UNMASKED)
    if HIGH:
        low = load_or_zero(low_ptr + p_plane, mask, UNMASKED)
    else:
        low = high
    return high, low


@triton.jit(do_not_specialize=["q", "splits", "square_blocks"])
def collect_kernel(
    partial_ptr, shift_partial_ptr, square_partial_ptr, p_sum_ptr, flags_ptr, pivot_ptr,
    products_ptr, shift_ptr, square_ptr,
    q, d, splits, square_blocks,
    CENTRED: tl.constexpr, NUM_FLAGS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Add the splits of a block of features to products (Q, D).

    NUM_FLAGS: number of flags of a block of back, which is corrected for the pivot as a whole or
    not at all. Programs beyond the last block add to shift (D,) and square ().
    """
    begin_kernel(DEPENDENT)
    pid = tl.program_id(0)
    blocks = tl.cdiv(d, BLOCK_D)
    if pid >= blocks:
        o_d = (pid - blocks) * SUMS_BLOCK + tl.arange(0, SUMS_BLOCK)
        shift = tl.load(shift_ptr + o_d, mask=o_d < d, other=0.0)
        for s in range(splits):
            part = tl.load(
                shift_partial_ptr + s * tl.cast(d, tl.int64) + o_d, mask=o_d < d, other=0.0
            )
            shift += part.to(tl.float64)
        tl.store(shift_ptr + o_d, shift, mask=o_d < d)
        if pid == blocks:
            tl.store(square_ptr, tl.load(square_ptr) + sum_all(square_partial_ptr, square_blocks))
        return
    o_d = pid * BLOCK_D + tl.arange(0, BLOCK_D)
    o_q = tl.arange(0, BLOCK_Q)
    m_d = o_d < d
    m_out = (o_q < q)[:, None] & m_d[None, :]
    p_products = o_q.to(tl.int64)[:, None] * d + o_d[None, :]
    products = tl.load(products_ptr + p_products, mask=m_out, other=0.0)
    pivot = tl.load(pivot_ptr + o_d, mask=m_d, other=0.0)
    needs_pivot = not CENTRED
    if not CENTRED:
        needs_pivot = not _any_flag(
            flags_ptr, pid // (NUM_FLAGS * FLAG_BLOCK // BLOCK_D), d, NUM_FLAGS
        )
    step = tl.cast(BLOCK_Q, tl.int64) * d
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    acc = add_splits(acc, partial_ptr, p_products, m_d[None, :], splits, step)
    allow_next_kernel(DEPENDENT)
    if needs_pivot:
        acc -= tl.load(p_sum_ptr + o_q)[:, None] * pivot[None, :]
    tl.store(products_ptr + p_products, acc + products, mask=m_out)


# The tensors of a launch, in order, and the dtype of every part of the workspace.
TENSORS = ("x", "rows", "basis", "pivot", "products", "shift", "square")
PART_DTYPES = {
    "v_high": torch.bfloat16,
    "v_low": torch.bfloat16,
    "vp_parts": torch.float32,
    "vp": torch.float32,
    "flags": torch.int32,
    "projected": torch.float32,
    "p_high": torch.bfloat16,
    "p_low": torch.bfloat16,
    "p_sum_parts": torch.float32,
    "p_sum": torch.float32,
    "products_parts": torch.float32,
    "shift_parts": torch.float32,
    "square_parts": torch.float32,
}
V_PLANES, P_PLANES = ("v_high", "v_low"), ("p_high", "p_low")
PARTIAL_SUMS = ("products_parts", "shift_parts", "square_parts")


@functools.lru_cache(maxsize=1024)
def sketch_sequence(
    n: int, q: int, d: int, stride: int, dtype: torch.dtype, has_rows: bool, high: bool, arch: Arch
) -> LaunchSequence:
    """Return the launches that sketch tokens of one kind; cached.

    :meth:`~.sequence.LaunchSequence.run` takes the tensors of ``TENSORS``, see
    :func:`eva_kernels.reference.sketch`.

    Args:
        n: tokens; if ``rows`` are given, those selected.
        q, d: shape of the basis.
        stride: between rows of x, whose columns are contiguous.
        dtype: of x; bfloat16, float16 or float32.
        has_rows: whether rows are given.
        high: split precision, see ``ops.sketch``.
        arch: of the device.
    """
    centred = dtype != torch.bfloat16
    plan = plan_sketch(n, q, d, centred, arch)
    project, back = plan.project, plan.back
    flag_blocks = ceil_div(d, FLAG_BLOCK.value)
    finish_block = small_block(plan.block_q, FINISH_BLOCK)
    finish_blocks = ceil_div(plan.pitch, finish_block)
    d_blocks = ceil_div(d, back.block_d)
    collect_block = small_block(plan.block_q, COLLECT_BLOCK)
    flags_of_block = back.block_d // FLAG_BLOCK.value
    small_warps = max(8, plan.block_q // 16)
    # One more program sums what the next kernel needs, see project and back.
    extra_programs = 0 if centred else 1
    # Constants of every kernel, and further ones of those that stream tokens.
    common = {"HIGH": high, "BLOCK_Q": plan.block_q, "DEPENDENT": arch.dependent_launch}
    common["CENTRED"] = centred
    prepare = Call(
        prepare_kernel,
        (flag_blocks,),
        ("x", "rows", "basis", "pivot", *V_PLANES, "vp_parts", "flags"),
        (n, q, d, stride),
        {**common, "HAS_ROWS": has_rows, "BLOCK_D": FLAG_BLOCK.value},
        compile_options(arch, max(4, plan.block_q // 32)),
    )
    calls = [
        Call(
            project_kernel,
            (ceil_div(n, project.block_n) + extra_programs, plan.splits_d),
            ("x", "rows", "basis", "pivot", *V_PLANES, "flags", "vp_parts", "projected", "vp"),
            (n, q, d, plan.pitch, stride, plan.blocks_d),
            {
                **common, "HAS_ROWS": has_rows, "NUM_FLAGS": triton.next_power_of_2(flag_blocks),
                "BLOCK_N": project.block_n, "BLOCK_D": project.block_d,
                "UNMASKED": project.divides(n, d),
            },
            compile_options(arch, project.num_warps, project.num_stages),
        ),
        Call(
            finish_kernel,
            (finish_blocks,),
            ("projected", "vp", *P_PLANES, "p_sum_parts"),
            (n, plan.pitch, plan.splits_d),
            {**common, "BLOCK_N": finish_block},
            compile_options(arch, small_warps),
        ),
        Call(
            back_kernel,
            (d_blocks + extra_programs, plan.splits_n),
            ("x", "rows", "pivot", *P_PLANES, "flags", "p_sum_parts", *PARTIAL_SUMS, "p_sum"),
            (n, d, plan.pitch, stride, plan.blocks_n, finish_blocks),
            {
                **common, "HAS_ROWS": has_rows, "NUM_FLAGS": flags_of_block,
                "BLOCK_N": back.block_n, "BLOCK_D": back.block_d,
                "ROWS_PER_SUM": rows_per_thread(back, dtype.itemsize),
                "UNMASKED": back.divides(n, d),
            },
            compile_options(arch, back.num_warps, pipeline_stages(back, has_rows, arch)),
        ),
        Call(
            collect_kernel,
            (ceil_div(d, collect_block) + ceil_div(d, SUMS_BLOCK.value),),
            (*PARTIAL_SUMS, "p_sum", "flags", "pivot", "products", "shift", "square"),
            (q, d, plan.splits_n, plan.splits_n * d_blocks),
            {**common, "NUM_FLAGS": flags_of_block, "BLOCK_D": collect_block},
            compile_options(arch, small_warps),
        ),
    ]  # fmt: skip
    parts = {name: (plan.offsets[name], dtype) for name, dtype in PART_DTYPES.items()}
    return LaunchSequence(calls if centred else [prepare, *calls], TENSORS, parts, plan.nbytes)
