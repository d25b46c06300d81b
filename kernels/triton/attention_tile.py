"""What the attention kernels share: rows through the order tables, which pairs are visible, products of rows.

Tiles of queries and keys may lie either way round: positions of one kind come as [rows, 1], those of the other as [1, rows], and what
is computed of both broadcasts. A head of D columns is held in two parts of D1 and D2 columns, powers of two (72 = 64 + 8 of 16), D2
may be 0; then the second part is the first, and nothing reads it. fp32 is multiplied CHUNK columns at a time, without tensor cores.
Strides arrive divided by ALIGN elements, as in tile.py.
"""

import triton
import triton.language as tl

from saccade._triton.matrix import INTERPRET
from saccade._triton.tile import narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SEEN_BY_ALL = tl.constexpr(-(2**31))  # at[0][j]: a key that every query sees
WHOLE, BOX, BITS = (tl.constexpr(i) for i in range(3))  # how the partial blocks are told; WHOLE: there are none

# Arguments that change from call to call: a kernel must not be compiled anew for their values.
SIZES = (
    "heads kv_heads group tiles k_tiles first_b first_h q_len k_len q_positions k_positions k_blocks samples shared_heads bias_heads scale"
    + " list_stride_b list_stride_h t_list_stride_b t_list_stride_h key_bias_stride"
    + "".join(f" {table}_stride_{d}" for table in ("box", "at", "q_order", "k_order") for d in "bh")
    + "".join(f" {x}_stride_{d}" for x in ("x", "q", "k", "v", "out", "dout", "dq", "dk", "dv", "bias") for d in "bhs")
).split()

# Scores are compared by value, so a product and a sum may be one operation.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def values(x):
    """What was loaded as it enters `tl.dot`. The interpreter cannot compute with 16 bits, and takes fp32 of the same values."""
    return x.to(tl.float32) if INTERPRET else x


@triton.jit
def operand(x, like):
    """fp32 rounded to the element type of the pointer `like`, for `tl.dot`."""
    return values(narrow(x, like.dtype.element_ty))


@triton.jit
def tokens_at(p_order, position, length, HAS_ORDER: tl.constexpr):
    """The token at each position, int64, and whether there is one."""
    if HAS_ORDER:
        token = tl.load(p_order + position)
        return token.to(tl.int64), token >= 0
    return position.to(tl.int64), position < length


@triton.jit
def rows_at(p, token, first, row, stride, ALIGN: tl.constexpr, FAR: tl.constexpr):
    """Pointers [rows, 1] to the rows of `token`, which are first + row unless FAR; `row` is the same for every tile."""
    if FAR:
        return p + token[:, None] * stride * ALIGN
    return p + first.to(tl.int64) * stride * ALIGN + (row * stride * ALIGN)[:, None]


@triton.jit
def load_parts(p_row, m_row, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr):
    """Both parts of rows p_row [rows, 1]; rows that m_row denies are 0 where MASKED, else not looked for."""
    first = tl.arange(0, D1)[None, :]
    if MASKED:
        x1 = values(tl.load(p_row + first, mask=m_row & (first < D), other=0.0))
    else:
        x1 = values(tl.load(p_row + first))
    x2 = x1
    if D2 > 0:
        second = D1 + tl.arange(0, D2)[None, :]
        if MASKED:
            x2 = values(tl.load(p_row + second, mask=m_row & (second < D), other=0.0))
        elif D1 + D2 == D:
            x2 = values(tl.load(p_row + second))
        else:
            x2 = values(tl.load(p_row + second, mask=second < D, other=0.0))
    return x1, x2


