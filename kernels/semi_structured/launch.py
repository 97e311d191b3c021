"""Starts the Triton kernels for n:m weights: block sizes, grids, and what each kernel takes for granted."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparselearn.kernels import crossover
from sparselearn.kernels.devices import on_its_device
from sparselearn.kernels.semi_structured import fragments, reference
from sparselearn.kernels.semi_structured import triton_kernels as kernels

_MASKS = reference.tile_masks()
_BITS = tuple(
    sum(1 << 4 * row + column for row, pair in enumerate(mask) for column in reference.PAIRS[pair]) for mask in _MASKS
)


class Blocks(NamedTuple):
    """The work of one program of `gemv`; with `kept` 0 by the kernel of `gluon_gemv`, see `cells_fit`."""

    neurons: int
    kept: int
    warps: int


ONE_TOKEN = (  # candidates for tuning; the first is taken without it
    Blocks(4, 256, 4), Blocks(2, 512, 4), Blocks(8, 128, 4), Blocks(1, 1024, 4), Blocks(16, 32, 4),
)  # fmt: skip
CELLS = (Blocks(4, 0, 2), Blocks(8, 0, 2), Blocks(4, 0, 4), Blocks(8, 0, 1), Blocks(4, 0, 1), Blocks(8, 0, 4))
FEW_TOKENS = (
    Blocks(4, 64, 4), Blocks(2, 128, 4), Blocks(8, 32, 4), Blocks(2, 64, 4), Blocks(4, 128, 8), Blocks(1, 256, 4),
    Blocks(8, 128, 8),
)  # fmt: skip


def tuning_key(values: Tensor, n: int, m: int, tokens: int) -> tuple[object, ...]:
    """Token counts of one power of two share their blocks."""
    dtype = str(values.dtype).removeprefix("torch.")
    return ("nm_gemv", n, m, *values.shape, dtype, triton.next_power_of_2(tokens))


def blocks_for(values: Tensor, n: int, m: int, tokens: int) -> Blocks:
    """The blocks that were measured best on this GPU, see `kernels.crossover`; else the first candidate (a guess)."""
    found = crossover.table().blocks.get(tuning_key(values, n, m, tokens))
    return Blocks(*found) if found is not None else (ONE_TOKEN if tokens == 1 else FEW_TOKENS)[0]


def cells_fit(x: Tensor, values: Tensor, places: Tensor, n: int, m: int) -> bool:
    """Whether one token can be computed from cells of 8 kept weights, whose pieces are read whole."""
    return (
        len(x) == 1 and n in (1, 2) and m in (4, 8, 16) and values.itemsize == 2 and values.shape[1] % 8 == 0
        and values.data_ptr() % 16 == 0 and places.data_ptr() % 4 == 0
    )  # fmt: skip


def gemv_candidates(x: Tensor, values: Tensor, places: Tensor, n: int, m: int) -> tuple[Blocks, ...]:
    if len(x) > 1:
        return FEW_TOKENS
    return CELLS + ONE_TOKEN[:2] if cells_fit(x, values, places, n, m) else ONE_TOKEN


@on_its_device
def pack(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """2:4 values and places of a contiguous weight [N, I], I a multiple of 8, by magnitude or by a bool mask [N, I]
    that is 2:4 (not looked at)."""
    neurons, inputs = weight.shape
    values, places = _empty(weight, neurons, inputs)
    rows, groups = 16, 64
    kernels.pack_kernel[(triton.cdiv(neurons, rows), triton.cdiv(inputs, 4 * groups))](
        weight, None if mask is None else mask.view(torch.uint8), values, places, neurons, inputs // 4,
        BN=rows, BG=groups, HAS_MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    return values, places


@on_its_device
def pack_transposable(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and places of the best transposable 2:4 weight, and of its transpose; N and I multiples of 8."""
    neurons, inputs = weight.shape
    out = (*_empty(weight, neurons, inputs), *_empty(weight, inputs, neurons))
    rows, columns = 8, 32  # tiles: 4 rows and 4 columns each
    kernels.pack_tiles_kernel[(triton.cdiv(neurons, 4 * rows), triton.cdiv(inputs, 4 * columns))](
        weight, *out, neurons, inputs, TN=rows, TI=columns, MASKS=_MASKS, BITS=_BITS, LARGEST=reference.LARGEST,
        num_warps=4,
    )  # fmt: skip
    return out


