"""Triton kernels of condensed layers for few tokens: every thread multiplies weights with the inputs they name.

Legend of shape suffixes: T tokens, N neurons, K weights per neuron; BN, BK blocks of them.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def few_tokens_kernel(
    x_ptr, values_ptr, indices_ptr, bias_ptr, y_ptr, tokens, neurons, fan_in, x_token, x_input,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """y[t, n] = Σ_k values[n, k] · x[t, indices[n, k]] + bias[n] for tokens <= T, a power of two."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    rt = tl.arange(0, T)
    nm = rn < neurons
    row = rn.to(tl.int64)[:, None] * fan_in
    acc = tl.zeros((BN, BK), tl.float32) if T == 1 else tl.zeros((BN, BK, T), tl.float32)
    for k in range(0, fan_in, BK):
        m = nm[:, None] & (k + rk < fan_in)[None, :]
        ix = tl.load(indices_ptr + row + (k + rk)[None, :], mask=m, other=0).to(tl.int32)
        if NARROW:
            ix = ix & 0xFFFF
        w = tl.load(values_ptr + row + (k + rk)[None, :], mask=m, other=0.0).to(tl.float32)
        if T == 1:
            acc += w * tl.load(x_ptr + ix * x_input, mask=m, other=0.0).to(tl.float32)
        else:
            x_at = x_ptr + ix[:, :, None] * x_input + rt[None, None, :] * x_token
            x = tl.load(x_at, mask=m[:, :, None] & (rt < tokens)[None, None, :], other=0.0)
            acc += w[:, :, None] * x.to(tl.float32)
    b = tl.load(bias_ptr + rn, mask=nm, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros((BN,), tl.float32)
    y = tl.sum(acc, 1)
    if T == 1:
        tl.store(y_ptr + rn, (y + b).to(y_ptr.dtype.element_ty), mask=nm)
    else:
        y_at = y_ptr + rt[None, :] * neurons + rn[:, None]
        tl.store(y_at, (y + b[:, None]).to(y_ptr.dtype.element_ty), mask=nm[:, None] & (rt < tokens)[None, :])


@triton.jit
def sampled_gradient_kernel(
    grad_ptr, x_ptr, indices_ptr, out_ptr, tokens, fan_in, grad_token, grad_neuron, x_token, x_input,
    T: tl.constexpr, BK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """out[n, k] = Σ_t grad[t, n] · x[t, indices[n, k]]; one program: BK weights of one neuron."""
    blocks = tl.cdiv(fan_in, BK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    rk = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    km = rk < fan_in
    ix = tl.load(indices_ptr + n * fan_in + rk, mask=km, other=0).to(tl.int32)
    if NARROW:
        ix = ix & 0xFFFF
    acc = tl.zeros((BK, T), tl.float32)
    for first in range(0, tokens, T):
        rt = first + tl.arange(0, T)
        tm = rt < tokens
        grad = tl.load(grad_ptr + rt * grad_token + n * grad_neuron, mask=tm, other=0.0).to(tl.float32)
        x_at = x_ptr + ix.to(tl.int64)[:, None] * x_input + rt[None, :] * x_token
        x = tl.load(x_at, mask=km[:, None] & tm[None, :], other=0.0)
        acc += x.to(tl.float32) * grad[None, :]
    tl.store(out_ptr + n * fan_in + rk, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=km)
