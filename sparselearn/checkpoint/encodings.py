"""How a mask is stored. In every encoding the kept values follow one another in row-major order.

Here a mask is a flat bool array and a value the bits of a number, an unsigned integer, so that -0.0 and the payloads of
NaN survive. A weight of two or more dimensions is a matrix [R, C] of its first dimension by all others; any other is
one row. Bit b of a packed array is bit b % 8 of byte b // 8; the bits that fill up the last byte are 0.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sparselearn.checkpoint.bits import Array, Mask, check_bits, pack, unpack
from sparselearn.errors import SparsityError

Shape = tuple[int, ...]
Parts = dict[str, tuple[np.dtype[np.unsignedinteger], Shape]]  # component -> its dtype and shape

LONGEST_GROUP = 16  # m of packed n:m, whose table of patterns has 2^m entries
EXPANSION = 1024  # no encoding may claim more entries than this for each byte that it stores
BYTE: np.dtype[np.unsignedinteger] = np.dtype(np.uint8)


def matrix(shape: Shape) -> tuple[int, int]:
    """R and C."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def index_dtype(n: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type that can hold 0 to n - 1."""
    return np.dtype(np.min_scalar_type(max(n - 1, 0)))


def _from_rows(rows: npt.NDArray[np.int64], indices: Array, shape: Shape) -> Mask:
    """The mask with True at (rows[i], indices[i]), which must ascend."""
    columns = matrix(shape)[1]
    if len(indices) and int(indices.max()) >= columns:
        raise SparsityError(f"its `indices` must be below {columns}; one is {int(indices.max())}")
    positions = rows * columns + indices.astype(np.int64)
    if bool((positions[1:] <= positions[:-1]).any()):
        raise SparsityError("its `indices` must ascend in every row, without repeats; they do not")
    mask = np.zeros(math.prod(shape), np.bool_)
    mask[positions] = True
    return mask