@triton.jit
def store_parts(p_row, m_row, x1, x2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Inverse of `load_parts`: fp32 is rounded to the element type of p_row."""
    first = tl.arange(0, D1)[None, :]
    tl.store(p_row + first, narrow(x1, p_row.dtype.element_ty), mask=m_row & (first < D))
    if D2 > 0:
        second = D1 + tl.arange(0, D2)[None, :]
        tl.store(p_row + second, narrow(x2, p_row.dtype.element_ty), mask=m_row & (second < D))


@triton.jit
def zero_parts(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Sums [rows, D1] and [rows, D2] to begin with."""
    x1 = tl.zeros((ROWS, D1), tl.float32)
    x2 = tl.zeros((ROWS, D2 if D2 > 0 else 1), tl.float32)
    return x1, x2


@triton.jit
def add_products(total1, total2, w, x1, x2, D2: tl.constexpr):
    """Adds w [A, B] times both parts [B, D]."""
    total1 = tl.dot(w, x1, total1, input_precision="ieee")
    if D2 > 0:
        total2 = tl.dot(w, x2, total2, input_precision="ieee")
    return total1, total2


@triton.jit
def products(
    a1, a2, p_a, m_a, b1, b2, p_b, m_b,
    D: tl.constexpr, D2: tl.constexpr, CHUNK: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows a with rows b, [A, B] fp32: of the parts given, or where CHUNK > 0 of rows read from p_a and p_b, [rows, 1] both."""
    if CHUNK == 0:
        s = tl.dot(a1, tl.trans(b1), input_precision="ieee")
        if D2 > 0:
            s = tl.dot(a2, tl.trans(b2), s, input_precision="ieee")
    else:
        s = tl.zeros((A, B), tl.float32)
        for start in range(0, D, CHUNK):
            column = start + tl.arange(0, CHUNK)[None, :]
            a = values(tl.load(p_a + column, mask=m_a & (column < D), other=0.0))
            b = values(tl.load(p_b + column, mask=m_b & (column < D), other=0.0))
            s = tl.dot(a, tl.trans(b), s, input_precision="ieee")
    return s


@triton.jit
def box_shows(p_box, p_at, i, j, q_positions, k_positions, AXES: tl.constexpr):
    """Whether the queries at positions i see the keys at positions j, by `box` and `at`."""
    at = tl.load(p_at + j)
    shown = (at >= tl.load(p_box + i)) & (at < tl.load(p_box + AXES * q_positions + i))
    by_all = at == SEEN_BY_ALL
    for a in tl.static_range(1, AXES):
        at = tl.load(p_at + a * k_positions + j)
        low, high = tl.load(p_box + a * q_positions + i), tl.load(p_box + (AXES + a) * q_positions + i)
        shown = shown & (at >= low) & (at < high)
    return shown | by_all


@triton.jit
def bits_show(p_bits, i, j, first, K_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same by the bits of one block: rows i of it, and keys j = first .. first + BLOCK_N - 1 of it."""
    p = p_bits + i * (K_BLOCK // 32) + first // 32
    word = tl.load(p)
    for w in tl.static_range(1, BLOCK_N // 32):
        word = tl.where(j - first < w * 32, word, tl.load(p + w))
    return ((word >> (j & 31)) & 1) != 0


@triton.jit
def list_of(starts_ptr, counts_ptr, at, HAS: tl.constexpr):
    """Where list `at` begins, and its length."""
    if HAS:
        return tl.load(starts_ptr + at).to(tl.int64), tl.load(counts_ptr + at)
    return tl.zeros((), tl.int64), tl.zeros((), tl.int32)


@triton.jit
def shown(
    p_box, p_at, p_bits, i, j, row, column, first, q_positions, k_positions,
    SEEN: tl.constexpr, AXES: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which pairs a block seen in part shows: positions i and j, by bits rows and columns within the block, which begin at `first`."""
    if SEEN == BOX:
        return box_shows(p_box, p_at, i, j, q_positions, k_positions, AXES)
    return bits_show(p_bits, row, column, first, K_BLOCK, BLOCK_N)


@triton.jit
def add_biases(
    s, p_bias, p_key_bias, key, m_q, exists, HOLES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr
):
    """Scores [queries, keys] with the biases of the tokens `key`; HOLES: some of them may not exist."""
    if HAS_BIAS:
        mask = m_q
        if HOLES:
            mask = mask & exists[None, :]
        s += tl.load(p_bias + key[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_KEY_BIAS:
        if HOLES:
            key_bias = tl.load(p_key_bias + key, mask=exists, other=0.0)
        else:
            key_bias = tl.load(p_key_bias + key)
        s += key_bias[None, :]
    return s


@triton.jit
def load_lse(p, mask):
    """lse, +inf for queries that do not exist or see nothing: their P is 0."""
    lse = tl.load(p, mask=mask, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def plain_blocks(indices_ptr, start, count, k_len, K_BLOCK: tl.constexpr, HAS_K_ORDER: tl.constexpr):
    """Blocks of a list seen without any mask: all but one that ends early, which can only be the last."""
    plain = count
    if not HAS_K_ORDER:
        last = tl.load(indices_ptr + start + count - 1, mask=count > 0, other=-1)
        plain = count - ((last + 1) * K_BLOCK > k_len).to(tl.int32)
    return plain


@triton.jit
def masked_block(
    indices_ptr, p_indices_ptr, p_ids_ptr, bits_ptr, start, p_start, count, entry,
    SEEN: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """Entry of the `count` blocks seen whole followed by those seen in part: the block, whether it is a whole one, and its bits."""
    whole = entry < count
    block = tl.load(indices_ptr + start + entry, mask=whole, other=0)
    p_bits = bits_ptr
    if SEEN != WHOLE:
        block += tl.load(p_indices_ptr + p_start + entry - count, mask=entry >= count, other=0)
    if SEEN == BITS:
        i_bits = tl.load(p_ids_ptr + p_start + entry - count, mask=entry >= count, other=0)
        p_bits += i_bits.to(tl.int64) * (Q_BLOCK * (K_BLOCK // 32))
    return block, whole, p_bits
