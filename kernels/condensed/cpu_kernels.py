# numba's annotations do not describe intrinsics and device arrays.
# mypy: disable-error-code="import-untyped, attr-defined, call-arg, no-untyped-call, no-untyped-def, untyped-decorator, misc, no-any-return"
# ruff: noqa: E501, E741
"""The compiled loops of `cpu.py`: numba functions that any number of threads may run on one block of arguments.

A kernel takes the address of a block of 64-bit integers. Slot 0 counts the work items handed out: whoever calls the
kernel takes items until none is left, so the same code serves one thread and torch's whole pool. Every item writes
memory of its own in a fixed order, so the result does not depend on the number of threads.

The inner loops are LLVM vector code built by hand, since numba does not keep accumulators in registers across a loop
over weights. LLVM lowers the vectors to AVX-512, AVX2 or NEON. They stay in this file on purpose: numba's cache on
disk is renewed when the file of the kernel changes, and does not see changes elsewhere.

Nothing here checks a bound: `prepare` did.
"""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BLOCK = 16 if binding.get_host_cpu_features().get("avx512f") else 8  # sums of so many lanes that fit the registers
GATHERS = not binding.get_host_cpu_name().startswith("znver")  # AMD's takes longer than as many loads (measured: Zen 4)
AHEAD = 4096  # bytes; the hardware stops reading ahead at the end of a page
SIDE = 8  # of the squares that are transposed in registers
ROWS = 16  # results that are computed before they are stored: one cache line of each row of y
CHUNK = 64  # rows of one work item
LANES = 32  # of the sampled products
SHARED = 4  # neurons that are computed together where they have the same inputs; divides ROWS and CHUNK


def _at(builder: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    """The pointer to item `offset` of an array of `kind` at an integer address."""
    pointer = builder.inttoptr(address, kind.as_pointer())
    return pointer if offset is None else builder.gep(pointer, [offset])


def _vector_at(builder: Any, address: Any, lanes: int, offset: Any = None) -> Any:
    """The pointer to `lanes` float32 numbers from number `offset` on."""
    return builder.bitcast(_at(builder, address, F32, offset), ir.VectorType(F32, lanes).as_pointer())


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    empty = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(builder.insert_element(empty, scalar, I32(0)), empty, zeros)


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))


def _bring(builder: Any, address: Any, write: int = 0) -> None:
    """Start to bring the cache line at an address, which may lie outside the process, to read (0) or to write (1)."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [builder.inttoptr(address, byte), I32(write), I32(3), I32(1)])


@intrinsic
def _pointer(typing: Any, address: Any, kind: Any) -> Any:
    """An integer address as a typed pointer, for `carray`."""
    pointer = types.CPointer(kind.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.intp, kind), generate


@intrinsic
def _take(typing: Any, block: Any) -> Any:
    """The next work item: slot 0, which is advanced for all threads at once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.bitcast(args[0], I64.as_pointer()), I64(1), "monotonic")

    return types.intp(block), generate


@intrinsic(prefer_literal=True)
def _prefetch(typing: Any, address: Any, write: Any) -> Any:
    """`_bring` for the kernels."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _bring(builder, args[0], write.literal_value)
        return context.get_dummy_value()

    return types.void(address, write), generate


@intrinsic(prefer_literal=True)
def _scratch(typing: Any, floats: Any) -> Any:
    """The address of that many float32 numbers on this thread's stack, aligned to a cache line."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(F32, floats.literal_value))
        memory.align = 64
        return builder.ptrtoint(memory, I64)

    return types.intp(floats), generate


