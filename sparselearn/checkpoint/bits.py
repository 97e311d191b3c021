"""Masks as bits, and the kept values of a weight by them.

A mask is a flat bool array, or packed: bit b is bit b % 8 of byte b // 8, and bits that fill up the last byte are 0.
A value is the bits of a number, an unsigned integer, so that -0.0 and the payloads of NaN survive.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from sparselearn.errors import SparsityError

Array = npt.NDArray[np.unsignedinteger]
Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

BLOCK = 1 << 18  # entries; in shorter ones threads wait for each other's Python, longer ones leave the cache


def pack(mask: Mask) -> Array:
    """Bools -> bits."""
    return np.packbits(mask, bitorder="little")


def unpack(bits: Array, n: int) -> Mask:
    """The inverse of `pack`."""
    return np.unpackbits(bits, count=n, bitorder="little").view(np.bool_)


def check_bits(bits: Array, n: int, part: str) -> None:
    """Raises `SparsityError` where `pack` cannot have made them from n bools."""
    if n % 8 and bits[-1] >> n % 8:
        raise SparsityError(f"the bits that fill up its `{part}` must be 0; some are 1")


def count(bits: Array) -> int:
    """How many are 1."""
    whole = len(bits) // 8 * 8
    wide = np.frombuffer(bits[:whole], np.uint64)  # wherever it lies in a file
    return int(np.bitwise_count(wide).sum(dtype=np.int64)) + int(np.bitwise_count(bits[whole:]).sum(dtype=np.int64))


def _sparse_scan_is_slow(nnz: int, size: int) -> bool:
    # Where at most a tenth is True, numpy jumps from one to the next: faster below 4 %, else half as fast as its loop
    # over all entries. Further ones behind the block, which do not count, make it take that loop.
    return 0.04 * size < nnz < 0.11 * size


def _places(block: Mask, padded: Mask | None) -> Places:
    """Where the block is True. `padded` ends in Trues behind a whole block."""
    if padded is None or len(block) < BLOCK:
        return np.flatnonzero(block)
    padded[:BLOCK] = block
    return np.flatnonzero(padded)[: BLOCK - len(padded)]


def _padded(nnz: int, size: int) -> Mask | None:
    return np.ones(BLOCK + BLOCK // 8, np.bool_) if _sparse_scan_is_slow(nnz, size) else None


def gather(values: Array, mask: Mask, nnz: int) -> Array:
    """The values where the mask is True."""
    kept, at, padded = np.empty(nnz, values.dtype), 0, _padded(nnz, len(mask))
    for start in range(0, len(mask), BLOCK):
        found = _places(mask[start : start + BLOCK], padded)
        # "clip" is faster than "raise"
        values[start : start + BLOCK].take(found, out=kept[at : at + len(found)], mode="clip")
        at += len(found)
    return kept


def scatter(kept: Array, bits: Array, values: Array, per_byte: int = 0) -> None:
    """Write the kept values to the places in `values` whose bits are 1, and zeros to the others.

    `per_byte`: how many bits are 1 in every whole byte, where that is known; else 0.
    """
    at = 0
    for start, found in _of_bytes(bits, len(values), per_byte) if per_byte else _of_bits(bits, len(kept), len(values)):
        block = values[start : start + BLOCK]
        block[:] = 0
        block[found] = kept[at : at + len(found)]
        at += len(found)


def _of_bits(bits: Array, nnz: int, size: int, start: int = 0) -> Iterator[tuple[int, Places]]:
    """The start of each block, and the places in it whose bits are 1."""
    padded = _padded(nnz, size)
    for first in range(start, size, BLOCK):
        n = min(BLOCK, size - first)
        yield first, _places(unpack(bits[first // 8 : (first + BLOCK) // 8], n), padded)


def _of_bytes(bits: Array, size: int, per_byte: int) -> Iterator[tuple[int, Places]]:
    """The same, looked up byte by byte."""
    table = _table(per_byte)
    begins = np.repeat(np.arange(0, BLOCK, 8), per_byte)
    whole = size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        found = table.take(bits[start // 8 : (start + BLOCK) // 8], 0, mode="clip").reshape(-1)
        found += begins
        yield start, found
    yield from _of_bits(bits, 0, size, whole)


@cache
def _table(per_byte: int) -> Places:
    """[256, per_byte]: the places of the ones of a byte; of one with another number of them, zeros."""
    table = np.zeros((256, per_byte), np.intp)
    for byte in range(256):
        if byte.bit_count() == per_byte:
            table[byte] = [i for i in range(8) if byte >> i & 1]
    return table
