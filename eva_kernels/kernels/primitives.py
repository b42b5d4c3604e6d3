"""Device functions that mean the same on a GPU and in Triton's interpreter.

The interpreter stores bfloat16 as 16-bit integers and computes on the bit patterns (triton issue
11584), so a bfloat16 tile may be loaded, stored, transposed, widened, or passed to the functions
below, and nothing else.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = ["INTERPRET", "add_half_product", "add_product", "add_sums", "dot", "load_tokens"]
__all__ += ["split_bf16", "sum_all", "sum_rows", "to_bf16"]

# As triton reads it, when it is imported: setting the variable later mixes both modes.
INTERPRET = tl.constexpr(
    os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "yes", "y")
)


@triton.jit
def dot(a, b, acc):
    """Return ``acc + a @ b`` of bfloat16 tiles, accumulated in float32 on tensor cores."""
    if INTERPRET:
        # Widening is exact and so is each product: the same sums in another order.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        # The limit is one for float8, and means nothing here; but products without one are merged
        # with a sum that follows them, which add_product keeps apart.
        return tl.dot(a, b, acc, max_num_imprecise_acc=1)


@triton.jit
def to_bf16(x):
    """Round float32 to bfloat16, nearest even."""
    if INTERPRET:  # where the plain cast truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # What the rounding would turn into infinity or another NaN stays as it is.
        bits = tl.where((bits & 0x7F800000) == 0x7F800000, bits & 0xFFFF0000, rounded)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def split_bf16(x):
    """Return ``high, low`` in bfloat16 with ``high + low = x`` up to 2**-17 of x."""
    high = to_bf16(x)
    return high, to_bf16(x - high.to(tl.float32))


@triton.jit
def load_tokens(x_ptr, rows_ptr, o_n, o_d, n, d, stride_xn, HAS_ROWS: tl.constexpr):
    """Return the tile x (BLOCK_N, BLOCK_D), 0 outside, and which of its entries are inside."""
    m_n = o_n < n
    if HAS_ROWS:
        i_row = tl.load(rows_ptr + o_n, mask=m_n, other=0)
    else:
        i_row = o_n.to(tl.int64)
    m_x = m_n[:, None] & (o_d < d)[None, :]
    return tl.load(x_ptr + i_row[:, None] * stride_xn + o_d[None, :], mask=m_x, other=0.0), m_x


@triton.jit
def add_product(acc, a_high, a_low, b_high, b_low, HIGH: tl.constexpr):
    """Return acc + a @ b; all but the product of the low planes if HIGH, else the high ones.

    The product of a tile begins at zero and is added in registers. Tensor cores truncate what they
    add, so that a long sum in them drifts (5e-5 over 8192 tokens on an H200). And a product that
    stays in flight into the next round of a loop may be overtaken by the copy of its own operand:
    Triton keeps two slots of a tile that is also read into registers, one too few (3.6, sm_90).
    """
    tile = tl.zeros_like(acc)
    if HIGH:
        tile = dot(a_low, b_high, tile)
        tile = dot(a_high, b_low, tile)
    return acc + dot(a_high, b_high, tile)


@triton.jit
def add_half_product(acc, a_high, a_low, b, HIGH: tl.constexpr):
    """Return acc + a @ b where b is exact in bfloat16; as :func:`add_product`."""
    tile = tl.zeros_like(acc)
    if HIGH:
        tile = dot(a_low, b, tile)
    return acc + dot(a_high, b, tile)


@triton.jit
def add_sums(
    shift, square, centred,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Add the column sums of a tile, and those of its squares, to (BLOCK_N // FOLD, BLOCK_D).

    FOLD is how many rows a thread holds; they lie BLOCK_N // FOLD apart, so nothing is exchanged.
    """
    tile = tl.reshape(centred, (FOLD, BLOCK_N // FOLD, BLOCK_D))
    return shift + tl.sum(tile, axis=0), square + tl.sum(tile * tile, axis=0)


@triton.jit
def sum_rows(ptr, o_q, rows, BLOCK_Q: tl.constexpr):
    """Return the column sums of a float32 matrix (rows, BLOCK_Q).

    Many rows at a time: a loop over single ones would wait for memory once for each.
    """
    BLOCK: tl.constexpr = 2048 // BLOCK_Q
    total = tl.zeros((BLOCK, BLOCK_Q), tl.float32)
    for begin in range(0, rows, BLOCK):
        o_r = begin + tl.arange(0, BLOCK)
        total += tl.load(
            ptr + o_r[:, None] * BLOCK_Q + o_q[None, :], mask=(o_r < rows)[:, None], other=0.0
        )
    return tl.sum(total, axis=0)


@triton.jit
def sum_all(ptr, count):
    """Return the sum of float32 numbers in float64."""
    total = tl.zeros((1024,), tl.float64)
    for begin in range(0, count, 1024):
        offset = begin + tl.arange(0, 1024)
        total += tl.load(ptr + offset, mask=offset < count, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)