@intrinsic(prefer_literal=True)
def _dot(
    typing: Any, lanes: Any, rows: Any, values: Any, columns: Any, count: Any, x: Any, starts: Any, y: Any, stride: Any
) -> Any:
    """y[r, 0:lanes] = starts[r] + Σ_k values[r, k] · x[columns[k], 0:lanes] for k < count, r < rows.

    The rows of y are `stride` numbers apart, those of values `count`. The sums stay in registers. Loads are what this
    waits for, two a cycle: one load brings the columns of two or four weights, and rows that share their columns share
    the loads of x.
    """
    width, shared = lanes.literal_value, rows.literal_value
    registers = shared * max(1, width // BLOCK)
    steps = 4 if registers <= 2 else 2 if registers <= 4 else 1  # sums side by side: eight hide a product's latency
    several = ir.IntType(16 * steps)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, values, columns, count, x, starts, y, stride = args
        zero = ir.Constant(ir.VectorType(F32, width), None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(shared)] for _ in range(steps)]
        for r, total in enumerate(sums[0]):
            builder.store(_splat(builder, builder.load(_at(builder, starts, F32, I64(r))), width), total)

        def step(k: Any, column: Any, totals: Any) -> None:
            place = builder.mul(builder.zext(column, I64), I64(width))
            numbers = builder.load(_vector_at(builder, x, width, place), align=4)
            for r, total in enumerate(totals):
                at = builder.add(k, builder.mul(count, I64(r)))
                weight = _splat(builder, builder.load(_at(builder, values, F32, at)), width)
                builder.store(_fused(builder, weight, numbers, builder.load(total)), total)

        whole = builder.sub(count, builder.urem(count, I64(steps)))
        with cgutils.for_range_slice(builder, I64(0), whole, I64(steps), I64) as (k, _):
            place = builder.bitcast(_at(builder, columns, I16, k), several.as_pointer())
            read = builder.load(place, align=2)
            for u in range(steps):
                column = builder.trunc(builder.lshr(read, several(16 * u)), I16) if steps > 1 else read
                step(builder.add(k, I64(u)), column, sums[u])
        with cgutils.for_range_slice(builder, whole, count, I64(1), I64) as (k, _):
            step(k, builder.load(_at(builder, columns, I16, k)), sums[0])
        for r in range(shared):
            total = builder.load(sums[0][r])
            for others in sums[1:]:
                total = builder.fadd(total, builder.load(others[r]))
            builder.store(total, _vector_at(builder, y, width, builder.mul(stride, I64(r))), align=4)
        return context.get_dummy_value()

    return types.void(lanes, rows, *[types.intp] * 7), generate


