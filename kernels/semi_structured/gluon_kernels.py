"""A product with 2:4 weights for few tokens on sparse tensor cores: `mma.sp`, which Triton itself does not emit.

Gluon fixes which thread holds which number, so that `inline_asm_elementwise` over four registers is one instruction of
a warp. `fragments.py` says what lies where. sm_80 and later; the weight is read once. Weight and inputs are read in
pieces of 16 bytes, the inputs as the model holds them: neighbouring lanes exchange what belongs to the other.

Legend: R blocks of 16 neurons; BW warps, which share the inputs; BR blocks and BT groups of 8 tokens of one program.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

OPERANDS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")

# Of the words that an even lane (0 .. 3) and the next (4 .. 7) hold, the even lane gets 0, 2, 4, 6, the other the rest.
EXCHANGE = gl.constexpr(
    "{ .reg .pred odd; .reg .b32 lane, give0, give1, keep0, keep1; "
    "mov.u32 lane, %laneid; and.b32 lane, lane, 1; setp.ne.u32 odd, lane, 0; "
    "selp.b32 give0, $4, $5, odd; selp.b32 give1, $6, $7, odd; "
    "selp.b32 keep0, $5, $4, odd; selp.b32 keep1, $7, $6, odd; "
    "shfl.sync.bfly.b32 give0, give0, 1, 31, -1; shfl.sync.bfly.b32 give1, give1, 1, 31, -1; "
    "selp.b32 $0, give0, keep0, odd; selp.b32 $1, give1, keep1, odd; "
    "selp.b32 $2, keep0, give0, odd; selp.b32 $3, keep1, give1, odd; }"
)


def instructions(dtype: torch.dtype) -> tuple[str, ...]:
    """The eight steps of a chunk; step s takes its places from register s // 2 of lanes s % 2 · 2 .. + 1 of four."""
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    return tuple(
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, ${16 + s // 2}, 0x{s % 2};"
        for s in range(8)
    )


@gluon.jit
def along(size: gl.constexpr, dim: gl.constexpr, layout: gl.constexpr):
    """0 .. size - 1 along one of the four dimensions of a layout."""
    if dim == 0:
        line = gl.arange(0, size, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
        return gl.expand_dims(gl.expand_dims(gl.expand_dims(line, 1), 2), 3)
    elif dim == 1:
        line = gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
        return gl.expand_dims(gl.expand_dims(gl.expand_dims(line, 0), 2), 3)
    elif dim == 2:
        line = gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
        return gl.expand_dims(gl.expand_dims(gl.expand_dims(line, 0), 1), 3)
    else:
        line = gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
        return gl.expand_dims(gl.expand_dims(gl.expand_dims(line, 0), 1), 2)


@gluon.jit
def decode_kernel(
    kept_ptr, places_ptr, x_ptr, bias_ptr, y_ptr, tokens, neurons, inputs,
    BR: gl.constexpr, BT: gl.constexpr, BW: gl.constexpr, STEPS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """y[t, i] = Σ_k w[i, k] · x[t, k] + bias[i]; x [T, I] as int32, two numbers each. I is a multiple of 256·BW.

    One program: 16·BR neurons, tokens < 8·BT. Warp w takes the chunks w, w + BW, ... of the inputs.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, BR, BT, 4], [1, 1, 1, 32], [BW, 1, 1, 1], [3, 2, 1, 0])
    warp, block, group, place = along(BW, 0, layout), along(BR, 1, layout), along(BT, 2, layout), along(128, 3, layout)
    lane, register = place // 4, place % 4
    rows = gl.program_id(0) * BR + block
    token = group * 8 + lane // 4
    chunks = inputs // 256
    kept_at = kept_ptr + (rows * chunks + warp).to(gl.int64) * 1024 + place
    places_at = places_ptr + (rows * chunks + warp) * 128 + place
    x_at = x_ptr + token * (inputs // 2) + warp * 128 + place % 16
    inside = token < tokens
    acc = gl.zeros([BW, BR, BT, 128], gl.float32, layout=layout)
    for _ in range(0, chunks // BW):
        e = gl.load(places_at)
        a = (gl.load(kept_at), gl.load(kept_at + 128), gl.load(kept_at + 256), gl.load(kept_at + 384),
             gl.load(kept_at + 512), gl.load(kept_at + 640), gl.load(kept_at + 768),
             gl.load(kept_at + 896))  # fmt: skip
        for s in gl.static_range(8):
            b = gl.load(x_at + s * 16, mask=inside, other=0)
            b = gl.inline_asm_elementwise(EXCHANGE, "=&r,=&r,=&r,=&r,r,r,r,r", [b], gl.int32, True, 4)
            acc = gl.inline_asm_elementwise(STEPS[s], OPERANDS, [a[s], b, acc, e], gl.float32, True, 4)
        kept_at += BW * 1024
        places_at += BW * 128
        x_at += BW * 128
    y = gl.expand_dims(gl.sum(acc, 0), 0)  # over warps
    token = group * 8 + lane % 4 * 2 + register % 2
    neuron = rows * 16 + lane // 4 + register // 2 * 8
    if HAS_BIAS:
        y += gl.load(bias_ptr + neuron).to(gl.float32)
    gl.store(y_ptr + token * neurons + neuron, y.to(y_ptr.dtype.element_ty), mask=token < tokens)
