"""Triton kernels for drop and grow over all layers at once. Called through `launch.py`, which knows what must hold.

A layer is a segment: a row of a table of addresses. A program sees `STEPS` blocks of one segment. The key of a score x
is the bits of |x| as float32, an integer that orders as |x| does (without its LOW bits, which 16-bit dtypes leave at
zero).

The k-th highest key of each segment is searched for in an interval of BINS bins of 2^shift keys: count the keys above
it and in each bin, go on in the bin that holds the k-th. The first interval is guessed from a sample, so that few keys
fall into it; a wrong guess costs a pass over all keys, never the result. All counts are integers: the order of atomics
does not matter.
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

# Columns of a search, int32 [segments, SEARCH].
SEARCH = tl.constexpr(8)
LO, SHIFT, DONE, HOT, MISSING, TIES = (tl.constexpr(i) for i in (0, 1, 2, 3, 5, 6))  # HOT has two columns

BITS = tl.constexpr(11)
BINS = tl.constexpr(2**11)
ABOVE, NAN, HEAT = (tl.constexpr(i) for i in (2**11, 2**11 + 1, 2**11 + 2))  # behind the bins; HEAT has two columns
COUNTS = tl.constexpr(2**11 + 4)
TOP = tl.constexpr(2**31 - 1)  # above every key
INFINITY = tl.constexpr(0x7F800000)
GUARD = tl.constexpr(4.0)  # standard deviations of the sampled rank

DROPPED, KEPT = tl.constexpr(2), tl.constexpr(1)  # marks, which lie in the new mask until it is written; 0 = inactive


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
    return (x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> LOW


@triton.jit
def candidates(
    row_ptr, where, inside, GROW: tl.constexpr, EXCLUDE: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """(which of these may be chosen, their keys): active weights by |w|, or (GROW) those not kept by |g|."""
    if GROW:
        mark = tl.load(pointer(row_ptr, NEW, tl.int8, ALIGNED) + where, mask=inside, other=1)
        may = (mark == 0) if EXCLUDE else (mark != KEPT)
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
    table_ptr, search_ptr, GROW: tl.constexpr, EXCLUDE: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr,
    STRIDED: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """One program: the first interval of one segment, from SAMPLE places spread over it with a stagger."""
    row_ptr = table_ptr + tl.program_id(0) * ROW
    search_ptr += tl.program_id(0) * SEARCH
    n = tl.load(row_ptr + SIZE)
    i = tl.arange(0, SAMPLE)
    stagger = ((i * 40503) & 0xFFFF).to(tl.int64)
    at = i.to(tl.int64) * n // SAMPLE + stagger * (n // SAMPLE) // 65536
    may, keys = candidates(row_ptr, place(row_ptr, at.to(tl.int32), STRIDED), at < n, GROW, EXCLUDE, W, LOW, False)
    keys = tl.where(may, keys, -1)
    valid = tl.sum(may.to(tl.int32), 0).to(tl.float32)
    column: tl.constexpr = 2 if GROW else 0
    k, total = tl.load(row_ptr + K + column), tl.load(row_ptr + K + column + 1)
    rank = k.to(tl.float32) / tl.maximum(total, 1).to(tl.float32) * valid
    margin = GUARD * tl.sqrt(rank * tl.maximum(1 - rank / tl.maximum(valid, 1.0), 0.0) + 1) + 1
    high = key_of_rank(keys, tl.maximum(rank - margin, 1.0).to(tl.int32))
    low = tl.minimum(key_of_rank(keys, (rank + margin).to(tl.int32) + 1), high)
    end = tl.where(rank - margin < 1, TOP >> LOW, high)
    shift = tl.zeros((), tl.int32)
    for _ in range(31 - BITS):
        shift += (((end - low) >> shift) >= BINS).to(tl.int32)
    tl.store(search_ptr + LO, low)
    tl.store(search_ptr + SHIFT, shift)
    tl.store(search_ptr + DONE, 0)
    tl.store(search_ptr + HOT, low)
    tl.store(search_ptr + HOT + 1, tl.where(high == low, -1, high))


@triton.jit
def count_kernel(
    table_ptr, blocks_ptr, search_ptr, counts_ptr, GROW: tl.constexpr, EXCLUDE: tl.constexpr, W: tl.constexpr,
    LOW: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Adds to each segment's counts: keys in each bin, above all bins, and NaN.

    The two hot keys, ends of the guess, are counted in registers: they are frequent where many scores are equal, and
    atomics at one address wait for each other.
    """
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1) * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    counts_ptr += segment * COUNTS
    if tl.load(search_ptr + DONE) == 0:
        lo, shift = tl.load(search_ptr + LO), tl.load(search_ptr + SHIFT)
        hot, hotter = tl.load(search_ptr + HOT), tl.load(search_ptr + HOT + 1)
        n = size_of(row_ptr, ALIGNED)
        above = tl.zeros((BLOCK,), tl.int32)
        nan = tl.zeros((BLOCK,), tl.int32)
        heat = tl.zeros((BLOCK,), tl.int32)
        heat_more = tl.zeros((BLOCK,), tl.int32)
        for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            may, key = candidates(row_ptr, place(row_ptr, at, STRIDED), inside, GROW, EXCLUDE, W, LOW, ALIGNED)
            number = (key - lo) >> shift  # negative below the interval
            above += (may & (number >= BINS)).to(tl.int32)
            nan += (key > (INFINITY >> LOW)).to(tl.int32)  # also where it may not be chosen
            within = may & (number >= 0) & (number < BINS)
            heat += (within & (key == hot)).to(tl.int32)
            heat_more += (within & (key == hotter)).to(tl.int32)
            cold = within & (key != hot) & (key != hotter)
            tl.atomic_add(counts_ptr + number, tl.full((BLOCK,), 1, tl.int32), mask=cold, sem="relaxed")
            start += BLOCK
        tl.atomic_add(counts_ptr + ABOVE, tl.sum(above, 0), sem="relaxed")
        tl.atomic_add(counts_ptr + NAN, tl.sum(nan, 0), sem="relaxed")
        tl.atomic_add(counts_ptr + HEAT, tl.sum(heat, 0), sem="relaxed")
        tl.atomic_add(counts_ptr + HEAT + 1, tl.sum(heat_more, 0), sem="relaxed")


