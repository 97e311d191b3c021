"""Starts the Triton kernels of condensed layers: block sizes and grids."""

import torch
import triton
from torch import Tensor

from sparselearn.kernels.condensed import triton_kernels as kernels
from sparselearn.kernels.devices import on_its_device
from sparselearn.kernels.grouped_fan_in.launch import Blocks, feature_major, tuned

ONE_TOKEN = (  # candidates for tuning: neurons, weights, warps (stages are not used)
    Blocks(4, 256, 4, 1), Blocks(2, 512, 4, 1), Blocks(8, 128, 4, 1), Blocks(16, 64, 4, 1), Blocks(16, 32, 4, 1),
    Blocks(1, 512, 4, 1), Blocks(1, 1024, 4, 1), Blocks(4, 512, 8, 1),
)  # fmt: skip
FEW_TOKENS = (
    Blocks(4, 64, 4, 1), Blocks(2, 64, 4, 1), Blocks(8, 32, 4, 1), Blocks(2, 128, 4, 1), Blocks(4, 128, 8, 1),
    Blocks(1, 128, 4, 1), Blocks(16, 16, 4, 1),
)  # fmt: skip


def blocks_for(values: Tensor, tokens: int) -> Blocks:
    """Measured blocks, or those that were best on an H100 in the prototype's sweep."""
    if (measured := tuned("condensed", values[:, None], tokens)) is not None:
        return measured
    if tokens > 1:
        return FEW_TOKENS[0]
    fan_in = values.shape[1]
    return ONE_TOKEN[0] if fan_in > 128 else ONE_TOKEN[2] if fan_in > 64 else ONE_TOKEN[3 if fan_in > 32 else 4]


@on_its_device
def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, blocks: Blocks | None = None
) -> Tensor:  # fmt: skip
    """`reference.linear` for at most 16 tokens; values and indices [N, K] contiguous."""
    tokens, (neurons, fan_in) = len(x), values.shape
    out = torch.empty((tokens, neurons), dtype=x.dtype, device=x.device)
    blocks = blocks or blocks_for(values, tokens)
    if tokens > 8 and x.stride(0) != 1:
        x = feature_major(x)  # the tokens of an input are one piece of memory then
    kernels.few_tokens_kernel[(triton.cdiv(neurons, blocks.tokens),)](
        x, values, indices, bias, out, tokens, neurons, fan_in, *x.stride(), T=triton.next_power_of_2(tokens),
        BN=blocks.tokens, BK=blocks.inputs, HAS_BIAS=bias is not None, NARROW=indices.itemsize == 2,
        num_warps=blocks.warps,
    )  # fmt: skip
    return out


@on_its_device
def grad_values(grad: Tensor, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """`reference.grad_values` in the dtype of values; any number of tokens."""
    out = torch.empty(values.shape, dtype=values.dtype, device=x.device)
    tokens, (neurons, fan_in) = len(x), values.shape
    if tokens > 8 and x.stride(0) != 1:
        x = feature_major(x)
    block = 64 if tokens > 16 else 128
    kernels.sampled_gradient_kernel[(neurons * triton.cdiv(fan_in, block),)](
        grad, x, indices, out, tokens, fan_in, *grad.stride(), *x.stride(),
        T=min(64, triton.next_power_of_2(tokens)), BK=block, NARROW=indices.itemsize == 2, num_warps=4,
    )  # fmt: skip
    return out
