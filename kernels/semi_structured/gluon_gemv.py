"""A product of n:m weights with one token, without gathers.

`triton_kernels.gemv_kernel` asks the L1 cache for the input of every weight, which takes longer than the weights take
from memory. Here a thread holds all inputs of a cell of 8 kept weights in registers, uses them for BN neurons, and
chooses among them by the bits of the places. Values, places and inputs are read in pieces as large as they come; the
inputs through shared memory, since a warp that loaded them for its cells would ask for 32 lines of the cache at a time.

Legend: C cells that a program takes at a time, one for each thread; G groups of m inputs in a cell; BN neurons of one
program, all of them of every thread; BW warps.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

PERMUTE = gl.constexpr("prmt.b32 $0, $1, $2, $3;")  # byte b of $0 is that of $2:$1 named by 4 bits of $3


@gluon.jit
def pairs_of(words):
    """Even and odd ones of [1 or BN, C, G, 2·S]."""
    rows: gl.constexpr = words.shape[0]
    pairs: gl.constexpr = words.shape[3] // 2
    return gl.split(gl.reshape(words, [rows, words.shape[1], words.shape[2], pairs, 2]))


@gluon.jit
def chosen(words, place, BIT: gl.constexpr, layout: gl.constexpr):
    """Of every two neighbours of [BN, C, G, 2·S] the first or, where a bit of [BN, C, G] is set, the second; `layout`
    is that of [BN, C, G, S]."""
    even, odd = pairs_of(words)
    second = gl.expand_dims(gl.convert_layout(place & BIT, gl.SliceLayout(3, layout)), 3) != 0
    return gl.where(second, gl.convert_layout(odd, layout), gl.convert_layout(even, layout))


@gluon.jit
def inputs_at(
    words, bits, shift, m: gl.constexpr, BN: gl.constexpr, BW: gl.constexpr, G: gl.constexpr, DTYPE: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """The inputs at the places `bits >> shift` [BN, C, G] of their groups [1, C, G, m / 2], of which a word has two; as
    float32.

    One instruction takes one of the four inputs of two words, by the numbers of its bytes; the upper half of what it
    makes is of no use. The numbers for the places of four bytes of `bits` are made together. Among the fours of a group
    bits of the places choose.
    """
    four: gl.constexpr = gl.BlockedLayout([BN, 1, G, 4], [1, 32, 1, 1], [1, BW, 1, 1], [3, 2, 1, 0])
    two: gl.constexpr = gl.BlockedLayout([BN, 1, G, 2], [1, 32, 1, 1], [1, BW, 1, 1], [3, 2, 1, 0])
    one: gl.constexpr = gl.BlockedLayout([BN, 1, G, 1], [1, 32, 1, 1], [1, BW, 1, 1], [3, 2, 1, 0])
    fours: gl.constexpr = four if m == 16 else two if m == 8 else one
    even, odd = pairs_of(words)
    taken = (((bits >> shift % 8) & 0x03030303) * 0x22 + 0x10101010) >> shift // 8 * 8
    taken = gl.expand_dims(gl.convert_layout(taken, gl.SliceLayout(3, fours)), 3)
    place = bits >> shift
    word = gl.inline_asm_elementwise(
        PERMUTE, "=r,r,r,r", [gl.convert_layout(even, fours), gl.convert_layout(odd, fours), taken], gl.int32, True, 1
    )
    if m == 16:
        word = chosen(word, place, 4, two)
    if m > 4:
        word = chosen(word, place, m // 2, one)
    word = gl.convert_layout(gl.reshape(word, [BN, 32 * BW, G]), layout)
    return word.to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)


@gluon.jit
def gemv_kernel(
    x_ptr, values_ptr, places_ptr, bias_ptr, y_ptr, neurons, cells,
    n: gl.constexpr, m: gl.constexpr, PLACE_BITS: gl.constexpr, BN: gl.constexpr, BW: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """y[i] = Σ_k values[i, k] · x[column of k] + bias[i], n 1 or 2, m 4, 8 or 16, numbers of 2 bytes.

    x as int32, two inputs each; places as integers with the 8 places of a cell, of which a row has `cells`.
    """
    C: gl.constexpr = 32 * BW
    G: gl.constexpr = 8 // n
    WORDS: gl.constexpr = 4 * m // n  # of x in a cell
    DTYPE: gl.constexpr = values_ptr.dtype.element_ty
    layout: gl.constexpr = gl.BlockedLayout([BN, 1, G], [1, 32, 1], [1, BW, 1], [2, 1, 0])
    wide: gl.constexpr = gl.BlockedLayout([BN, 1, 8], [1, 32, 1], [1, BW, 1], [2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(2, wide)
    piece: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [BW, 1], [1, 0])
    VECS: gl.constexpr = WORDS // 4  # pieces of 16 bytes
    LINE: gl.constexpr = 8 // VECS if VECS < 8 else 1  # cells in 128 bytes
    read: gl.constexpr = gl.BlockedLayout([1, 4], [32 // VECS, VECS], [BW, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, LINE, 8 // LINE, [1, 0])
    row = gl.program_id(0) * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, flat))
    cell = gl.arange(0, C, layout=gl.SliceLayout(0, flat))
    x_cell = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(1, read)), 1)
    word = gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, read)), 0)
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, wide)))
    group = gl.arange(0, G, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    shift = gl.expand_dims(gl.expand_dims(group, 0), 1) * (n * PLACE_BITS)
    inside = gl.expand_dims(row < neurons, 1)
    at = gl.expand_dims(row.to(gl.int64), 1) * cells + gl.expand_dims(cell, 0)  # [BN, C]
    x_at = x_ptr + x_cell * WORDS + word
    x_s = gl.allocate_shared_memory(gl.int32, [C, WORDS], swizzled)
    acc = gl.zeros([BN, C], gl.float32, layout=gl.SliceLayout(2, layout))
    for start in range(0, cells, C):
        here = inside & gl.expand_dims(start + cell < cells, 0)
        w_at = values_ptr + gl.expand_dims((at + start) * 8, 2) + gl.expand_dims(gl.expand_dims(eight, 0), 1)
        w = gl.load(w_at, mask=gl.expand_dims(here, 2), other=0.0)
        bits = gl.load(places_ptr + (at + start), mask=here, other=0).to(gl.int32)
        # Neighbouring lanes read neighbouring pieces, and find the cells again without conflicts of banks.
        x_s.store(gl.load(x_at + start * WORDS, mask=start + x_cell < cells, other=0))
        x = gl.reshape(x_s.load(piece), [1, C, G, m // 2])
        bits = gl.expand_dims(gl.convert_layout(bits, gl.SliceLayout(2, layout)), 2)
        if n == 1:
            chosen_x = inputs_at(x, bits, shift, m, BN, BW, G, DTYPE, layout)
            made = gl.convert_layout(w, layout).to(gl.float32) * chosen_x
        else:
            first, second = gl.split(gl.reshape(w, [BN, C, G, 2]))
            chosen_x = inputs_at(x, bits, shift, m, BN, BW, G, DTYPE, layout)
            made = gl.convert_layout(first, layout).to(gl.float32) * chosen_x
            chosen_x = inputs_at(x, bits, shift + PLACE_BITS, m, BN, BW, G, DTYPE, layout)
            made += gl.convert_layout(second, layout).to(gl.float32) * chosen_x
        acc += gl.sum(made, 2)
    y = gl.sum(acc, 1)
    row = gl.program_id(0) * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    if HAS_BIAS:
        y += gl.load(bias_ptr + row, mask=row < neurons, other=0.0).to(gl.float32)
    gl.store(y_ptr + row, y.to(DTYPE), mask=row < neurons)