@triton.jit
def narrow_kernel(
    table_ptr, search_ptr, counts_ptr, bad_ptr, GROW: tl.constexpr, LOW: tl.constexpr, LAST: tl.constexpr
):
    """One program: the next interval of one segment, or its end: LO the k-th highest key, TIES equal to it, of which
    the first MISSING are chosen. Clears the counts. Adds to `bad` for NaN, or (LAST) a search without an end."""
    row_ptr = table_ptr + tl.program_id(0) * ROW
    search_ptr += tl.program_id(0) * SEARCH
    counts_ptr += tl.program_id(0) * COUNTS
    column: tl.constexpr = 2 if GROW else 0
    if tl.load(search_ptr + DONE) == 0:
        k = tl.load(row_ptr + K + column).to(tl.int32)
        lo, shift = tl.load(search_ptr + LO), tl.load(search_ptr + SHIFT)
        hot, hotter = tl.load(search_ptr + HOT), tl.load(search_ptr + HOT + 1)
        numbers = tl.arange(0, BINS)
        in_bin = tl.load(counts_ptr + numbers)
        in_bin += tl.where(numbers == (hot - lo) >> shift, tl.load(counts_ptr + HEAT), 0)
        in_bin += tl.where(numbers == (hotter - lo) >> shift, tl.load(counts_ptr + HEAT + 1), 0)
        above = tl.load(counts_ptr + ABOVE)
        from_bin = above + tl.cumsum(in_bin, 0, reverse=True)
        found = tl.sum((from_bin >= k).to(tl.int32), 0) - 1  # the highest bin from which there are k
        here = tl.sum(tl.where(numbers == found, in_bin, 0), 0)
        higher = tl.sum(tl.where(numbers == found, from_bin, 0), 0) - here
        inside = (found >= 0) & (above < k)
        nothing = k <= 0
        done = nothing | (inside & (shift == 0))
        tl.store(search_ptr + LO, tl.where(nothing, TOP, tl.where(inside, lo + (found << shift), 0)))
        tl.store(search_ptr + SHIFT, tl.where(inside, tl.maximum(shift - BITS, 0), 31 - BITS - LOW))
        tl.store(search_ptr + DONE, done.to(tl.int32))
        tl.store(search_ptr + MISSING, tl.where(nothing, 0, k - higher))
        tl.store(search_ptr + TIES, tl.where(nothing, 0, here))
        bad = (tl.load(counts_ptr + NAN) > 0).to(tl.int32)
        if LAST:
            bad += (done == 0).to(tl.int32)
        tl.atomic_add(bad_ptr, bad, sem="relaxed")
        tl.store(counts_ptr + numbers, tl.zeros((BINS,), tl.int32))
        tl.store(counts_ptr + BINS + tl.arange(0, 4), tl.zeros((4,), tl.int32))


