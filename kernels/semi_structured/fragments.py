"""2:4 weights as the registers of `mma.sp`, so that every thread reads its part in pieces of 16 bytes.

The PTX instruction mma.sp m16n8k32 (bfloat16, float16) multiplies 16 neurons with 8 tokens over 32 inputs, of which it
keeps 16; lane g·4 + c of a warp holds rows g and g + 8 (PTX ISA, "Warp-level matrix fragments for sparse
mma.m16n8k32").

Legend of shape suffixes: R blocks of 16 neurons, S steps of 32 inputs, C chunks of 256 inputs.
"""

import torch
from torch import Tensor

ROWS, CHUNK = 16, 256  # neurons and inputs come in multiples of these
FLOATS = (torch.bfloat16, torch.float16)


def fits(neurons: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether a weight has whole blocks and chunks, of a dtype of the instruction."""
    return dtype in FLOATS and neurons % ROWS == 0 and inputs % CHUNK == 0


def fragments(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Packed 2:4 values [N, I/2] and places [N, I/8] -> int32 [R, S, 32 lanes, 4] and [R, C, 32 lanes, 4].

    The first has two values a number: register h·2 + u of a lane holds the kept inputs of the instruction's group
    q = h·4 + c, row g + 8·u of a step. The second has the places of 4 groups of row g (low half) and row g + 8:
    register p of lane g·4 + s·2 + c those of groups 4·c .. 4·c + 3 of step p·2 + s of a chunk, s being the
    instruction's selector.

    Group q of the instruction is group (q % 2)·4 + q // 2 of a step's 8 groups of 4 inputs: so a lane finds what it
    needs of x in 16 bytes of its own and 16 of its neighbour.
    """
    blocks, inputs = len(values) // ROWS, values.shape[1] * 2
    pairs = values.contiguous().view(torch.int32).view(blocks, 2, 8, inputs // 32, 2, 4)  # R u g S, group of x
    pairs = pairs.transpose(4, 5).reshape(blocks, 2, 8, inputs // 32, 2, 4)  # R u g S h c
    kept = pairs.permute(0, 3, 2, 5, 4, 1).reshape(blocks, inputs // 32, 32, 4)
    halves = torch.stack([places & 15, places >> 4], -1).int()  # 4 bits for each group
    halves = halves.view(blocks, 2, 8, inputs // 32, 2, 4).transpose(4, 5).reshape(-1, 4)
    shifts = torch.arange(0, 16, 4, device=places.device)
    sixteen = (halves << shifts).sum(1, dtype=torch.int32).view(blocks, 2, 8, inputs // CHUNK, 4, 2, 2)  # R u g C p s c
    joined = sixteen[:, 0] | sixteen[:, 1] << 16
    return kept, joined.permute(0, 2, 1, 4, 5, 3).reshape(blocks, inputs // CHUNK, 32, 4)
