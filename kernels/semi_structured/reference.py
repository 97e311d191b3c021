"""n:m weights in plain torch: the definition of the packed layout and of every product; any device, any float dtype.

Of every m neighbouring inputs of a neuron n have a weight. `values` [N, K], K = I·n/m, holds the weights in row-major
order, as a checkpoint stores them. `places` [N, ceil(K·b/8)] (uint8) holds for each of them its place in its group, in
b = 2 bits for m <= 4 and b = 4 bits for m <= 16: the place of value k takes the bits b·k to b·k + b - 1 of its row, bit
i being bit i % 8 of byte i // 8; the bits that fill up the last byte are 0. Places ascend within a group. For 2:4 this
is the order of the PTX instruction `mma.sp` and of cuSPARSELt's documentation (a nibble for each group), before any
shuffling for a GPU.

Legend of shape suffixes: T tokens, N neurons, I inputs, K kept weights of a neuron, G groups of m, S masks of a tile.
"""

from functools import cache
from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearn.errors import SparsityError

LARGEST_M = 16


def place_bits(m: int) -> int:
    """Bits that a place takes: 2 or 4, so that a byte holds whole places.

    >>> place_bits(4), place_bits(8), place_bits(16)
    (2, 4, 4)
    """
    return 2 if m <= 4 else 4