@triton.jit
def ties_kernel(
    table_ptr, blocks_ptr, search_ptr, ties_ptr, GROW: tl.constexpr, EXCLUDE: tl.constexpr, W: tl.constexpr,
    LOW: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """ties[program] = keys equal to the threshold, of segments that choose some of them but not all; else 0."""
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1) * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    ties = tl.zeros((BLOCK,), tl.int32)
    if tl.load(search_ptr + MISSING) < tl.load(search_ptr + TIES):
        threshold = tl.load(search_ptr + LO)
        n = size_of(row_ptr, ALIGNED)
        for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
            at = start + tl.arange(0, BLOCK)
            may, key = candidates(row_ptr, place(row_ptr, at, STRIDED), at < n, GROW, EXCLUDE, W, LOW, ALIGNED)
            ties += (may & (key == threshold)).to(tl.int32)
            start += BLOCK
    tl.store(ties_ptr + tl.program_id(0), tl.sum(ties, 0))


@triton.jit
def ties_before(row_ptr, ties_ptr, offsets_ptr):
    """Ties of this segment in the programs before this one; offsets are running sums of ties over all programs."""
    first = tl.load(row_ptr + FIRST)
    here = tl.load(offsets_ptr + tl.program_id(0)) - tl.load(ties_ptr + tl.program_id(0))
    return (here - tl.load(offsets_ptr + first) + tl.load(ties_ptr + first)).to(tl.int32)


@triton.jit
def choose(may, key, threshold, missing, partial, before):
    """(which of a block are chosen, ties up to its end); `before`: ties ahead of it."""
    tie = may & (key == threshold)
    chosen = tie
    if partial:
        rank = before + tl.cumsum(tie.to(tl.int32), 0)
        chosen = tie & (rank <= missing)
        before += tl.sum(tie.to(tl.int32), 0)
    return (may & (key > threshold)) | chosen, before


