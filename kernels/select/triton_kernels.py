"""Triton kernels for drop and grow over all layers at once: the passes over all weights.

`triton_search.py` has the rest and says how a threshold is found; `launch.py` calls both and knows what must hold.
"""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from sparselearn.kernels.select.triton_search import (
    ABOVE,
    CHANNELS,
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
    INNER,
    KEPT,
    LO,
    MASK,
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
    growable,
    key_of,
    packed_part,
    pointer,
    size_of,
)  # fmt: skip

# A block is a tile [LANES, weights of a lane]: a lane is a thread, whose weights are neighbours. Sums and running sums
# of a lane need no other thread; what crosses lanes (shuffles, shared memory, barriers) comes once, at the program's
# end. Four weights for a lane: with more, stores of 32 bits and of 8 want other tiles, and each is moved to its own.


@triton.jit
def tile(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Numbers of a block's weights."""
    each: tl.constexpr = BLOCK // LANES
    return tl.arange(0, LANES)[:, None] * each + tl.arange(0, each)[None, :]


@triton.jit
def home(start, i, inner, channels, STRIDED: tl.constexpr):
    """(where a block lies, where its weights lie from there): with a scalar for the block, addresses of a thread's
    weights differ by constants."""
    if STRIDED:  # [out, channels, inner] in memory is [out, inner, channels]
        at = start + i
        rest = at % (inner * channels)
        return start * 0, at - rest + rest % inner * channels + rest // inner
    return start, i


@triton.jit
def sift(may, key, lo, end, hotter, part, room, slot, tally, top, LANES: tl.constexpr):
    """Packs the keys of a block that are within the window, each lane's into its column of the buffer.

    Returns (which are above the window, the next free slot of each lane, tally, top): the tally holds counters of a
    byte each: above, first hot key, second hot key; top: highest key, also of what may not be chosen (NaN is highest).
    The window's lower end is the first hot key; its upper end is the second, or the first, or above all keys.
    """
    above = may & (key > end)
    cold = may & (key > lo) & (key < end)
    step = tl.where(cold, LANES, 0)
    to = slot[:, None] + tl.cumsum(step, 1) - step
    # Not so, but else the compiler moves the tile to other threads for this store, through shared memory. The store
    # itself is of single keys, as their mask differs.
    to_ptr = tl.max_contiguous(tl.multiple_of(part + to, [1, 4 * may.shape[1]]), [1, may.shape[1]])
    tl.store(to_ptr, key, mask=cold & (to < room))
    seen = tl.where(above, 1, 0) + tl.where(may & (key == lo), 1 << 8, 0) + tl.where(may & (key == hotter), 1 << 16, 0)
    return above, slot + tl.sum(step, 1), tally + tl.sum(seen, 1), tl.maximum(top, tl.max(key, 1))


@triton.jit
def part_of(tally, i: tl.constexpr):
    """The sum of the i-th counters."""
    return tl.sum((tally >> (8 * i)) & 255, 0)


@triton.jit
def report(counts_ptr, tallies_ptr, lengths_ptr, tally, top, slot, room, LOW: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    length = slot // LANES
    tl.store(lengths_ptr + tl.program_id(0) * LANES + lane, length)
    too_many = (length > 0) & (slot - LANES >= room)
    first, second = part_of(tally, 1), part_of(tally, 2)
    tallies_ptr += tl.program_id(0) * TALLY
    tl.store(tallies_ptr, tl.max(length, 0))
    tl.store(tallies_ptr + 1, first)
    tl.store(tallies_ptr + 2, second)
    nan = tl.max(top, 0) > (INFINITY >> LOW)
    tl.atomic_add(counts_ptr + ABOVE, part_of(tally, 0), sem="relaxed")
    tl.atomic_add(counts_ptr + NAN, 1, mask=nan, sem="relaxed")
    tl.atomic_add(counts_ptr + HOT_KEYS, first, sem="relaxed")
    tl.atomic_add(counts_ptr + HOT_KEYS + 1, second, mask=second > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + FOUND, tl.sum(length, 0), sem="relaxed")
    tl.atomic_add(counts_ptr + TOO_MANY, 1, mask=tl.max(too_many.to(tl.int32), 0) > 0, sem="relaxed")


@triton.jit
def drop_kernel(
    table_ptr, blocks_ptr, search_ptr, counts_ptr, tallies_ptr, lengths_ptr, W: tl.constexpr, LOW: tl.constexpr,
    STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The pass over all weights: packs and counts their keys, and writes marks: KEPT above the window, DROPPED below,
    OPEN in it, 0 = inactive."""
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    program = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)
    start = program * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    search_ptr += segment * SEARCH
    lo, end, hotter = tl.load(search_ptr + LO), tl.load(search_ptr + END), tl.load(search_ptr + HOT + 1)
    n = size_of(row_ptr, ALIGNED)
    inner, channels = tl.load(row_ptr + INNER).to(tl.int32), tl.load(row_ptr + CHANNELS).to(tl.int32)
    masks, weights = pointer(row_ptr, MASK, tl.int8, ALIGNED), pointer(row_ptr, WEIGHT, W, ALIGNED)
    marks = pointer(row_ptr, NEW, tl.int8, ALIGNED)
    room = tl.minimum(n - start, BLOCK * STEPS) // 4
    part = packed_part(row_ptr, program, ALIGNED, BLOCK * STEPS)
    i = tile(BLOCK, LANES)
    slot = tl.arange(0, LANES)
    tally = tl.zeros((LANES,), tl.int32)
    top = tl.zeros((LANES,), tl.int32)
    for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
        inside = i < n - start
        here, where = home(start, i, inner, channels, STRIDED)
        may = tl.load(masks + here + where, mask=inside, other=0).to(tl.int32) != 0
        key = key_of(tl.load(weights + here + where, mask=inside, other=0.0), LOW)
        above, slot, tally, top = sift(may, key, lo, end, hotter, part, room, slot, tally, top, LANES)
        mark = tl.where(may, tl.where(above, KEPT, tl.where(key >= lo, OPEN, DROPPED)), 0)
        tl.store(marks + here + where, mark.to(tl.int8), mask=inside)
        start += BLOCK
    counts_ptr += segment * COUNTS
    report(counts_ptr, tallies_ptr, lengths_ptr, tally, top, slot, room, LOW, LANES)


@triton.jit
def ties_before(row_ptr, ties_ptr, offsets_ptr):
    """Ties of this segment in the programs before this one; offsets are running sums of ties over all programs."""
    first = tl.load(row_ptr + FIRST)
    here = tl.load(offsets_ptr + tl.program_id(0)) - tl.load(ties_ptr + tl.program_id(0))
    return (here - tl.load(offsets_ptr + first) + tl.load(ties_ptr + first)).to(tl.int32)


@triton.jit
def choice(row_ptr, search_ptr, ties_ptr, offsets_ptr):
    """(threshold, the lowest key of which this program chooses all, whether it chooses some of its ties but not all,
    ties before it, up to which rank they are chosen)."""
    threshold, missing = tl.load(search_ptr + LO), tl.load(search_ptr + MISSING)
    partial = missing < tl.load(search_ptr + TIES)
    before, ties = ties_before(row_ptr, ties_ptr, offsets_ptr), tl.load(ties_ptr + tl.program_id(0))
    every = (partial == 0) | (before + ties <= missing)
    some = (every == 0) & (before < missing)
    return threshold, tl.where(every, threshold, threshold + 1), some, before, missing


@triton.jit
def choose(may, key, threshold, least, some, before, missing):
    """(which of a block are chosen, ties up to its end); `before`: ties ahead of it."""
    chosen = may & (key >= least)
    if some:
        tie = may & (key == threshold)
        each = tie.to(tl.int32)
        of_lane = tl.sum(each, 1)
        rank = before + (tl.cumsum(of_lane, 0) - of_lane)[:, None] + tl.cumsum(each, 1)
        chosen = chosen | (tie & (rank <= missing))
        before += tl.sum(of_lane, 0)
    return chosen, before


@triton.jit
def grow_kernel(
    table_ptr, blocks_ptr, dropped_ptr, ties_ptr, offsets_ptr, search_ptr, counts_ptr, tallies_ptr, lengths_ptr,
    squares_ptr, EXCLUDE: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr, STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The pass over all gradients. Ends the drop: marks become KEPT, DROPPED or 0 = inactive. Packs and counts the
    keys of what may grow, and marks it CHOSEN above the window, UNDECIDED in it. squares[program] = Σ(g·m)².

    dropped, ties, offsets: the search for what to drop; search, counts, tallies, lengths: that for what to grow.
    """
    segment = tl.load(blocks_ptr + 2 * tl.program_id(0))
    program = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)
    start = program * (BLOCK * STEPS)
    row_ptr = table_ptr + segment * ROW
    dropped_ptr += segment * SEARCH
    search_ptr += segment * SEARCH
    threshold, least, some, before, missing = choice(row_ptr, dropped_ptr, ties_ptr, offsets_ptr)
    # Without a threshold in the window, marks say no more than which weights are active.
    sure = tl.load(dropped_ptr + SURE) != 0
    from_mark, known = tl.where(sure, OPEN, DROPPED), tl.where(sure, KEPT, -1)
    lo, end, hotter = tl.load(search_ptr + LO), tl.load(search_ptr + END), tl.load(search_ptr + HOT + 1)
    n = size_of(row_ptr, ALIGNED)
    inner, channels = tl.load(row_ptr + INNER).to(tl.int32), tl.load(row_ptr + CHANNELS).to(tl.int32)
    weights, grads = pointer(row_ptr, WEIGHT, W, ALIGNED), pointer(row_ptr, GRAD, W, ALIGNED)
    marks = pointer(row_ptr, NEW, tl.int8, ALIGNED)
    room = tl.minimum(n - start, BLOCK * STEPS) // 4
    part = packed_part(row_ptr, program, ALIGNED, BLOCK * STEPS)
    i = tile(BLOCK, LANES)
    slot = tl.arange(0, LANES)
    tally = tl.zeros((LANES,), tl.int32)
    top = tl.zeros((LANES,), tl.int32)
    squares = tl.zeros((LANES,), tl.float32)
    for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
        inside = i < n - start
        here, where = home(start, i, inner, channels, STRIDED)
        mark = tl.load(marks + here + where, mask=inside, other=0).to(tl.int32)
        g = tl.load(grads + here + where, mask=inside, other=0.0)
        open = mark >= from_mark
        w = tl.load(weights + here + where, mask=open, other=0.0)
        kept, before = choose(open, key_of(w, LOW), threshold, least, some, before, missing)
        kept = kept | (mark == known)
        may = (inside & (mark == 0)) if EXCLUDE else (inside & (kept == 0))
        key = key_of(g, LOW)
        above, slot, tally, top = sift(may, key, lo, end, hotter, part, room, slot, tally, top, LANES)
        now = tl.where(kept, KEPT, tl.where(mark != 0, DROPPED, 0))
        now += tl.where(may & (key >= lo), tl.where(above, CHOSEN, UNDECIDED), 0)
        tl.store(marks + here + where, now.to(tl.int8), mask=inside)
        active = tl.where(mark != 0, g.to(tl.float32), 0.0)
        squares += tl.sum(active * active, 1)
        start += BLOCK
    counts_ptr += segment * COUNTS
    report(counts_ptr, tallies_ptr, lengths_ptr, tally, top, slot, room, LOW, LANES)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def apply_kernel(
    table_ptr, blocks_ptr, search_ptr, ties_ptr, offsets_ptr, bad_ptr, totals_ptr,
    EXCLUDE: tl.constexpr, REINIT: tl.constexpr, STATES: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    LOW: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    LANES: tl.constexpr,
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
        threshold, least, some, before, missing = choice(row_ptr, search_ptr, ties_ptr, offsets_ptr)
        sure = tl.load(search_ptr + SURE) != 0
        from_mark, known = tl.where(sure, UNDECIDED, 0), tl.where(sure, CHOSEN, 0)
        n = size_of(row_ptr, ALIGNED)
        inner, channels = tl.load(row_ptr + INNER).to(tl.int32), tl.load(row_ptr + CHANNELS).to(tl.int32)
        weights, grads = pointer(row_ptr, WEIGHT, W, ALIGNED), pointer(row_ptr, GRAD, W, ALIGNED)
        growns, fireds = pointer(row_ptr, GROWN, tl.int8, ALIGNED), pointer(row_ptr, FIRED, tl.int8, ALIGNED)
        marks, inactives = pointer(row_ptr, NEW, tl.int8, ALIGNED), pointer(row_ptr, INACTIVE, tl.int8, ALIGNED)
        new_growns = pointer(row_ptr, NEW_GROWN, tl.int8, ALIGNED)
        new_fireds = pointer(row_ptr, NEW_FIRED, tl.int8, ALIGNED)
        state_0 = pointer(row_ptr, STATE, S, ALIGNED)
        state_1 = pointer(row_ptr, STATE + 1, S, ALIGNED)
        state_2 = pointer(row_ptr, STATE + 2, S, ALIGNED)
        i = tile(BLOCK, LANES)
        tally = tl.zeros((LANES,), tl.int32)
        for _ in range(tl.cdiv(tl.minimum(n - start, BLOCK * STEPS), BLOCK)):
            inside = i < n - start
            here, where = home(start, i, inner, channels, STRIDED)
            mark = tl.load(marks + here + where, mask=inside, other=0).to(tl.int32)
            earlier = tl.load(growns + here + where, mask=inside, other=0).to(tl.int32) != 0
            fired = tl.load(fireds + here + where, mask=inside, other=0).to(tl.int32) != 0
            may = inside & growable(mark, EXCLUDE)
            open = may & (mark >= from_mark)
            g = tl.load(grads + here + where, mask=open, other=0.0)
            chosen, before = choose(open, key_of(g, LOW), threshold, least, some, before, missing)
            chosen = chosen | ((mark & known) != 0)
            was, kept = (mark & 3) != 0, (mark & 3) == KEPT
            new = kept | chosen
            stay = kept if REINIT else was & new
            grown = new & (stay == 0)
            moved = (was | new) & (stay == 0)
            tl.store(weights + here + where, tl.zeros(i.shape, W), mask=moved)
            if STATES > 0:
                tl.store(state_0 + here + where, tl.zeros(i.shape, S), mask=moved)
            if STATES > 1:
                tl.store(state_1 + here + where, tl.zeros(i.shape, S), mask=moved)
            if STATES > 2:
                tl.store(state_2 + here + where, tl.zeros(i.shape, S), mask=moved)
            tl.store(marks + here + where, new.to(tl.int8), mask=inside)
            tl.store(inactives + here + where, (new == 0).to(tl.int8), mask=inside)
            tl.store(new_growns + here + where, grown.to(tl.int8), mask=inside)
            tl.store(new_fireds + here + where, (fired | new).to(tl.int8), mask=inside)
            # four counters of a byte each
            seen = tl.where(new, 1, 0) + tl.where(grown, 1 << 8, 0) + tl.where(earlier, 1 << 16, 0)
            tally += tl.sum(seen + tl.where(earlier & new, 1 << 24, 0), 1)
            start += BLOCK
        for i in tl.static_range(4):
            tl.atomic_add(totals_ptr + i, part_of(tally, i), sem="relaxed")
