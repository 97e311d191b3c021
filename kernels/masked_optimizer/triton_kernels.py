"""One program updates a block of one of many tensors, whose addresses stand in a table: one launch for a model.

Every number is read once and written once. Arithmetic is float32, with correctly rounded square roots and divisions;
results are rounded once, to the dtype in which they are stored, as torch's `fused=True` does.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

ADDRESSES = tl.constexpr(8)  # columns of the table: w, g, first state, second state, mask, new mask, forward, size
NUMBERS = tl.constexpr(12)  # columns of `launch.numbers`
SECTOR = tl.constexpr(8)  # weights that are read or left alone together: 32 bytes of float32


@triton.jit
def address(row_ptr, column: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    at = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(at, 16) if ALIGNED else at


@triton.jit
def best_of_four(w, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of the KEEP largest |w| of every 4 neighbours, the lower index first among equals; w [BLOCK / 8, 8]."""
    size = tl.abs(w)
    even, odd = tl.split(tl.reshape(size, (BLOCK // 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    ab, ac, ad = (a >= b).to(tl.int32), (a >= c).to(tl.int32), (a >= d).to(tl.int32)
    bc, bd, cd = (b >= c).to(tl.int32), (b >= d).to(tl.int32), (c >= d).to(tl.int32)
    lead: tl.constexpr = 4 - KEEP  # a chosen weight is ahead of so many others
    a, b = (ab + ac + ad >= lead).to(tl.int8), (1 - ab + bc + bd >= lead).to(tl.int8)
    c, d = (2 - ac - bc + cd >= lead).to(tl.int8), (3 - ad - bd - cd >= lead).to(tl.int8)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK // SECTOR, SECTOR)) != 0


@triton.jit
def update(w, g, m, v, numbers_ptr, STATES: tl.constexpr, ADAM: tl.constexpr, NESTEROV: tl.constexpr):
    """`reference.update_` of a block; the numbers are those of `launch.numbers`."""
    decay = tl.load(numbers_ptr + 2)
    g = g * tl.load(numbers_ptr + 10) + tl.where(decay == 0, 0.0, decay * w)  # 0·∞ is not 0
    w = w * tl.load(numbers_ptr + 1)
    beta1, rest1 = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
    if ADAM:
        m = tl.where(rest1 < 0.5, m + rest1 * (g - m), g - beta1 * (g - m))  # torch's lerp
        v = v * tl.load(numbers_ptr + 5) + tl.load(numbers_ptr + 6) * g * g
        root = tl.div_rn(tl.sqrt_rn(v), tl.load(numbers_ptr + 9))
        w -= tl.load(numbers_ptr + 8) * tl.div_rn(m, root + tl.load(numbers_ptr + 7))
    else:
        if STATES > 0:
            m = m * beta1 + rest1 * g
            g = g + beta1 * m if NESTEROV else m
        w -= tl.load(numbers_ptr) * g
    return w, m, v


@triton.jit
def block(
    row_ptr, numbers_ptr, start, n, STATES: tl.constexpr, ADAM: tl.constexpr, NESTEROV: tl.constexpr,
    MASKED: tl.constexpr, CLEAN: tl.constexpr, KEEP: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    ALIGNED: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, BLOCK // SECTOR), tl.arange(0, SECTOR)
    at = rows[:, None] * SECTOR + columns[None, :]
    w_at = address(row_ptr, 0, start, W, ALIGNED) + at
    g_at = address(row_ptr, 1, start, W, ALIGNED) + at
    m_at = address(row_ptr, 2, start, S, ALIGNED) + at
    v_at = address(row_ptr, 3, start, S, ALIGNED) + at
    inside = at < n - start if TAIL else tl.full((BLOCK // SECTOR, SECTOR), 1, tl.int1)
    kept = tl.load(address(row_ptr, 4, start, tl.int8, ALIGNED) + at, mask=inside, other=0) != 0
    touched = inside
    if CLEAN:  # in a sector without active weights the state is zero and stays it
        active = tl.max(kept.to(tl.int32), 1) > 0
        touched = inside & tl.broadcast_to(active[:, None], (BLOCK // SECTOR, SECTOR))
    w = tl.load(w_at, mask=touched, other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=touched, other=0.0).to(tl.float32)
    m = tl.zeros_like(w)
    v = tl.zeros_like(w)
    if STATES > 0:
        m = tl.load(m_at, mask=touched, other=0.0).to(tl.float32)
    if STATES > 1:
        v = tl.load(v_at, mask=touched, other=0.0).to(tl.float32)
    if not MASKED:
        g += tl.load(numbers_ptr + 11) * tl.where(kept, 0.0, w)
    w, m, v = update(w, g, m, v, numbers_ptr, STATES, ADAM, NESTEROV)
    if MASKED:  # whatever was computed elsewhere, NaN included, is dropped here
        w = tl.where(kept, w, 0.0)
        m = tl.where(kept, m, 0.0)
        v = tl.where(kept, v, 0.0)
    w_out = w.to(W)
    if KEEP > 0:
        new = best_of_four(w_out.to(tl.float32), KEEP, BLOCK)
        tl.store(address(row_ptr, 5, start, tl.int8, ALIGNED) + at, new.to(tl.int8), mask=inside)
        tl.store(address(row_ptr, 6, start, W, ALIGNED) + at, tl.where(new, w_out, 0.0).to(W), mask=inside)
    tl.store(w_at, w_out, mask=inside)  # also where it was not read: zero, whatever was there
    if STATES > 0:
        tl.store(m_at, m.to(S), mask=touched)
    if STATES > 1:
        tl.store(v_at, v.to(S), mask=touched)


@triton.jit
def step_kernel(
    table_ptr, numbers_ptr, blocks_ptr, STATES: tl.constexpr, ADAM: tl.constexpr, NESTEROV: tl.constexpr,
    MASKED: tl.constexpr, CLEAN: tl.constexpr, KEEP: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of `reference.masked_` (MASKED) or `straight_through_` for a block of one tensor, then (KEEP of 4) of
    `project`.

    table_ptr int64 [tensors, ADDRESSES]; numbers_ptr float32 [tensors, NUMBERS]; blocks_ptr int32 [programs, 2] =
    (tensor, its how-manieth block). W and S are the dtypes of weights (and gradients) and of state. CLEAN: state
    outside the mask is zero, and is not even read where 8 neighbours have no active weight.
    """
    tensor = tl.load(blocks_ptr + 2 * tl.program_id(0))
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    row_ptr = table_ptr + tensor * ADDRESSES
    numbers_ptr += tensor * NUMBERS
    n = tl.load(row_ptr + 7)
    if start + BLOCK <= n:
        block(row_ptr, numbers_ptr, start, n, STATES, ADAM, NESTEROV, MASKED, CLEAN, KEEP, W, S, ALIGNED, False,
              BLOCK)  # fmt: skip
    else:
        block(row_ptr, numbers_ptr, start, n, STATES, ADAM, NESTEROV, MASKED, CLEAN, KEEP, W, S, ALIGNED, True,
              BLOCK)  # fmt: skip
