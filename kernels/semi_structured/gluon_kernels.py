"""Products with 2:4 weights for few tokens on sparse tensor cores: `mma.sp`, which Triton itself does not emit.

Gluon fixes which thread holds which number, so that `inline_asm_elementwise` over four registers is one instruction of
a warp. `fragments.py` says what lies where. sm_80 and later; the weight is read once. Weight and inputs are read in
pieces of 16 bytes, the inputs as the model holds them: neighbouring lanes exchange what belongs to the other.

Few tokens take as long as the weight takes to arrive, so that what counts is how many of its bytes are on their way:
`decode_kernel` holds a chunk of each warp in registers, `staged_decode_kernel` several in shared memory.

Legend: R blocks of 16 neurons; BR of them and BT groups of 8 tokens are of one program; BW warps share its inputs.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

OPERANDS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")

# Of the words that an even lane (0 .. 3) and the next (4 .. 7) hold, the even lane gets 0, 2, 4, 6, the other the rest.
# $8 is 4·lane; the register %laneid would be read anew, slowly, each time.
EXCHANGE = gl.constexpr(
    "{ .reg .pred odd; .reg .b32 lane, give0, give1, keep0, keep1; "
    "and.b32 lane, $8, 4; setp.ne.u32 odd, lane, 0; "
    "selp.b32 give0, $4, $5, odd; selp.b32 give1, $6, $7, odd; "
    "selp.b32 keep0, $5, $4, odd; selp.b32 keep1, $7, $6, odd; "
    "shfl.sync.bfly.b32 give0, give0, 1, 31, -1; shfl.sync.bfly.b32 give1, give1, 1, 31, -1; "
    "selp.b32 $0, give0, keep0, odd; selp.b32 $1, give1, keep1, odd; "
    "selp.b32 $2, keep0, give0, odd; selp.b32 $3, keep1, give1, odd; }"
)
EXCHANGED = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r")

# The first word of places, once the first word of each of eight pieces is there.
ARRIVED = gl.constexpr(
    "{ .reg .b32 all; or.b32 all, $8, $12; or.b32 all, all, $16; or.b32 all, all, $20; or.b32 all, all, $24; "
    "or.b32 all, all, $28; or.b32 all, all, $32; or.b32 all, all, $36; and.b32 all, all, $40; or.b32 $0, $4, all; "
    "mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }"
)
WAITING = gl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 40)


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
def eight(at, STRIDE: gl.constexpr):
    """Eight pieces of the weight. They are read once, and stay out of the L1 cache, which is for x."""
    return (gl.load(at, cache_modifier=".cg"), gl.load(at + STRIDE, cache_modifier=".cg"),
            gl.load(at + 2 * STRIDE, cache_modifier=".cg"), gl.load(at + 3 * STRIDE, cache_modifier=".cg"),
            gl.load(at + 4 * STRIDE, cache_modifier=".cg"), gl.load(at + 5 * STRIDE, cache_modifier=".cg"),
            gl.load(at + 6 * STRIDE, cache_modifier=".cg"), gl.load(at + 7 * STRIDE, cache_modifier=".cg"))  # fmt: skip


@gluon.jit
def eight_of(at, inside, STRIDE: gl.constexpr):
    """Eight pieces of x, zero for tokens that are not there."""
    return (gl.load(at, mask=inside, other=0), gl.load(at + STRIDE, mask=inside, other=0),
            gl.load(at + 2 * STRIDE, mask=inside, other=0), gl.load(at + 3 * STRIDE, mask=inside, other=0),
            gl.load(at + 4 * STRIDE, mask=inside, other=0), gl.load(at + 5 * STRIDE, mask=inside, other=0),
            gl.load(at + 6 * STRIDE, mask=inside, other=0), gl.load(at + 7 * STRIDE, mask=inside, other=0))  # fmt: skip


@gluon.jit
def arrived(e, a, nothing):
    """The places e, once the eight pieces a are there, too. To spare registers ptxas would load each piece just before
    its use, and a warp wait for memory eight times instead of once; it does not know that `nothing` is 0."""
    return gl.inline_asm_elementwise(
        ARRIVED, WAITING, [e, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], nothing], gl.int32, True, 4
    )


@gluon.jit
def exchanged(x, place):
    """x of one step of 32 inputs, as it lies in memory -> as the instruction wants it."""
    return gl.inline_asm_elementwise(EXCHANGE, EXCHANGED, [x, place], gl.int32, True, 4)


@gluon.jit
def store_decoded(
    acc, bias_ptr, y_ptr, first, tokens, neurons, BR: gl.constexpr, BT: gl.constexpr, layout: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    block, group, place = along(BR, 1, layout), along(BT, 2, layout), along(128, 3, layout)
    lane, register = place // 4, place % 4
    y = gl.expand_dims(gl.sum(acc, 0), 0)  # over warps
    token = group * 8 + lane % 4 * 2 + register % 2
    neuron = (first + block) * 16 + lane // 4 + register // 2 * 8
    if HAS_BIAS:
        y += gl.load(bias_ptr + neuron).to(gl.float32)
    gl.store(y_ptr + token * neurons + neuron, y.to(y_ptr.dtype.element_ty), mask=token < tokens)


@gluon.jit(do_not_specialize=["tokens", "nothing"])
def decode_kernel(
    kept_ptr, places_ptr, x_ptr, bias_ptr, y_ptr, tokens, neurons, inputs, nothing,
    BR: gl.constexpr, BT: gl.constexpr, BW: gl.constexpr, X_TOO: gl.constexpr, EVEN: gl.constexpr,
    STEPS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """y[t, i] = Σ_k w[i, k] · x[t, k] + bias[i]; x [T, I] as int32, two numbers each. I is a multiple of 256.

    One program: 16·BR neurons, tokens <= 8·BT. Warp w takes the chunks w, w + BW, ... of the inputs; where they are not
    EVEN, a warp without one in the last round computes the last chunk of all, and drops it. X_TOO: pieces of x are
    loaded together, too, which takes more registers. `nothing` is 0, see `arrived`.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, BR, BT, 4], [1, 1, 1, 32], [BW, 1, 1, 1], [3, 2, 1, 0])
    warp, block, group, place = along(BW, 0, layout), along(BR, 1, layout), along(BT, 2, layout), along(128, 3, layout)
    first = gl.program_id(0) * BR
    chunks = inputs // 256
    kept_ptr += (first + block).to(gl.int64) * (chunks * 1024) + place
    places_ptr += (first + block) * (chunks * 128) + place
    token = group * 8 + place // 16
    x_ptr += token * (inputs // 2) + place % 16
    inside = token < tokens
    acc = gl.zeros([BW, BR, BT, 128], gl.float32, layout=layout)
    for start in range(0, chunks, BW):
        chunk = start + warp if EVEN else gl.minimum(start + warp, chunks - 1)
        x_at = x_ptr + chunk * 128
        e = gl.load(places_ptr + chunk * 128, cache_modifier=".cg")
        a = eight(kept_ptr + chunk * 1024, 128)
        made = acc
        if X_TOO:
            b = eight_of(x_at, inside, 16)
            e = arrived(arrived(e, a, nothing), b, nothing)
            for s in gl.static_range(8):
                b_s = exchanged(b[s], place)
                made = gl.inline_asm_elementwise(STEPS[s], OPERANDS, [a[s], b_s, made, e], gl.float32, True, 4)
        else:
            e = arrived(e, a, nothing)
            for s in gl.static_range(8):
                b_s = exchanged(gl.load(x_at + s * 16, mask=inside, other=0), place)
                made = gl.inline_asm_elementwise(STEPS[s], OPERANDS, [a[s], b_s, made, e], gl.float32, True, 4)
        acc = made if EVEN else gl.where(start + warp < chunks, made, acc)
    store_decoded(acc, bias_ptr, y_ptr, first, tokens, neurons, BR, BT, layout, HAS_BIAS)


@gluon.jit
def copy_chunk(kept_at, places_at, x_at, inside, kept_s, places_s, x_s, chunk, stage, wanted):
    """Start the copies of a chunk of every warp into a stage of shared memory, if wanted; one group of copies."""
    if wanted:
        async_copy.async_copy_global_to_shared(places_s.index(stage), places_at + chunk * 128)
        async_copy.async_copy_global_to_shared(kept_s.index(stage), kept_at + chunk * 1024)
        async_copy.async_copy_global_to_shared(x_s.index(stage), x_at + chunk * 128, mask=inside)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["tokens"])
