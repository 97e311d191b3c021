"""Triton kernels for drop and grow over all layers at once: the passes over all weights.

`triton_search.py` has the rest and says how a threshold is found; `launch.py` calls both and knows what must hold.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from sparselearn.kernels.select.triton_search import (
    ABOVE,
    CHOSEN,
    COUNTS,
    DROPPED,
    END,
    FIRED,
    FIRST,
    FOUND,
    GRAD,
    GROWN,
    HOT,
    HOT_KEYS,
    INACTIVE,
    INFINITY,
    KEPT,
    LO,
    MISSING,
    NAN,
    NEW,
    NEW_FIRED,
    NEW_GROWN,
    OPEN,
    ROW,
    SEARCH,
    STATE,
    SURE,
    TALLY,
    TIES,
    TOO_MANY,
    UNDECIDED,
    WEIGHT,
    candidates,
    growable,
    key_of,
    packed_part,
    place,
    pointer,
    size_of,
)  # fmt: skip


@triton.jit
def sift(may, key, lo, end, hot, hotter, part, room, found, tally, LOW: tl.constexpr):
    """Packs the keys of a block that are in the window behind the `found` ones before.

    Returns (which are above the window, which are in it, found up to here, tally): the tally holds four counters of a
    byte each: above, first hot key, second hot key, NaN (also where it may not be chosen).
    """
    above = may & (key > end)
    within = may & (key >= lo) & (key <= end)
    first, second = within & (key == hot), within & (key == hotter)
    cold = (within & (key != hot) & (key != hotter)).to(tl.int32)
    rank = found + tl.cumsum(cold, 0) - 1
    rank = tl.where((cold != 0) & (rank < room), rank, -1)
    tl.store(part + rank.to(tl.int64), key, mask=rank >= 0)
    nan = key > (INFINITY >> LOW)
    tally += above.to(tl.int32) + (first.to(tl.int32) << 8) + (second.to(tl.int32) << 16) + (nan.to(tl.int32) << 24)
    return above, within, found + tl.sum(cold, 0), tally


@triton.jit
def part_of(tally, i: tl.constexpr):
    """The sum of the i-th counters."""
    return tl.sum((tally >> (8 * i)) & 255, 0)


@triton.jit
def report(counts_ptr, tallies_ptr, tally, found, room):
    first, second = part_of(tally, 1), part_of(tally, 2)
    tallies_ptr += tl.program_id(0) * TALLY
    tl.store(tallies_ptr, found)
    tl.store(tallies_ptr + 1, first)
    tl.store(tallies_ptr + 2, second)
    tl.atomic_add(counts_ptr + ABOVE, part_of(tally, 0), sem="relaxed")
    tl.atomic_add(counts_ptr + NAN, part_of(tally, 3), sem="relaxed")
    tl.atomic_add(counts_ptr + HOT_KEYS, first, sem="relaxed")
    tl.atomic_add(counts_ptr + HOT_KEYS + 1, second, sem="relaxed")
    tl.atomic_add(counts_ptr + FOUND, found, sem="relaxed")
    tl.atomic_add(counts_ptr + TOO_MANY, (found > room).to(tl.int32), sem="relaxed")


@triton.jit
def drop_kernel(
    table_ptr, blocks_ptr, search_ptr, counts_ptr, tallies_ptr, W: tl.constexpr, LOW: tl.constexpr,
    STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The pass over all weights: packs and counts their keys, and writes marks: KEPT above the window, DROPPED below,
    OPEN in it, 0 = inactive."""
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    program = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)
    start = program * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    lo, end = tl.load(search_ptr + LO), tl.load(search_ptr + END)
    hot, hotter = tl.load(search_ptr + HOT), tl.load(search_ptr + HOT + 1)
    n = size_of(row_ptr, ALIGNED)
    room = tl.minimum(n - start, BLOCK * STEPS) // 4
    part = packed_part(row_ptr, program, ALIGNED, BLOCK * STEPS)
    found = tl.zeros((), tl.int32)
    tally = tl.zeros((BLOCK,), tl.int32)
    for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        where = place(row_ptr, at, STRIDED)
        may, key = candidates(row_ptr, where, inside, False, False, W, LOW, ALIGNED)
        above, within, found, tally = sift(may, key, lo, end, hot, hotter, part, room, found, tally, LOW)
        mark = tl.where(may, tl.where(above, KEPT, tl.where(within, OPEN, DROPPED)), 0)
        tl.store(pointer(row_ptr, NEW, tl.int8, ALIGNED) + where, mark.to(tl.int8), mask=inside)
        start += BLOCK
    report(counts_ptr + segment * COUNTS, tallies_ptr, tally, found, room)


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
def grow_kernel(
    table_ptr, blocks_ptr, dropped_ptr, ties_ptr, offsets_ptr, search_ptr, counts_ptr, tallies_ptr, squares_ptr,
    EXCLUDE: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The pass over all gradients. Ends the drop: marks become KEPT, DROPPED or 0 = inactive. Packs and counts the
    keys of what may grow, and marks it CHOSEN above the window, UNDECIDED in it. squares[program] = Σ(g·m)².

    dropped, ties, offsets: the search for what to drop; search, counts, tallies: that for what to grow.
    """
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    program = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)
    start = program * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    dropped_ptr += segment * SEARCH
    search_ptr += segment * SEARCH
    threshold, missing = tl.load(dropped_ptr + LO), tl.load(dropped_ptr + MISSING)
    partial = missing < tl.load(dropped_ptr + TIES)
    sure = tl.load(dropped_ptr + SURE) != 0
    before = ties_before(row_ptr, ties_ptr, offsets_ptr)
    lo, end = tl.load(search_ptr + LO), tl.load(search_ptr + END)
    hot, hotter = tl.load(search_ptr + HOT), tl.load(search_ptr + HOT + 1)
    n = size_of(row_ptr, ALIGNED)
    room = tl.minimum(n - start, BLOCK * STEPS) // 4
    part = packed_part(row_ptr, program, ALIGNED, BLOCK * STEPS)
    found = tl.zeros((), tl.int32)
    tally = tl.zeros((BLOCK,), tl.int32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        where = place(row_ptr, at, STRIDED)
        marks = pointer(row_ptr, NEW, tl.int8, ALIGNED) + where
        mark = tl.load(marks, mask=inside, other=0)
        g = tl.load(pointer(row_ptr, GRAD, W, ALIGNED) + where, mask=inside, other=0.0)
        open = (mark == OPEN) | ((mark != 0) & (sure == 0))
        w = tl.load(pointer(row_ptr, WEIGHT, W, ALIGNED) + where, mask=open, other=0.0)
        kept, before = choose(open, key_of(w, LOW), threshold, missing, partial, before)
        kept = kept | ((mark == KEPT) & sure)
        now = tl.where(kept, KEPT, tl.where(mark != 0, DROPPED, 0))
        may = inside & growable(now, EXCLUDE)
        above, within, found, tally = sift(may, key_of(g, LOW), lo, end, hot, hotter, part, room, found, tally, LOW)
        now += tl.where(above, CHOSEN, 0) + tl.where(within, UNDECIDED, 0)
        tl.store(marks, now.to(tl.int8), mask=inside)
        g = tl.where(mark != 0, g.to(tl.float32), 0.0)
        squares += g * g
        start += BLOCK
    report(counts_ptr + segment * COUNTS, tallies_ptr, tally, found, room)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def zero(row_ptr, column: tl.constexpr, where, moved, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    at = pointer(row_ptr, column, DTYPE, ALIGNED) + where
    tl.store(at, tl.zeros(where.shape, DTYPE), mask=moved)


@triton.jit
def store_bool(row_ptr, column: tl.constexpr, where, inside, value, ALIGNED: tl.constexpr):
    tl.store(pointer(row_ptr, column, tl.int8, ALIGNED) + where, value.to(tl.int8), mask=inside)


@triton.jit
def apply_kernel(
    table_ptr, blocks_ptr, search_ptr, ties_ptr, offsets_ptr, bad_ptr, totals_ptr,
    EXCLUDE: tl.constexpr, REINIT: tl.constexpr, STATES: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    LOW: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Writes the new masks and the zeros of weights and state that moved, unless anything was bad.

    totals int32 [segments, 4] += active, grown, earlier, survivors.
    """
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1) * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    totals_ptr += segment * 4
    if tl.load(bad_ptr) == 0:
        threshold, missing = tl.load(search_ptr + LO), tl.load(search_ptr + MISSING)
        partial = missing < tl.load(search_ptr + TIES)
        sure = tl.load(search_ptr + SURE) != 0
        before = ties_before(row_ptr, ties_ptr, offsets_ptr)
        n = size_of(row_ptr, ALIGNED)
        tally = tl.zeros((BLOCK,), tl.int32)
        for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            where = place(row_ptr, at, STRIDED)
            mark = tl.load(pointer(row_ptr, NEW, tl.int8, ALIGNED) + where, mask=inside, other=0)
            earlier = tl.load(pointer(row_ptr, GROWN, tl.int8, ALIGNED) + where, mask=inside, other=0) != 0
            fired = tl.load(pointer(row_ptr, FIRED, tl.int8, ALIGNED) + where, mask=inside, other=0) != 0
            may = inside & growable(mark, EXCLUDE)
            open = may & (((mark & UNDECIDED) != 0) | (sure == 0))
            g = tl.load(pointer(row_ptr, GRAD, W, ALIGNED) + where, mask=open, other=0.0)
            chosen, before = choose(open, key_of(g, LOW), threshold, missing, partial, before)
            chosen = chosen | (((mark & CHOSEN) != 0) & sure)
            was, kept = (mark & 3) != 0, (mark & 3) == KEPT
            new = kept | chosen
            stay = kept if REINIT else was & new
            grown = new & (stay == 0)
            moved = (was | new) & (stay == 0)
            zero(row_ptr, WEIGHT, where, moved, W, ALIGNED)
            for i in tl.static_range(STATES):
                zero(row_ptr, STATE + i, where, moved, S, ALIGNED)
            store_bool(row_ptr, NEW, where, inside, new, ALIGNED)
            store_bool(row_ptr, INACTIVE, where, inside, new == 0, ALIGNED)
            store_bool(row_ptr, NEW_GROWN, where, inside, grown, ALIGNED)
            store_bool(row_ptr, NEW_FIRED, where, inside, fired | new, ALIGNED)
            # four counters of a byte each
            tally += new.to(tl.int32) + (grown.to(tl.int32) << 8)
            tally += (earlier.to(tl.int32) << 16) + ((earlier & new).to(tl.int32) << 24)
            start += BLOCK
        for i in tl.static_range(4):
            tl.atomic_add(totals_ptr + i, part_of(tally, i), sem="relaxed")