def places_bytes(kept: int, m: int) -> int:
    """Bytes for the places of `kept` values of a row."""
    return -(-kept * place_bits(m) // 8)


def magnitude_mask(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """True for the n largest magnitudes of every m along the last dimension; of equals the first, NaN before all.

    >>> magnitude_mask(torch.tensor([[1., -3., 2., 2.]])).int()
    tensor([[0, 1, 1, 0]], dtype=torch.int32)
    """
    _check_pattern(weight, n, m)
    size = weight.abs().unflatten(1, (-1, m))
    size = torch.where(size.isnan(), torch.inf, size)
    first = size.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(-1, first, True).flatten(1)


LARGEST = 1e37  # magnitudes above it (and NaN) count as it, so that no sum of a tile overflows
PAIRS = tuple(combinations(range(4), 2))  # the six ways to keep two of four


@cache
def tile_masks() -> tuple[tuple[int, int, int, int], ...]:
    """The 90 masks of a 4×4 tile with two weights in each row and column: for each row its number in PAIRS."""
    return tuple(
        rows  # type: ignore[misc]  # product() does not say that it makes four
        for rows in product(range(6), repeat=4)
        if all(sum(column in PAIRS[row] for row in rows) == 2 for column in range(4))
    )


def transposable_mask(weight: Tensor) -> Tensor:
    """The 2:4 mask of W and of its transpose that keeps the largest sum of magnitudes of each 4×4 tile; of equals the
    first of `tile_masks`. Sums are formed in float32 as (row 0 + row 1) + (row 2 + row 3); float64 in itself.

    The optimum of arXiv 2102.08124, eq. 6, by comparing all masks, as `structures.TransposableNM(2, 4)` does.

    >>> mask = transposable_mask(torch.arange(16.).view(4, 4))
    >>> mask.int().sum(0).tolist(), mask.int().sum(1).tolist()
    ([2, 2, 2, 2], [2, 2, 2, 2])
    """
    _check_pattern(weight, 2, 4)
    if len(weight) % 4:
        raise SparsityError(
            f"A transposable 2:4 mask needs a multiple of 4 neurons; the weight has shape {list(weight.shape)}."
        )
    size = weight.abs()
    size = size.float() if size.itemsize < 4 else size
    size = torch.where(size < LARGEST, size, LARGEST)
    tiles = size.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2)  # [N/4, I/4, 4, 4]
    sums = torch.stack([tiles[..., a] + tiles[..., b] for a, b in PAIRS], -1)  # [N/4, I/4, 4, 6]
    chosen = torch.tensor(tile_masks(), device=weight.device)  # [S, 4]
    rows = [sums[..., row, :].index_select(-1, chosen[:, row]) for row in range(4)]
    best = ((rows[0] + rows[1]) + (rows[2] + rows[3])).argmax(-1)
    pairs = torch.tensor([[column in pair for column in range(4)] for pair in PAIRS], device=weight.device)
    return pairs[chosen][best].transpose(1, 2).reshape(weight.shape)


def pack(weight: Tensor, mask: Tensor, n: int = 2, m: int = 4) -> tuple[Tensor, Tensor]:
    """A weight [N, I] and its mask -> values [N, K], places; weights outside the mask are dropped.

    Raises:
        SparsityError: I is no multiple of m, or some group of the mask does not have exactly n.

    >>> values, places = pack(torch.tensor([[5., 0., 7., 0.]]), torch.tensor([[True, False, True, False]]))
    >>> values.tolist(), [bin(byte) for byte in places[0]]
    ([[5.0, 7.0]], ['0b1000'])
    """
    check_mask(mask, n, m)
    if mask.shape != weight.shape:
        raise SparsityError(f"The mask must have the weight's shape {list(weight.shape)}; it has {list(mask.shape)}.")
    columns = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices  # kept ones first, ascending
    columns = columns[:, : weight.shape[1] // m * n]
    return weight.gather(1, columns), join(columns % m, m)


def unpack(values: Tensor, places: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The dense weight [N, I], with zeros at the other places. Differentiable in values.

    >>> unpack(torch.tensor([[5., 7.]]), torch.tensor([[0b1000]], dtype=torch.uint8))
    tensor([[5., 0., 7., 0.]])
    """
    columns = columns_of(places, values.shape[1], n, m)
    return values.new_zeros(len(values), values.shape[1] // n * m).scatter(1, columns, values)


def gather(dense: Tensor, places: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The numbers of a matrix [N, I] at the places of the weights -> [N, K]."""
    return dense.gather(1, columns_of(places, dense.shape[1] // m * n, n, m))


def linear(
    x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None = None, n: int = 2, m: int = 4
) -> Tensor:  # fmt: skip
    """y[t, i'] = Σ_k values[i', k] · x[t, k // n · m + place k] + bias; x [T, I] -> [T, N].

    >>> linear(torch.tensor([[1., 2., 3., 4.]]), torch.tensor([[5., 7.]]), torch.tensor([[0b1000]], dtype=torch.uint8))
    tensor([[26.]])
    """
    return F.linear(x, unpack(values, places, n, m), bias)


def columns_of(places: Tensor, kept: int, n: int, m: int) -> Tensor:
    """The input of every value, [N, K] int64."""
    groups = torch.arange(kept, device=places.device) // n
    return split(places, kept, m) + groups * m


def join(places: Tensor, m: int) -> Tensor:
    """Places [N, K] -> bytes [N, ceil(K·b/8)]."""
    bits = place_bits(m)
    per_byte = 8 // bits
    padded: Tensor = F.pad(places, (0, -places.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    shifts = torch.arange(0, 8, bits, device=places.device)
    return (padded.long() << shifts).sum(-1).to(torch.uint8)


def split(joined: Tensor, kept: int, m: int) -> Tensor:
    """The inverse of `join`: bytes -> places [N, K] int64."""
    bits = place_bits(m)
    shifts = torch.arange(0, 8, bits, device=joined.device)
    return ((joined.long()[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :kept]


def transpose(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Values [I, N/2] and places of the transpose of a 2:4 weight.

    Raises:
        SparsityError: the transpose is not 2:4: some 4 neighbouring neurons do not have two weights at some input.
    """
    mask = unpack(torch.ones_like(values), places) > 0  # of the places: a weight may be zero
    return pack(unpack(values, places).T, mask.T)


def transpose_values(values: Tensor, places: Tensor, places_t: Tensor) -> Tensor:
    """The values alone of `transpose`, whose places are known: they stay while a fixed mask trains."""
    return gather(unpack(values, places).T, places_t)


# ---- what is refused -----------------------------------------------------------------------------------------


def check_mask(mask: Tensor, n: int, m: int) -> None:
    """Raises `SparsityError` where a mask [N, I] is not bool with exactly n True of every m inputs."""
    _check_pattern(mask, n, m)
    if mask.dtype != torch.bool:
        raise SparsityError(f"A mask must be bool, True = active; got {mask.dtype}.")
    wrong = (mask.unflatten(1, (-1, m)).sum(-1) != n).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        count = int(mask[row, group * m : group * m + m].sum())
        raise SparsityError(
            f"A {n}:{m} weight needs exactly {n} active weights of every {m} inputs; neuron {row} has {count} of the "
            f"inputs {group * m} to {group * m + m - 1} (shape {list(mask.shape)}; {len(wrong)} groups are wrong). "
            f"Train with `NM({n}, {m})`, or take `magnitude_mask`."
        )


def check_packed(values: Tensor, places: Tensor, n: int, m: int) -> None:
    """Raises `SparsityError` where values and places cannot be a packed weight. Kernels read where places point."""
    if not 0 < n < m <= LARGEST_M or values.ndim != 2 or not values.numel() or values.shape[1] % n:
        raise SparsityError(
            f"A packed n:m weight needs 0 < n < m <= {LARGEST_M} and values [N, I·n/m], none of them zero; got "
            f"{n}:{m} and {list(values.shape)}."
        )
    size = (len(values), places_bytes(values.shape[1], m))
    if places.dtype != torch.uint8 or places.shape != size or not values.is_floating_point():
        raise SparsityError(
            f"Packed {n}:{m} values {list(values.shape)} need to be floating-point and to come with places "
            f"{list(size)} of torch.uint8; got {values.dtype}, and {list(places.shape)} of {places.dtype}."
        )
    found = split(places, values.shape[1], m)
    groups = found.unflatten(1, (-1, n))
    if int(found.max()) >= m or not bool((groups[..., 1:] > groups[..., :-1]).all()):
        raise SparsityError(
            f"The places of a packed {n}:{m} weight must ascend in every group, below {m}; they do not. Make them with "
            "`pack`."
        )
    if not torch.equal(join(found, m), places):
        raise SparsityError("The bits that fill up the last byte of packed places must be 0; some are 1.")


def _check_pattern(weight: Tensor, n: int, m: int) -> None:
    if not 0 < n < m <= LARGEST_M:
        raise SparsityError(f"Packed n:m weights need 0 < n < m <= {LARGEST_M}; got {n}:{m}.")
    if weight.ndim != 2 or not weight.numel() or weight.shape[1] % m:
        raise SparsityError(
            f"A {n}:{m} weight must be a matrix [N, I], not empty, I a multiple of {m}; it has shape "
            f"{list(weight.shape)}."
        )
