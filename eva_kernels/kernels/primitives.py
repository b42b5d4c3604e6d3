"""Device functions that mean the same on a GPU and in Triton's interpreter.

The interpreter stores bfloat16 as 16-bit integers and computes on the bit patterns (triton issue
11584), so a bfloat16 tile may be loaded, stored, transposed, widened, or passed to the functions
below, and nothing else.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import HAS_DEPENDENT_LAUNCH

__all__ = ["INTERPRET", "add_column_sums", "add_product", "add_product_bf16", "add_splits"]
__all__ += ["allow_next_kernel", "begin_kernel", "centre_tokens", "column_sums", "dot"]
__all__ += ["load_or_zero", "load_tokens", "split_bf16", "sum_all", "to_bf16"]

# Read at import, as triton does: setting the variable later would mix both modes.
INTERPRET = tl.constexpr(
    os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "yes", "y")
)


# Triton resolves names even in branches that it then discards, so each release needs a function of
# its own.
if HAS_DEPENDENT_LAUNCH:

    @triton.jit
    def begin_kernel(DEPENDENT: tl.constexpr):
        """Begin a kernel: wait until its predecessor has finished and its writes are visible.

        DEPENDENT: it was launched before that (programmatic dependent launch), so that its set-up
        overlaps with the predecessor.
        """
        if DEPENDENT and not INTERPRET:
            cuda.gdc_wait()

    @triton.jit
    def allow_next_kernel(DEPENDENT: tl.constexpr):
        """Allow the next kernel to start its set-up; call this when little work is left.

        A program that does not call it allows that implicitly when it ends.
        """
        if DEPENDENT and not INTERPRET:
            cuda.gdc_launch_dependents()

else:

    @triton.jit
    def begin_kernel(DEPENDENT: tl.constexpr):
        """Do nothing: the kernel is launched after its predecessor has finished."""
        tl.static_assert(not DEPENDENT)

    @triton.jit
    def allow_next_kernel(DEPENDENT: tl.constexpr):
        """Do nothing: the next kernel is launched after this one has finished."""
        tl.static_assert(not DEPENDENT)


@triton.jit
def dot(a, b, acc):
    """Return ``acc + a @ b`` of bfloat16 tiles, accumulated in float32 on tensor cores."""
    if INTERPRET:
        # Widening is exact, and so is each product: only the order of the additions differs.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        # The limit matters for float8 only; but without it the compiler would fuse the product with
        # the addition that follows, which add_product keeps separate.
        return tl.dot(a, b, acc, max_num_imprecise_acc=1)


@triton.jit
def to_bf16(x):
    """Round float32 to bfloat16, to nearest even."""
    if INTERPRET:  # the interpreter's cast truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # The payload bits of a NaN could be lost or, by a carry, change it into another number.
        bits = tl.where(x == x, rounded, 0x7FC00000)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def split_bf16(x):
    """Return ``high, low`` in bfloat16 with ``high + low = x`` up to 2**-17 of x."""
    high = to_bf16(x)
    return high, to_bf16(x - high.to(tl.float32))


@triton.jit
def load_or_zero(ptr, mask, UNMASKED: tl.constexpr):
    """Load where the mask is true, 0 elsewhere.

    UNMASKED: the mask is true everywhere and not needed. Masks and the code that they require are a
    quarter of the instructions of a loop over tokens.
    """
    if UNMASKED:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def load_tokens(
    x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn,
    HAS_ROWS: tl.constexpr, UNMASKED: tl.constexpr = False,
):  # fmt: skip
    """Return the tile x (BLOCK_N, BLOCK_D), 0 outside; UNMASKED: all of it is inside."""
    if HAS_ROWS:
        i_row = load_or_zero(rows_ptr + o_n, o_n < n, UNMASKED)
    else:
        i_row = o_n.to(tl.int64)
    p_x = x_ptr + i_row[:, None] * stride_xn + o_d[None, :]
    return load_or_zero(p_x, (o_n < n)[:, None] & (o_d < d)[None, :], UNMASKED)


@triton.jit
def centre_tokens(x, pivot, o_n, o_d, n, d, UNMASKED: tl.constexpr = False):
    """Return x - p in float32, 0 outside; arguments as for ``load_tokens``."""
    centred = x.to(tl.float32) - pivot[None, :]
    if UNMASKED:
        return centred
    else:
        return tl.where((o_n < n)[:, None] & (o_d < d)[None, :], centred, 0.0)


@triton.jit
def warps_share_rows(acc):
    """Tell whether a product has fewer rows than its warps multiply at once, 16 each.

    If one product accumulates onto another, Triton assigns different rows to each warp: surplus
    warps repeat the work of others, and the accumulator is converted to another layout through
    shared memory. Products that start from zero keep their layout.
    """
    if INTERPRET:
        return False
    else:
        return acc.shape[0] < 16 * cuda.num_warps()


@triton.jit
def add_product(acc, a_high, a_low, b_high, b_low, HIGH: tl.constexpr):
    """Return acc + a @ b; HIGH: without the product of the low planes; else of the high ones only.

    The product of a tile starts from zero and is added to acc in registers. Tensor cores truncate
    when they accumulate, so that a long sum drifts (5e-5 over 8192 tokens on an H200). And if a
    product is still in flight in the next iteration, its operand may be overwritten by the next
    copy: for a tile that is also read into registers Triton allocates two buffers, one too few
    (3.6, sm_90).
    """
    tile = tl.zeros_like(acc)
    if HIGH:
        tile = dot(a_low, b_high, tile)
        if warps_share_rows(acc):
            acc += tile
            tile = tl.zeros_like(acc)
        tile = dot(a_high, b_low, tile)
        if warps_share_rows(acc):
            acc += tile
            tile = tl.zeros_like(acc)
    return acc + dot(a_high, b_high, tile)


@triton.jit
def add_product_bf16(acc, a_high, a_low, b, HIGH: tl.constexpr):
    """Return acc + a @ b where b is exact in bfloat16; as :func:`add_product`."""
    tile = tl.zeros_like(acc)
    if HIGH:
        tile = dot(a_low, b, tile)
        if warps_share_rows(acc):
            acc += tile
            tile = tl.zeros_like(acc)
    return acc + dot(a_high, b, tile)


@triton.jit
def add_column_sums(shift, square, centred, ROWS: tl.constexpr):
    """Add the column sums of a tile, and those of its squares, to (ROWS, BLOCK_D).

    Rows that are ROWS apart are added; if one thread holds them all, threads exchange nothing.
    """
    FOLD: tl.constexpr = centred.shape[0] // ROWS
    tile = tl.reshape(centred, (FOLD, ROWS, centred.shape[1]))
    return shift + tl.sum(tile, axis=0), square + tl.sum(tile * tile, axis=0)


@triton.jit
def add_splits(acc, ptr, offset, mask, splits, step):
    """Return acc plus the tiles at ``ptr + s * step + offset`` for s in 0 .. splits - 1, in order.

    Three loads are in flight before the first is added: one at a time, each would wait for memory.
    (Loads that merely precede the additions in the source are moved behind them by ptxas.)
    """
    for s in tl.range(0, splits, num_stages=4):
        acc += tl.load(ptr + s * step + offset, mask=mask, other=0.0).to(acc.dtype)
    return acc


@triton.jit
def column_sums(ptr, o_q, rows, BLOCK_Q: tl.constexpr):
    """Return the column sums of a float32 matrix (rows, BLOCK_Q)."""
    BLOCK: tl.constexpr = 2048 // BLOCK_Q
    total = tl.zeros((BLOCK, BLOCK_Q), tl.float32)
    for first in range(0, rows, BLOCK):
        o_r = first + tl.arange(0, BLOCK)
        total += tl.load(
            ptr + o_r[:, None] * BLOCK_Q + o_q[None, :], mask=(o_r < rows)[:, None], other=0.0
        )
    return tl.sum(total, axis=0)


@triton.jit
def sum_all(ptr, count):
    """Return the sum of float32 numbers in float64."""
    total = tl.zeros((1024,), tl.float64)
    for first in range(0, count, 1024):
        offset = first + tl.arange(0, 1024)
        total += tl.load(ptr + offset, mask=offset < count, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)
