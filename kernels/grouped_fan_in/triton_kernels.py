"""Triton kernels for groups of V neurons that share K inputs. Called through `launch.py`, which knows what must hold.

Activations have the shape [T, ·] and any strides. What is fast: x by feature (neighbouring tokens side by side), so
that a gathered input is a run of memory; gradients and outputs either way.

Legend of shape suffixes: T tokens, I inputs, N = G·V neurons, G groups, V neurons of a group, K weights of a neuron;
BT, BK, BI blocks of them.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def widened(ix, NARROW: tl.constexpr, WIDE: tl.constexpr):
    """Indices as int32, from int32 or (NARROW) two unsigned bytes; as int64 where products with a stride need it."""
    ix = ix.to(tl.int32)
    if NARROW:
        ix = ix & 0xFFFF
    if WIDE:
        ix = ix.to(tl.int64)
    return ix


@triton.jit
def load_indices(indices_ptr, offsets, mask, NARROW: tl.constexpr, WIDE: tl.constexpr):
    return widened(tl.load(indices_ptr + offsets, mask=mask, other=0), NARROW, WIDE)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    return y


@triton.jit
def forward_kernel(
    x_ptr, values_ptr, indices_ptr, bias_ptr, y_ptr,
    tokens, limit, groups, fan_in, x_token, x_input, y_token, y_neuron,
    V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, NARROW: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, g·V + v] = activation(Σ_k values[g, v, k] · x[t, indices[g, k]] + bias[g·V + v]).

    One program: one group, BT tokens. Programs of one block of tokens follow each other, so that x stays in the L2
    cache. Tokens below `limit` (a multiple of 16, for wide loads) may be read, and below `tokens` written. EVEN: all
    blocks are full. SWAP: tokens are the rows of the accumulator, else neurons. AHEAD: the indices of the next block
    are in registers when its inputs are asked for; else every block waits for its indices first.
    """
    g = tl.program_id(0) % groups
    rt = tl.program_id(0) // groups * BT + tl.arange(0, BT)
    rv = tl.arange(0, V)
    rk = tl.arange(0, BK)
    t = rt.to(tl.int64) if WIDE else rt
    values_ptr += g.to(tl.int64) * V * fan_in
    indices_ptr += g * fan_in
    acc = tl.zeros((BT, V), tl.float32) if SWAP else tl.zeros((V, BT), tl.float32)
    if AHEAD:
        loaded = tl.load(indices_ptr + rk, mask=rk < fan_in, other=0)
    for k in tl.range(0, fan_in, BK, num_stages=STAGES):
        km = k + rk < fan_in
        if not AHEAD:
            loaded = tl.load(indices_ptr + k + rk, mask=km, other=0)
        ix = widened(loaded, NARROW, WIDE)
        x_at = x_ptr + ix[:, None] * x_input + t[None, :] * x_token
        w_at = values_ptr + rv[:, None] * fan_in + (k + rk)[None, :]
        if EVEN:
            x = tl.load(x_at)  # [BK, BT]
            w = tl.load(w_at)  # [V, BK]
        else:  # both: zero times NaN is not zero
            x = tl.load(x_at, mask=km[:, None] & (rt < limit)[None, :], other=0.0)
            w = tl.load(w_at, mask=km[None, :], other=0.0)
        if AHEAD:  # as loaded: a conversion here would wait for them
            loaded = tl.load(indices_ptr + k + BK + rk, mask=k + BK + rk < fan_in, other=0)
        if SWAP:
            acc = tl.dot(tl.trans(x), tl.trans(w), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
    n = g * V + rv
    b = tl.load(bias_ptr + n).to(tl.float32) if HAS_BIAS else tl.zeros((V,), tl.float32)
    if SWAP:
        y = activate(acc + b[None, :], ACTIVATION)
        y_at = y_ptr + t[:, None] * y_token + (n.to(tl.int64) if WIDE else n)[None, :] * y_neuron
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(rt < tokens)[:, None])
    else:
        y = activate(acc + b[:, None], ACTIVATION)
        y_at = y_ptr + t[None, :] * y_token + (n.to(tl.int64) if WIDE else n)[:, None] * y_neuron
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(rt < tokens)[None, :])


