"""Triton kernels for n:m weights in the layout of `reference.py`. Called through `launch.py`.

All matrices but x are contiguous. Legend of shape suffixes: T tokens, N neurons, I inputs, K kept weights of a neuron,
G groups of m inputs; BT, BN, BI, BK, BG blocks of them. Every bit pattern of a place leads to memory of its own row.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def place_of(places_ptr, row, k, mask, BITS: tl.constexpr):
    """The places of weights k of rows that start at byte `row`."""
    byte = tl.load(places_ptr + row + k * BITS // 8, mask=mask, other=0).to(tl.int32)
    return byte >> (k * BITS % 8) & ((1 << BITS) - 1)


@triton.jit
def four(tile, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """[ROWS, 4·GROUPS] -> its four columns of each group, [ROWS, GROUPS] each."""
    even, odd = tl.split(tl.reshape(tile, (ROWS, GROUPS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def kept_two(w0, w1, w2, w3, k0, k1, k2, k3):
    """Of four weights, of which k says that two are kept: the first, the second, and a nibble with their places."""
    first = tl.where(k0, w0, tl.where(k1, w1, w2))
    second = tl.where(k3, w3, tl.where(k2, w2, w1))
    nibble = tl.where(k0, 0, tl.where(k1, 1, 2)) | tl.where(k3, 3, tl.where(k2, 2, 1)) << 2
    return first, second, nibble


@triton.jit
def store_packed(values_ptr, places_ptr, first, second, nibble, row, group, groups, rows: tl.constexpr,
                 per_row: tl.constexpr, mask_rows):  # fmt: skip
    """Store the two values and the nibbles [rows, per_row] of groups `group`.. of the rows `row` (vectors)."""
    pair = tl.reshape(tl.join(first, second), (rows, 2 * per_row))
    at = group * 2 + tl.arange(0, 2 * per_row)
    inside = mask_rows[:, None] & (at < groups * 2)[None, :]
    tl.store(values_ptr + row[:, None] * (groups * 2) + at[None, :], pair, mask=inside)
    low, high = tl.split(tl.reshape(nibble, (rows, per_row // 2, 2)))
    byte = group // 2 + tl.arange(0, per_row // 2)
    inside = mask_rows[:, None] & (byte < groups // 2)[None, :]
    tl.store(places_ptr + row[:, None] * (groups // 2) + byte[None, :], (low | high << 4).to(tl.uint8), mask=inside)


@triton.jit
def pack_kernel(
    weight_ptr, mask_ptr, values_ptr, places_ptr, neurons, groups,
    BN: tl.constexpr, BG: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """2:4: the two largest magnitudes of every four (of equals the first, NaN before all), or those of a mask (bytes).

    `groups` is even.
    """
    rn = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    nm = rn < neurons
    group = tl.program_id(1) * BG
    ri = group * 4 + tl.arange(0, 4 * BG)
    at = rn[:, None] * (groups * 4) + ri[None, :]
    inside = nm[:, None] & (ri < groups * 4)[None, :]
    w0, w1, w2, w3 = four(tl.load(weight_ptr + at, mask=inside, other=0.0), BN, BG)
    if HAS_MASK:
        m0, m1, m2, m3 = four(tl.load(mask_ptr + at, mask=inside, other=0), BN, BG)
        k0, k1, k2, k3 = m0 != 0, m1 != 0, m2 != 0, m3 != 0
    else:
        a0, a1, a2, a3 = magnitude(w0), magnitude(w1), magnitude(w2), magnitude(w3)
        b01, b02, b03 = (a0 >= a1).to(tl.int32), (a0 >= a2).to(tl.int32), (a0 >= a3).to(tl.int32)
        b12, b13, b23 = (a1 >= a2).to(tl.int32), (a1 >= a3).to(tl.int32), (a2 >= a3).to(tl.int32)
        k0, k1 = b01 + b02 + b03 >= 2, 1 - b01 + b12 + b13 >= 2
        k2, k3 = 2 - b02 - b12 + b23 >= 2, 3 - b03 - b13 - b23 >= 2
    first, second, nibble = kept_two(w0, w1, w2, w3, k0, k1, k2, k3)
    store_packed(values_ptr, places_ptr, first, second, nibble, rn, group, groups, BN, BG, nm)


@triton.jit
def magnitude(w):
    size = tl.abs(w.to(tl.float32))
    return tl.where(size == size, size, float("inf"))


@triton.jit
def bounded(w, LARGEST: tl.constexpr):
    size = tl.abs(w.to(tl.float32))
    return tl.where(size < LARGEST, size, LARGEST)


@triton.jit
def pair_sums(w0, w1, w2, w3, LARGEST: tl.constexpr):
    a0, a1, a2, a3 = bounded(w0, LARGEST), bounded(w1, LARGEST), bounded(w2, LARGEST), bounded(w3, LARGEST)
    return a0 + a1, a0 + a2, a0 + a3, a1 + a2, a1 + a3, a2 + a3


@triton.jit
def kept_of_row(w0, w1, w2, w3, bits, SHIFT: tl.constexpr, STEP: tl.constexpr):
    """`kept_two` by the bits SHIFT, SHIFT + STEP, ... of tile masks."""
    k0, k1 = (bits >> SHIFT & 1) != 0, (bits >> SHIFT + STEP & 1) != 0
    k2, k3 = (bits >> SHIFT + 2 * STEP & 1) != 0, (bits >> SHIFT + 3 * STEP & 1) != 0
    return kept_two(w0, w1, w2, w3, k0, k1, k2, k3)


@triton.jit
def pack_tiles_kernel(
    weight_ptr, values_ptr, places_ptr, values_t_ptr, places_t_ptr, neurons, inputs,
    TN: tl.constexpr, TI: tl.constexpr, MASKS: tl.constexpr, BITS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """`reference.transposable_mask` of 4×4 tiles, and the packed weight and packed transpose.

    MASKS: for each mask the numbers of its rows' pairs; BITS: the same as 16 bits, bit 4·row + column. One program:
    TN x TI tiles. neurons and inputs are multiples of 8.
    """
    tn, ti = tl.program_id(0) * TN, tl.program_id(1) * TI
    rn, ri = tn + tl.arange(0, TN), ti + tl.arange(0, TI)
    rows, columns = neurons // 4, inputs // 4
    nm, im = rn < rows, ri < columns
    wide = ti * 4 + tl.arange(0, 4 * TI)
    at = (rn * 4).to(tl.int64)[:, None] * inputs + wide[None, :]
    inside = nm[:, None] & (wide < inputs)[None, :]
    a0, a1, a2, a3 = four(tl.load(weight_ptr + at, mask=inside, other=0.0), TN, TI)
    b0, b1, b2, b3 = four(tl.load(weight_ptr + at + inputs, mask=inside, other=0.0), TN, TI)
    c0, c1, c2, c3 = four(tl.load(weight_ptr + at + 2 * inputs, mask=inside, other=0.0), TN, TI)
    d0, d1, d2, d3 = four(tl.load(weight_ptr + at + 3 * inputs, mask=inside, other=0.0), TN, TI)
    sa, sb = pair_sums(a0, a1, a2, a3, LARGEST), pair_sums(b0, b1, b2, b3, LARGEST)
    sc, sd = pair_sums(c0, c1, c2, c3, LARGEST), pair_sums(d0, d1, d2, d3, LARGEST)
    best = tl.full((TN, TI), -1.0, tl.float32)
    bits = tl.zeros((TN, TI), tl.int32)
    for s in tl.static_range(len(MASKS)):
        total = (sa[MASKS[s][0]] + sb[MASKS[s][1]]) + (sc[MASKS[s][2]] + sd[MASKS[s][3]])
        bits = tl.where(total > best, BITS[s], bits)
        best = tl.maximum(total, best)
    row, half = rn.to(tl.int64) * 4, columns
    first, second, nibble = kept_of_row(a0, a1, a2, a3, bits, 0, 1)
    store_packed(values_ptr, places_ptr, first, second, nibble, row, ti, half, TN, TI, nm)
    first, second, nibble = kept_of_row(b0, b1, b2, b3, bits, 4, 1)
    store_packed(values_ptr, places_ptr, first, second, nibble, row + 1, ti, half, TN, TI, nm)
    first, second, nibble = kept_of_row(c0, c1, c2, c3, bits, 8, 1)
    store_packed(values_ptr, places_ptr, first, second, nibble, row + 2, ti, half, TN, TI, nm)
    first, second, nibble = kept_of_row(d0, d1, d2, d3, bits, 12, 1)
    store_packed(values_ptr, places_ptr, first, second, nibble, row + 3, ti, half, TN, TI, nm)
    row, half = ri.to(tl.int64) * 4, rows
    first, second, nibble = kept_of_row(a0, b0, c0, d0, bits, 0, 4)
    store_packed(values_t_ptr, places_t_ptr, first.T, second.T, nibble.T, row, tn, half, TI, TN, im)
    first, second, nibble = kept_of_row(a1, b1, c1, d1, bits, 1, 4)
    store_packed(values_t_ptr, places_t_ptr, first.T, second.T, nibble.T, row + 1, tn, half, TI, TN, im)
    first, second, nibble = kept_of_row(a2, b2, c2, d2, bits, 2, 4)
    store_packed(values_t_ptr, places_t_ptr, first.T, second.T, nibble.T, row + 2, tn, half, TI, TN, im)
    first, second, nibble = kept_of_row(a3, b3, c3, d3, bits, 3, 4)
    store_packed(values_t_ptr, places_t_ptr, first.T, second.T, nibble.T, row + 3, tn, half, TI, TN, im)


@triton.jit
def gemv_kernel(
    x_ptr, values_ptr, places_ptr, bias_ptr, y_ptr, tokens, neurons, kept, row_bytes, x_token, x_input,
    n: tl.constexpr, m: tl.constexpr, PLACE_BITS: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y[t, i] = Σ_k values[i, k] · x[t, column of k] + bias[i] for tokens <= T, a power of two."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    rt = tl.arange(0, T)
    nm = rn < neurons
    row = rn.to(tl.int64)[:, None]
    acc = tl.zeros((BN, BK), tl.float32) if T == 1 else tl.zeros((BN, BK, T), tl.float32)
    for start in range(0, kept, BK):
        k = (start + rk)[None, :]
        inside = nm[:, None] & (k < kept)
        column = k // n * m + place_of(places_ptr, row * row_bytes, k, inside, PLACE_BITS)
        w = tl.load(values_ptr + row * kept + k, mask=inside, other=0.0).to(tl.float32)
        if T == 1:
            acc += w * tl.load(x_ptr + column * x_input, mask=inside, other=0.0).to(tl.float32)
        else:
            x_at = x_ptr + column[:, :, None] * x_input + rt[None, None, :] * x_token
            x = tl.load(x_at, mask=inside[:, :, None] & (rt < tokens)[None, None, :], other=0.0)
            acc += w[:, :, None] * x.to(tl.float32)
    b = tl.load(bias_ptr + rn, mask=nm, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros((BN,), tl.float32)
    y = tl.sum(acc, 1)
    if T == 1:
        tl.store(y_ptr + rn, (y + b).to(y_ptr.dtype.element_ty), mask=nm)
    else:
        y_at = y_ptr + rt[None, :] * neurons + rn[:, None]
        tl.store(y_at, (y + b[:, None]).to(y_ptr.dtype.element_ty), mask=nm[:, None] & (rt < tokens)[None, :])


@triton.jit
def unpack_kernel(
    values_ptr, places_ptr, out_ptr, neurons, inputs, row_bytes,
    n: tl.constexpr, m: tl.constexpr, PLACE_BITS: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """The dense weight; every number of it is written."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    ri = (tl.program_id(1) * BI + tl.arange(0, BI))[None, :]
    inside = (row < neurons) & (ri < inputs)
    out = tl.zeros((BN, BI), values_ptr.dtype.element_ty)
    for j in tl.static_range(n):
        k = ri // m * n + j
        here = inside & (place_of(places_ptr, row * row_bytes, k, inside, PLACE_BITS) == ri % m)
        out = tl.where(here, tl.load(values_ptr + row * (inputs // m * n) + k, mask=here, other=0.0), out)
    tl.store(out_ptr + row * inputs + ri, out, mask=inside)


@triton.jit
def gather_kernel(
    dense_ptr, places_ptr, out_ptr, neurons, kept, row_bytes,
    n: tl.constexpr, m: tl.constexpr, PLACE_BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The numbers of a dense matrix at the places of the weights."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    inside = (row < neurons) & (k < kept)
    column = k // n * m + place_of(places_ptr, row * row_bytes, k, inside, PLACE_BITS)
    found = tl.load(dense_ptr + row * (kept // n * m) + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * kept + k, found, mask=inside)


@triton.jit
def transpose_values_kernel(
    values_ptr, places_ptr, places_t_ptr, out_ptr, neurons, inputs, BI: tl.constexpr, BK: tl.constexpr
):
    """2:4: out[i, k] is the weight that neuron 4·(k // 2) + place has for input i."""
    i = (tl.program_id(0) * BI + tl.arange(0, BI))[:, None]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    inside = (i < inputs) & (k < neurons // 2)
    row = i.to(tl.int64)
    neuron = k // 2 * 4 + place_of(places_t_ptr, row * (neurons // 8), k, inside, 2)
    pair = i // 4 * 2
    first = place_of(places_ptr, neuron.to(tl.int64) * (inputs // 8), pair, inside, 2)
    at = neuron.to(tl.int64) * (inputs // 2) + pair + (first != i % 4)
    tl.store(out_ptr + row * (neurons // 2) + k, tl.load(values_ptr + at, mask=inside, other=0.0), mask=inside)
