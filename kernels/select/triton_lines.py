"""A Triton kernel for the highest of every short line: N:M masks, chosen anew in every step, in one pass."""

# Parameters of kernels are pointers and numbers of the compiler; Python types say nothing of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparselearn.kernels.devices import on_its_device

BLOCK = 256


@triton.jit
def number(pointer, inside):
    x = tl.load(pointer, inside, 0)
    return x if x.dtype == tl.float64 else x.to(tl.float32)  # the interpreter compares the bits of bfloat16


@triton.jit
def lines_kernel(score_ptr, mask_ptr, lines, stride, K: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    """Line L has its M numbers `stride` apart, from ⌊L / stride⌋·stride·M + L mod stride on."""
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = line < lines
    start = line // stride * stride * M + line % stride
    for j in tl.static_range(M):
        mine = number(score_ptr + start + j * stride, inside)
        ahead = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(M):  # a number is read M times, from the L1 cache after the first
            other = number(score_ptr + start + i * stride, inside)
            if i < j:  # ties go to the lower index
                ahead += 1 - (mine > other).to(tl.int32)
            if i > j:
                ahead += (other > mine).to(tl.int32)
        tl.store(mask_ptr + start + j * stride, ahead < K, inside)


@on_its_device
def highest(score: Tensor, k: int) -> Tensor:
    """The mask lies in memory as the score does, which is copied where it has gaps."""
    mask = torch.empty_like(score, dtype=torch.bool)
    if mask.stride() != score.stride():
        score = score.contiguous()
        mask = torch.empty_like(score, dtype=torch.bool)
    size = score.shape[-1]
    lines = score.numel() // size
    stride = score.stride(-1) if size > 1 else 1
    lines_kernel[(triton.cdiv(lines, BLOCK),)](score, mask, lines, stride, K=k, M=size, BLOCK=BLOCK)
    return mask