@triton.jit
def mark_kernel(
    table_ptr, blocks_ptr, search_ptr, ties_ptr, offsets_ptr, W: tl.constexpr, LOW: tl.constexpr,
    STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Writes KEPT, DROPPED or 0 = inactive where the new mask will lie."""
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1) * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    threshold, missing = tl.load(search_ptr + LO), tl.load(search_ptr + MISSING)
    partial = missing < tl.load(search_ptr + TIES)
    before = ties_before(row_ptr, ties_ptr, offsets_ptr)
    n = size_of(row_ptr, ALIGNED)
    for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
        at = start + tl.arange(0, BLOCK)
        where = place(row_ptr, at, STRIDED)
        may, key = candidates(row_ptr, where, at < n, False, False, W, LOW, ALIGNED)
        kept, before = choose(may, key, threshold, missing, partial, before)
        mark = tl.where(may, tl.where(kept, KEPT, DROPPED), 0)
        tl.store(pointer(row_ptr, NEW, tl.int8, ALIGNED) + where, mark.to(tl.int8), mask=at < n)
        start += BLOCK


@triton.jit
def zero(row_ptr, column: tl.constexpr, where, moved, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    at = pointer(row_ptr, column, DTYPE, ALIGNED) + where
    tl.store(at, tl.zeros(where.shape, DTYPE), mask=moved)


@triton.jit
def store_bool(row_ptr, column: tl.constexpr, where, inside, value, ALIGNED: tl.constexpr):
    tl.store(pointer(row_ptr, column, tl.int8, ALIGNED) + where, value.to(tl.int8), mask=inside)


@triton.jit
def apply_kernel(
    table_ptr, blocks_ptr, search_ptr, ties_ptr, offsets_ptr, bad_ptr, totals_ptr, squares_ptr,
    EXCLUDE: tl.constexpr, REINIT: tl.constexpr, STATES: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    LOW: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Writes the new masks and the zeros of weights and state that moved, unless anything was bad.

    totals int32 [segments, 4] += active, grown, earlier, survivors; squares[program] = Σ(g·m)².
    """
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1) * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    totals_ptr += segment * 4
    if tl.load(bad_ptr) == 0:
        threshold, missing = tl.load(search_ptr + LO), tl.load(search_ptr + MISSING)
        partial = missing < tl.load(search_ptr + TIES)
        before = ties_before(row_ptr, ties_ptr, offsets_ptr)
        n = size_of(row_ptr, ALIGNED)
        n_active = tl.zeros((BLOCK,), tl.int32)
        n_grown = tl.zeros((BLOCK,), tl.int32)
        n_earlier = tl.zeros((BLOCK,), tl.int32)
        n_survivors = tl.zeros((BLOCK,), tl.int32)
        squares = tl.zeros((BLOCK,), tl.float32)
        for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            where = place(row_ptr, at, STRIDED)
            mark = tl.load(pointer(row_ptr, NEW, tl.int8, ALIGNED) + where, mask=inside, other=0)
            g = tl.load(pointer(row_ptr, GRAD, W, ALIGNED) + where, mask=inside, other=0.0)
            may = inside & ((mark == 0) if EXCLUDE else (mark != KEPT))
            chosen, before = choose(may, key_of(g, LOW), threshold, missing, partial, before)
            was, kept = mark != 0, mark == KEPT
            new = kept | chosen
            stay = kept if REINIT else was & new
            grown = new & (stay == 0)
            moved = (was | new) & (stay == 0)
            zero(row_ptr, WEIGHT, where, moved, W, ALIGNED)
            for i in tl.static_range(STATES):
                zero(row_ptr, STATE + i, where, moved, S, ALIGNED)
            earlier = tl.load(pointer(row_ptr, GROWN, tl.int8, ALIGNED) + where, mask=inside, other=0) != 0
            fired = tl.load(pointer(row_ptr, FIRED, tl.int8, ALIGNED) + where, mask=inside, other=0) != 0
            store_bool(row_ptr, NEW, where, inside, new, ALIGNED)
            store_bool(row_ptr, INACTIVE, where, inside, new == 0, ALIGNED)
            store_bool(row_ptr, NEW_GROWN, where, inside, grown, ALIGNED)
            store_bool(row_ptr, NEW_FIRED, where, inside, fired | new, ALIGNED)
            n_active += new.to(tl.int32)
            n_grown += grown.to(tl.int32)
            n_earlier += earlier.to(tl.int32)
            n_survivors += (earlier & new).to(tl.int32)
            g = tl.where(was, g.to(tl.float32), 0.0)
            squares += g * g
            start += BLOCK
        tl.atomic_add(totals_ptr, tl.sum(n_active, 0), sem="relaxed")
        tl.atomic_add(totals_ptr + 1, tl.sum(n_grown, 0), sem="relaxed")
        tl.atomic_add(totals_ptr + 2, tl.sum(n_earlier, 0), sem="relaxed")
        tl.atomic_add(totals_ptr + 3, tl.sum(n_survivors, 0), sem="relaxed")
        tl.store(squares_ptr + tl.program_id(0), tl.sum(squares, 0))
