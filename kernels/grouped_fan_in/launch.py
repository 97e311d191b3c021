"""Starts the Triton kernels: block sizes, grids, and what each kernel takes for granted.

Activations have the shape [T, ·]; `by_feature` says that their memory is laid out by feature, [·, T], in rows of a
multiple of 16 tokens. Nothing here is differentiable; `ops.py` is the door.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparselearn.kernels import crossover
from sparselearn.kernels.devices import on_its_device
from sparselearn.kernels.grouped_fan_in import triton_kernels as kernels
from sparselearn.kernels.grouped_fan_in.layout import activations

# With more, and V = 32, triton 3.6 writes wrong addresses (bits of the thread's number stray into them) for at most 16
# token-major tokens and a fan-in that is no multiple of 16: "misaligned address" on an H200. Triton 3.8 did not.
MOST_STAGES_FLOAT32 = 4
PARTIAL_BYTES = 24 * 2**20  # of partial sums at a time in `grad_input_collected`: they should stay in the L2 cache


class Blocks(NamedTuple):
    """The shape of one program's work. `swap` and `ahead` are read by the forward kernel alone."""

    tokens: int
    inputs: int
    warps: int
    stages: int
    swap: bool = False
    ahead: bool = False


FORWARD = (  # candidates for tuning, the widest first
    Blocks(256, 32, 8, 4), Blocks(256, 64, 8, 3), Blocks(256, 32, 8, 4, True), Blocks(256, 64, 8, 3, True),
    *(Blocks(256, *rest, swap, True) for swap in (False, True)
      for rest in ((64, 8, 2), (64, 8, 3), (32, 8, 4), (32, 8, 3), (32, 4, 4), (64, 4, 2))),
    Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 4), Blocks(128, 128, 8, 3), Blocks(128, 64, 4, 3, True),
    Blocks(128, 64, 8, 3, True), Blocks(128, 32, 4, 4, True), Blocks(128, 64, 4, 4, True),
    *(Blocks(128, *rest, swap, True) for swap in (False, True)
      for rest in ((64, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 4), (32, 4, 6), (128, 4, 2), (128, 8, 3), (64, 8, 3))),
    Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3, True), Blocks(64, 64, 4, 5, True), Blocks(64, 64, 4, 4, False, True),
    Blocks(64, 64, 4, 4, True, True), Blocks(64, 128, 4, 3, True, True),
    Blocks(16, 64, 2, 5), Blocks(16, 64, 4, 5), Blocks(16, 128, 4, 4), Blocks(16, 64, 2, 5, False, True),
    Blocks(16, 128, 4, 4, False, True),
)  # fmt: skip
GRAD_VALUES = (
    Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 4), Blocks(64, 128, 4, 3), Blocks(64, 128, 8, 4), Blocks(128, 64, 4, 3),
    Blocks(128, 64, 8, 3), Blocks(128, 128, 8, 3), Blocks(64, 128, 4, 4), Blocks(32, 64, 4, 4),
    Blocks(64, 128, 4, 5), Blocks(128, 128, 8, 4), Blocks(128, 128, 4, 3),
)  # fmt: skip
COPY = (Blocks(64, 64, 4, 1), Blocks(128, 64, 8, 1), Blocks(128, 64, 4, 1), Blocks(64, 128, 8, 1), Blocks(64, 32, 2, 1))


def tuning_key(kernel: str, values: Tensor, tokens: int) -> tuple[object, ...]:
    """Token counts of one power of two share their blocks."""
    return (kernel, *values.shape, crossover.dtype_name(values.dtype), max(tokens - 1, 1).bit_length())


def tuned(kernel: str, values: Tensor, tokens: int) -> Blocks | None:
    """The blocks that were measured best on this GPU; see `kernels.crossover`."""
    found = crossover.table().blocks.get(tuning_key(kernel, values, tokens))
    return None if found is None else Blocks(*found)


def forward_blocks(values: Tensor, tokens: int) -> Blocks:
    """Measured blocks, or those that were best at 4096² and 90 %: on an H200 (bf16), else in the prototype's sweep."""
    if (measured := tuned("forward", values, tokens)) is not None:
        return measured
    group = values.shape[1]
    if tokens <= 16:
        best = Blocks(16, 64, 2 if group < 64 else 4, 5)
    elif tokens <= 64:
        best = Blocks(64, 64, 4, 3, group > 8)
    elif group in (16, 32, 64) and values.itemsize == 2:
        best = Blocks(256, 64, 8, 2, True, True) if group == 32 and tokens > 128 else Blocks(128, 64, 4, 2, True, True)
    elif group == 32:
        best = Blocks(128, 32, 4, 4, True)
    else:
        best = Blocks(128, 64, 4, 3, group == 16)
    return best._replace(inputs=32, stages=min(best.stages, MOST_STAGES_FLOAT32)) if values.itemsize == 4 else best


