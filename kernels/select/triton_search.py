"""Triton kernels that find thresholds of all layers at once. Called through `launch.py`, which knows what must hold.

A layer is a segment: a row of a table of addresses. A program sees `STEPS` blocks of one segment. The key of a score x
is the bits of |x| as float32, an integer that orders as |x| does (without its LOW bits, which 16-bit dtypes leave at
zero).

The k-th highest key of each segment, the threshold, is searched for so that a layer is read once for it:

1. A window around it is guessed from a sample.
2. One pass over the layer (`triton_kernels.py`) counts the keys above the window, and packs those in it, some 1 %, into
   a buffer. It also marks each weight as above, in or below the window, so that later passes read only the scores of
   those in it.
3. The packed keys are counted in BINS bins of 2^shift keys, then those of the bin that holds the k-th, and so on.

Where the threshold is not in the window, or a program's part of the buffer is too short, keys are read from the layer
again: that costs passes, never the result. All counts are integers: the order of atomics does not matter. The buffer
lies where the inactive masks will lie, whose bytes are not yet used: a program's part holds a quarter of its keys, and
each thread (lane) has a column of it, so that packing needs no word between threads; the order of keys does not matter.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

# Columns of the table, int64 [segments, ROW]: addresses, then numbers.
ROW = tl.constexpr(20)
WEIGHT, GRAD, MASK, GROWN, FIRED = (tl.constexpr(i) for i in range(5))
STATE = tl.constexpr(5)  # up to three
NEW, INACTIVE, NEW_GROWN, NEW_FIRED = (tl.constexpr(i) for i in range(8, 12))
SIZE, INNER, CHANNELS, FIRST = (tl.constexpr(i) for i in range(12, 16))
K = tl.constexpr(16)  # how many to select, and of how many; the same for growth in the next two

# Columns of a search, int32 [segments, SEARCH]. HOT and HEAT have two: the ends of the window, which are frequent where
# many scores are equal, and how many keys equal them; these are never packed.
SEARCH = tl.constexpr(16)
LO, SHIFT, DONE, END, MISSING, TIES, SURE, PACKED, BASE = (tl.constexpr(i) for i in range(9))
HOT, HEAT = tl.constexpr(9), tl.constexpr(11)

BITS = tl.constexpr(8)
BINS = tl.constexpr(2**8)
# Columns of the counts, int32 [segments, COUNTS], behind the bins.
ABOVE, NAN, HOT_KEYS, FOUND, TOO_MANY = (tl.constexpr(2**8 + i) for i in (0, 1, 2, 4, 5))  # HOT_KEYS has two
COUNTS = tl.constexpr(2**8 + 8)
# Columns of the tallies, int32 [programs, TALLY]: most keys that a lane packed, keys equal to the two hot ones.
TALLY = tl.constexpr(4)
TOP = tl.constexpr(2**31 - 1)  # above every key
INFINITY = tl.constexpr(0x7F800000)
GUARD = tl.constexpr(4.0)  # standard deviations of the sampled rank

# Marks, which lie in the new mask until it is written; 0 = inactive. OPEN: in the window of the drop. For growth,
# CHOSEN or UNDECIDED is added.
DROPPED, KEPT, OPEN = (tl.constexpr(i) for i in (1, 2, 3))
CHOSEN, UNDECIDED = tl.constexpr(4), tl.constexpr(8)


@triton.jit
def pointer(row_ptr, column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def size_of(row_ptr, ALIGNED: tl.constexpr):
    n = tl.load(row_ptr + SIZE).to(tl.int32)
    return tl.multiple_of(n, 16) if ALIGNED else n


@triton.jit
def place(row_ptr, at, STRIDED: tl.constexpr):
    """Where the weights of these flat indices lie: [out, channels, inner] in memory is [out, inner, channels]."""
    if STRIDED:
        inner = tl.load(row_ptr + INNER).to(tl.int32)
        channels = tl.load(row_ptr + CHANNELS).to(tl.int32)
        rest = at % (inner * channels)
        at = at - rest + rest % inner * channels + rest // inner
    return at


@triton.jit
def key_of(x, LOW: tl.constexpr):
    if LOW == 16:  # bfloat16: the upper half of a float32's bits
        return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return (x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> LOW


@triton.jit
def growable(mark, EXCLUDE: tl.constexpr):
    """Which weights may grow: those not kept."""
    return ((mark & 3) == 0) if EXCLUDE else ((mark & 3) != KEPT)


@triton.jit
def candidates(
    row_ptr, where, inside, GROW: tl.constexpr, EXCLUDE: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """(which of these may be chosen, their keys): active weights by |w|, or (GROW) those not kept by |g|."""
    if GROW:
        mark = tl.load(pointer(row_ptr, NEW, tl.int8, ALIGNED) + where, mask=inside, other=KEPT)
        may = inside & growable(mark, EXCLUDE)
        x = tl.load(pointer(row_ptr, GRAD, W, ALIGNED) + where, mask=inside, other=0.0)
    else:
        may = tl.load(pointer(row_ptr, MASK, tl.int8, ALIGNED) + where, mask=inside, other=0) != 0
        x = tl.load(pointer(row_ptr, WEIGHT, W, ALIGNED) + where, mask=inside, other=0.0)
    return may, key_of(x, LOW)


@triton.jit
def key_of_rank(keys, rank):
    """The rank-th highest of the keys; 0 where there are fewer."""
    found = tl.zeros((), tl.int32)
    for i in range(31):
        trial = found | (1 << (30 - i))
        found = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= rank, trial, found)
    return found


@triton.jit
def guess_kernel(
    table_ptr, search_ptr, dropped_ptr, GROW: tl.constexpr, EXCLUDE: tl.constexpr, W: tl.constexpr,
    LOW: tl.constexpr, STRIDED: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """One program: the window of one segment, from SAMPLE places spread over it with a stagger; `dropped`: the search
    for what to drop, by which (GROW) weights are kept here, without regard to ties."""
    row_ptr = table_ptr + tl.program_id(0) * ROW
    search_ptr += tl.program_id(0) * SEARCH
    n = tl.load(row_ptr + SIZE)
    i = tl.arange(0, SAMPLE)
    stagger = ((i * 40503) & 0xFFFF).to(tl.int64)
    at = i.to(tl.int64) * n // SAMPLE + stagger * (n // SAMPLE) // 65536
    where = place(row_ptr, at.to(tl.int32), STRIDED)
    may, keys = candidates(row_ptr, where, at < n, False, False, W, LOW, False)
    if GROW:
        if not EXCLUDE:
            may &= keys >= tl.load(dropped_ptr + tl.program_id(0) * SEARCH + LO)
        may = (may == 0) & (at < n)
        keys = key_of(tl.load(pointer(row_ptr, GRAD, W, False) + where, mask=at < n, other=0.0), LOW)
    keys = tl.where(may, keys, -1)
    valid = tl.sum(may.to(tl.int32), 0).to(tl.float32)
    column: tl.constexpr = 2 if GROW else 0
    k, total = tl.load(row_ptr + K + column), tl.load(row_ptr + K + column + 1)
    rank = k.to(tl.float32) / tl.maximum(total, 1).to(tl.float32) * valid
    margin = GUARD * tl.sqrt(rank * tl.maximum(1 - rank / tl.maximum(valid, 1.0), 0.0) + 1) + 1
    high = key_of_rank(keys, tl.maximum(rank - margin, 1.0).to(tl.int32))
    low = tl.minimum(key_of_rank(keys, (rank + margin).to(tl.int32) + 1), high)
    unbounded = rank - margin < 1
    end = tl.where(unbounded, TOP >> LOW, high)
    shift = tl.zeros((), tl.int32)
    for _ in range(31 - BITS):
        shift += (((end - low) >> shift) >= BINS).to(tl.int32)
    tl.store(search_ptr + LO, low)
    tl.store(search_ptr + SHIFT, shift)
    tl.store(search_ptr + END, end)
    tl.store(search_ptr + HOT, low)
    tl.store(search_ptr + HOT + 1, tl.where(unbounded | (high == low), -1, high))


@triton.jit
def packed_part(row_ptr, program, ALIGNED: tl.constexpr, SPAN: tl.constexpr):
    """Where the packed keys lie of a segment's program, or of several; SPAN: weights of a program."""
    return pointer(row_ptr, INACTIVE, tl.int32, ALIGNED) + program * (SPAN // 4)


@triton.jit
def judge_kernel(table_ptr, search_ptr, counts_ptr, bad_ptr, GROW: tl.constexpr, LOW: tl.constexpr):
    """One program: what a segment's pass found. SURE: the threshold is in the window; PACKED: it is found from the
    packed keys, above which there are BASE. Adds to `bad` for NaN."""
    row_ptr = table_ptr + tl.program_id(0) * ROW
    search_ptr += tl.program_id(0) * SEARCH
    counts_ptr += tl.program_id(0) * COUNTS
    column: tl.constexpr = 2 if GROW else 0
    k = tl.load(row_ptr + K + column).to(tl.int32)
    above = tl.load(counts_ptr + ABOVE)
    first, second = tl.load(counts_ptr + HOT_KEYS), tl.load(counts_ptr + HOT_KEYS + 1)
    sure = (above < k) & (k <= above + first + second + tl.load(counts_ptr + FOUND))
    packed = sure & (tl.load(counts_ptr + TOO_MANY) == 0)
    nothing = k <= 0
    lo, shift = tl.load(search_ptr + LO), tl.load(search_ptr + SHIFT)
    tl.store(search_ptr + LO, tl.where(nothing, TOP, tl.where(sure, lo, 0)))
    tl.store(search_ptr + SHIFT, tl.where(sure, shift, 31 - BITS - LOW))
    tl.store(search_ptr + DONE, nothing.to(tl.int32))
    tl.store(search_ptr + MISSING, 0)
    tl.store(search_ptr + TIES, 0)
    tl.store(search_ptr + SURE, sure.to(tl.int32))
    tl.store(search_ptr + PACKED, packed.to(tl.int32))
    tl.store(search_ptr + BASE, tl.where(packed, above, 0))
    tl.store(search_ptr + HEAT, first)
    tl.store(search_ptr + HEAT + 1, second)
    tl.atomic_add(bad_ptr, (tl.load(counts_ptr + NAN) > 0).to(tl.int32), sem="relaxed")
    tl.store(counts_ptr + BINS + tl.arange(0, 8), tl.zeros((8,), tl.int32))


@triton.jit
def packed_keys(
    row_ptr, lengths_ptr, program, i, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(which of a tile of a program's part are keys, the keys). The part is [keys of a lane, LANES]."""
    slot = tl.arange(0, TILE)
    length = tl.load(lengths_ptr + (tl.load(row_ptr + FIRST) + program) * LANES + slot % LANES)
    inside = i * (TILE // LANES) + slot // LANES < length
    part = packed_part(row_ptr, program, ALIGNED, BLOCK * STEPS) + i * TILE
    return inside, tl.load(part + slot, mask=inside, other=0)


@triton.jit
def tiles_of(row_ptr, tallies_ptr, program, LANES: tl.constexpr, TILE: tl.constexpr):
    longest = tl.load(tallies_ptr + (tl.load(row_ptr + FIRST) + program) * TALLY)
    return tl.cdiv(longest, TILE // LANES)


@triton.jit
def count_kernel(
    table_ptr, groups_ptr, search_ptr, counts_ptr, tallies_ptr, lengths_ptr, GROW: tl.constexpr, EXCLUDE: tl.constexpr,
    W: tl.constexpr, LOW: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Adds to each segment's counts: keys in each bin, and above all bins, without the hot ones. One program for the
    part of GROUP others. MANY: most packed keys are in some bin, so that atomics would wait for each other."""
    segment = tl.load(groups_ptr + 2 * tl.program_id(0))
    group = tl.load(groups_ptr + 2 * tl.program_id(0) + 1)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    counts_ptr += segment * COUNTS
    if tl.load(search_ptr + DONE) == 0:
        lo, shift = tl.load(search_ptr + LO), tl.load(search_ptr + SHIFT)
        n = size_of(row_ptr, ALIGNED)
        bins = tl.arange(0, BINS)
        in_bin = tl.zeros((BINS,), tl.int32)
        if tl.load(search_ptr + PACKED) != 0:
            above = tl.zeros((TILE,), tl.int32)
            for program in range(group * GROUP, tl.minimum((group + 1) * GROUP, tl.cdiv(n, BLOCK * STEPS))):
                for i in range(tiles_of(row_ptr, tallies_ptr, program, LANES, TILE)):
                    inside, key = packed_keys(row_ptr, lengths_ptr, program, i, ALIGNED, BLOCK, STEPS, LANES, TILE)
                    number = (key - lo) >> shift
                    above += (inside & (number >= BINS)).to(tl.int32)
                    within = inside & (number >= 0) & (number < BINS)
                    if MANY:
                        in_bin += tl.histogram(tl.where(within, number, 0), BINS, mask=within)
                    else:
                        tl.atomic_add(counts_ptr + number, tl.full((TILE,), 1, tl.int32), mask=within, sem="relaxed")
            tl.atomic_add(counts_ptr + ABOVE, tl.sum(above, 0), sem="relaxed")
        else:
            hot, hotter = tl.load(search_ptr + HOT), tl.load(search_ptr + HOT + 1)
            start = group * (BLOCK * STEPS * GROUP)
            higher = tl.zeros((BLOCK,), tl.int32)
            for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS * GROUP), BLOCK)):
                at = start + tl.arange(0, BLOCK)
                may, key = candidates(row_ptr, place(row_ptr, at, STRIDED), at < n, GROW, EXCLUDE, W, LOW, ALIGNED)
                cold = may & (key != hot) & (key != hotter)
                number = (key - lo) >> shift  # negative below the interval
                higher += (cold & (number >= BINS)).to(tl.int32)
                within = cold & (number >= 0) & (number < BINS)
                in_bin += tl.histogram(tl.where(within, number, 0), BINS, mask=within)
                start += BLOCK
            tl.atomic_add(counts_ptr + ABOVE, tl.sum(higher, 0), sem="relaxed")
        tl.atomic_add(counts_ptr + bins, in_bin, mask=in_bin > 0, sem="relaxed")


@triton.jit
def narrow_kernel(
    table_ptr, search_ptr, counts_ptr, bad_ptr, GROW: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """One program: the next interval of one segment, or its end: LO the k-th highest key, TIES equal to it, of which
    the first MISSING are chosen. Clears the counts. Adds to `bad` for (LAST) a search without an end."""
    row_ptr = table_ptr + tl.program_id(0) * ROW
    search_ptr += tl.program_id(0) * SEARCH
    counts_ptr += tl.program_id(0) * COUNTS
    column: tl.constexpr = 2 if GROW else 0
    if tl.load(search_ptr + DONE) == 0:
        k = tl.load(row_ptr + K + column).to(tl.int32)
        lo, shift = tl.load(search_ptr + LO), tl.load(search_ptr + SHIFT)
        numbers = tl.arange(0, BINS)
        in_bin = tl.load(counts_ptr + numbers)
        above = tl.load(search_ptr + BASE) + tl.load(counts_ptr + ABOVE)
        for i in tl.static_range(2):
            number, heat = (tl.load(search_ptr + HOT + i) - lo) >> shift, tl.load(search_ptr + HEAT + i)
            in_bin += tl.where(numbers == number, heat, 0)
            above += tl.where(number >= BINS, heat, 0)
        from_bin = above + tl.cumsum(in_bin, 0, reverse=True)
        found = tl.sum((from_bin >= k).to(tl.int32), 0) - 1  # the highest bin from which there are k
        here = tl.sum(tl.where(numbers == found, in_bin, 0), 0)
        higher = tl.sum(tl.where(numbers == found, from_bin, 0), 0) - here
        inside = (found >= 0) & (above < k)
        done = inside & (shift == 0)
        tl.store(search_ptr + LO, tl.where(inside, lo + (found << shift), lo))
        tl.store(search_ptr + SHIFT, tl.maximum(shift - BITS, 0))
        tl.store(search_ptr + DONE, done.to(tl.int32))
        tl.store(search_ptr + MISSING, k - higher)
        tl.store(search_ptr + TIES, here)
        if LAST:
            tl.atomic_add(bad_ptr, (done == 0).to(tl.int32), sem="relaxed")
        tl.store(counts_ptr + numbers, tl.zeros((BINS,), tl.int32))
        tl.store(counts_ptr + BINS + tl.arange(0, 8), tl.zeros((8,), tl.int32))


@triton.jit
def ties_kernel(
    table_ptr, groups_ptr, search_ptr, tallies_ptr, lengths_ptr, ties_ptr, GROW: tl.constexpr, EXCLUDE: tl.constexpr,
    W: tl.constexpr, LOW: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """ties[program] = keys equal to the threshold, of segments that choose some of them but not all; else 0. One
    program for the part of GROUP others."""
    segment = tl.load(groups_ptr + 2 * tl.program_id(0))
    group = tl.load(groups_ptr + 2 * tl.program_id(0) + 1)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    n = size_of(row_ptr, ALIGNED)
    first = tl.load(row_ptr + FIRST)
    threshold = tl.load(search_ptr + LO)
    partial = tl.load(search_ptr + MISSING) < tl.load(search_ptr + TIES)
    first_end, second_end = threshold == tl.load(search_ptr + HOT), threshold == tl.load(search_ptr + HOT + 1)
    if partial & (first_end == 0) & (second_end == 0):
        packed = tl.load(search_ptr + PACKED) != 0
        for program in range(group * GROUP, tl.minimum((group + 1) * GROUP, tl.cdiv(n, BLOCK * STEPS))):
            if packed:
                seen = tl.zeros((TILE,), tl.int32)
                for i in range(tiles_of(row_ptr, tallies_ptr, program, LANES, TILE)):
                    inside, key = packed_keys(row_ptr, lengths_ptr, program, i, ALIGNED, BLOCK, STEPS, LANES, TILE)
                    seen += (inside & (key == threshold)).to(tl.int32)
                tl.store(ties_ptr + first + program, tl.sum(seen, 0))
            else:
                start = program * (BLOCK * STEPS)
                equal = tl.zeros((BLOCK,), tl.int32)
                for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
                    at = start + tl.arange(0, BLOCK)
                    may, key = candidates(row_ptr, place(row_ptr, at, STRIDED), at < n, GROW, EXCLUDE, W, LOW, ALIGNED)
                    equal += (may & (key == threshold)).to(tl.int32)
                    start += BLOCK
                tl.store(ties_ptr + first + program, tl.sum(equal, 0))
    else:
        programs = group * GROUP + tl.arange(0, GROUP)
        real = programs < tl.cdiv(n, BLOCK * STEPS)
        counted = tallies_ptr + (first + programs) * TALLY + tl.where(first_end, 1, 2)
        tl.store(ties_ptr + first + programs, tl.load(counted, mask=real & partial, other=0), mask=real)