def staged_decode_kernel(
    kept_ptr, places_ptr, x_ptr, bias_ptr, y_ptr, tokens, neurons, inputs,
    BR: gl.constexpr, BT: gl.constexpr, BW: gl.constexpr, RW: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
    STEPS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """`decode_kernel` by BW·RW warps: RW of them share the BR blocks, and what is copied of x. Asynchronous copies into
    STAGES buffers keep STAGES - 1 rounds of chunks on their way, without registers."""
    layout: gl.constexpr = gl.BlockedLayout([1, BR // RW, BT, 4], [1, 1, 1, 32], [BW, RW, 1, 1], [3, 2, 1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    warp, block, group = along(BW, 0, layout), along(BR, 1, layout), along(BT, 2, layout)
    place, wide = along(128, 3, layout), along(1024, 3, layout)
    first = gl.program_id(0) * BR
    chunks = inputs // 256
    kept_at = kept_ptr + (first + block).to(gl.int64) * (chunks * 1024) + wide
    places_at = places_ptr + (first + block) * (chunks * 128) + place
    token = group * 8 + wide // 16 % 8
    x_at = x_ptr + token * (inputs // 2) + (wide // 128 * 16 + wide % 16)
    inside = token < tokens
    kept_s = gl.allocate_shared_memory(gl.int32, [STAGES, BW, BR, 1, 1024], plain)
    places_s = gl.allocate_shared_memory(gl.int32, [STAGES, BW, BR, 1, 128], plain)
    x_s = gl.allocate_shared_memory(gl.int32, [STAGES, BW, 1, BT, 1024], plain)
    rounds = gl.cdiv(chunks, BW)
    for early in gl.static_range(STAGES - 1):
        chunk = early * BW + warp if EVEN else gl.minimum(early * BW + warp, chunks - 1)
        copy_chunk(kept_at, places_at, x_at, inside, kept_s, places_s, x_s, chunk, early, early < rounds)
    acc = gl.zeros([BW, BR, BT, 128], gl.float32, layout=layout)
    for i in range(0, rounds):
        async_copy.wait_group(STAGES - 2)  # Gluon puts barriers where threads read what others copied
        ahead = i + STAGES - 1
        chunk = ahead * BW + warp if EVEN else gl.minimum(ahead * BW + warp, chunks - 1)
        copy_chunk(kept_at, places_at, x_at, inside, kept_s, places_s, x_s, chunk, ahead % STAGES, ahead < rounds)
        e = places_s.index(i % STAGES).load(layout)
        made = acc
        for s in gl.static_range(8):
            a = kept_s.index(i % STAGES).slice(s * 128, 128, dim=3).load(layout)
            b = exchanged(x_s.index(i % STAGES).slice(s * 128, 128, dim=3).load(layout), place)
            made = gl.inline_asm_elementwise(STEPS[s], OPERANDS, [a, b, made, e], gl.float32, True, 4)
        acc = made if EVEN else gl.where(i * BW + warp < chunks, made, acc)
    store_decoded(acc, bias_ptr, y_ptr, first, tokens, neurons, BR, BT, layout, HAS_BIAS)