@intrinsic(prefer_literal=True)
def _row_dot(typing: Any, rows: Any, values: Any, columns: Any, count: Any, x: Any, y: Any) -> Any:
    """y[r] = Σ_k values[r, k] · x[columns[k]] for k < count, r < rows, with one load for each number of x.

    LLVM would read x with gather instructions.
    """
    shared = rows.literal_value
    lane = ir.VectorType(F32, SIDE)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, values, columns, count, x, y = args
        sums = [[cgutils.alloca_once_value(builder, ir.Constant(lane, None)) for _ in range(shared)] for _ in "ab"]
        rest = [cgutils.alloca_once_value(builder, F32(0.0)) for _ in range(shared)]

        def number(column: Any) -> Any:
            return builder.load(_at(builder, x, F32, builder.zext(column, I64)))

        def add(k: Any, numbers: Any, totals: Any, read: Any) -> None:
            for r, total in enumerate(totals):
                weights = read(builder.add(k, builder.mul(count, I64(r))))
                builder.store(_fused(builder, weights, numbers, builder.load(total)), total)

        def side(k: Any, totals: Any) -> None:
            numbers = ir.Constant(lane, ir.Undefined)
            for j in range(0, SIDE, 2):  # one load brings two columns
                place = builder.bitcast(_at(builder, columns, I16, builder.add(k, I64(j))), I32.as_pointer())
                two = builder.load(place, align=2)
                for u in range(2):
                    column = builder.trunc(builder.lshr(two, I32(16 * u)), I16)
                    numbers = builder.insert_element(numbers, number(column), I32(j + u))
            add(k, numbers, totals, lambda at: builder.load(_vector_at(builder, values, SIDE, at), align=4))

        done = I64(0)
        for together in (2, 1):  # sums side by side
            width = I64(SIDE * together)
            end = builder.sub(count, builder.urem(count, width))
            with cgutils.for_range_slice(builder, done, end, width, I64) as (k, _):
                if together == 2:  # the values of one cache line
                    for r in range(shared):
                        place = builder.add(k, builder.mul(count, I64(r)))
                        _bring(builder, builder.add(builder.mul(place, I64(4)), builder.add(values, I64(AHEAD))))
                    _bring(builder, builder.add(builder.mul(k, I64(2)), builder.add(columns, I64(AHEAD // 2))))
                for part in range(together):
                    side(builder.add(k, I64(SIDE * part)), sums[part])
            done = end
        with cgutils.for_range_slice(builder, done, count, I64(1), I64) as (k, _):
            column = builder.load(_at(builder, columns, I16, k))
            add(k, number(column), rest, lambda at: builder.load(_at(builder, values, F32, at)))
        for r in range(shared):
            total = builder.fadd(builder.load(sums[0][r]), builder.load(sums[1][r]))
            half = SIDE // 2
            while half:
                low, high = list(range(half)), list(range(half, 2 * half))
                total = builder.fadd(_shuffle(builder, total, total, low), _shuffle(builder, total, total, high))
                half //= 2
            total = builder.fadd(builder.extract_element(total, I32(0)), builder.load(rest[r]))
            builder.store(total, _at(builder, y, F32, I64(r)))
        return context.get_dummy_value()

    return types.void(rows, *[types.intp] * 5), generate


@intrinsic
def _transpose(typing: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
    """target[j, i] = source[i, j] for i, j < SIDE; addresses, and strides of the rows in numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, source_stride, target, target_stride = args
        rows = [
            builder.load(_vector_at(builder, source, SIDE, builder.mul(source_stride, I64(i))), align=4)
            for i in range(SIDE)
        ]
        half = SIDE // 2
        while half:  # swap the off-diagonal quarters of ever smaller squares
            upper = [lane + SIDE - half if lane & half else lane for lane in range(SIDE)]
            lower = [lane + SIDE if lane & half else lane + half for lane in range(SIDE)]
            for i in range(SIDE):
                if not i & half:
                    a, b = rows[i], rows[i + half]
                    rows[i], rows[i + half] = _shuffle(builder, a, b, upper), _shuffle(builder, a, b, lower)
            half //= 2
        for j, row in enumerate(rows):
            builder.store(row, _vector_at(builder, target, SIDE, builder.mul(target_stride, I64(j))), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def _move(typing: Any, source: Any, target: Any) -> Any:
    """target[i] = source[i] for i < SIDE; addresses."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (_vector_at(builder, address, SIDE) for address in args)
        builder.store(builder.load(source, align=4), target, align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def _sampled(
    typing: Any, x: Any, x_stride: Any, grad: Any, grad_stride: Any, tiles: Any, columns: Any, out: Any
) -> Any:
    """out[j] = Σ_t Σ_b grad[t, b] · x[t, columns[j], b] for j < BLOCK, b < LANES, t < tiles."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_stride, grad, grad_stride, tiles, columns, out = args
        zero = ir.Constant(ir.VectorType(F32, BLOCK), None)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(BLOCK)]
        rows = [builder.zext(builder.load(_at(builder, columns, I16, I64(j))), I64) for j in range(BLOCK)]
        offsets = [builder.mul(row, I64(LANES)) for row in rows]
        with cgutils.for_range(builder, tiles) as loop:
            x_tile, grad_tile = builder.mul(loop.index, x_stride), builder.mul(loop.index, grad_stride)
            for part in range(0, LANES, BLOCK):
                g = builder.load(_vector_at(builder, grad, BLOCK, builder.add(grad_tile, I64(part))), align=4)
                for total, offset in zip(sums, offsets, strict=True):
                    place = builder.add(builder.add(x_tile, offset), I64(part))
                    numbers = builder.load(_vector_at(builder, x, BLOCK, place), align=4)
                    builder.store(_fused(builder, g, numbers, builder.load(total)), total)
        left = [builder.load(total) for total in sums]
        half = BLOCK // 2
        while half:  # add the halves of neighbours' sums side by side, until one lane is left of each
            low = [lane for lane in range(2 * BLOCK) if not lane & half]
            high = [lane + half for lane in low]
            left = [
                builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, high))
                for a, b in zip(left[::2], left[1::2], strict=True)
            ]
            half //= 2
        builder.store(left[0], _vector_at(builder, out, BLOCK), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


def gemv(block: Any) -> None:
    """One row of input: y [N] from x [I]. Block: counter, N, K, values, columns, x, bias or 0, y."""
    a = carray(block, (8,), np.int64)
    N, K = a[1], a[2]
    values = carray(_pointer(a[3], np.float32), (N, K))
    columns = carray(_pointer(a[4], np.uint16), (N, K))
    x = carray(_pointer(a[5], np.float32), (65536,))
    bias = carray(_pointer(a[6], np.float32), (N,))
    y = carray(_pointer(a[7], np.float32), (N,))
    biased = a[6] != 0
    first = _take(block) * CHUNK
    while first < N:
        for n in range(first, min(first + CHUNK, N)):
            if GATHERS:
                for line in range(0, K, 16):
                    _prefetch(a[3] + 4 * (K * n + line) + AHEAD, 0)
                for line in range(0, K, 32):
                    _prefetch(a[4] + 2 * (K * n + line) + AHEAD // 2, 0)
                total = np.float32(0)
                for k in range(K):
                    total += values[n, k] * x[columns[n, k]]
                y[n] = total
            else:
                _row_dot(1, a[3] + 4 * K * n, a[4] + 2 * K * n, K, a[5], a[7] + 4 * n)
            if biased:
                y[n] += bias[n]
        first = _take(block) * CHUNK


def gemv_shared(block: Any) -> None:
    """The same for neurons that share their columns, SHARED in turn: each input is fetched once for all of them."""
    a = carray(block, (8,), np.int64)
    N, K = a[1], a[2]
    values = carray(_pointer(a[3], np.float32), (N, K))
    columns = carray(_pointer(a[4], np.uint16), (N, K))
    x = carray(_pointer(a[5], np.float32), (65536,))
    bias = carray(_pointer(a[6], np.float32), (N,))
    y = carray(_pointer(a[7], np.float32), (N,))
    first = _take(block) * CHUNK
    while first < N:
        for n in range(first, min(first + CHUNK, N), SHARED):
            if GATHERS:
                for line in range(0, SHARED * K, 16):
                    _prefetch(a[3] + 4 * (K * n + line) + AHEAD, 0)
                sum0 = sum1 = sum2 = sum3 = np.float32(0)
                for k in range(K):
                    number = x[columns[n, k]]
                    sum0 += values[n, k] * number
                    sum1 += values[n + 1, k] * number
                    sum2 += values[n + 2, k] * number
                    sum3 += values[n + 3, k] * number
                y[n], y[n + 1], y[n + 2], y[n + 3] = sum0, sum1, sum2, sum3
            else:
                _row_dot(SHARED, a[3] + 4 * K * n, a[4] + 2 * K * n, K, a[5], a[7] + 4 * n)
            if a[6] != 0:
                for i in range(n, n + SHARED):
                    y[i] += bias[i]
        first = _take(block) * CHUNK


def pack(block: Any) -> None:
    """x -> tiles [tiles, I, T] of T rows each, the last one filled up with zeros.

    Block: counter, x, stride of its rows, stride of its columns (one of the two is 1), B, I, T, tiles, target.
    """
    a = carray(block, (9,), np.int64)
    row_stride, column_stride, B, I, T, tiles = a[2], a[3], a[4], a[5], a[6], a[7]
    x = carray(_pointer(a[1], np.float32), (B * I,))
    target = carray(_pointer(a[8], np.float32), (tiles, I, T))
    chunks = (I + CHUNK - 1) // CHUNK
    work = _take(block)
    while work < tiles * chunks:  # the tiles of a chunk one after the other: they share the rows of a transposed x
        t, first = work % tiles, work // tiles * CHUNK
        last, rows = min(first + CHUNK, I), min(T, B - t * T)
        done = first
        if column_stride == 1 and rows == T:
            while done + SIDE <= last:
                for b in range(0, T, SIDE):
                    source = a[1] + 4 * ((t * T + b) * row_stride + done)
                    _transpose(source, row_stride, a[8] + 4 * ((t * I + done) * T + b), T)
                done += SIDE
        elif row_stride == 1 and rows == T:  # numba would copy number by number: it does not know the stride
            for i in range(first, last):
                for b in range(0, T, SIDE):
                    _move(a[1] + 4 * (t * T + b + i * column_stride), a[8] + 4 * ((t * I + i) * T + b))
            done = last
        for i in range(done, last):
            for b in range(rows):
                target[t, i, b] = x[(t * T + b) * row_stride + i * column_stride]
            for b in range(rows, T):
                target[t, i, b] = 0
        work = _take(block)


def tile(block: Any) -> None:
    """A sparse matrix, given by rows, times packed tiles.

    Block: counter, N, rows that share their columns (1 or SHARED), starts [N + 1], columns, values, bias or 0,
    tiles [.., I, T], I, T, B, feature-major or not, y [N, B] or [B, N].
    """
    a = carray(block, (13,), np.int64)
    N, shared, I, T, B, by_feature = a[1], a[2], a[8], a[9], a[10], a[11]
    starts = carray(_pointer(a[3], np.int64), (N + 1,))
    bias = carray(_pointer(a[6], np.float32), (N,))
    y = carray(_pointer(a[12], np.float32), (N * B,))
    memory, first_sums = _scratch(512), _scratch(16)  # ROWS · 32
    results = carray(_pointer(memory, np.float32), (512,))
    begin = carray(_pointer(first_sums, np.float32), (16,))
    tiles, chunks = (B + T - 1) // T, (N + CHUNK - 1) // CHUNK
    work = _take(block)
    while work < tiles * chunks:  # tile after tile, which keeps the tile in the cache
        t, first = work // chunks, work % chunks * CHUNK
        base, x, width = t * T, a[7] + 4 * T * I * t, min(T, B - t * T)
        for n0 in range(first, min(first + CHUNK, N), ROWS):
            rows = min(ROWS, N - n0)
            direct = by_feature and width == T
            for r in range(0, rows, shared):
                n = n0 + r
                p, count = starts[n], starts[n + 1] - starts[n]
                values, columns = a[5] + 4 * p, a[4] + 2 * p
                for i in range(shared):
                    begin[i] = bias[n + i] if a[6] else np.float32(0)
                out, stride = (a[12] + 4 * (n * B + base), B) if direct else (memory + 4 * r * T, T)
                if shared == 1:
                    if T == 32:
                        _dot(32, 1, values, columns, count, x, first_sums, out, stride)
                    elif T == 16:
                        _dot(16, 1, values, columns, count, x, first_sums, out, stride)
                    else:
                        _dot(8, 1, values, columns, count, x, first_sums, out, stride)
                elif T == 32:
                    _dot(32, SHARED, values, columns, count, x, first_sums, out, stride)
                elif T == 16:
                    _dot(16, SHARED, values, columns, count, x, first_sums, out, stride)
                else:
                    _dot(8, SHARED, values, columns, count, x, first_sums, out, stride)
            if direct:
                continue
            if by_feature:
                for r in range(rows):
                    for b in range(width):
                        y[(n0 + r) * B + base + b] = results[r * T + b]
            elif rows == ROWS and width == T:
                for b in range(0, T, SIDE):
                    for r in range(0, ROWS, SIDE):
                        _transpose(memory + 4 * (r * T + b), T, a[12] + 4 * ((base + b) * N + n0 + r), N)
            else:
                for b in range(width):
                    for r in range(rows):
                        y[(base + b) * N + n0 + r] = results[r * T + b]
        work = _take(block)


def sample(block: Any) -> None:
    """out[n, k] = Σ_b grad[b, n] · x[b, columns[n, k]], from tiles of LANES rows, some tiles at a time.

    Block: counter, N, K, columns, tiles of x [tiles, I, LANES], of grad [tiles, N, LANES], tiles, I, tiles at a time,
    rows of one work item, out [N, K].
    """
    a = carray(block, (11,), np.int64)
    N, K, tiles, I, group, rows = a[1], a[2], a[6], a[7], a[8], a[9]
    columns = carray(_pointer(a[3], np.uint16), (N, K))
    out = carray(_pointer(a[10], np.float32), (N, K))
    memory, padded_at = _scratch(16), _scratch(8)
    found = carray(_pointer(memory, np.float32), (16,))
    padded = carray(_pointer(padded_at, np.uint16), (16,))
    for j in range(16):
        padded[j] = 0
    first = _take(block) * rows
    while first < N:
        for t in range(0, tiles, group):
            x, now = a[4] + 4 * LANES * I * t, min(group, tiles - t)
            for n in range(first, min(first + rows, N)):
                grad = a[5] + 4 * LANES * (N * t + n)
                for k in range(0, K, BLOCK):
                    size, here = min(BLOCK, K - k), a[3] + 2 * (K * n + k)
                    if size < BLOCK:
                        for j in range(size):
                            padded[j] = columns[n, k + j]
                        here = padded_at
                    _sampled(x, LANES * I, grad, LANES * N, now, here, memory)
                    for j in range(size):
                        out[n, k + j] = found[j] if t == 0 else out[n, k + j] + found[j]
        first = _take(block) * rows


def gather(block: Any) -> None:
    """out[p] = values[order[p]]. Block: counter, length, values, order (int32), out."""
    a = carray(block, (5,), np.int64)
    length = a[1]
    values = carray(_pointer(a[2], np.float32), (length,))
    order = carray(_pointer(a[3], np.uint32), (length,))
    out = carray(_pointer(a[4], np.float32), (length,))
    first = _take(block) * 16384
    while first < length:
        for p in range(first, min(first + 16384, length)):
            out[p] = values[order[p]]
        first = _take(block) * 16384