@triton.jit
def weight_gradient_kernel(
    grad_ptr, x_ptr, indices_ptr, out_ptr,
    tokens, per_split, fan_in, split_size, grad_token, grad_neuron, x_token, x_input,
    V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, NARROW: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[s, g, v, k] = Σ_t grad[t, g·V + v] · x[t, indices[g, k]] over the tokens of split s.

    One program: BK inputs of one group, `per_split` tokens (a multiple of BT).
    """
    blocks = tl.cdiv(fan_in, BK)
    g = tl.program_id(0) // blocks
    rk = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    rv = tl.arange(0, V)
    rt = tl.arange(0, BT)
    km = rk < fan_in
    ix = load_indices(indices_ptr, g * fan_in + rk, km, NARROW, WIDE)
    n = (g * V + rv).to(tl.int64) if WIDE else g * V + rv
    start = tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, tokens)
    full = start + (stop - start) // BT * BT
    acc = tl.zeros((BK, V), tl.float32)
    for t in tl.range(start, full, BT, num_stages=STAGES):  # without masks: these loads are wide
        rows = (t + rt).to(tl.int64) if WIDE else t + rt
        x = tl.load(x_ptr + ix[:, None] * x_input + rows[None, :] * x_token)  # [BK, BT]
        grad = tl.load(grad_ptr + rows[:, None] * grad_token + n[None, :] * grad_neuron)  # [BT, V]
        acc = tl.dot(x, grad, acc, input_precision=PRECISION)
    if full < stop:
        rows = (full + rt).to(tl.int64) if WIDE else full + rt
        tm = full + rt < stop
        x = tl.load(x_ptr + ix[:, None] * x_input + rows[None, :] * x_token, mask=tm[None, :], other=0.0)
        grad_at = grad_ptr + rows[:, None] * grad_token + n[None, :] * grad_neuron
        acc = tl.dot(x, tl.load(grad_at, mask=tm[:, None], other=0.0), acc, input_precision=PRECISION)
    out_ptr += tl.program_id(1).to(tl.int64) * split_size + g.to(tl.int64) * V * fan_in
    out_at = out_ptr + rv[None, :] * fan_in + rk[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=km[:, None])


@triton.jit
def scores_kernel(
    grad_ptr, x_ptr, out_ptr,
    tokens, groups, inputs, grad_token, grad_neuron, x_token, x_input,
    V: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[g, i] = Σ_v |Σ_t grad[t, g·V + v] · x[t, i]|.

    One program: BK inputs, BN neurons of several groups, all tokens: a tile of the dense gradient, which is summed
    where it is. Programs that follow each other form squares of 8 x 8 tiles, so that what they read is in the L2 cache.
    """
    across, down = tl.cdiv(inputs, BK), tl.cdiv(groups * V, BN)
    band = tl.program_id(0) // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    within = tl.program_id(0) % (8 * across)
    rk = within // height * BK + tl.arange(0, BK)
    rn = (band * 8 + within % height) * BN + tl.arange(0, BN)
    rt = tl.arange(0, BT)
    km, nm = rk < inputs, rn < groups * V
    i = rk.to(tl.int64) if WIDE else rk
    n = rn.to(tl.int64) if WIDE else rn
    full = tokens // BT * BT
    acc = tl.zeros((BK, BN), tl.float32)
    for t in tl.range(0, full, BT, num_stages=STAGES):
        rows = (t + rt).to(tl.int64) if WIDE else t + rt
        x = tl.load(x_ptr + i[:, None] * x_input + rows[None, :] * x_token, mask=km[:, None], other=0.0)
        grad = tl.load(grad_ptr + rows[:, None] * grad_token + n[None, :] * grad_neuron, mask=nm[None, :], other=0.0)
        acc = tl.dot(x, grad, acc, input_precision=PRECISION)
    if full < tokens:
        rows = (full + rt).to(tl.int64) if WIDE else full + rt
        tm = full + rt < tokens
        x_at = x_ptr + i[:, None] * x_input + rows[None, :] * x_token
        grad_at = grad_ptr + rows[:, None] * grad_token + n[None, :] * grad_neuron
        x = tl.load(x_at, mask=km[:, None] & tm[None, :], other=0.0)
        grad = tl.load(grad_at, mask=tm[:, None] & nm[None, :], other=0.0)
        acc = tl.dot(x, grad, acc, input_precision=PRECISION)
    score = tl.sum(tl.reshape(tl.abs(acc), (BK, BN // V, V)), 2)
    g = (band * 8 + within % height) * (BN // V) + tl.arange(0, BN // V)
    out_at = out_ptr + g.to(tl.int64)[None, :] * inputs + rk[:, None]
    tl.store(out_at, score, mask=km[:, None] & (g < groups)[None, :])


@triton.jit
def partial_kernel(
    grad_ptr, values_ptr, out_ptr, first, tokens, groups, fan_in, row, grad_token, grad_neuron,
    V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[g·K + k, t] = Σ_v values[g, v, k] · grad[first + t, g·V + v], for t < tokens; rows of `row` numbers.

    The first half of the gradient of the input: what each group sends to each of its inputs.
    """
    g = tl.program_id(0) % groups
    rk = tl.program_id(0) // groups * BK + tl.arange(0, BK)
    rt = tl.program_id(1) * BT + tl.arange(0, BT)
    rv = tl.arange(0, V if V > 16 else 16)  # a dot sums over at least 16
    vm = rv < V
    t = (first + rt).to(tl.int64) if WIDE else first + rt
    n = (g * V + rv).to(tl.int64) if WIDE else g * V + rv
    km = rk < fan_in
    tm = rt < tokens
    w_at = values_ptr + (g.to(tl.int64) * V + rv)[:, None] * fan_in + rk[None, :]
    w = tl.load(w_at, mask=vm[:, None] & km[None, :], other=0.0)  # [V, BK]
    grad_at = grad_ptr + t[:, None] * grad_token + n[None, :] * grad_neuron
    grad = tl.load(grad_at, mask=tm[:, None] & vm[None, :], other=0.0)
    sent = tl.dot(tl.trans(w), tl.trans(grad), input_precision=PRECISION)  # [BK, BT]
    out_at = out_ptr + (g.to(tl.int64) * fan_in + rk)[:, None] * row + rt[None, :]
    tl.store(out_at, sent.to(out_ptr.dtype.element_ty), mask=km[:, None] & tm[None, :])


@triton.jit
def collect_kernel(
    partial_ptr, order_ptr, starts_ptr, out_ptr, first, tokens, inputs, row, out_token, out_input,
    BI: tl.constexpr, BT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[first + t, i] = Σ_e partial[order[e], t] over starts[i] <= e < starts[i + 1], in this order: deterministic.

    The second half of the gradient of the input. `order` [G·K] sorts the places (g, k) by their input.
    """
    ri = tl.program_id(0) * BI + tl.arange(0, BI)
    rt = tl.program_id(1) * BT + tl.arange(0, BT)
    im = ri < inputs
    tm = rt < tokens
    start = tl.load(starts_ptr + ri, mask=im, other=0)
    end = tl.load(starts_ptr + ri + 1, mask=im, other=0)
    acc = tl.zeros((BI, BT), tl.float32)
    partial_ptr += rt[None, :]
    # Four parts at a time, whose places were read a turn earlier: the wait for memory is the cost of this kernel.
    a, b = tl.load(order_ptr + start, mask=start < end), tl.load(order_ptr + start + 1, mask=start + 1 < end)
    c = tl.load(order_ptr + start + 2, mask=start + 2 < end)
    d = tl.load(order_ptr + start + 3, mask=start + 3 < end)
    for _ in range(0, tl.max(end - start, 0), 4):
        am, bm = (start < end)[:, None] & tm[None, :], (start + 1 < end)[:, None] & tm[None, :]
        cm, dm = (start + 2 < end)[:, None] & tm[None, :], (start + 3 < end)[:, None] & tm[None, :]
        part_a = tl.load(partial_ptr + a.to(tl.int64)[:, None] * row, mask=am, other=0.0)
        part_b = tl.load(partial_ptr + b.to(tl.int64)[:, None] * row, mask=bm, other=0.0)
        part_c = tl.load(partial_ptr + c.to(tl.int64)[:, None] * row, mask=cm, other=0.0)
        part_d = tl.load(partial_ptr + d.to(tl.int64)[:, None] * row, mask=dm, other=0.0)
        start += 4
        a, b = tl.load(order_ptr + start, mask=start < end), tl.load(order_ptr + start + 1, mask=start + 1 < end)
        c = tl.load(order_ptr + start + 2, mask=start + 2 < end)
        d = tl.load(order_ptr + start + 3, mask=start + 3 < end)
        acc += part_a.to(tl.float32)
        acc += part_b.to(tl.float32)
        acc += part_c.to(tl.float32)
        acc += part_d.to(tl.float32)
    t = (first + rt).to(tl.int64) if WIDE else first + rt
    i = ri.to(tl.int64) if WIDE else ri
    out_at = out_ptr + t[None, :] * out_token + i[:, None] * out_input
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=im[:, None] & tm[None, :])


@triton.jit
def places_kernel(indices_ptr, places_ptr, fan_in, inputs, BK: tl.constexpr, NARROW: tl.constexpr):
    """places[g, indices[g, k]] = k; the other places are -1 already."""
    g = tl.program_id(0)
    rk = tl.program_id(1) * BK + tl.arange(0, BK)
    km = rk < fan_in
    ix = load_indices(indices_ptr, g * fan_in + rk, km, NARROW, True)
    tl.store(places_ptr + g.to(tl.int64) * inputs + ix, rk.to(places_ptr.dtype.element_ty), mask=km)


@triton.jit
def densify_kernel(
    values_ptr, places_ptr, out_ptr, fan_in, inputs, V: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr
):
    """out[g·V + v, i] = values[g, v, places[g, i]], zero where that is -1. One program: ROWS neurons of one group, BI
    inputs, so that every number of `out` is written once, beside its neighbours."""
    g = tl.program_id(0) * ROWS // V
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    ri = tl.program_id(1) * BI + tl.arange(0, BI)
    im = ri < inputs
    k = tl.load(places_ptr + g.to(tl.int64) * inputs + ri, mask=im, other=-1).to(tl.int32)[None, :]
    w = tl.load(values_ptr + n * fan_in + k, mask=k >= 0, other=0.0)
    tl.store(out_ptr + n * inputs + ri[None, :], w, mask=im[None, :])


@triton.jit
def feature_major_kernel(x_ptr, out_ptr, tokens, padded, inputs, x_token, x_input, BT: tl.constexpr, BI: tl.constexpr):
    """out[i, t] = x[t, i], rows of `padded` numbers; zero where tokens <= t < padded."""
    blocks = tl.cdiv(inputs, BI)
    rt = tl.program_id(0) // blocks * BT + tl.arange(0, BT)
    ri = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    im = ri < inputs
    x_at = x_ptr + rt.to(tl.int64)[:, None] * x_token + ri.to(tl.int64)[None, :] * x_input
    x = tl.load(x_at, mask=(rt < tokens)[:, None] & im[None, :], other=0.0)
    out_at = out_ptr + ri.to(tl.int64)[:, None] * padded + rt[None, :]
    tl.store(out_at, tl.trans(x), mask=im[:, None] & (rt < padded)[None, :])