def copy_blocks(dtype: torch.dtype) -> Blocks:
    """Of the transposing copy."""
    found = crossover.table().blocks.get(("copy", str(dtype).removeprefix("torch.")))
    return COPY[0] if found is None else Blocks(*found)


def grad_blocks(values: Tensor, tokens: int) -> Blocks:
    if (measured := tuned("grad_values", values, tokens)) is not None:
        return measured
    return Blocks(32, 64, 4, 3) if values.itemsize == 4 else Blocks(64, 128, 4, 3)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as torch's own matrix products are."""
    return "tf32" if crossover.dtype_name(dtype) == "tf32" else "ieee"


def is_wide(*tensors: Tensor) -> bool:
    """Whether places in one of them need more than 31 bits."""
    return any(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= 2**31 for t in tensors)


def _readable(x: Tensor) -> int:
    """How many tokens of every input may be read: T, rounded up to 16 where the memory is there."""
    tokens, inputs = x.shape
    limit = -(-tokens // 16) * 16
    end = x.storage_offset() + (inputs - 1) * x.stride(1) + limit
    inside = x.stride(0) == 1 and x.stride(1) >= limit and end * x.itemsize <= x.untyped_storage().nbytes()
    return limit if inside else tokens


def _padded(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The same layer with fan-in a multiple of 16, so that its rows are aligned and can be read in wide pieces.

    What is added is zero times the last input of the group, which the group reads anyway: a NaN elsewhere stays there.
    """
    missing = -values.shape[2] % 16
    if not missing:
        return values, indices
    last = indices[:, -1:].expand(-1, missing)
    return torch.nn.functional.pad(values, (0, missing)), torch.cat([indices, last], 1)


@on_its_device
def forward(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out: Tensor, activation: str = "none",
    blocks: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """The product of `reference.linear` into `out` [T, N]; x [T, I], values [G, V, K] contiguous, indices [G, K]."""
    groups, group, fan_in = values.shape
    tokens = len(x)
    if tokens == 0:
        return out
    blocks = blocks or forward_blocks(values, tokens)
    if tokens > 16:
        values, indices = _padded(values, indices)
        fan_in = values.shape[2]
    limit = _readable(x)
    kernels.forward_kernel[(groups * triton.cdiv(tokens, blocks.tokens),)](
        x, values, indices, bias, out, tokens, limit, groups, fan_in, *x.stride(), *out.stride(),
        V=group, BT=blocks.tokens, BK=blocks.inputs, SWAP=blocks.swap, STAGES=blocks.stages,
        AHEAD=blocks.ahead, ACTIVATION=activation, HAS_BIAS=bias is not None,
        EVEN=fan_in % blocks.inputs == 0 and tokens % blocks.tokens == 0,
        NARROW=indices.itemsize == 2, WIDE=is_wide(x, out), PRECISION=precision(x.dtype), num_warps=blocks.warps,
    )  # fmt: skip
    return out


@on_its_device
def grad_values(grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, blocks: Blocks | None = None) -> Tensor:
    """`reference.grad_values`, like `values` in shape and dtype; grad [T, N], x [T, I]."""
    groups, group, fan_in = values.shape
    tokens = len(x)
    if tokens == 0:
        return torch.zeros_like(values)
    blocks = blocks or grad_blocks(values, tokens)
    programs = groups * triton.cdiv(fan_in, blocks.inputs)
    # Few programs leave processors idle: the tokens are split, and the parts added in a fixed order.
    splits = max(1, min(2 * _processors(x.device) // programs, tokens // (4 * blocks.tokens), 8))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), blocks.tokens) * blocks.tokens
    splits = triton.cdiv(tokens, per_split)
    dtype = values.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, *values.shape), dtype=dtype, device=x.device)
    kernels.weight_gradient_kernel[(programs, splits)](
        grad, x, indices, out, tokens, per_split, fan_in, out[0].numel(), *grad.stride(), *x.stride(),
        V=group, BT=blocks.tokens, BK=blocks.inputs, STAGES=blocks.stages, NARROW=indices.itemsize == 2,
        WIDE=is_wide(grad, x), PRECISION=precision(x.dtype), num_warps=blocks.warps,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(values.dtype)


@on_its_device
def scores(grad: Tensor, x: Tensor, group: int) -> Tensor:
    """`reference.scores`, float32; grad [T, N], x [T, I] -> [G, I]."""
    tokens, inputs = x.shape
    groups = grad.shape[1] // group
    out = torch.zeros if tokens == 0 else torch.empty
    result: Tensor = out((groups, inputs), dtype=torch.float32, device=x.device)
    if tokens:
        block_n, block_t, block_k = (max(64, group), 32, 64) if x.itemsize == 4 else (128, 64, 128)
        grid = (triton.cdiv(groups * group, block_n) * triton.cdiv(inputs, block_k),)
        kernels.scores_kernel[grid](
            grad, x, result, tokens, groups, inputs, *grad.stride(), *x.stride(),
            V=group, BN=block_n, BT=block_t, BK=block_k, STAGES=3, WIDE=is_wide(grad, x),
            PRECISION=precision(x.dtype), num_warps=8,
        )  # fmt: skip
    return result


@on_its_device
def densify(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """The dense weight [N, I]."""
    groups, group, fan_in = values.shape
    dtype = torch.int16 if fan_in <= 2**15 else torch.int32
    places = torch.full((groups, in_features), -1, dtype=dtype, device=values.device)
    kernels.places_kernel[(groups, triton.cdiv(fan_in, 512))](
        indices, places, fan_in, in_features, BK=512, NARROW=indices.itemsize == 2
    )
    out = torch.empty((groups * group, in_features), dtype=values.dtype, device=values.device)
    kernels.densify_kernel[(groups * group // 8, triton.cdiv(in_features, 512))](
        values, places, out, fan_in, in_features, V=group, ROWS=8, BI=512
    )
    return out


def grad_input_dense(grad: Tensor, values: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """`reference.grad_input` into `out` [T, I], by one dense product with the re-densified weight."""
    weight_NI = densify(values, indices, out.shape[1])
    if out.stride(0) == 1:  # by feature
        torch.mm(weight_NI.mT, grad.mT, out=out.mT)
    else:
        torch.mm(grad, weight_NI, out=out)
    return out


@on_its_device
def grad_input_collected(grad: Tensor, values: Tensor, order: Tensor, starts: Tensor, out: Tensor) -> Tensor:
    """`reference.grad_input` into `out` [T, I], in two sparse steps: what each group sends to each of its inputs, then
    the sums by input. No atomics: the order of every sum is fixed. `order`, `starts` are from `layout.by_input`.

    What is sent is rounded to the dtype of `grad`. It takes G·K numbers per token, so tokens come in portions.
    """
    groups, group, fan_in = values.shape
    tokens, inputs = out.shape
    portion = max(128, PARTIAL_BYTES // (groups * fan_in * grad.itemsize) // 128 * 128)
    portion = min(portion, triton.cdiv(tokens, 16) * 16)
    partial = torch.empty((groups * fan_in, portion), dtype=grad.dtype, device=grad.device)
    wide = is_wide(grad, out)
    block_k, block_t = 64 if group <= 64 else 32, 64 if grad.itemsize == 4 else 128
    for first in range(0, tokens, portion):
        here = min(portion, tokens - first)
        kernels.partial_kernel[(groups * triton.cdiv(fan_in, block_k), triton.cdiv(here, block_t))](
            grad, values, partial, first, here, groups, fan_in, portion, *grad.stride(),
            V=group, BT=block_t, BK=block_k, WIDE=wide, PRECISION=precision(grad.dtype), num_warps=4,
        )  # fmt: skip
        tile = 128 if here >= 512 else 64  # enough programs for all processors
        kernels.collect_kernel[(triton.cdiv(inputs, 16), triton.cdiv(here, tile))](
            partial, order, starts, out, first, here, inputs, portion, *out.stride(), BI=16, BT=tile, WIDE=wide,
            num_warps=tile // 32,
        )  # fmt: skip
    return out


@on_its_device
def feature_major(x: Tensor, blocks: Blocks | None = None) -> Tensor:
    """A copy of x [T, I] whose memory is laid out by feature, padded with zeros to a multiple of 16 tokens."""
    tokens, inputs = x.shape
    out = activations(x, inputs, True)
    padded = out.stride(1)
    if out.numel():
        blocks = blocks or copy_blocks(x.dtype)
        grid = (triton.cdiv(padded, blocks.tokens) * triton.cdiv(inputs, blocks.inputs),)
        kernels.feature_major_kernel[grid](
            x, out, tokens, padded, inputs, *x.stride(), BT=blocks.tokens, BI=blocks.inputs, num_warps=blocks.warps
        )
    return out


def token_major(x: Tensor) -> Tensor:
    """A contiguous copy of x [T, I] that lies by feature: the way back, at the same speed."""
    copy = feature_major(x.mT).mT
    return copy if copy.is_contiguous() else copy.contiguous()