@dataclass(frozen=True)
class Encoding:
    """One way to store a mask. The fields are what a reader must know beside shape, dtype and nnz."""

    name: ClassVar[str]

    def parts(self, shape: Shape, nnz: int) -> Parts:
        """The components that hold the mask."""
        raise NotImplementedError

    def values_shape(self, shape: Shape, nnz: int) -> Shape:
        """Of the component that holds the values."""
        return (nnz,)

    def problem(self, shape: Shape, nnz: int) -> str:
        """Why no weight of this shape and count can be stored so; empty where it can."""
        return ""

    def encode(self, mask: Mask, shape: Shape) -> dict[str, Array]:
        """The components; raises `SparsityError` where the mask is not of the pattern."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Mask:
        """The inverse of `encode`; raises `SparsityError` where the components are not what it could have made."""
        raise NotImplementedError

    def decode_bits(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Array:
        """What `decode` gives, packed; no bools are made where the components hold the bits in order."""
        return pack(self.decode(parts, shape, nnz))

    def per_byte(self, shape: Shape) -> int:
        """How many bits are 1 in every whole byte of the packed mask; 0 where they differ."""
        return 0

    def mask_bytes(self, shape: Shape, nnz: int) -> int:
        return sum(dtype.itemsize * math.prod(part) for dtype, part in self.parts(shape, nnz).values())

    def stored_bytes(self, shape: Shape, nnz: int, itemsize: int) -> int:
        """Of values and mask."""
        return self.mask_bytes(shape, nnz) + itemsize * math.prod(self.values_shape(shape, nnz))

    @property
    def structure(self) -> str:
        """What is known of the mask from its encoding, written as a structure."""
        return "Unstructured()"

    @property
    def parameters(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Bitmask(Encoding):
    """`bits`, one a weight."""

    name = "bitmask"

    def parts(self, shape: Shape, nnz: int) -> Parts:
        return {"bits": (BYTE, (-(-math.prod(shape) // 8),))}

    def encode(self, mask: Mask, shape: Shape) -> dict[str, Array]:
        return {"bits": pack(mask)}

    def decode(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Mask:
        return unpack(self.decode_bits(parts, shape, nnz), math.prod(shape))

    def decode_bits(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Array:
        check_bits(parts["bits"], math.prod(shape), "bits")
        return parts["bits"]


@dataclass(frozen=True)
class Dense(Bitmask):
    """All values, in the weight's shape; also `bits`, as above, where the mask is not full."""

    name = "dense"

    def values_shape(self, shape: Shape, nnz: int) -> Shape:
        return shape

    def parts(self, shape: Shape, nnz: int) -> Parts:
        return {} if nnz == math.prod(shape) else super().parts(shape, nnz)

    def encode(self, mask: Mask, shape: Shape) -> dict[str, Array]:
        return {} if mask.all() else super().encode(mask, shape)

    def decode_bits(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Array:
        return super().decode_bits(parts, shape, nnz) if parts else pack(np.ones(math.prod(shape), np.bool_))


@dataclass(frozen=True)
class Condensed(Encoding):
    """Constant fan-in: bits of the active `rows`, and `indices` [active rows, fan_in], the columns of their weights."""

    name = "condensed"
    fan_in: int

    @property
    def structure(self) -> str:
        return "ConstantFanIn()"

    def problem(self, shape: Shape, nnz: int) -> str:
        rows, columns = matrix(shape)
        if 0 < self.fan_in <= columns and nnz % self.fan_in == 0 and nnz // self.fan_in <= rows:
            return ""
        return f"{nnz} weights in a matrix of {rows} x {columns} are not {self.fan_in} in each of some rows"

    def values_shape(self, shape: Shape, nnz: int) -> Shape:
        return (nnz // self.fan_in, self.fan_in)

    def parts(self, shape: Shape, nnz: int) -> Parts:
        rows, columns = matrix(shape)
        return {"rows": (BYTE, (-(-rows // 8),)), "indices": (index_dtype(columns), self.values_shape(shape, nnz))}

    def encode(self, mask: Mask, shape: Shape) -> dict[str, Array]:
        rows, columns = matrix(shape)
        counts = mask.reshape(rows, columns).sum(1)
        if bool(((counts != 0) & (counts != self.fan_in)).any()):
            raise SparsityError(f"rows must hold {self.fan_in} weights or none; they hold up to {int(counts.max())}")
        indices = (np.flatnonzero(mask) % columns).astype(index_dtype(columns))
        return {"rows": pack(counts > 0), "indices": indices.reshape(-1, self.fan_in)}

    def decode(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Mask:
        rows = matrix(shape)[0]
        check_bits(parts["rows"], rows, "rows")
        active = np.flatnonzero(unpack(parts["rows"], rows))
        if len(active) != len(parts["indices"]):
            raise SparsityError(f"its `rows` must name {len(parts['indices'])} active rows; they name {len(active)}")
        return _from_rows(np.repeat(active, self.fan_in), parts["indices"].reshape(-1), shape)


@dataclass(frozen=True)
class Csr(Encoding):
    """`pointers` [R + 1], where the values of each row start, and the column `indices` of all values."""

    name = "csr"

    def parts(self, shape: Shape, nnz: int) -> Parts:
        rows, columns = matrix(shape)
        return {"pointers": (index_dtype(nnz + 1), (rows + 1,)), "indices": (index_dtype(columns), (nnz,))}

    def encode(self, mask: Mask, shape: Shape) -> dict[str, Array]:
        rows, columns = matrix(shape)
        positions = np.flatnonzero(mask)
        pointers = np.searchsorted(positions, np.arange(rows + 1) * columns)
        return {
            "pointers": pointers.astype(index_dtype(len(positions) + 1)),
            "indices": (positions % max(columns, 1)).astype(index_dtype(columns)),
        }

    def decode(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Mask:
        pointers = parts["pointers"].astype(np.int64)
        counts = np.diff(pointers)
        if pointers[0] != 0 or pointers[-1] != nnz or bool((counts < 0).any()):
            raise SparsityError(f"its `pointers` must ascend from 0 to {nnz}; they do not")
        return _from_rows(np.repeat(np.arange(len(counts)), counts), parts["indices"], shape)


@dataclass(frozen=True)
class Packed(Encoding):
    """n of every m along `dim`: `patterns`, for each group the number of its pattern in ceil(log2(C(m, n))) bits.

    Patterns are the C(m, n) integers of m bits of which n are 1 (bit i: whether weight i of the group is kept),
    numbered in ascending order. Groups follow one another with `dim` moved to the end. 2:4 takes 3 bits where the two
    positions take 4.
    """

    name = "packed_nm"
    n: int
    m: int
    dim: int

    @property
    def structure(self) -> str:
        return f"NM({self.n}, {self.m})"

    def problem(self, shape: Shape, nnz: int) -> str:
        if not 0 < self.n < self.m <= LONGEST_GROUP:
            return f"{self.n}:{self.m} is not a pattern with 0 < n < m <= {LONGEST_GROUP}"
        if not 0 <= self.dim < len(shape) or shape[self.dim] % self.m or nnz * self.m != math.prod(shape) * self.n:
            return f"{nnz} weights of shape {list(shape)} are not {self.n} of every {self.m} along dimension {self.dim}"
        return ""

    @property
    def _width(self) -> int:
        return (math.comb(self.m, self.n) - 1).bit_length()

    def parts(self, shape: Shape, nnz: int) -> Parts:
        return {"patterns": (BYTE, (-(-math.prod(shape) // self.m * self._width // 8),))}

    def encode(self, mask: Mask, shape: Shape) -> dict[str, Array]:
        moved = np.moveaxis(mask.reshape(shape), self.dim, -1).reshape(-1)
        whole = len(moved) // 64 * 64 if 8 % self.m == 0 else 0  # a byte of the mask is a whole number of groups
        fields = _fields(self.n, self.m).take(pack(moved[:whole]).reshape(-1, 8))
        bits = 8 // self.m * self._width
        words = np.zeros(len(fields), np.uint64)
        for i in range(8):
            words |= fields[:, i].astype(np.uint64) << np.uint64(bits * i)
        numbers = _numbers(self.n, self.m).take(_join(moved[whole:].reshape(-1, self.m)))
        if bool((fields == _NONE).any()) or bool((numbers == len(_patterns(self.n, self.m))).any()):
            raise SparsityError(f"every {self.m} weights along dimension {self.dim} must hold {self.n}; some do not")
        head = words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
        return {"patterns": np.concatenate([head, pack(_split(numbers, self._width).reshape(-1))])}

    def decode(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Mask:
        mask = unpack(self._in_groups(parts["patterns"], math.prod(shape)), math.prod(shape))
        moved = [length for dim, length in enumerate(shape) if dim != self.dim] + [shape[self.dim]]
        return np.ascontiguousarray(np.moveaxis(mask.reshape(moved), -1, self.dim)).reshape(-1)

    def decode_bits(self, parts: Mapping[str, Array], shape: Shape, nnz: int) -> Array:
        if self.dim == len(shape) - 1:  # nothing was moved
            return self._in_groups(parts["patterns"], math.prod(shape))
        return super().decode_bits(parts, shape, nnz)

    def per_byte(self, shape: Shape) -> int:
        return 8 // self.m * self.n if 8 % self.m == 0 and self.dim == len(shape) - 1 else 0

    def _in_groups(self, stored: Array, size: int) -> Array:
        """The bits of the mask, with `dim` at its end."""
        whole = size // 64 if 8 % self.m == 0 else 0
        bits = 8 // self.m * self._width
        eights = np.zeros((whole, 8), np.uint8)
        eights[:, :bits] = stored[: whole * bits].reshape(whole, bits)
        words = eights.view("<u8").reshape(-1)
        last = np.uint64((1 << bits) - 1)
        fields = np.empty((whole, 8), np.uint8)
        for i in range(8):
            fields[:, i] = words >> np.uint64(bits * i) & last
        head = _bytes_of_fields(self.n, self.m).take(fields).reshape(-1)
        groups = (size - 64 * whole) // self.m
        check_bits(stored[whole * bits :], groups * self._width, "patterns")
        numbers = _join(unpack(stored[whole * bits :], groups * self._width).reshape(groups, self._width))
        patterns = _patterns(self.n, self.m)
        if (whole and not int(head.min())) or (groups and int(numbers.max()) >= len(patterns)):
            raise SparsityError(f"its `patterns` must be below {len(patterns)}; some are not")
        return np.concatenate([head, pack(_split(patterns, self.m).take(numbers, 0).reshape(-1))])


def _join(bits: Mask) -> Array:
    """Bools [G, up to 16] -> integers [G]."""
    width = bits.shape[1]
    numbers: Array = np.zeros(len(bits), np.uint8 if width <= 8 else np.uint16)
    for i in range(width):
        numbers |= bits[:, i].astype(numbers.dtype, copy=False) << numbers.dtype.type(i)
    return numbers


def _split(numbers: Array, width: int) -> Mask:
    """Integers [G] -> bools [G, width]."""
    bits = np.empty((len(numbers), width), np.bool_)
    for i in range(width):
        bits[:, i] = numbers >> i & 1
    return bits


_NONE = 255  # no field of eight entries is as large


@cache
def _fields(n: int, m: int) -> Array:
    """A byte of the mask -> the pattern numbers of its groups side by side; `_NONE` where one is no pattern. m | 8."""
    numbers, width = _numbers(n, m), (math.comb(m, n) - 1).bit_length()
    fields = np.zeros(256, np.uint8)
    every = np.arange(256)
    for i in range(8 // m):
        number = numbers[every >> m * i & (1 << m) - 1]
        fields = np.where((number == len(_patterns(n, m))) | (fields == _NONE), _NONE, fields | number << width * i)
    found: Array = fields.astype(np.uint8)
    return found


@cache
def _bytes_of_fields(n: int, m: int) -> Array:
    """The inverse of `_fields`; 0, which no byte of a mask is, for what is no field."""
    fields = _fields(n, m)
    known = np.flatnonzero(fields != _NONE)
    entries = np.zeros(256, np.uint8)
    entries[fields[known]] = known
    return entries


@cache
def _patterns(n: int, m: int) -> Array:
    every = np.arange(1 << m, dtype=index_dtype(1 << m))
    patterns: Array = every[np.bitwise_count(every) == n]
    return patterns


@cache
def _numbers(n: int, m: int) -> Array:
    """Pattern -> its number; C(m, n) for what is no pattern."""
    patterns = _patterns(n, m)
    numbers: Array = np.full(1 << m, len(patterns), index_dtype(len(patterns) + 1))
    numbers[patterns] = np.arange(len(patterns))
    return numbers


KINDS: dict[str, type[Encoding]] = {kind.name: kind for kind in (Dense, Bitmask, Condensed, Csr, Packed)}


def _packed(mask: Mask, shape: Shape, nnz: int) -> Packed | None:
    """The n:m pattern of the mask, with the shortest groups."""
    n_entries = mask.size
    for dim in (1, 0)[-len(shape) :] if shape else ():
        for m in range(2, LONGEST_GROUP + 1):
            if nnz * m % n_entries or not 0 < nnz < n_entries or shape[dim] % m:
                continue
            lines = np.atleast_2d(np.moveaxis(mask.reshape(shape), dim, -1))
            n = nnz * m // n_entries
            # A few groups tell most masks that only happen to have the count.
            if all(_every_group_has(n, m, part) for part in (lines[:1], lines)):
                return Packed(n, m, dim)
    return None


def _every_group_has(n: int, m: int, lines: Mask) -> bool:
    """Whether n of every m are True along the last dimension, whose length m divides."""
    if 8 % m == 0 and lines.size % 8 == 0:  # a byte is a whole number of groups
        return not bool((_fields(n, m) == _NONE).take(pack(lines.reshape(-1))).any())
    counts = lines[..., ::m].astype(np.uint8)  # `sum` is slow over dimensions as short as m
    for i in range(1, m):
        counts += lines[..., i::m]
    return bool((counts == n).all())


def _condensed(mask: Mask, shape: Shape, nnz: int) -> Condensed | None:
    counts = mask.reshape(matrix(shape)).sum(1)
    fan_in = int(counts.max()) if nnz else 0
    return Condensed(fan_in) if fan_in and nnz == fan_in * np.count_nonzero(counts) else None


def choose(mask: Mask, shape: Shape, nnz: int, itemsize: int, kind: str | None = None) -> Encoding:
    """The encoding of this kind, or of all kinds that with the fewest bytes.

    Raises:
        SparsityError: the mask is not of the pattern that this kind stores.
    """
    fitting: list[Encoding] = []
    if kind in (None, "dense") and (kind or nnz == mask.size):
        return Dense()
    if kind in (None, "packed_nm") and (packed := _packed(mask, shape, nnz)):
        fitting.append(packed)
    if kind in (None, "bitmask"):
        fitting.append(Bitmask())
    smallest = min((e.mask_bytes(shape, nnz) for e in fitting), default=math.inf)
    if nnz * index_dtype(matrix(shape)[1]).itemsize < smallest:  # otherwise the indices alone are larger
        if kind in (None, "condensed") and (condensed := _condensed(mask, shape, nnz)):
            fitting.append(condensed)
        if kind in (None, "csr"):
            fitting.append(Csr())
    fitting = [e for e in fitting if mask.size <= EXPANSION * e.stored_bytes(shape, nnz, itemsize)]
    if not fitting:
        raise SparsityError(
            f"its mask (shape {list(shape)}, {nnz} active) is not of the pattern that '{kind}' stores, or has more "
            f"than {EXPANSION} entries for each byte stored"
        )
    return min(fitting, key=lambda e: e.mask_bytes(shape, nnz))