def _empty(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    values = torch.empty((rows, columns // 2), dtype=like.dtype, device=like.device)
    return values, torch.empty((rows, columns // 8), dtype=torch.uint8, device=like.device)


@on_its_device
def gemv(
    x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, n: int, m: int, blocks: Blocks | None = None
) -> Tensor:
    """`reference.linear` for few tokens (a power of two above them should be 8 or less)."""
    tokens, (neurons, kept) = len(x), values.shape
    out = torch.empty((tokens, neurons), dtype=x.dtype, device=x.device)
    blocks = blocks or blocks_for(values, n, m, tokens)
    if not blocks.kept and cells_fit(x, values, places, n, m):
        _gemv_of_cells(x, values, places, bias, out, n, m, blocks)
        return out
    blocks = blocks if blocks.kept else ONE_TOKEN[0]
    if tokens > 1 and x.stride(0) != 1:
        x = x.T.contiguous().T  # the tokens of an input are one piece of memory then
    kernels.gemv_kernel[(triton.cdiv(neurons, blocks.neurons),)](
        x, values, places, bias, out, tokens, neurons, kept, places.shape[1], *x.stride(),
        n=n, m=m, PLACE_BITS=reference.place_bits(m), T=triton.next_power_of_2(tokens), BN=blocks.neurons,
        BK=blocks.kept, HAS_BIAS=bias is not None, num_warps=blocks.warps,
    )  # fmt: skip
    return out


@on_its_device
def _gemv_of_cells(
    x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, out: Tensor, n: int, m: int, blocks: Blocks
) -> None:  # fmt: skip
    from sparselearn.kernels.semi_structured import gluon_gemv

    x, bits = x.contiguous(), reference.place_bits(m)
    x = (x.clone() if x.data_ptr() % 16 else x).view(torch.int32)
    gluon_gemv.gemv_kernel[(triton.cdiv(len(values), blocks.neurons),)](
        x, values, places.view(torch.int16 if bits == 2 else torch.int32), bias, out, len(values),
        values.shape[1] // 8, n=n, m=m, PLACE_BITS=bits, BN=blocks.neurons, BW=blocks.warps,
        HAS_BIAS=bias is not None, num_warps=blocks.warps,
    )  # fmt: skip


@on_its_device
def unpack(values: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """The dense weight [N, I]."""
    neurons, inputs = len(values), values.shape[1] // n * m
    out = torch.empty((neurons, inputs), dtype=values.dtype, device=values.device)
    kernels.unpack_kernel[(triton.cdiv(neurons, 4), triton.cdiv(inputs, 256))](
        values, places, out, neurons, inputs, places.shape[1],
        n=n, m=m, PLACE_BITS=reference.place_bits(m), BN=4, BI=256, num_warps=4,
    )  # fmt: skip
    return out


@on_its_device
def gather(dense: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """The numbers of a contiguous matrix [N, I] at the places of the weights -> [N, K]."""
    neurons, kept = len(dense), dense.shape[1] // m * n
    out = torch.empty((neurons, kept), dtype=dense.dtype, device=dense.device)
    kernels.gather_kernel[(triton.cdiv(neurons, 4), triton.cdiv(kept, 256))](
        dense, places, out, neurons, kept, places.shape[1],
        n=n, m=m, PLACE_BITS=reference.place_bits(m), BN=4, BK=256, num_warps=4,
    )  # fmt: skip
    return out


@on_its_device
def transpose_values(values: Tensor, places: Tensor, places_t: Tensor) -> Tensor:
    """`reference.transpose_values`; N and I multiples of 8."""
    neurons, inputs = len(values), values.shape[1] * 2
    out = torch.empty((inputs, neurons // 2), dtype=values.dtype, device=values.device)
    kernels.transpose_values_kernel[(triton.cdiv(inputs, 64), triton.cdiv(neurons // 2, 32))](
        values, places, places_t, out, neurons, inputs, BI=64, BK=32, num_warps=4
    )
    return out


class DecodeBlocks(NamedTuple):
    """The work of one program of `decode`: blocks of 16 neurons, and warps among which the inputs are shared.

    With stages up to 1 a warp holds a chunk of the weight in registers, with 1 that of the inputs, too. With 2 and more
    chunks wait in so many buffers of shared memory, and `rows` groups of such warps share the blocks.
    """

    blocks: int
    warps: int
    rows: int = 1
    stages: int = 0


_DECODE = {  # groups of 8 tokens -> candidates, the likeliest first
    1: ((1, 8, 1, 1), (1, 16), (1, 4, 1, 1), (2, 4, 1, 1), (2, 4, 2, 3), (2, 8), (1, 8, 1, 2), (2, 8, 2, 2)),
    2: ((1, 8), (2, 4), (2, 4, 2, 3), (1, 16), (1, 4), (4, 2, 4, 3), (2, 8), (4, 4, 4, 2), (1, 8, 1, 1), (2, 4, 1, 1)),
    4: ((1, 8), (2, 4), (4, 2, 4, 2), (2, 4, 2, 2), (1, 4)),
    8: ((1, 4), (2, 4), (4, 2, 4, 2), (4, 1, 4, 3), (2, 2, 2, 2)),
}
DECODE = {groups: tuple(DecodeBlocks(*numbers) for numbers in found) for groups, found in _DECODE.items()}


def token_groups(tokens: int) -> int:
    """Groups of 8 tokens that a program computes, a power of two."""
    return int(triton.next_power_of_2(triton.cdiv(tokens, 8)))


def decode_options(blocks: DecodeBlocks, groups: int) -> dict[str, int]:
    """What the compiler is told. 16 warps need few registers each, lest a multiprocessor hold one program alone."""
    limit = {"maxnreg": 64} if blocks == DecodeBlocks(1, 16) and groups == 1 else {}
    return {"num_warps": blocks.warps * blocks.rows} | limit


def decode_key(kept: Tensor, dtype: torch.dtype, tokens: int) -> tuple[object, ...]:
    name = str(dtype).removeprefix("torch.")
    return ("sp24_decode", kept.shape[0] * fragments.ROWS, kept.shape[1] * 32, name, triton.next_power_of_2(tokens))


def decode_candidates(kept: Tensor, tokens: int) -> list[DecodeBlocks]:
    """Those whose blocks divide a weight and whose warps find work; without a measurement the first is taken."""
    rows, chunks = kept.shape[0], kept.shape[1] // 8
    found = [c for c in DECODE[token_groups(tokens)] if rows % c.blocks == 0 and c.warps < 2 * chunks]
    return found or [DecodeBlocks(1, 1)]


@on_its_device
def decode(
    x: Tensor, kept: Tensor, places: Tensor, bias: Tensor | None, blocks: DecodeBlocks | None = None
) -> Tensor:  # fmt: skip
    """x [T, I] · Wᵀ + bias by `mma.sp`; kept and places from `fragments`; at most 64 tokens."""
    from sparselearn.kernels.semi_structured import gluon_kernels

    tokens, neurons = len(x), kept.shape[0] * fragments.ROWS
    out = torch.empty((tokens, neurons), dtype=x.dtype, device=x.device)
    if blocks is None:
        measured = crossover.table().blocks.get(decode_key(kept, x.dtype, tokens))
        blocks = decode_candidates(kept, tokens)[0] if measured is None else DecodeBlocks(*measured)
    x = x.contiguous()
    x = (x.clone() if x.data_ptr() % 16 else x).view(torch.int32)
    arguments = (kept, places, x, bias, out, tokens, neurons, x.shape[1] * 2)
    groups = token_groups(tokens)
    constants = {
        "BR": blocks.blocks, "BT": groups, "BW": blocks.warps, "EVEN": kept.shape[1] // 8 % blocks.warps == 0,
        "STEPS": gluon_kernels.instructions(out.dtype), "HAS_BIAS": bias is not None,
        **decode_options(blocks, groups),
    }  # fmt: skip
    grid = (len(kept) // blocks.blocks,)
    if blocks.stages < 2:
        gluon_kernels.decode_kernel[grid](*arguments, 0, X_TOO=blocks.stages == 1, **constants)
    else:
        gluon_kernels.staged_decode_kernel[grid](*arguments, RW=blocks.rows, STAGES=blocks.stages, **constants)
    return out
